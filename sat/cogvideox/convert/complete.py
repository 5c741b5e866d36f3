"""Whether a source is all of one model: missing, unknown and misshapen tensors are named before anything is written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cogvideox.convert import diffusers_config as configs
from cogvideox.convert.source import Model
from cogvideox.weights import transformer_keys as keys
from cogvideox.weights import vae_keys
from cogvideox.weights.geometry import OPTIONAL_KEYS, TABLE_KEYS
from cogvideox.weights.lora.low_rank import Lora, touched

_TABLE_TOLERANCE = 2**-8  # entries lie in [-1, 1], and bfloat16 rounds by at most 2^-9


def check_table(model: Model, table: Tensor, config: Mapping[str, Any]) -> None:
    difference = configs.table_difference(table, config)
    if difference > _TABLE_TOLERANCE:
        raise ValueError(
            f"{model.path}: its fixed position table is not that of spatial_interpolation_scale="
            f"{config['spatial_interpolation_scale']} (largest difference {difference:.3g}), which diffusers would "
            f"compute: name its configuration with --config FILE (a YAML file, or a diffusers config.json)"
        )


def check_transformer(model: Model, num_layers: int, learned: bool, ofs: bool) -> None:
    """ValueError unless the tensors are those of a whole transformer of so many layers."""
    sat = model.naming == "SAT"
    patterns = [*keys.RENAMED, *keys.SPLIT]
    if not sat:
        patterns = [*keys.RENAMED.values(), *(name for parts in keys.SPLIT.values() for name, _ in parts)]
    table = TABLE_KEYS[0 if sat else 1]
    expected = {
        pattern.format(layer): None
        for pattern in patterns
        if (ofs or not pattern.startswith("ofs_")) and (learned or pattern != table)
        for layer in (range(num_layers) if "{}" in pattern else [0])
    }
    found = model.shapes
    missing = [name for name in expected if name not in found]
    unknown = [
        name for name in found if name not in expected and name != table and not OPTIONAL_KEYS.fullmatch(name)
    ]
    if unknown:
        near = difflib.get_close_matches(unknown[0], expected, n=1, cutoff=0.5)
        hint = f"; the nearest known is {near[0]}" if near else ""
        raise ValueError(
            f"{model.path}: {len(unknown)} tensors are unknown to a CogVideoX transformer under {model.naming} names, "
            f"first {unknown[0]}{hint}"
        )
    if missing:
        raise ValueError(
            f"{model.path}: {len(missing)} tensors of {num_layers} layers are missing, first {missing[0]}: finish the "
            f"download, or check how the file was made"
        )


def check_constants(model: Model, config: Mapping[str, Any]) -> None:
    """ValueError where diffusers' configuration asks for what SAT's network does not compute."""
    wrong = [key for key, value in configs.CONSTANTS.items() if config[key] != value and key != "dropout"]
    if wrong:
        raise ValueError(
            f"{model.path}: its config.json says {wrong[0]}={config[wrong[0]]}; SAT's network has "
            f"{configs.CONSTANTS[wrong[0]]}, and no setting for it"
        )


def check_vae(model: Model, geometry: Mapping[str, Any], kept: list[str], num_levels: int) -> None:
    from cogvideox.vae.autoencoder import CausalVAE

    arguments = {key: geometry[key] for key in ("channels", "num_res_blocks", "z_channels", "in_channels")}
    arguments["norm_groups"] = model.known.get("norm_num_groups", 32)
    with torch.device("meta"):
        net = CausalVAE(
            **arguments,
            channel_multipliers=list(geometry["channel_multipliers"]),
            temporal_compression=int(model.known.get("temporal_compression_ratio", 4)),
        )
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    names = kept if model.naming == "SAT" else [vae_keys.to_sat(name, num_levels) for name in kept]
    found = {ours: model.headers[name].shape for ours, name in zip(names, kept, strict=True)}
    for title, wrong in (
        ("are missing", [name for name in expected if name not in found]),
        ("are unknown", [name for name in found if name not in expected]),
        ("have another shape", [n for n in expected if n in found and found[n] != expected[n]]),
    ):
        if wrong:
            raise ValueError(
                f"{model.path}: {len(wrong)} tensors of a VAE of its geometry {title}, first {wrong[0]} (SAT name): "
                f"finish the download, or check how the file was made"
            )


def check_lora(model: Model, lora: Lora) -> None:
    absent = sorted(touched(lora, model.naming) - model.shapes.keys())
    if absent:
        raise ValueError(
            f"{model.path} is {model.reader.info.variant}, and the LoRA changes {len(absent)} weights that it does not "
            f"have, first {absent[0]}: use the model that the LoRA was trained on"
        )
