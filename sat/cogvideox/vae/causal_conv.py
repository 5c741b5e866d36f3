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
from torch import Tensor, nn

ConvCache = dict[nn.Module, Tensor]
"""The last `kernel_size - 1` input frames of each causal convolution; empty before a clip's first chunk."""

# cuDNN's convolutions index with 32 bits; 49 frames of 480x720 at width 128 are more elements than that.
MAX_CONV_ELEMENTS = 2**31 - 1
# An input over that limit is cut into pieces this large: small, because a convolution copies a piece before it starts.
PIECE_ELEMENTS = 2**29


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
        pieces = self.pieces(x, cache)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def pieces(self, x: Tensor, cache: ConvCache | None = None) -> list[Tensor]:
        """The output as tensors that follow each other in time: the caller may free `x` before he joins them.

        Only the first `num_past_frames` outputs see the past. Convolving these apart spares a copy of all of `x` with
        the past in front.
        """
        k = self.num_past_frames
        if k == 0:
            return [self.conv(x)]
        past = cache.pop(self, None) if cache is not None else None
        if past is None:
            past = x[:, :, :1].expand(-1, -1, k, -1, -1)
        pieces = [self.conv(torch.cat([past, x[:, :, :k]], dim=2))]
        if cache is not None:
            # A slice alone would keep the whole chunk in memory.
            cache[self] = (
                x[:, :, -k:].clone() if x.shape[2] >= k else torch.cat([past[:, :, x.shape[2] :], x], 2)
            )
        del past
        return pieces + self._convolve(x)

    def _convolve(self, x: Tensor) -> list[Tensor]:
        """The outputs that see no frame before `x`, of which there are `num_past_frames` fewer than frames."""
        num_frames = x.shape[2] - self.num_past_frames
        if num_frames <= 0:
            return []
        if x.numel() <= MAX_CONV_ELEMENTS:
            return [self.conv(x)]
        frames_per_piece = max(1, PIECE_ELEMENTS // x[:, :, 0].numel() - self.num_past_frames)
        return [
            self.conv(x[:, :, start : min(start + frames_per_piece, num_frames) + self.num_past_frames])
            for start in range(0, num_frames, frames_per_piece)
        ]


def per_frame(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a 2D operation to each frame of (B, C, T, H, W), one after the other."""
    first = operation(x[:, :, 0])
    others = (operation(x[:, :, t]) for t in range(1, x.shape[2]))
    if first.requires_grad:
        return torch.stack([first, *others], dim=2)
    result = first.new_empty(*first.shape[:2], x.shape[2], *first.shape[2:])  # never two of the whole result
    result[:, :, 0] = first
    for t, frame in enumerate(others, 1):
        result[:, :, t] = frame
    return result


def needs_graph(network: nn.Module, *inputs: Tensor) -> bool:
    """Whether a pass will be differentiated; if not, tensors may be overwritten and freed on the way."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *network.parameters()))
