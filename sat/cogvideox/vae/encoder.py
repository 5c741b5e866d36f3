"""Video to posterior moments: levels of residual blocks with a down-sampling after each but the last."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cogvideox.vae.blocks import NORM_EPS, Downsample, ResBlock
from cogvideox.vae.causal_conv import CausalConv3d, ConvCache


class EncoderLevel(nn.Module):
    """`num_blocks` residual blocks at one resolution, then `downsample` (None at the last level)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        norm_groups: int,
        downsample: Downsample | None,
    ):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResBlock(channels, out_channels, norm_groups) for channels in inputs)
        self.downsample = downsample


class Encoder(nn.Module):
    """(B, in_channels, F, H, W) in [-1, 1] -> moments (B, 2 * z_channels, T, H/s, W/s), mean then log variance.

    widths: channels of each level, finest first. The first `num_time_levels` down-samplings halve time as well.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        widths: list[int],
        num_res_blocks: int,
        z_channels: int,
        num_time_levels: int,
        norm_groups: int,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.conv_in = CausalConv3d(in_channels, widths[0])
        self.down = nn.ModuleList()
        for i, (width_in, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            is_last = i == len(widths) - 1
            downsample = None if is_last else Downsample(width, time=i < num_time_levels)
            self.down.append(EncoderLevel(width_in, width, num_res_blocks, norm_groups, downsample))
        self.mid = nn.ModuleDict(
            {f"block_{i}": ResBlock(widths[-1], widths[-1], norm_groups) for i in (1, 2)}
        )
        self.norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * z_channels)

    def forward(self, x: Tensor, cache: ConvCache | None = None) -> Tensor:
        """Encode a whole clip (no cache) or the clip's next chunk, whose predecessors have filled `cache`."""
        starts_clip = not cache
        h = self.conv_in(x, cache)
        for level in self.down:
            for block in level.block:
                h = self._run(block, h, cache)
            if level.downsample is not None:
                h = level.downsample(h, starts_clip)
        for block in self.mid.values():
            h = self._run(block, h, cache)
        return self.conv_out(F.silu(self.norm_out(h), inplace=True), cache)

    def _run(self, block: ResBlock, h: Tensor, cache: ConvCache | None) -> Tensor:
        # A recomputed block would read the cache of a later chunk: chunks are never checkpointed.
        if self.checkpoint_activations and cache is None:
            return checkpoint(block, h, use_reentrant=False)
        return block(h, cache=cache)
