"""Which form of an operation runs where, and what the forms have in common."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger("cogvideox")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def compiler_fuses(x: Tensor) -> bool:
    """On a CPU the compiler makes one loop of a formula; an operator would stand in its way."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def has_kernel(x: Tensor) -> bool:
    """There is a Triton kernel for tensors like ``x``. Kernels compute in float32: none for float64."""
    if not x.is_cuda:
        return False
    if not HAS_TRITON:
        _say_that_triton_is_missing()
    return HAS_TRITON and x.dtype != torch.float64


@lru_cache
def _say_that_triton_is_missing() -> None:
    logger.warning(
        "Triton is not installed: norms, modulation, rotation and gates of the transformer run as plain PyTorch, which "
        "reads and writes about twice as much (pip install triton)"
    )


@torch.compiler.assume_constant_result  # a compiled graph would break here, also where the result is cached
def has_bf16_products() -> bool:
    """Whether torch multiplies bf16 matrices by instructions of this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def parts(tokens: Tensor, text_length: int) -> tuple[Tensor, Tensor]:
    """(B, S, ...) -> its video tokens, its text tokens: views, in the order of a pair of modulations."""
    return tokens[:, text_length:], tokens[:, :text_length]


def wide(x: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64."""
    return torch.promote_types(x.dtype, torch.float32)


def norm_parameter(parameter: Tensor, x: Tensor) -> Tensor:
    """The weight or bias of a layer norm of ``x``, such that torch's norm takes its statistics in ``wide(x)``."""
    # A CPU keeps the statistics in the parameters' dtype; CUDA takes none but that of x, and is in float32 anyway.
    return parameter.to(wide(x)) if x.device.type == "cpu" else parameter.to(x.dtype)


def tokens_like(x: Tensor) -> Tensor:
    """New and contiguous, whatever the strides of ``x`` are."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def sums_like(x: Tensor, pair: Tensor) -> Tensor:
    """Zeros for a sum over the tokens of each item and part: (B, 2, D)."""
    return torch.zeros((x.shape[0], pair.shape[1], x.shape[2]), dtype=wide(x), device=x.device)


def to_pair(sums: Tensor, pair: Tensor) -> Tensor:
    """Sums of each item as the gradient of ``pair``, which items may share."""
    return (sums.sum(dim=0, keepdim=True) if len(pair) < len(sums) else sums).to(pair.dtype)
