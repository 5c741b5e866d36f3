"""How the transformer's operations are executed: ``model.transformer.attention`` and ``model.transformer.compile``.

The same mathematics, in other orders of rounding. torch is not imported, so that the configuration can read it;
model/attention_backends.py and model/compiled_blocks.py do it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

AUTO = "auto"

ATTENTION = {
    AUTO: "on a GPU the fastest of the others within tolerance, by a probe at the start; torch's own choice elsewhere",
    "flash": "torch's FlashAttention-2",
    "cudnn": "cuDNN's, on GPUs since Ampere",
    "efficient": "torch's memory-efficient kernel; the fastest in float32",
    "math": "matrix products and a softmax: all scores at once, for comparisons of small clips",
    "fa3": "FlashAttention-3, for Hopper: the package flash_attn_interface, put in FlashAttention-2's place by torch",
    "fa4": "FlashAttention-4, for Hopper and Blackwell: the package flash_attn.cute",
}

COMPILE = {
    "none": "operation by operation",
    "blocks": "torch.compile of one transformer block, which all blocks use",
}


def check_attention(name: str) -> None:
    """Raises ValueError naming the key for a word that is not in ``ATTENTION``."""
    _check("attention", name, ATTENTION)


def check_compile(name: str) -> None:
    """Raises ValueError naming the key for a word that is not in ``COMPILE``."""
    _check("compile", name, COMPILE)


def _check(key: str, name: str, known: Iterable[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"model.transformer.{key}={name!r}: {hint}expected one of {', '.join(known)}")
