"""Convolution in 2D or 3D, also in bfloat16 on CPUs that have no instructions for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideox.kernels.forms import has_bf16_products


def convolve(x: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int]) -> Tensor:
    """F.conv2d of (B, C, H, W) or F.conv3d of (B, C, T, H, W), with stride 1.

    Without gradients, on a CPU that has no bf16 instructions, bf16 is convolved in float32 and rounded once: torch's
    own bf16 convolution takes 12 times as long there.
    """
    convolution = F.conv3d if x.ndim == 5 else F.conv2d
    if not _is_slow(x):
        return convolution(x, weight, bias, padding=tuple(padding))
    operands = (t.float() for t in (x, weight, bias))
    return convolution(*operands, padding=tuple(padding)).to(x.dtype)


def _is_slow(x: Tensor) -> bool:
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return not has_bf16_products()
