"""Convolution over video, `(B, C, T, H, W)`: causal in time, or frame by frame.

A clip may pass through a network in consecutive chunks. Each causal convolution then needs the last frames of what
it saw before; they travel in a `ConvCache` that the caller creates for one clip and hands to every chunk:

    cache: ConvCache = {}
    chunks = [network(chunk, cache) for chunk in x.split(4, dim=2)]

The modules themselves hold no state, so an interrupted pass leaves nothing behind. Without a cache (`None`) the input
is a whole clip.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

ConvCache = dict[nn.Module, Tensor]
"""The last `kernel_size - 1` input frames of each causal convolution; empty before a clip's first chunk."""

# cuDNN's convolutions index with 32 bits; 49 frames of 480x720 at width 128 are more elements than that.
MAX_CONV_ELEMENTS = 2**31 - 1


class CausalConv3d(nn.Module):
    """Convolution whose output frame t sees the input frames up to t: (B, C, T, H, W) -> (B, C', T, H, W).

    Before the first frame of a clip stand copies of it; height and width are padded with zeros. The kernel is
    `kernel_size` in all three directions, the stride one.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__()
        self.num_past_frames = kernel_size - 1
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, padding=(0, kernel_size // 2, kernel_size // 2)
        )

    def forward(self, x: Tensor, cache: ConvCache | None = None) -> Tensor:
        if self.num_past_frames == 0:
            return self.conv(x)
        past = cache.get(self) if cache else None
        if past is None:
            past = x[:, :, :1].expand(-1, -1, self.num_past_frames, -1, -1)
        x = torch.cat([past, x], dim=2)
        if cache is not None:
            # A slice alone would keep the whole chunk in memory.
            cache[self] = x[:, :, -self.num_past_frames :].clone()
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        if x.numel() <= MAX_CONV_ELEMENTS:
            return self.conv(x)
        frames_per_piece = max(1, MAX_CONV_ELEMENTS // x[:, :, 0].numel() - self.num_past_frames)
        num_frames = x.shape[2] - self.num_past_frames
        pieces = [
            self.conv(x[:, :, start : min(start + frames_per_piece, num_frames) + self.num_past_frames])
            for start in range(0, num_frames, frames_per_piece)
        ]
        return torch.cat(pieces, dim=2)


def per_frame(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a 2D operation to each frame of (B, C, T, H, W)."""
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    return rearrange(operation(frames), "(b t) c h w -> b c t h w", b=x.shape[0]).contiguous()
