"""What the encoder and the decoder are made of; everything here is `(B, C, T, H, W)`.

Time is halved and doubled in pairs of frames, except that a clip's first frame stands alone: 4k+1 frames become
k+1 latents. `starts_clip` says that frame 0 of the tensor at hand is that first frame; a later chunk has pairs only.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideox.vae.causal_conv import CausalConv3d, ConvCache, per_frame

NORM_EPS = 1e-6


def halve_frames(x: Tensor, starts_clip: bool) -> Tensor:
    """Average pairs of frames: 2n -> n, or 1 + 2n -> 1 + n at the start of a clip."""
    first = int(starts_clip)
    pairs = (x[:, :, first::2] + x[:, :, first + 1 :: 2]) / 2
    return torch.cat([x[:, :, :1], pairs], dim=2) if starts_clip else pairs


def double_frames(x: Tensor, starts_clip: bool) -> Tensor:
    """Show each frame twice: n -> 2n, or 1 + n -> 1 + 2n at the start of a clip."""
    frames = (
        torch.arange(int(starts_clip), 2 * x.shape[2], device=x.device) // 2
    )  # 0 1 1 2 2 ..., else 0 0 1 1 ...
    return x.index_select(2, frames)


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
        return modulate(self.norm_layer(x), self.conv_y(z), self.conv_b(z))

    def activate_in_place(self, x: Tensor, z: Tensor) -> Tensor:
        """`x` overwritten by silu(forward(x, z)): half of the groups at a time, so that two of it never exist."""
        scale, shift, norm = self.conv_y(z), self.conv_b(z), self.norm_layer
        width = norm.num_channels // norm.num_groups
        for first, end in itertools.pairwise(sorted({0, norm.num_groups // 2, norm.num_groups})):
            part = slice(first * width, end * width)
            h = F.group_norm(x[:, part], end - first, norm.weight[part], norm.bias[part], norm.eps)
            x[:, part] = F.silu(modulate(h, scale[:, part], shift[:, part]), inplace=True)
            del h
        return x


def modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """h * scale + shift, written into `h`, the fields enlarged by nearest neighbours.

    h: (B, C, T, s * H, s * W);  scale, shift: (B, C, T, H, W). Enlarged are only the rows of the fields; that all
    s rows of h above a row of the field use it is a broadcast. A field at full resolution is over a gigabyte.
    """
    s = h.shape[3] // scale.shape[3]
    rows = h.unflatten(3, (scale.shape[3], s))  # (B, C, T, H, s, s * W), a view
    rows *= scale.repeat_interleave(s, dim=4).unsqueeze(4)
    rows += shift.repeat_interleave(s, dim=4).unsqueeze(4)
    return h


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))  (B, C, T, H, W) -> (B, C', T, H, W).

    With `z_channels` the norms are conditioned on the latents (decoder): `forward` then takes them as `z`.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, z_channels: int | None = None):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if z_channels is None:
                return nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
            return SpatialNorm(channels, z_channels, norm_groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.changes_width = in_channels != out_channels
        if self.changes_width:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(
        self, x: Tensor | list[Tensor], z: Tensor | None = None, cache: ConvCache | None = None
    ) -> Tensor:
        """x: a tensor; or, where nothing is differentiated, a list of one that is handed over: it is taken out,
        overwritten and freed as soon as it can be."""
        if isinstance(x, list):
            return self._consume(x, z, cache)
        condition = () if z is None else (z,)
        h = self.conv1(F.silu(self.norm1(x, *condition), inplace=True), cache)
        h = self.conv2(F.silu(self.norm2(h, *condition), inplace=True), cache)
        h += self.nin_shortcut(x) if self.changes_width else x
        return h

    def _consume(self, held: list[Tensor], z: Tensor | None, cache: ConvCache | None) -> Tensor:
        x = held.pop()
        total = self.nin_shortcut(x) if self.changes_width else x
        if self.changes_width and z is not None:
            # The widest tensor of all enters the last level; the shortcut has been read from it, so it can go.
            h = self.norm1.activate_in_place(x, z)
        else:
            h = F.silu(self.norm1(x) if z is None else self.norm1(x, z), inplace=True)
        del x
        pieces = self.conv1.pieces(h, cache)
        del h
        h = torch.cat(pieces, dim=2)
        del pieces
        h = F.silu(self.norm2(h) if z is None else self.norm2(h, z), inplace=True)
        start = 0
        for piece in self.conv2.pieces(h, cache):
            total[:, :, start : start + piece.shape[2]] += piece
            start += piece.shape[2]
        return total


class Downsample(nn.Module):
    """Halve height and width, and with `time` the frames too."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor, starts_clip: bool) -> Tensor:
        if self.time:
            x = halve_frames(x, starts_clip)
        return per_frame(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)


class Upsample(nn.Module):
    """Double height and width, and with `time` the frames too."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, starts_clip: bool) -> Tensor:
        # The convolution works frame by frame: before the doubling it sees each frame once (upstream: after, twice).
        kernels = doubling_kernels(self.conv.weight)
        x = per_frame(lambda frame: convolve_doubled(frame, kernels, self.conv.bias), x)
        return double_frames(x, starts_clip) if self.time else x


def convolve_doubled(x: Tensor, kernels: list[Tensor], bias: Tensor) -> Tensor:
    """The 3x3 convolution of `x` at twice its size (nearest neighbours): (B, C, H, W) -> (B, C', 2H, 2W).

    Of each 2x2 output pixels every one sees only 2x2 different input pixels: four small convolutions of the small
    image at 4/9 of the multiplications  (Shi et al. 2016, arXiv:1609.05158, the other way round).
    """
    phases = [
        F.conv2d(F.pad(x, (1 - j, j, 1 - i, i)), kernel, bias)
        for (i, j), kernel in zip(itertools.product((0, 1), repeat=2), kernels, strict=True)
    ]
    return F.pixel_shuffle(torch.stack(phases, dim=2).flatten(1, 2), 2)


def doubling_kernels(weight: Tensor) -> list[Tensor]:
    """The kernels of `convolve_doubled`: (C', C, 3, 3) -> four of (C', C, 2, 2), for even and odd rows x columns.

    An even row sees the input row above and, with two taps, its own; an odd row its own and the one below.
    """

    def fold(w: Tensor, dim: int) -> list[Tensor]:
        a, b, c = w.unbind(dim)
        return [torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)]

    # Summed in float32: in bfloat16 each tap is then rounded once.
    return [kernel.to(weight.dtype) for rows in fold(weight.float(), 2) for kernel in fold(rows, 3)]
