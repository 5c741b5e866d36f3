"""Load published weights, runs of this project or diffusers folders into a transformer, VAE or text encoder.

A checkpoint of another model is refused by its header, before any data is read, in a sentence that says which model it
is and what to set. Loading is strict (fill.py); values are cast to the network's dtype.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cogvideox.weights.fill import LoadReport, fill
from cogvideox.weights.geometry import (
    T5_ALIAS,
    Geometry,
    is_optional,
    shapes_of,
    transformer_geometry,
    vae_geometry,
)
from cogvideox.weights.identify import WeightsInfo
from cogvideox.weights.reader import WeightsReader

logger = logging.getLogger("cogvideox")

_MATRIX = re.compile(r"\.(matrix_[AB]\.\d+|magnitude_gain)$")
_CONFIG_KEYS = (
    "num_layers", "hidden_size", "num_attention_heads", "patch_size", "in_channels", "out_channels", "time_embed_dim",
    "text_hidden_size", "ofs_embed_dim",
)  # fmt: skip


def load_transformer(
    net: nn.Module, path: str | Path, *, ema: bool = True, base_only: bool = False
) -> LoadReport:
    """Fill an expert transformer from SAT, DeepSpeed, diffusers or safetensors weights.

    net: under SAT's names; where LoRA is injected, weights go to ``.original`` and the matrices stay as they are. ema:
    take averaged weights where the checkpoint has them. base_only: leave out the LoRA of a full checkpoint, which is
    applied on its own (lora/apply.py). Without it such a checkpoint is refused: its LoRA would be lost in silence.
    """
    reader = _open_transformer(net, path, ema)
    info = reader.info
    if info.lora_rank and not base_only:
        raise ValueError(
            f"{path} is {info.variant}, which would be lost: load it with base_only=True and apply its LoRA "
            f"(weights.lora.apply)"
        )
    theirs = transformer_geometry(shapes_of(reader.tensors, info.prefix), info.naming)
    learned = theirs is not None and theirs.learned_table
    names = {_plain_name(name): name for name in net.state_dict()}

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name.removeprefix(info.prefix): tensor for name, tensor in tensors.items()}
        if info.naming == "diffusers":
            from cogvideox.weights.transformer_keys import diffusers_to_sat

            tensors = diffusers_to_sat(tensors)
        return {names.get(_plain_name(name), name): tensor for name, tensor in tensors.items()}

    return fill(
        net,
        reader,
        _by_block([name for name in reader.tensors if not _is_lora(name)], info.prefix),
        convert,
        may_miss=_is_lora,
        may_skip=lambda name: is_optional(name, learned),
    )


def check_transformer(net: nn.Module, path: str | Path, *, ema: bool = True) -> WeightsInfo:
    """What ``load_transformer`` would load, from headers alone; it refuses another model with the same errors."""
    return _open_transformer(net, path, ema).info


def _open_transformer(net: nn.Module, path: str | Path, ema: bool) -> WeightsReader:
    reader = WeightsReader(path, "transformer", ema=ema)
    info = reader.info
    if info.family == "lora":
        raise ValueError(
            f"{path} holds {info.variant} (rank {info.lora_rank}) without the base weights: set load.lora={path}, "
            f"and load.transformer to the model that it was trained on"
        )
    reader.expect("transformer")
    theirs = transformer_geometry(shapes_of(reader.tensors, info.prefix), info.naming)
    mine = transformer_geometry(shapes_of(net.state_dict()))
    if theirs is not None and mine is not None:
        _compare_geometry(path, theirs, mine)
    return reader


def load_vae(vae: nn.Module, path: str | Path, *, ema: bool = True) -> LoadReport:
    """Fill the 3D causal VAE from `3d-vae.pt`, a diffusers folder or a VAE run of ours; `loss.*` keys are ignored."""
    reader = _open_vae(vae, path, ema)
    info = reader.info

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name.removeprefix(info.prefix): tensor for name, tensor in tensors.items()}
        if info.naming == "SAT":
            return tensors
        from cogvideox.weights.vae_keys import diffusers_to_sat

        return diffusers_to_sat(tensors)

    # diffusers counts levels from the other end, so names are converted together; the tensors stay mapped.
    names = [name for name in reader.tensors if name.startswith(info.prefix)]
    return fill(vae, reader, [names], convert, may_skip=lambda name: name.startswith("loss."))


def check_vae(vae: nn.Module, path: str | Path, *, ema: bool = True) -> WeightsInfo:
    """What ``load_vae`` would load, from headers alone; it refuses another VAE with the same errors."""
    return _open_vae(vae, path, ema).info


def _open_vae(vae: nn.Module, path: str | Path, ema: bool) -> WeightsReader:
    reader = WeightsReader(path, "vae", ema=ema)
    reader.expect("vae")
    info = reader.info
    theirs = vae_geometry(shapes_of(reader.tensors, info.prefix), info.naming)
    mine = vae_geometry(shapes_of(vae.state_dict()))
    wrong = [key for key in theirs if theirs[key] != mine[key]]
    if wrong:
        raise ValueError(
            f"{path}: this is {info.variant} with {_settings(theirs, wrong)}; your config has "
            f"{_settings(mine, wrong)}: set {_settings(theirs, wrong, 'vae.')}"
        )
    return reader


def load_text_encoder(
    encoder: nn.Module, path: str | Path, *, index: int = 0, ema: bool = True
) -> LoadReport:
    """Fill a transformers T5EncoderModel from a T5 file, or from a run of ours that trained embedder ``index``."""
    reader = WeightsReader(path, "text_encoder", ema=ema)
    prefix = f"conditioner.embedders.{index}.transformer."
    if not any(name.startswith(prefix) for name in reader.tensors):
        reader.expect("t5")
        prefix = reader.info.prefix
    theirs, mine = shapes_of(reader.tensors, prefix), shapes_of(encoder.state_dict())
    wrong = next((name for name in mine if name in theirs and mine[name] != theirs[name]), None)
    if wrong is not None:
        raise ValueError(
            f"{path}: another text encoder than your config's: {wrong} is {theirs[wrong]} in the file, "
            f"{mine[wrong]} in the network"
        )
    return fill(
        encoder,
        reader,
        [[name] for name in reader.tensors if name.startswith(prefix)],
        lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
        may_skip=lambda name: name == T5_ALIAS,
        other_part=lambda name: name.startswith(("decoder.", "lm_head.")),
    )


def check_precision(info: WeightsInfo, precision: str, key: str, *, force: bool = False) -> None:
    """Refuse fp16 for weights trained in bf16 (published 5B and 1.5): they overflow into black videos and NaN losses.

    key: the configuration key that holds the precision. force: ``load.force_fp16``.
    """
    if precision == "fp16" and (info.published_dtype or info.dtype) == "bfloat16" and not force:
        raise ValueError(
            f"{key}=fp16, but {info.path} is {info.variant}, trained in bf16, and overflows in fp16 (black videos, "
            f"NaN losses): set {key}=bf16 or fp32; load.force_fp16=true overrides"
        )


def check_constant(
    info: WeightsInfo, key: str, value: float, expected: float | None, *, force: bool = False
) -> None:
    """Refuse a constant of the configuration that is not the one of the weights (vae.scale_factor, the SNR shift).

    expected: None where the weights do not say. force: ``load.force_constants``; the difference is then a warning.
    """
    if expected is None or math.isclose(value, expected, rel_tol=1e-6):
        return
    found = f"{key}={value}, but {info.path} is {info.variant}, which was trained with {expected}"
    if not force:
        raise ValueError(f"{found}: set {key}={expected}; load.force_constants=true keeps {value}")
    logger.warning("%s; kept, as load.force_constants=true", found)


def own_precision(info: WeightsInfo, key: str) -> str:
    """fp32, bf16 or fp16: what the published model was trained in, else what the file holds."""
    dtype = info.published_dtype or info.dtype
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    if dtype not in names:
        raise ValueError(
            f"{key}=null is the checkpoint's own precision, and {info.path} holds {dtype}: set {key}"
        )
    return names[dtype]


def _compare_geometry(path: str | Path, theirs: Geometry, mine: Geometry) -> None:
    wrong = [key for key in (*_CONFIG_KEYS, "learned_table") if getattr(theirs, key) != getattr(mine, key)]
    if not wrong:
        return
    variant = theirs.variant()
    if variant is not None and variant != mine.variant():
        advice = f"use {variant.config}"
    else:
        keys = [key for key in wrong if key in _CONFIG_KEYS]
        advice = [f"set {_settings(vars(theirs), keys, 'model.transformer.')}"] if keys else []
        if "learned_table" in wrong:
            advice.append(
                f"use a position part {'with' if theirs.learned_table else 'without'} a learned table"
            )
        advice = " and ".join(advice)
    raise ValueError(f"{path}: this is {theirs}; your config is {mine}: {advice}")


def _by_block(names: Any, prefix: str) -> list[list[str]]:
    """Names under the prefix; those of one diffusers block together, whose q, k, v become one tensor."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(prefix):
            block = re.match(r"transformer_blocks\.\d+\.", name[len(prefix) :])
            groups.setdefault(block[0] if block else name, []).append(name)
    return list(groups.values())


def _plain_name(name: str) -> str:
    """LoRA moves ``x.weight`` to ``x.original.weight``."""
    return name.replace(".original.", ".")


def _is_lora(name: str) -> bool:
    return _MATRIX.search(name) is not None


def _settings(values: dict[str, Any], keys: list[str], prefix: str = "") -> str:
    """``vae.z_channels=16, vae.channel_multipliers=[1,2,2,4]``: as a command line spells them."""
    return ", ".join(f"{prefix}{key}={_spelled(values[key])}" for key in keys)


def _spelled(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value)).replace(" ", "")
    return "null" if value is None else str(value)
