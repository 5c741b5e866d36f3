"""Latents and text features in, one joint token sequence out."""

from __future__ import annotations

import torch
from einops import rearrange
from sat.model.base_model import BaseMixin
from torch import Tensor, nn

from cogvideox.model.linear import Linear


class PatchEmbed(BaseMixin):
    """Cuts latents into patches of ``patch_size`` (t, h, w), projects patches and text to the width, text first.

    With a temporal patch of 1 the projection is a strided convolution per frame (CogVideoX 1.0), otherwise a linear
    layer on patches flattened as (c t h w) with the channel slowest (1.5): the published weights have these shapes.
    """

    def __init__(
        self, hidden_size: int, in_channels: int, patch_size: tuple[int, int, int], text_hidden_size: int
    ):
        super().__init__()
        self.patch_size = patch_size
        frames, height, width = patch_size
        if frames == 1:
            self.proj = nn.Conv2d(
                in_channels, hidden_size, kernel_size=(height, width), stride=(height, width)
            )
        else:
            self.proj = Linear(in_channels * frames * height * width, hidden_size)
        self.text_proj = Linear(text_hidden_size, hidden_size)
        # Every patch is one row of a matrix product, so Xavier's fans are those of the flattened weight.
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        nn.init.zeros_(self.proj.bias)

    def patchify(self, video: Tensor) -> Tensor:
        """video: (B, T, C, H, W) latents. Returns (B, N, D), N = T/pt * H/ph * W/pw, ordered (t h w)."""
        if isinstance(self.proj, nn.Conv2d):
            tokens = self.proj(rearrange(video, "b t c h w -> (b t) c h w"))
            return rearrange(tokens, "(b t) d h w -> b (t h w) d", b=video.shape[0])
        frames, height, width = self.patch_size
        pattern = "b (t o) c (h p) (w q) -> b (t h w) (c o p q)"
        return self.proj(rearrange(video, pattern, o=frames, p=height, q=width))

    def word_embedding_forward(
        self, video: Tensor, *, context: Tensor, text: Tensor | None = None, **_
    ) -> Tensor:
        """context: (B, L, text width). Returns (B, L + N, D), text first.

        text: (B, L, D), what the projection makes of ``context``, where it is known (text_projection.py).
        """
        text = self.text_proj(context) if text is None else text
        return torch.cat((text, self.patchify(video)), dim=1)


def pad_front(latents: Tensor, patch_t: int) -> Tensor:
    """Repeat the first latent in front until the temporal patch divides T: (B, T, C, H, W) -> (B, T', C, H, W).

    The one rule for training, image conditions and sampling (CogVideoX 1.5: 21 latents become 22).
    """
    missing = -latents.shape[1] % patch_t
    return torch.cat([latents[:, :1]] * missing + [latents], dim=1) if missing else latents
