"""Short names of optimizers, ``train.optimizer=muon``, and what each keeps in memory. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """What is known of an optimizer before it is built."""

    target: str
    state_bytes: float
    # Per trained parameter, the fp32 master weights not counted; of Muon's matrices where it has two kinds.
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    # Those of DeepSpeed under which it computes what it promises.
    block: int = 1
    # How many numbers share a scale in its low-bit states.


# torchao keeps one fp32 scale for 256 values (128 in four bits), of two moments.
KNOWN = {
    "adamw": Known("torch.optim.AdamW", 8),
    "sgd": Known("torch.optim.SGD", 4),  # with momentum
    "muon": Known("cogvideox.engine.muon.Muon", 4, (0, 1, 2)),
    "adamw_8bit": Known("torchao.optim.AdamW8bit", 2 + 8 / 256, block=256),
    "adamw_4bit": Known("torchao.optim.AdamW4bit", 1 + 8 / 128, block=128),
    "adamw_fp8": Known("torchao.optim.AdamWFp8", 2 + 8 / 256, block=256),
    "adamw_8bit_bnb": Known("bitsandbytes.optim.AdamW8bit", 2 + 8 / 256),
    "lion_8bit_bnb": Known("bitsandbytes.optim.Lion8bit", 1 + 4 / 256),
}

OPTIMIZERS = {name: known.target for name, known in KNOWN.items()}

_OTHERS = {"lion": 4.0}
"""By the end of an import path, in lower case; whatever is unknown counts as Adam's two fp32 moments."""


def known_optimizer(target: str) -> Known:
    """What is known of an import path: by the table, else by the class's name."""
    for known in KNOWN.values():
        if known.target == target:
            return known
    name = target.rpartition(".")[2].lower()
    same = [known for known in KNOWN.values() if known.target.rpartition(".")[2].lower() == name]
    if same:
        return same[0]
    return Known(target, _OTHERS.get(name, 8.0))


def check_installed(target: str) -> None:
    """Raise ValueError that says what to install for a library that is not there."""
    library = target.partition(".")[0]
    if library not in ("torchao", "bitsandbytes") or importlib.util.find_spec(library) is not None:
        return
    raise ValueError(
        f"train.optimizer.target={target} needs {library}, which is not installed: pip install {library}, or use "
        f"train.optimizer=adamw, which needs nothing"
    )


def check_zero(target: str, zero: Mapping[str, Any]) -> None:
    """Raise ValueError where an optimizer cannot work on what DeepSpeed hands it.

    zero: the section ``deepspeed.zero_optimization``; ZeRO-2 where it names no stage.
    """
    if target == "torch.optim.Muon":
        raise ValueError(
            "train.optimizer.target=torch.optim.Muon takes nothing but whole matrices: use train.optimizer=muon, which "
            "trains the rest by AdamW and works on what ZeRO 1 and 2 leave of them"
        )
    known, stage = known_optimizer(target), zero.get("stage", 2)
    if stage not in known.zero_stages:
        raise ValueError(
            f"train.optimizer.target={target} works on whole matrices, of which each rank holds a slice under "
            f"deepspeed.zero_optimization.stage={stage}: set it to {', '.join(map(str, known.zero_stages))}, or use "
            f"train.optimizer=adamw"
        )
    if 3 not in known.zero_stages:
        for key in ("offload_optimizer", "cpu_offload", "round_robin_gradients"):
            value = zero.get(key)
            if value and not (isinstance(value, Mapping) and value.get("device") == "none"):
                raise ValueError(
                    f"train.optimizer.target={target} does not work with deepspeed.zero_optimization.{key}: leave it "
                    f"out, or use train.optimizer=adamw"
                )
