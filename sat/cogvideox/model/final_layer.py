"""Tokens in, latents out."""

from __future__ import annotations

from collections.abc import Iterator

from einops import rearrange
from sat.model.base_model import BaseMixin
from torch import Tensor, nn

from cogvideox.kernels.norm_modulate import norm_modulate
from cogvideox.model.adaln import zero_linear


class FinalLayer(BaseMixin):
    """Layer norm, modulation by the time embedding (DiT, Peebles & Xie 2023), projection, unpatchify.

    The tokens come out of ``transformer.final_layernorm`` already, so two layer norms follow each other, as published.
    """

    def __init__(
        self, hidden_size: int, time_embed_dim: int, patch_size: tuple[int, int, int], out_channels: int
    ):
        super().__init__()
        self.patch_size = patch_size
        frames, height, width = patch_size
        # 1e-6 here, 1e-5 in the trunk (diffusers has 1e-5 in both: 2e-5 apart at the output).
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, frames * height * width * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_linear(time_embed_dim, 2 * hidden_size))
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def external_parameters(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """As ``ExpertAdaLN.external_parameters``."""
        yield from ((self.transformer, parameter) for parameter in self.norm_final.parameters())

    def final_forward(
        self,
        hidden_states: Tensor,
        *,
        emb: Tensor,
        text_length: int,
        grid: tuple[int, int, int],
        final_modulation: Tensor | None = None,
        **_,
    ) -> Tensor:
        """hidden_states: (B, L + N, D); emb: (B or 1, E). Returns (B, T, out_channels, H, W).

        final_modulation: (B or 1, 2 D), what the linear layer makes of ``emb``, where it is known (modulation.py).
        """
        modulation = self.adaLN_modulation(emb) if final_modulation is None else final_modulation
        shift, scale = modulation[:, None].chunk(2, dim=-1)  # of the video alone: (B or 1, 1, D)
        video = norm_modulate(hidden_states[:, text_length:], self.norm_final, shift, scale, text_length=0)
        (frames, height, width), (_, rows, columns) = self.patch_size, grid
        pattern = "b (t h w) (c o p q) -> b (t o) c (h p) (w q)"
        return rearrange(self.linear(video), pattern, h=rows, w=columns, o=frames, p=height, q=width)
