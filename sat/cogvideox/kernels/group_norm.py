"""Group norm, modulation and SiLU of video (B, C, T, H, W), where nothing is differentiated: two operators.

    plane_moments    mean and squared deviations of pieces of each frame's channel         1 pass over the video
    scaled_silu      silu((x factor + offset) scale + shift), the norm being the factor      2 passes

Triton on CUDA (on_cuda/group_norm.py); elsewhere `vae/norms.py` does the same with torch's operations, in 6. On the
meta device the operators have their shapes, so that what is counted there is what happens on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvideox.kernels.forms import has_kernel

PIECE = 4096
"""Pixels whose moments are taken together; a multiple of the warp."""


def is_fused(x: Tensor) -> bool:
    """Whether `x` lies where the kernels are."""
    return x.is_meta or (x.is_cuda and has_kernel(x))


def silu_of_group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    fields: tuple[Tensor, Tensor] | None,
    out: Tensor,
    others_twice: bool = False,
) -> Tensor:
    """silu(GN(x) scale + shift) into `out`, which may be `x`; both with contiguous frames.

    fields: scale and shift, each (B, C, T, H / s, W / s), enlarged by nearest neighbours; None: 1 and 0.
    others_twice: the statistics count the frames after the first twice.
    """
    mean, variance = _group_moments(x, norm.num_groups, others_twice)  # (B, C)
    factor = norm.weight.float() * torch.rsqrt(variance + norm.eps)
    offset = norm.bias.float() - mean * factor
    scale, shift = (None, None) if fields is None else (field.contiguous() for field in fields)
    torch.ops.cogvideox.scaled_silu(x, factor, offset, scale, shift, out)
    return out


def _group_moments(x: Tensor, groups: int, others_twice: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of the group of each channel: (B, C), float32."""
    batch, channels, frames, height, width = x.shape
    means, squares = torch.ops.cogvideox.plane_moments(x).unbind(0)  # (B, C, T, pieces)
    counts = torch.full((frames, means.shape[-1]), float(PIECE), device=x.device)
    counts[:, -1] = height * width - (means.shape[-1] - 1) * PIECE
    weights = torch.ones(frames, 1, device=x.device)
    if others_twice:
        weights[1:] = 2.0
    counted = weights * counts
    total = channels // groups * counted.sum()
    means, squares = (t.unflatten(1, (groups, -1)) for t in (means, squares))
    # Chan et al. 1983: squared deviations of the pieces about their own means, and of these about the whole's.
    mean = (means * counted).sum(dim=(2, 3, 4)) / total
    apart = (means - mean[:, :, None, None, None]).square() * counted
    variance = (squares * weights + apart).sum(dim=(2, 3, 4)) / total
    return tuple(t.repeat_interleave(channels // groups, 1) for t in (mean, variance))


@torch.library.custom_op("cogvideox::plane_moments", mutates_args=(), schema="(Tensor x) -> Tensor")
def plane_moments(x):
    """Of every piece of PIECE pixels of each frame: (2, B, C, T, pieces), float32: mean, sum of squared deviations."""
    from cogvideox.kernels.on_cuda import group_norm as on_cuda

    moments = _moments_like(x)
    on_cuda.plane_moments(x, moments, PIECE)
    return moments


@torch.library.custom_op(
    "cogvideox::scaled_silu",
    mutates_args=("out",),
    schema="(Tensor x, Tensor factor, Tensor offset, Tensor? scale, Tensor? shift, Tensor(a!) out) -> ()",
)
def scaled_silu(x, factor, offset, scale, shift, out):
    """Into `out`.  factor, offset: (B, C), float32;  scale, shift: (B, C, T, H / a, W / b), contiguous, or None."""
    from cogvideox.kernels.on_cuda import group_norm as on_cuda

    on_cuda.scaled_silu(x, factor, offset, scale, shift, out)


@plane_moments.register_fake
def _(x):
    return _moments_like(x)


@scaled_silu.register_fake
def _(x, factor, offset, scale, shift, out):
    return None


def _moments_like(x: Tensor) -> Tensor:
    pieces = -(-x.shape[3] * x.shape[4] // PIECE)
    return torch.empty((2, *x.shape[:3], pieces), dtype=torch.float32, device=x.device)
