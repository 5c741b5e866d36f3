"""Small transformers of the five published kinds, and the same network in diffusers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cogvideox.model.adaln import ExpertAdaLN
from cogvideox.model.final_layer import FinalLayer
from cogvideox.model.patch_embed import PatchEmbed
from cogvideox.model.position import RotaryPosition3D, SincosPosition3D
from cogvideox.model.transformer import ExpertTransformer
from scripts.benchmark.twins import randomise, run_twin
from scripts.benchmark.twins import transformer_twin as diffusers_twin

__all__ = ["KINDS", "diffusers_twin", "full", "inputs", "randomise", "run_twin", "tiny"]

MIXINS = {"patch_embed": PatchEmbed, "adaln": ExpertAdaLN, "final_layer": FinalLayer}
SINCOS = partial(SincosPosition3D, height_interpolation=1.875, width_interpolation=1.875)
LEARNED = partial(RotaryPosition3D, learned_table=True)

# What tells the five models apart; every other argument is `tiny`'s or `full`'s.
KINDS = {
    "2b": {"position": SINCOS},
    "5b": {"position": RotaryPosition3D},
    "5b_i2v": {"position": LEARNED, "image": True},
    "1.5": {"position": RotaryPosition3D, "patch_size": (2, 2, 2)},
    "1.5_i2v": {"position": RotaryPosition3D, "patch_size": (2, 2, 2), "image": True, "ofs": True},
}


def tiny(kind: str, **changes) -> ExpertTransformer:
    """48 wide, 3 heads, 2 layers, on a grid of 3 x 4 x 6 patches (1.5: 2 x 4 x 6)."""
    return _network(
        kind,
        {
            "num_layers": 2,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "out_channels": 4,
            "time_embed_dim": 20,
            "text_length": 5,
            "text_hidden_size": 12,
            "num_frames": 9,
            "latent_height": 8,
            "latent_width": 12,
        },
        changes,
    )


def full(kind: str, **changes) -> ExpertTransformer:
    """The published size on the meta device."""
    new = kind.startswith("1.5")
    return _network(
        kind,
        {
            "num_layers": 30 if kind == "2b" else 42,
            "hidden_size": 1920 if kind == "2b" else 3072,
            "num_attention_heads": 30 if kind == "2b" else 48,
            "out_channels": 16,
            "time_embed_dim": 512,
            "text_length": 224 if new else 226,
            "text_hidden_size": 4096,
            "num_frames": 81 if new else 49,
            "latent_height": 300 if new else 60,
            "latent_width": 300 if new else 90,
            "device": "meta",
        },
        changes,
    )


def _network(kind: str, arguments: dict, changes: dict) -> ExpertTransformer:
    special = dict(KINDS[kind])
    channels = arguments["out_channels"]
    arguments |= {
        "in_channels": channels * (2 if special.pop("image", False) else 1),
        "patch_size": (1, 2, 2),
        "ofs_embed_dim": arguments["time_embed_dim"] if special.pop("ofs", False) else None,
    }
    return ExpertTransformer(**(MIXINS | arguments | special | changes))


def inputs(
    net: ExpertTransformer,
    frames: int = 0,
    height: int = 0,
    width: int = 0,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Keyword arguments of ``net``; 0 is the configured size (for 1.5 with one latent in front)."""
    g = net.geometry
    frames = frames or g["grid"][0] * g["patch_size"][0]
    height, width = height or g["latent_height"], width or g["latent_width"]
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    result = {
        "x": randn(batch, frames, net.out_channels, height, width),
        "timesteps": torch.tensor([999, 17, 0, 500])[:batch],
        "context": randn(batch, g["text_length"], g["text_hidden_size"]),
    }
    if net.in_channels > net.out_channels:
        result["concat_images"] = randn(batch, frames, net.out_channels, height, width)
    if net.ofs_embed_dim:
        result["ofs"] = torch.tensor([2.0, 0.5, 2.0, 2.0])[:batch]
    return result
