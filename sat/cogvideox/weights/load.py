"""Load published weights, runs of this project or diffusers folders into a transformer, VAE, LoRA or text encoder.

A checkpoint of another model is refused by its header, before any data is read, in a sentence that says which model it
is and what to set. Loading is strict (fill.py); values are cast to the network's dtype.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cogvideox.weights.fill import LoadReport, fill
from cogvideox.weights.geometry import (
    T5_ALIAS,
    Geometry,
    is_optional,
    lora_geometry,
    shapes_of,
    transformer_geometry,
    vae_geometry,
)
from cogvideox.weights.identify import WeightsInfo
from cogvideox.weights.reader import WeightsReader

_MATRIX = re.compile(r"(?:^|\.)(transformer\.layers\.\d+\..+\.matrix_[AB]\.\d+)$")
_CONFIG_KEYS = (
    "num_layers", "hidden_size", "num_attention_heads", "patch_size", "in_channels", "out_channels", "time_embed_dim",
    "text_hidden_size", "ofs_embed_dim",
)  # fmt: skip


def load_transformer(
    net: nn.Module, path: str | Path, *, ema: bool = True, base_only: bool = False
) -> LoadReport:
    """Fill an expert transformer from SAT, DeepSpeed, diffusers or safetensors weights.

    net: under SAT's names; where LoRA is injected, weights go to ``.original`` and the matrices are filled if the file
    has them. ema: take averaged weights where the checkpoint has them. base_only: leave the LoRA matrices of a
    checkpoint to ``load_lora``. Without it a network without LoRA refuses a checkpoint with LoRA, which would
    otherwise lose its effect in silence.
    """
    reader = WeightsReader(path, "transformer", ema=ema)
    info, ours = reader.info, shapes_of(net.state_dict())
    if info.family == "lora":
        raise ValueError(
            f"{path} holds {info.variant} (rank {info.lora_rank}) without the base weights: set load.lora={path}, "
            f"and load.transformer to the model that it was trained on"
        )
    reader.expect("transformer")
    theirs = transformer_geometry(shapes_of(reader.tensors, info.prefix), info.naming)
    mine = transformer_geometry(ours)
    if theirs is not None and mine is not None:
        _compare_geometry(path, theirs, mine)
    if info.lora_rank and not base_only:
        injected = lora_geometry(ours)
        if injected is None:
            raise ValueError(
                f"{path} is {info.variant}, which a network without LoRA would lose: set lora.rank={info.lora_rank} "
                f"and load.lora={path}"
            )
        _compare_rank(path, info.lora_rank, injected["ranks"])

    learned = theirs is not None and theirs.learned_table
    names = {_plain_name(name): name for name in ours}

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name.removeprefix(info.prefix): tensor for name, tensor in tensors.items()}
        if info.naming == "diffusers":
            from cogvideox.weights.transformer_keys import diffusers_to_sat

            tensors = diffusers_to_sat(tensors)
        return {names.get(_plain_name(name), name): tensor for name, tensor in tensors.items()}

    return fill(
        net,
        reader,
        _by_block(reader.tensors, info.prefix),
        convert
        if not base_only
        else lambda tensors: {k: v for k, v in convert(tensors).items() if not _is_lora(k)},
        may_miss=lambda name: _is_lora(name) and (base_only or not info.lora_rank),
        may_skip=lambda name: is_optional(name, learned),
    )


def load_lora(net: nn.Module, path: str | Path, *, ema: bool = True) -> LoadReport:
    """Fill the injected LoRA matrices of a transformer from a LoRA run, or from a full SAT checkpoint with LoRA.

    The scale alpha / rank is no tensor: it is the network's own (``lora.alpha``).
    """
    reader = WeightsReader(path, "transformer", ema=ema)
    info, injected = reader.info, lora_geometry(shapes_of(net.state_dict()))
    theirs = lora_geometry(shapes_of(reader.tensors))
    if theirs is None:
        raise ValueError(f"load.lora={path}: there is no LoRA in it, it is {info.variant}")
    if theirs["naming"] != "SAT":
        raise ValueError(
            f"load.lora={path} is a LoRA under {theirs['naming']} names; expected SAT's "
            f"(transformer.layers.0.attention.query_key_value.matrix_A.0)"
        )
    if injected is None:
        raise ValueError(f"load.lora={path}: the network has no LoRA; set lora.rank={info.lora_rank}")
    if theirs["width"] != injected["width"] or theirs["layers"] > injected["layers"]:
        raise ValueError(
            f"load.lora={path}: this is {info.variant}; your network has {injected['layers']} layers x "
            f"{injected['width']} (model.transformer.num_layers, hidden_size)"
        )
    _compare_rank(path, info.lora_rank, injected["ranks"])
    return fill(
        net,
        reader,
        [[name] for name in reader.tensors if _MATRIX.search(name)],
        lambda tensors: {_MATRIX.search(name)[1]: tensor for name, tensor in tensors.items()},
        may_miss=lambda name: not _is_lora(name),
    )


def load_vae(vae: nn.Module, path: str | Path, *, ema: bool = True) -> LoadReport:
    """Fill the 3D causal VAE from `3d-vae.pt`, a diffusers folder or a VAE run of ours; `loss.*` keys are ignored."""
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

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name.removeprefix(info.prefix): tensor for name, tensor in tensors.items()}
        if info.naming == "SAT":
            return tensors
        from cogvideox.weights.vae_keys import diffusers_to_sat

        return diffusers_to_sat(tensors)

    # diffusers counts levels from the other end, so names are converted together; the tensors stay mapped.
    names = [name for name in reader.tensors if name.startswith(info.prefix)]
    return fill(vae, reader, [names], convert, may_skip=lambda name: name.startswith("loss."))


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


def _compare_rank(path: str | Path, rank: int, injected: list[int]) -> None:
    if [rank] != injected:
        raise ValueError(
            f"{path}: its LoRA has rank {rank}, your config lora.rank={injected[-1]}: use lora.rank={rank}"
        )


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
