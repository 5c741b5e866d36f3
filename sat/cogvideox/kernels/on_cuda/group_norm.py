"""Moments of pieces of frames, and scale, shift and SiLU: see kernels/group_norm.py.

A program has one piece of one frame of one channel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PIXELS = 2048
"""Of a program that scales: 8 per thread of eight warps."""


@triton.jit
def _plane_moments(
    x, means, squares, x_item, x_channel, x_frame, channels, frames, pixels, PIECE: tl.constexpr
):  # fmt: skip
    plane, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    item, channel, frame = plane // (channels * frames), plane // frames % channels, plane % frames
    pixel = piece * PIECE + tl.arange(0, PIECE)
    inside = pixel < pixels
    start = item * x_item + channel * x_channel + frame * x_frame
    value = tl.load(x + start + pixel, inside, 0.0).to(tl.float32)
    count = tl.minimum(pixels - piece * PIECE, PIECE)
    mean = tl.sum(value, 0) / count
    centred = tl.where(inside, value - mean, 0.0)
    place = plane * tl.num_programs(1) + piece
    tl.store(means + place, mean)
    tl.store(squares + place, tl.sum(centred * centred, 0))


@triton.jit
def _scaled_silu(
    x, factor, offset, scale, shift, out,
    x_item, x_channel, x_frame, out_item, out_channel, out_frame,
    channels, frames, pixels, width, rows, columns, field_width, field_pixels,
    PIXELS: tl.constexpr, HAS_FIELDS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    item, channel, frame = plane // (channels * frames), plane // frames % channels, plane % frames
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    value = tl.load(x + item * x_item + channel * x_channel + frame * x_frame + pixel, inside, 0.0)
    row = item * channels + channel
    value = value.to(tl.float32) * tl.load(factor + row) + tl.load(offset + row)
    if HAS_FIELDS:
        place = plane * field_pixels + pixel // width // rows * field_width + pixel % width // columns
        by = tl.load(scale + place, inside, 0.0).to(tl.float32)
        value = value * by + tl.load(shift + place, inside, 0.0).to(tl.float32)
    value = value * tl.sigmoid(value)
    tl.store(out + item * out_item + channel * out_channel + frame * out_frame + pixel, value, inside)


def plane_moments(x: Tensor, moments: Tensor, piece: int) -> None:
    """x: (B, C, T, H, W) with contiguous frames;  moments: (2, B, C, T, pieces), written."""
    batch, channels, frames, height, width = _frames_of(x)
    grid = (batch * channels * frames, moments.shape[-1])
    _plane_moments[grid](
        x, moments[0], moments[1], *x.stride()[:3], channels, frames, height * width, PIECE=piece, num_warps=8
    )


def scaled_silu(
    x: Tensor, factor: Tensor, offset: Tensor, scale: Tensor | None, shift: Tensor | None, out: Tensor
) -> None:
    """x, out: (B, C, T, H, W) with contiguous frames;  scale, shift: narrower by whole numbers, contiguous."""
    batch, channels, frames, height, width = _frames_of(x)
    _frames_of(out)
    has_fields = scale is not None
    field_height, field_width = scale.shape[3:] if has_fields else (1, 1)
    grid = (batch * channels * frames, triton.cdiv(height * width, PIXELS))
    _scaled_silu[grid](
        x, factor, offset, scale if has_fields else x, shift if has_fields else x, out,
        *x.stride()[:3], *out.stride()[:3], channels, frames, height * width, width,
        height // field_height, width // field_width, field_width, field_height * field_width,
        PIXELS=PIXELS, HAS_FIELDS=has_fields, num_warps=8,
    )  # fmt: skip


def _frames_of(x: Tensor) -> tuple[int, ...]:
    assert x.stride()[3:] == (x.shape[4], 1), f"frames of strides {x.stride()[3:]}: not contiguous"
    return tuple(x.shape)
