"""diffusers' configuration files for a model that is known by its tensors.

Shapes decide all they can. The rest (the size it was trained at, the latent scale, the schedule) comes from what is
``known``: a diffusers ``config.json`` beside the source, a run's ``config.yaml``, the record in a file of ours. Else it
comes from the published relative of the same kind, and a note says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cogvideox.weights.geometry import Geometry
from cogvideox.weights.variants import VARIANTS, Variant

DIFFUSERS_VERSION = "0.32.0"
"""The first release that knows every key written here."""

# Keys of the transformer's config that no shape tells. What is known of them travels in the provenance of SAT files.
UNSEEN = (
    "sample_width", "sample_height", "sample_frames", "max_text_seq_length", "temporal_compression_ratio",
    "spatial_interpolation_scale", "temporal_interpolation_scale", "use_rotary_positional_embeddings",
)  # fmt: skip
VAE_UNSEEN = (
    "scaling_factor", "invert_scale_latents", "temporal_compression_ratio", "norm_num_groups", "sample_height",
    "sample_width",
)  # fmt: skip
CONSTANTS = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "dropout": 0.0, "flip_sin_to_cos": True,
    "freq_shift": 0, "norm_elementwise_affine": True, "norm_eps": 1e-5, "timestep_activation_fn": "silu",
}  # fmt: skip
"""Keys of the transformer's config that have one value in the whole family."""
_SPATIAL_COMPRESSION = 8

Known = Mapping[str, Any]
"""A part of a diffusers config."""


def relative(geometry: Geometry, rotary: bool) -> Variant:
    """The published model, or for another size the one of the same kind: its constants are the best guess.

    The first that agrees in position, patch, image input and learned table.
    """

    def likeness(variant: Variant) -> tuple[bool, ...]:
        return (
            variant == geometry.variant(),
            variant.rotary == rotary,
            variant.patch_size == geometry.patch_size,
            variant.image_to_video == (geometry.in_channels > geometry.out_channels),
            variant.learned_table == geometry.learned_table,
        )

    return max(VARIANTS, key=likeness)


def is_rotary(geometry: Geometry, known: Known, has_rotary_keys: bool, has_table: bool) -> bool:
    """Whether q and k are rotated, or a sine-cosine table is added (2B). ValueError where nothing tells."""
    variant = geometry.variant()
    if variant is not None:
        return variant.rotary
    stated = known.get("use_rotary_positional_embeddings")
    if geometry.learned_table and stated is not None:
        return bool(stated)
    if geometry.learned_table or has_rotary_keys or geometry.patch_size[0] > 1:
        return True
    if has_table:
        return False
    if stated is not None:
        return bool(stated)
    raise ValueError(
        f"{geometry}: neither the tensors nor a configuration beside them tell whether its position is rotary (5B) or "
        f"a fixed table (2B); name its configuration with --config FILE (a YAML file, or a diffusers config.json)"
    )


def transformer_config(
    geometry: Geometry, known: Known, rotary: bool, table: Known
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """All keys of ``CogVideoXTransformer3DModel``'s config, those that had to be substituted, and contradictions.

    table: what a stored sine-cosine table tells (``read_sincos_table``). Raises ValueError where a learned table does
    not have as many rows as the size that is known of it.
    """
    variant = relative(geometry, rotary)
    compression = known.get("temporal_compression_ratio", 4)
    published = {
        "sample_width": variant.width // _SPATIAL_COMPRESSION,
        "sample_height": variant.height // _SPATIAL_COMPRESSION,
        "sample_frames": variant.num_frames,
        "max_text_seq_length": 226,  # in diffusers' configs of 1.5 too, whose text has 224
        "temporal_compression_ratio": 4,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
    }
    sizes = {key: table.get(key, known.get(key, published[key])) for key in published}
    # A rotary network has no table to interpolate, and every network of the family compresses four frames into one.
    told = UNSEEN[:4] if rotary else UNSEEN[:4] + UNSEEN[5:7]
    missing = [key for key in told if key not in table and key not in known]
    substituted = {key: sizes[key] for key in missing if geometry.variant() is None}
    if geometry.learned_table:
        _check_table_size(geometry, sizes, compression)
    heads = geometry.num_attention_heads or variant.num_attention_heads
    frames, patch, _ = geometry.patch_size
    config = {
        "_class_name": "CogVideoXTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": geometry.hidden_size // heads,
        "in_channels": geometry.in_channels,
        "num_attention_heads": heads,
        "num_layers": geometry.num_layers,
        "ofs_embed_dim": geometry.ofs_embed_dim,
        "out_channels": geometry.out_channels,
        "patch_bias": frames == 1,
        "patch_size": patch,
        "patch_size_t": None if frames == 1 else frames,
        "text_embed_dim": geometry.text_hidden_size,
        "time_embed_dim": geometry.time_embed_dim,
        "use_learned_positional_embeddings": geometry.learned_table,
        "use_rotary_positional_embeddings": rotary,
        **sizes,
        **{key: known.get(key, value) for key, value in CONSTANTS.items()},
    }
    wrong = [key for key in config if key[0] != "_" and key in known and known[key] != config[key]]
    notes = [f"{key} is {config[key]} by the tensors; the configuration said {known[key]}" for key in wrong]
    return config, substituted, notes


def grid_of(config: Known) -> tuple[int, int, int]:
    """Patches (t, h, w) at the configured size."""
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    patch = config["patch_size"]
    # diffusers, like SAT, repeats a latent where the temporal patch does not divide their number.
    return (
        math.ceil(frames / (config["patch_size_t"] or 1)),
        config["sample_height"] // patch,
        config["sample_width"] // patch,
    )


def read_sincos_table(table: Tensor, patch: int = 2) -> dict[str, Any]:
    """What a stored table (1, L + T * H * W, D) of ``SincosPosition3D`` was computed for, as keys of the config.

    Text rows are zero. The interpolation, which a half-precision table only tells to three digits, is left out.
    """
    rows = table[0].float()
    length = int((rows.abs().sum(dim=1) > 0).nonzero()[0])
    video, quarter, third = rows[length:], rows.shape[1] // 4, rows.shape[1] // 8 * 3
    # From one frame to the next the first quarter changes; within a frame, the next columns tell the width.
    frame = video[: _first_change(video[:, :quarter])]
    columns = frame[:, quarter : quarter + third]
    start = _first_change(columns)
    back = (columns[start:] == columns[0]).all(dim=1).nonzero()
    width = 1 if start == len(frame) else start + int(back[0]) if len(back) else len(frame)
    frames, height = len(video) // len(frame), len(frame) // width
    return {
        "max_text_seq_length": length,
        "sample_frames": (frames - 1) * 4 + 1,
        "sample_height": height * patch,
        "sample_width": width * patch,
    }


def _first_change(rows: Tensor) -> int:
    """The index of the first row that is not the first row again; their number where there is none."""
    changed = (rows != rows[0]).any(dim=1).nonzero()
    return int(changed[0]) if len(changed) else len(rows)


def sincos_table(config: Known, dim: int) -> Tensor:
    """The fixed table of the configured size: (1, L + T * H * W, D), float32 (CONVENTIONS of SAT: see position.py)."""
    from cogvideox.model.position import SincosPosition3D

    over_hw, over_t = config["spatial_interpolation_scale"], config["temporal_interpolation_scale"]
    length = config["max_text_seq_length"]
    position = SincosPosition3D(dim, grid_of(config), length, over_hw, over_hw, over_t)
    return position.table(grid_of(config), length)


def table_difference(stored: Tensor, config: Known) -> float:
    """The largest difference between a stored fixed table and the one that diffusers computes; inf for other sizes."""
    expected = sincos_table(config, stored.shape[-1])
    if stored.shape != expected.shape:
        return math.inf
    return float((stored.float() - expected.to(stored.dtype).float()).abs().max())


def vae_config(geometry: Known, known: Known, latent_scale: float, invert: bool) -> dict[str, Any]:
    """All keys of ``AutoencoderKLCogVideoX``'s config. geometry: of ``vae_geometry``."""
    widths = [geometry["channels"] * multiplier for multiplier in geometry["channel_multipliers"]]
    return {
        "_class_name": "AutoencoderKLCogVideoX",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["CogVideoXDownBlock3D"] * len(widths),
        "force_upcast": True,
        "in_channels": geometry["in_channels"],
        "invert_scale_latents": known.get("invert_scale_latents", invert),
        "latent_channels": geometry["z_channels"],
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": geometry["num_res_blocks"],
        "norm_eps": 1e-6,
        "norm_num_groups": known.get("norm_num_groups", 32),
        "out_channels": geometry["in_channels"],
        "sample_height": known.get("sample_height", 480),
        "sample_width": known.get("sample_width", 720),
        "scaling_factor": latent_scale,
        "shift_factor": None,
        "temporal_compression_ratio": known.get("temporal_compression_ratio", 4),
        "up_block_types": ["CogVideoXUpBlock3D"] * len(widths),
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def scheduler_config(sampler: str, snr_shift: float) -> dict[str, Any]:
    """The training schedule of the family with a model's SNR shift. sampler: diffusers' class."""
    return {
        "_class_name": sampler,
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": snr_shift,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
        "trained_betas": None,
    }


def from_our_config(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What our configuration (``config.yaml`` as plain mappings) says, as keys of diffusers': (transformer, vae)."""
    transformer, vae = {}, {}
    ours, our_vae = (tree.get("model") or {}).get("transformer") or {}, tree.get("vae") or {}
    if ours:
        position = ours.get("position") or {}
        params = position.get("params") or {}
        transformer = {
            "sample_width": ours["latent_width"],
            "sample_height": ours["latent_height"],
            "sample_frames": ours["num_frames"],
            "max_text_seq_length": ours["text_length"],
            "use_rotary_positional_embeddings": "Rotary" in position.get("target", ""),
            "temporal_compression_ratio": our_vae.get("temporal_compression", 4),
        }
        if "Sincos" in position.get("target", ""):
            over = (params.get("height_interpolation", 1.0), params.get("width_interpolation", 1.0))
            if over[0] != over[1]:
                raise ValueError(
                    f"model.transformer.position interpolates height by {over[0]} and width by {over[1]}; diffusers "
                    f"has one spatial_interpolation_scale for both: this network cannot be written for it"
                )
            transformer["spatial_interpolation_scale"] = over[0]
            transformer["temporal_interpolation_scale"] = params.get("time_interpolation", 1.0)
    if our_vae:
        vae = {
            "scaling_factor": our_vae["scale_factor"],
            "temporal_compression_ratio": our_vae.get("temporal_compression", 4),
            "norm_num_groups": our_vae.get("norm_groups", 32),
        }
        data = tree.get("data") or {}
        vae |= {f"sample_{key}": data[key] for key in ("height", "width") if key in data}
    return transformer, vae


def _check_table_size(geometry: Geometry, sizes: Known, compression: int) -> None:
    frames = (sizes["sample_frames"] - 1) // compression + 1
    _, height, width = geometry.patch_size
    rows = (
        sizes["max_text_seq_length"]
        + frames * (sizes["sample_height"] // height) * sizes["sample_width"] // width
    )
    if rows != geometry.table_tokens:
        raise ValueError(
            f"its learned position table has {geometry.table_tokens} rows, but {sizes['max_text_seq_length']} text "
            f"tokens and {sizes['sample_frames']} frames of {sizes['sample_height']} x {sizes['sample_width']} latents "
            f"make {rows}: name its configuration with --config FILE (a YAML file, or a diffusers config.json)"
        )
