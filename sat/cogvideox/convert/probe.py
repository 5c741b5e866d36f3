"""The input of a verification, and this project's network for weights of which only names and shapes are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cogvideox.convert.diffusers_config import is_rotary
from cogvideox.model.adaln import ExpertAdaLN
from cogvideox.model.final_layer import FinalLayer
from cogvideox.model.patch_embed import PatchEmbed
from cogvideox.model.position import RotaryPosition3D, SincosPosition3D
from cogvideox.model.transformer import ExpertTransformer
from cogvideox.vae.autoencoder import CausalVAE
from cogvideox.weights.geometry import OPTIONAL_KEYS, TABLE_KEYS, Geometry

GRID, TEXT = (2, 3, 4), 16
"""Patches (t, h, w) and text tokens of the input, where no position table asks for others."""
NORM_GROUPS = 32
"""Of the published VAE: no shape tells."""


@dataclass(frozen=True)
class Probe:
    """An input of the transformer, and what shapes leave open."""

    rotary: bool
    learned_table: bool
    text_length: int
    num_frames: int
    latent_height: int
    latent_width: int
    temporal_compression: int
    # The four that decide the grid of a learned table.
    table_grid: tuple[int, int, int]
    grid: tuple[int, int, int]
    inputs: dict[str, Tensor]
    # x (1, T, in_channels, H, W), context (1, L, D), timesteps (1,), and ofs (1,) where the network has it


def probe_transformer(geometry: Geometry, names: set[str], config: Mapping[str, Any] | None) -> Probe:
    """names: the tensors of both sides, without prefix. config: diffusers' config.json of either side, if any.

    Raises ValueError where the sizes in config are not those of a learned table.
    """
    text, frames, height, width, compression = _sizes(geometry, config)
    pt, ph, pw = geometry.patch_size
    table_grid = (-(-((frames - 1) // compression + 1) // pt), height // ph, width // pw)
    if geometry.learned_table and text + math.prod(table_grid) != geometry.table_tokens:
        raise ValueError(
            f"the learned position table has {geometry.table_tokens} rows, but config.json says {text} text tokens and "
            f"{' x '.join(map(str, table_grid))} patches: correct max_text_seq_length, sample_frames, sample_height "
            f"or sample_width"
        )
    grid = tuple(map(min, GRID, table_grid)) if geometry.learned_table else GRID
    generator = torch.Generator().manual_seed(0)
    size = (1, grid[0] * pt, geometry.in_channels, grid[1] * ph, grid[2] * pw)
    inputs = {
        "x": torch.randn(size, generator=generator),
        "context": torch.randn((1, text, geometry.text_hidden_size), generator=generator),
        "timesteps": torch.tensor([537]),
    }
    if geometry.ofs_embed_dim:
        inputs["ofs"] = torch.tensor([2.0])
    rotary = _is_rotary(geometry, names, config)
    return Probe(
        rotary, geometry.learned_table, text, frames, height, width, compression, table_grid, grid, inputs
    )


def _sizes(geometry: Geometry, config: Mapping[str, Any] | None) -> tuple[int, int, int, int, int]:
    """Text tokens, frames, latent height and width, frames per latent."""
    if config is not None:
        # A table of diffusers is added to the whole sequence, so the text has to have its length.
        table = geometry.learned_table or not config.get("use_rotary_positional_embeddings", False)
        text = config.get("max_text_seq_length", 226) if table else TEXT
        keys = {"sample_frames": 49, "sample_height": 60, "sample_width": 90, "temporal_compression_ratio": 4}
        return text, *(config.get(key, default) for key, default in keys.items())
    if geometry.learned_table:
        # Any grid of so many rows will do: it is the same on both sides.
        text, (_, ph, pw) = min(TEXT, geometry.table_tokens - 1), geometry.patch_size
        return text, 1, ph, (geometry.table_tokens - text) * pw, 1
    return TEXT, 49, 60, 90, 4


def _is_rotary(geometry: Geometry, names: set[str], config: Mapping[str, Any] | None) -> bool:
    # Tensors and published sizes go before the flag in config.json, so that a wrong flag shows. Where nothing tells,
    # both sides are under SAT names, and any position will do that the width allows.
    head_dim = geometry.hidden_size // geometry.num_attention_heads
    known = {"use_rotary_positional_embeddings": head_dim % 16 == 0} | dict(config or {})
    has_rotary_keys = any(OPTIONAL_KEYS.fullmatch(name) for name in names)
    return is_rotary(geometry, known, has_rotary_keys, TABLE_KEYS[0] in names)


def build_transformer(geometry: Geometry, probe: Probe) -> ExpertTransformer:
    """On the meta device: nothing is allocated."""
    position = partial(SincosPosition3D, height_interpolation=1.875, width_interpolation=1.875)
    if probe.rotary:
        position = partial(RotaryPosition3D, learned_table=probe.learned_table)
    return ExpertTransformer(
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        num_attention_heads=geometry.num_attention_heads,
        in_channels=geometry.in_channels,
        out_channels=geometry.out_channels,
        time_embed_dim=geometry.time_embed_dim,
        ofs_embed_dim=geometry.ofs_embed_dim,
        patch_size=geometry.patch_size,
        text_length=probe.text_length,
        text_hidden_size=geometry.text_hidden_size,
        num_frames=probe.num_frames,
        latent_height=probe.latent_height,
        latent_width=probe.latent_width,
        temporal_compression=probe.temporal_compression,
        position=position,
        patch_embed=PatchEmbed,
        adaln=ExpertAdaLN,
        final_layer=FinalLayer,
        device="meta",
    )


def build_vae(geometry: Mapping[str, Any], config: Mapping[str, Any] | None) -> CausalVAE:
    """geometry: of ``vae_geometry``. On the meta device."""
    config = config or {}
    widths = [geometry["channels"] * multiplier for multiplier in geometry["channel_multipliers"]]
    with torch.device("meta"):
        return CausalVAE(
            **geometry,
            temporal_compression=config.get("temporal_compression_ratio", 4),
            # Of a narrower VAE the most that divide all widths, where no config.json says.
            norm_groups=config.get("norm_num_groups", math.gcd(NORM_GROUPS, *widths)),
        )


def vae_inputs(vae: CausalVAE) -> tuple[Tensor, Tensor]:
    """A video (1, F, C, H, W) of 3 latents and latents (1, 5, z, 2, 3), which are decoded in two chunks."""
    generator = torch.Generator().manual_seed(0)
    side = vae.spatial_compression
    video = torch.randn((1, vae.num_frames(3), vae.in_channels, 2 * side, 3 * side), generator=generator)
    return video.tanh(), torch.randn((1, 5, vae.z_channels, 2, 3), generator=generator)
