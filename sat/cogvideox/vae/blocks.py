"""What the encoder and the decoder are made of; everything here is `(B, C, T, H, W)`.

Time is halved and doubled in pairs of frames, except that a clip's first frame stands alone: 4k+1 frames become
k+1 latents. `starts_clip` says that frame 0 of the tensor at hand is that first frame; a later chunk has pairs only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideox.vae.causal_conv import CausalConv3d, ConvCache, joined, per_frame
from cogvideox.vae.folded import DoublingConv2d
from cogvideox.vae.norms import NORM_EPS, SpatialNorm, activated


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
        self,
        x: Tensor | list[Tensor],
        z: Tensor | None = None,
        cache: ConvCache | None = None,
        doubled_start: bool | None = None,
    ) -> Tensor:
        """x: a tensor; or, where nothing is differentiated, a list of one that is handed over: it is taken out,
        overwritten and freed as soon as it can be.
        doubled_start: of such a list, what comes back is that of `double_frames(x)` and `double_frames(z)`, and this is
        their `starts_clip`. None: of x and z themselves."""
        if doubled_start is not None:
            return self._doubled(x, z, cache, doubled_start)
        if isinstance(x, list):
            return self._consume(x, z, cache)
        condition = () if z is None else (z,)
        h = self.conv1(F.silu(self.norm1(x, *condition), inplace=True), cache)
        h = self.conv2(F.silu(self.norm2(h, *condition), inplace=True), cache)
        h += self.nin_shortcut(x) if self.changes_width else x
        return h

    def _doubled(self, held: list[Tensor], z: Tensor, cache: ConvCache | None, starts_clip: bool) -> Tensor:
        """Doubled are the outputs of the first convolution and of the shortcut; before them a frame is taken once."""
        (x,) = held
        past = self.conv1.past(cache)
        past = None if past is None else past[:, :, -1:]  # the frame before, also shown twice
        h = activated(self.norm1, held, z, past, others_twice=starts_clip)
        total = double_frames(self.nin_shortcut(x) if self.changes_width else x, starts_clip)
        del x
        h = [self.conv1.doubled(h, cache, starts_clip)]
        return self._add_rest(total, h, double_frames(z, starts_clip), cache)

    def _consume(self, held: list[Tensor], z: Tensor | None, cache: ConvCache | None) -> Tensor:
        (x,) = held
        total = self.nin_shortcut(x) if self.changes_width else x
        del x
        if self.changes_width and z is not None:
            # The widest tensor of all enters the last level; the shortcut has been read from it, so it can go.
            h = activated(self.norm1, held, z, in_place=True)
            pieces = self.conv1.pieces(h, cache)
            del h
        else:
            pieces = self._convolved(self.norm1, self.conv1, held, z, cache)
        h = [joined(pieces)]
        del pieces
        return self._add_rest(total, h, z, cache)

    def _add_rest(
        self, total: Tensor, held: list[Tensor], z: Tensor | None, cache: ConvCache | None
    ) -> Tensor:
        """`total`, with the second half of the block added to it."""
        start = 0
        for piece in self._convolved(self.norm2, self.conv2, held, z, cache):
            total[:, :, start : start + piece.shape[2]] += piece
            start += piece.shape[2]
        return total

    def _convolved(
        self,
        norm: nn.Module,
        conv: CausalConv3d,
        held: list[Tensor],
        z: Tensor | None,
        cache: ConvCache | None,
    ) -> list[Tensor]:
        past = conv.past(cache)
        past_frames = 0 if past is None else past.shape[2]
        h = activated(norm, held, z, past)
        del past
        return conv.pieces_behind(h, past_frames, cache)


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
        self.conv = DoublingConv2d(channels, channels)

    def forward(self, x: Tensor, starts_clip: bool) -> Tensor:
        # The convolution works frame by frame: before the doubling it sees each frame once (upstream: after, twice).
        x = torch.stack([self.conv(frame) for frame in x.unbind(2)], dim=2)
        return double_frames(x, starts_clip) if self.time else x

    def consume(self, held: list[Tensor]) -> Tensor:
        """Without the doubling of time, and without gradients: takes `x` out of the list and frees it at the end."""
        x = held.pop()
        height, width = x.shape[3:]
        out = x.new_empty(*x.shape[:3], 2 * height, 2 * width)
        for t in range(x.shape[2]):
            self.conv(x[:, :, t], out[:, :, t])
        return out
