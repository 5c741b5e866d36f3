"""Convolution by the fastest of torch's implementations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], stride: Sequence[int] = (1, 1)
) -> Tensor:
    """F.conv2d or F.conv3d of (B, C, ...), the stride that of height and width; on a CPU by oneDNN whatever the size.

    torch asks oneDNN only where B * C * T * H (2D: B * C * H * W) is over 20480; its own convolution takes 2 to 6
    times as long. In bfloat16, on a CPU without AVX-512, it never asks: without gradients the product is then made in
    float32 and rounded once, as oneDNN would. 1x1 kernels are matrix products, which torch has in good order.
    """
    is_3d = x.ndim == 5
    steps = (1, *stride) if is_3d else tuple(stride)
    if _takes_onednn(x, weight):
        operands = [None if t is None else t.float() for t in (x, weight, bias)]
        ones = (1,) * (x.ndim - 2)
        return torch.mkldnn_convolution(*operands, tuple(padding), steps, ones, 1).to(x.dtype)
    return (F.conv3d if is_3d else F.conv2d)(x, weight, bias, steps, tuple(padding))


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or weight.shape[-2:] == (1, 1) or not _has_onednn():
        return False
    if x.dtype == torch.bfloat16:
        return not torch.is_grad_enabled() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32 == weight.dtype


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
