"""Normalise, modulate, SiLU: what stands before every convolution of a residual block.

    silu(GN(x) * y(z) + b(z))        z: the latents, in the decoder only

`activated` does all of it where nothing is differentiated, and writes what the convolution reads: the frames before the
chunk first. On CUDA by kernels, in three passes over `x`; elsewhere in as few as torch's operations allow.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideox.kernels.group_norm import is_fused, silu_of_group_norm
from cogvideox.vae.causal_conv import CausalConv3d

NORM_EPS = 1e-6


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift are read from the latents at each place: GN(x) * y(z) + b(z)  (MoVQ, eq. 5,
    arXiv:2209.09002).

    x: (B, C, T, H, W);  z: (B, z_channels, T, H/s, W/s), latents that have been given as many frames as x.
    """

    def __init__(self, channels: int, z_channels: int, norm_groups: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.conv_y = CausalConv3d(z_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(z_channels, channels, kernel_size=1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        # A 1x1x1 convolution commutes with nearest-neighbour enlargement; upstream enlarges first, at s * s times the
        # work.
        h = self.norm_layer(x)
        rows, scale, shift = aligned(h, self.conv_y(z), self.conv_b(z))
        rows *= scale
        rows += shift
        return h


def aligned(h: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views that broadcast: `h` (B, C, T, H, s, s * W), and its fields enlarged by nearest neighbours.

    h: (B, C, T, s * H, s * W);  scale, shift: (B, C, T, H, W). Enlarged are only the rows of the fields; that all
    s rows of h above a row of the field use it is a broadcast. A field at full resolution is over a gigabyte.
    """
    s = h.shape[3] // scale.shape[3]
    rows = h.unflatten(3, (scale.shape[3], s))
    return rows, *(field.repeat_interleave(s, dim=4).unsqueeze(4) for field in (scale, shift))


def activated(
    norm: nn.Module,
    held: list[Tensor],
    z: Tensor | None,
    past: Tensor | None = None,
    *,
    in_place: bool = False,
    others_twice: bool = False,
) -> Tensor:
    """silu(norm(x)) behind the frames `past`: (B, C, T, H, W) -> (B, C, P + T, H, W). Nothing is differentiated.

    norm: nn.GroupNorm, or SpatialNorm at `z`.  held: x, taken out of the list and freed as soon as it can be.
    in_place: x is overwritten, half of the groups at a time, so that two of it never exist; without `past`.
    others_twice: the statistics count each frame but the first twice: those of `double_frames(x)` where a clip starts.
    """
    x = held.pop()
    shape, past_frames = x.shape, 0 if past is None else past.shape[2]
    fields = None if z is None else (norm.conv_y(z), norm.conv_b(z))
    group_norm = norm if z is None else norm.norm_layer
    if is_fused(x):
        buffer = x if in_place else x.new_empty(*shape[:2], past_frames + shape[2], *shape[3:])
        if past is not None:
            buffer[:, :, :past_frames] = past
        silu_of_group_norm(x, group_norm, fields, buffer[:, :, past_frames:], others_twice)
        return buffer
    if in_place:
        middle = group_norm.num_groups // 2
        for first, end in itertools.pairwise(sorted({0, middle, group_norm.num_groups})):
            part = slice(
                first * x.shape[1] // group_norm.num_groups, end * x.shape[1] // group_norm.num_groups
            )
            h = _group_norm(group_norm, x[:, part], slice(first, end))
            _activate(h, fields and tuple(field[:, part] for field in fields), out=x[:, part])
            del h
        return x
    if others_twice and shape[2] > 1:
        # Each frame twice and the first once, and one of the two taken again.
        h = _group_norm(group_norm, torch.cat([x, x[:, :, 1:]], dim=2))[:, :, : shape[2]]
    else:
        h = _group_norm(group_norm, x)
    del x
    if past is None:
        return _activate(h, fields, out=h)
    buffer = h.new_empty(*shape[:2], past_frames + shape[2], *shape[3:])
    buffer[:, :, :past_frames] = past
    _activate(h, fields, out=buffer[:, :, past_frames:])
    return buffer


def _group_norm(norm: nn.GroupNorm, x: Tensor, groups: slice = slice(None)) -> Tensor:
    """Of some of the groups, whose channels are `x`."""
    count = len(range(norm.num_groups)[groups])
    width = norm.num_channels // norm.num_groups
    first = (groups.start or 0) * width
    weight, bias = (p[first : first + count * width] for p in (norm.weight, norm.bias))
    return F.group_norm(x, count, weight, bias, norm.eps)


def _activate(h: Tensor, fields: tuple[Tensor, Tensor] | None, out: Tensor) -> Tensor:
    """silu(h * scale + shift), or silu(h), into `out`, which may be `h`."""
    if fields is not None:
        rows, scale, shift = aligned(h, *fields)
        torch.addcmul(shift, rows, scale, out=out.unflatten(3, rows.shape[3:5]))
        return F.silu(out, inplace=True)
    return F.silu(h, inplace=True) if out is h else torch.ops.aten.silu.out(h, out=out)
