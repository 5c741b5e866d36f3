"""Latents to video: levels of residual blocks with an up-sampling after each but the last (level 0, the finest)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cogvideox.vae.blocks import ResBlock, Upsample, double_frames
from cogvideox.vae.causal_conv import CausalConv3d, ConvCache, needs_graph
from cogvideox.vae.norms import SpatialNorm, activated


class DecoderLevel(nn.Module):
    """`num_blocks` residual blocks at one resolution, then `upsample` (None at level 0)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        norm_groups: int,
        z_channels: int,
        upsample: Upsample | None,
    ):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(
            ResBlock(channels, out_channels, norm_groups, z_channels) for channels in inputs
        )
        self.upsample = upsample


class Decoder(nn.Module):
    """(B, z_channels, T, H, W) -> video (B, out_channels, F, s * H, s * W); not clamped.

    widths: channels of each level, finest first, as in the encoder; the levels run from the last to the first, and the
    first `num_time_levels` up-samplings double time as well.
    """

    def __init__(
        self,
        *,
        out_channels: int,
        widths: list[int],
        num_res_blocks: int,
        z_channels: int,
        num_time_levels: int,
        norm_groups: int,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.conv_in = CausalConv3d(z_channels, widths[-1])
        self.mid = nn.ModuleDict(
            {f"block_{i}": ResBlock(widths[-1], widths[-1], norm_groups, z_channels) for i in (1, 2)}
        )
        self.up = nn.ModuleList()
        for i, (width, width_in) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            upsample = None if i == 0 else Upsample(width, time=i >= len(widths) - num_time_levels)
            self.up.append(
                DecoderLevel(width_in, width, num_res_blocks + 1, norm_groups, z_channels, upsample)
            )
        self.norm_out = SpatialNorm(widths[0], z_channels, norm_groups)
        self.conv_out = CausalConv3d(widths[0], out_channels)

    def forward(self, z: Tensor, cache: ConvCache | None = None) -> Tensor:
        """Decode a whole clip (no cache) or the clip's next chunk, whose predecessors have filled `cache`."""
        starts_clip = not cache
        if needs_graph(self, z, *(cache or {}).values()):
            return self._differentiable(z, cache, starts_clip)
        held = [self.conv_in(z, cache)]  # in a list, so that a block can free what it was given
        for block in self.mid.values():
            held = [block(held, z, cache)]
        doubles = False
        for level in reversed(self.up):
            for block in level.block:
                held = [block(held, z, cache, starts_clip if doubles else None)]
                if doubles:
                    z = double_frames(z, starts_clip)
                doubles = False
            if level.upsample is not None:
                held = [level.upsample.consume(held)]
                doubles = level.upsample.time
        return self.conv_out(activated(self.norm_out, held, z), cache)

    def _differentiable(self, z: Tensor, cache: ConvCache | None, starts_clip: bool) -> Tensor:
        x = self.conv_in(z, cache)
        for block in self.mid.values():
            x = self._run(block, x, z, cache)
        for level in reversed(self.up):
            for block in level.block:
                x = self._run(block, x, z, cache)
            if level.upsample is not None:
                x = level.upsample(x, starts_clip)
                if level.upsample.time:
                    # The norms' condition keeps pace in time; space stays coarse.
                    z = double_frames(z, starts_clip)
        return self.conv_out(F.silu(self.norm_out(x, z), inplace=True), cache)

    def _run(self, block: ResBlock, x: Tensor, z: Tensor, cache: ConvCache | None) -> Tensor:
        # A recomputed block would read the cache of a later chunk: chunks are never checkpointed.
        if self.checkpoint_activations and cache is None:
            return checkpoint(block, x, z, use_reentrant=False)
        return block(x, z, cache)
