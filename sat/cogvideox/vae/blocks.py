"""What the encoder and the decoder are made of; everything here is `(B, C, T, H, W)`.

Time is halved and doubled in pairs of frames, except that a clip's first frame stands alone: 4k+1 frames become
k+1 latents. `starts_clip` says that frame 0 of the tensor at hand is that first frame; a later chunk has pairs only.
"""

from __future__ import annotations

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
        # work. In place, because at full resolution each of these tensors is over a gigabyte.
        h = self.norm_layer(x)
        h *= F.interpolate(self.conv_y(z), size=x.shape[2:])
        h += F.interpolate(self.conv_b(z), size=x.shape[2:])
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
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, z: Tensor | None = None, cache: ConvCache | None = None) -> Tensor:
        condition = () if z is None else (z,)
        h = self.conv1(F.silu(self.norm1(x, *condition), inplace=True), cache)
        h = self.conv2(F.silu(self.norm2(h, *condition), inplace=True), cache)
        h += x if h.shape[1] == x.shape[1] else self.nin_shortcut(x)
        return h


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
        x = per_frame(lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)), x)
        return double_frames(x, starts_clip) if self.time else x
