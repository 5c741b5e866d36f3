"""Convolution over video, `(B, C, T, H, W)`: causal in time, or frame by frame.

A clip may pass through a network in consecutive chunks. Each causal convolution then needs the last frames of what
it saw before; they travel in a `ConvCache` that the caller creates for one clip and hands to every chunk:

    cache: ConvCache = {}
    chunks = [network(chunk, cache) for chunk in x.split(4, dim=2)]

The modules themselves hold no state, so an interrupted pass leaves nothing behind. Without a cache (`None`) the input
is a whole clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cogvideox.vae.folded import PAIRS, Taps, TimeFoldedConv3d, after_copies

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
        self.conv = TimeFoldedConv3d(
            in_channels, out_channels, kernel_size, padding=(0, kernel_size // 2, kernel_size // 2)
        )

    def forward(self, x: Tensor, cache: ConvCache | None = None) -> Tensor:
        return joined(self.pieces(x, cache))

    def past(self, cache: ConvCache | None) -> Tensor | None:
        """The frames before the next chunk, (B, C, num_past_frames, H, W), out of the cache; None: a clip starts."""
        return None if cache is None else cache.pop(self, None)

    def pieces(self, x: Tensor, cache: ConvCache | None) -> list[Tensor]:
        """The output as tensors that follow each other in time: the caller may free `x` before he joins them.

        Only the first `num_past_frames` outputs see the past, or the copies of a clip's first frame. Convolving these
        apart spares a copy of all of `x` with the past in front, and products with the copies.
        """
        k = self.num_past_frames
        if k == 0:
            return [self.conv(x)]
        past = self.past(cache)
        if past is None:
            starts = range(min(k, x.shape[2]))
            first = [self.conv(x[:, :, : frame + 1], [after_copies(k + 1, frame)]) for frame in starts]
        else:
            first = [self.conv(torch.cat([past, x[:, :, :k]], dim=2))]
        if cache is not None:
            self._remember(x, past, cache)
        del past
        return first + self._convolve(x, k)

    def pieces_behind(self, x: Tensor, past_frames: int, cache: ConvCache | None) -> list[Tensor]:
        """`pieces` where `x` itself begins with `past_frames` of the past: all of them, or none where a clip starts."""
        if past_frames == 0:
            return self.pieces(x, cache)
        if cache is not None:
            self._remember(x, None, cache)
        return self._convolve(x, past_frames)

    def doubled(self, x: Tensor, cache: ConvCache | None, starts_clip: bool) -> Tensor:
        """The output for `double_frames(x)`, at two thirds of its products.

        x: (B, C, n, H, W).  starts_clip: the first frame stands alone, (B, C', 2n - 1, H, W) comes back; if not, `x`
        begins with the frame before, which gives no output, (B, C', 2n - 2, H, W).  Nothing is differentiated.
        """
        if cache is not None:
            cache[self] = x[:, :, -1:].clone().expand(-1, -1, self.num_past_frames, -1, -1)
        first = int(starts_clip)
        num_pairs = x.shape[2] - 1
        out = x.new_empty(x.shape[0], self.conv.out_channels, first + 2 * num_pairs, *x.shape[3:])
        if starts_clip:
            out[:, :, :1] = self.conv(x[:, :, :1], [after_copies(self.num_past_frames + 1, 0)])
        start = 0
        for piece in self._convolve(x, 1, PAIRS):
            end = start + piece.shape[2]
            pairs = out[:, :, first + 2 * start : first + 2 * end].unflatten(2, (end - start, 2))
            pairs.copy_(piece.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5))
            start = end
        return out

    def _remember(self, x: Tensor, past: Tensor | None, cache: ConvCache) -> None:
        k, num_frames = self.num_past_frames, x.shape[2]
        if num_frames >= k:
            cache[self] = x[:, :, -k:].clone()  # a slice alone would keep the whole chunk in memory
            return
        before = (
            x[:, :, :1].expand(-1, -1, k - num_frames, -1, -1) if past is None else past[:, :, num_frames:]
        )
        cache[self] = torch.cat([before, x], dim=2)

    def _convolve(self, x: Tensor, past: int, kernels: Sequence[Taps] = ()) -> list[Tensor]:
        """The outputs that see no frame before `x`, of which there are `past` fewer than frames."""
        num_frames = x.shape[2] - past
        if num_frames <= 0:
            return []
        if x.numel() <= MAX_CONV_ELEMENTS:
            return [self.conv(x, kernels)]
        frames_per_piece = max(1, PIECE_ELEMENTS // x[:, :, 0].numel() - past)
        return [
            self.conv(x[:, :, start : min(start + frames_per_piece, num_frames) + past], kernels)
            for start in range(0, num_frames, frames_per_piece)
        ]


def joined(pieces: list[Tensor]) -> Tensor:
    """Tensors that follow each other in time as one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


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
