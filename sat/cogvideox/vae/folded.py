"""Convolutions of what is shown several times, at the cost of showing it once: taps that meet the same input are added.

    a x + b x + c y = (a + b) x + c y

Three repetitions occur in the VAE: before a clip's first frame stand copies of it, time is doubled frame by frame, and
space is doubled by nearest neighbours. The sums are those of the plain convolution in another order; in bfloat16 a
summed tap is rounded once more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideox.vae.convolution import convolve

Taps = Sequence[Sequence[int]]
"""Of a kernel in one direction: the taps that are added to give each tap of the folded one."""

PAIRS: tuple[Taps, Taps] = (((0, 1), (2,)), ((0,), (1, 2)))
"""A kernel of three on p p c c: the output at the first c is (w0 + w1) p + w2 c, at the second w0 p + (w1 + w2) c."""


def after_copies(kernel_size: int, frame: int) -> Taps:
    """Taps for output `frame` of a clip whose frame 0 stands at all earlier times too; frame < kernel_size - 1.

    The folded kernel covers frames 0 ... frame.
    """
    apart = kernel_size - frame
    return (tuple(range(apart)), *((tap,) for tap in range(apart, kernel_size)))


def fold(weight: Tensor, dim: int, taps: Taps) -> Tensor:
    """(..., k, ...) -> (..., len(taps), ...) along `dim`. Added in float32 or better: each tap is rounded once."""
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # Sums of slices: three times as fast as a reduction over two or three elements that lie apart.
    return torch.cat([sum_of([precise.narrow(dim, tap, 1) for tap in group]) for group in taps], dim)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


class TimeFoldedConv3d(nn.Conv3d):
    """nn.Conv3d that can be applied with its taps in time folded.

    forward(x, kernels): the outputs of each of `kernels`, one after the other in the channels:
    (B, len(kernels) * C', T, H, W) with T = frames - taps + 1.
    """

    def forward(self, x: Tensor, kernels: Sequence[Taps] = ()) -> Tensor:
        if not kernels:
            return convolve(x, self.weight, self.bias, self.padding)
        weight = torch.cat([fold(self.weight, 2, taps) for taps in kernels]).to(self.weight.dtype)
        return convolve(x, weight, self.bias.repeat(len(kernels)), self.padding)


class DoublingConv2d(nn.Conv2d):
    """The 3x3 convolution of an image at twice its size (nearest neighbours): (B, C, H, W) -> (B, C', 2H, 2W).

    Of each 2x2 output pixels every one sees only 2x2 different input pixels: four small convolutions of the small
    image at 4/9 of the multiplications  (Shi et al. 2016, arXiv:1609.05158, the other way round).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """out: where the result is to be written; not where it is differentiated."""
        # An odd row or column sees its own pixel and the next, an even one the one before and its own: at each pixel
        # the kernels of the four lie one place apart, so one padded convolution gives all of them.
        rows = [fold(self.weight, 2, taps) for taps in reversed(PAIRS)]
        kernels = torch.cat([fold(row, 3, taps) for row in rows for taps in reversed(PAIRS)])
        phases = convolve(x, kernels.to(self.weight.dtype), self.bias.repeat(4), self.padding)
        phases = phases.unflatten(1, (2, 2, -1))  # (B, 2, 2, C', H + 1, W + 1)
        height, width = x.shape[2:]
        places = [(i, j, phases[:, i, j, :, i : i + height, j : j + width]) for i in (0, 1) for j in (0, 1)]
        if out is None:
            stacked = torch.stack([phase for *_, phase in places], dim=2)
            return F.pixel_shuffle(stacked.flatten(1, 2), 2)
        for i, j, phase in places:
            out[:, :, i::2, j::2] = phase
        return out
