"""Video to posterior moments: levels of residual blocks with a down-sampling after each but the last."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cogvideox.vae.blocks import Downsample, ResBlock
from cogvideox.vae.causal_conv import CausalConv3d, ConvCache, needs_graph
from cogvideox.vae.norms import NORM_EPS


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
        differentiated = needs_graph(self, x, *(cache or {}).values())
        held = [self.conv_in(x, cache)]  # in a list, so that a block can free what it was given
        for level in self.down:
            for block in level.block:
                held = [self._run(block, held, cache, differentiated)]
            if level.downsample is not None:
                held = [level.downsample(held.pop(), starts_clip)]
        for block in self.mid.values():
            held = [self._run(block, held, cache, differentiated)]
        return self.conv_out(F.silu(self.norm_out(held.pop()), inplace=True), cache)

    def _run(
        self, block: ResBlock, held: list[Tensor], cache: ConvCache | None, differentiated: bool
    ) -> Tensor:
        if not differentiated:
            return block(held, cache=cache)
        # A recomputed block would read the cache of a later chunk: chunks are never checkpointed.
        if self.checkpoint_activations and cache is None:
            return checkpoint(block, held.pop(), use_reentrant=False)
        return block(held.pop(), cache=cache)
