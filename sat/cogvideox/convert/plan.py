"""What a conversion writes, by headers alone: names, shapes, dtypes, the configuration, and what to tell the user."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox.convert import complete
from cogvideox.convert import diffusers_config as configs
from cogvideox.convert.source import Model, plain
from cogvideox.convert.writer import Entry, Tensors
from cogvideox.weights import transformer_keys as keys
from cogvideox.weights import vae_keys
from cogvideox.weights.geometry import (
    OPTIONAL_KEYS,
    TABLE_KEYS,
    vae_geometry,
)
from cogvideox.weights.identify import identify
from cogvideox.weights.lora.file import LoraFile
from cogvideox.weights.lora.low_rank import Lora, add_to
from cogvideox.weights.variants import Variant, variant_named_in

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
EPS_NOTE = (
    "the last norm's eps is 1e-6 in SAT and 1e-5 in diffusers, whose config has one for all norms: outputs differ by "
    "up to about 2e-5"
)


@dataclass
class Plan:
    """``entries``: what will be written, in order. ``tensors()`` gives it, converted group by group."""

    model: Model
    to: str
    entries: list[Entry]
    groups: list[list[str]]
    convert: Convert
    added: dict[str, Callable[[], Tensor]]
    # Tensors that no tensor of the source becomes.
    config: dict[str, Any]
    # diffusers' config.json.
    network: dict[str, Any]
    # What of it SAT's files have no place for; it goes into their record, for the way back. No guesses.
    variant: Variant | None
    # Of a transformer: the published model, or its nearest relative.
    num_parameters: int
    notes: list[str] = field(default_factory=list)
    loras: list[tuple[LoraFile, float]] = field(default_factory=list)

    @property
    def inputs(self) -> list[Path]:
        return [*self.model.files, *(file for lora, _ in self.loras for file in lora.files)]

    @property
    def latent_scale(self) -> float:
        """Of a transformer: what the VAE's latents are multiplied by."""
        stated = self.model.reader.info.latent_scale
        return self.variant.latent_scale if stated is None else stated

    @property
    def snr_shift(self) -> float:
        """Of a transformer."""
        stated = self.model.reader.info.snr_shift
        return self.variant.snr_shift if stated is None else stated

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def tensors(self) -> Tensors:
        for group in self.groups:
            yield from self.convert({name: self.model.tensor(name) for name in group}).items()
        for name, make in self.added.items():
            yield name, make()


def plan_transformer(model: Model, to: str, dtype: torch.dtype | None, lora: Lora) -> Plan:
    """The plan for a transformer. to: "sat", "safetensors" (SAT's names) or "diffusers". lora: what is merged into it.

    Raises ValueError for tensors that are missing or unknown, LoRA for another network, and where neither shapes nor
    ``known`` tell what a configuration needs.
    """
    diffusers = to == "diffusers"
    geometry = model.geometry
    has_table = any(name in TABLE_KEYS for name in model.shapes)
    dead = [name for name in model.headers if OPTIONAL_KEYS.fullmatch(name)]
    rotary = configs.is_rotary(geometry, model.known, bool(dead), has_table)
    table = _stored_table(model) if has_table and not rotary else None
    if table is not None and not keys.is_sincos_table(table):
        raise ValueError(
            f"{model.path}: its position table is learned and not beside a rotary one; diffusers has no such network"
        )
    read = {} if table is None else configs.read_sincos_table(table, geometry.patch_size[1])
    config, substituted, notes = configs.transformer_config(geometry, model.known, rotary, read)
    complete.check_transformer(
        model, geometry.num_layers, geometry.learned_table, bool(geometry.ofs_embed_dim)
    )
    complete.check_lora(model, lora)
    if not diffusers:
        complete.check_constants(model, config)
    elif substituted:
        listed = ", ".join(f"{key}={value}" for key, value in substituted.items())
        relative = configs.relative(geometry, rotary).name
        notes.append(f"not in the source, taken from {relative}: {listed} (--config FILE tells them)")
    if table is not None:
        complete.check_table(model, table, config)

    dropped = set(model.lora_names)
    if diffusers:
        dropped |= {name for name in model.headers if name in dead or (name in TABLE_KEYS and not rotary)}
    added = {}
    # Published SAT files of 2B hold the table, and SAT's own loader asks for it.
    if not rotary and not diffusers and not has_table:
        stored = dtype or getattr(torch, model.stored_dtype)
        name = keys.SAT_PREFIX + keys.POSITION_TABLE
        added[name] = lambda: configs.sincos_table(config, geometry.hidden_size).to(stored)
    rename = _renaming(model.naming, to, geometry.learned_table)

    def convert(part: dict[str, Tensor]) -> dict[str, Tensor]:
        part = {plain(name): _cast(name, tensor, dtype or model.dtype) for name, tensor in part.items()}
        return rename(add_to(part, lora, model.naming) if lora else part)

    kept = [name for name in model.headers if name not in dropped]
    counted = sum(
        h.numel for n, h in model.headers.items() if n not in dropped and not OPTIONAL_KEYS.fullmatch(n)
    )
    plan = Plan(
        model=model,
        to=to,
        entries=[],
        groups=_by_block(kept),
        convert=convert,
        added=added,
        config=config,
        network={key: config[key] for key in configs.UNSEEN if key not in substituted},
        variant=configs.relative(geometry, rotary),
        num_parameters=counted,
        notes=[
            *_source_notes(model, dtype),
            *notes,
            *_position_notes(diffusers, rotary, has_table, dead),
            *([EPS_NOTE] if diffusers != (model.naming == "diffusers") else []),
        ],
    )
    return _with_entries(plan)


def plan_vae(model: Model, to: str, dtype: torch.dtype | None, transformer: Plan | None) -> Plan:
    """The plan for a VAE. transformer: of the same pipeline; its latent scale and conventions are the VAE's.

    Raises ValueError for tensors that are missing or unknown, and where nothing tells the latent scale diffusers needs.
    """
    geometry = vae_geometry(model.shapes, model.naming)
    num_levels = len(geometry["channel_multipliers"])
    losses = [name for name in model.headers if name.startswith("loss.")]
    kept = [name for name in model.headers if name not in losses]
    diffusers = to == "diffusers"
    if diffusers == (model.naming == "diffusers"):
        rename = {name: name for name in kept}
    else:
        translate = vae_keys.to_diffusers if diffusers else vae_keys.to_sat
        rename = {name: translate(name, num_levels) for name in kept}
    complete.check_vae(model, geometry, kept, num_levels)
    notes = [f"left out, of its training: {len(losses)} tensors under loss."] if losses else []
    scale, source = _latent_scale(model, transformer)
    if scale is None and diffusers:
        raise ValueError(
            f"{model.path}: nothing beside it tells the latent scale, and 2B and 5B have VAEs of one shape: give "
            f"--scaling-factor 1.15258426 for 2B, 0.7 for the others"
        )
    if source and diffusers:
        notes.append(f"scaling_factor {scale:g}, {source}")
    invert = transformer is not None and transformer.variant.invert_scale_latents
    if invert and diffusers and transformer.variant.image_to_video:
        notes.append(
            "invert_scale_latents: diffusers divides the first frame's latents by the scale (1.5 I2V)"
        )
    config = configs.vae_config(geometry, model.known, scale, invert)
    if scale is None:
        del config["scaling_factor"]

    def convert(part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {rename[name]: _cast(name, tensor, dtype or model.dtype) for name, tensor in part.items()}

    plan = Plan(
        model=model,
        to=to,
        entries=[],
        groups=[[name] for name in kept],
        convert=convert,
        added={},
        config=config,
        network={key: config[key] for key in configs.VAE_UNSEEN if key in config},
        variant=None,
        num_parameters=sum(model.headers[name].numel for name in kept),
        notes=_source_notes(model, dtype) + notes,
    )
    return _with_entries(plan)


def _renaming(naming: str, to: str, learned_table: bool) -> Convert:
    """From the names of ``naming``, without prefix, to those of the target."""
    if to == "diffusers":
        return dict if naming == to else partial(keys.sat_to_diffusers, learned_position=learned_table)
    if naming == "diffusers":
        return partial(keys.diffusers_to_sat, prefix=keys.SAT_PREFIX)
    return lambda part: {keys.SAT_PREFIX + name: tensor for name, tensor in part.items()}


def _position_notes(diffusers: bool, rotary: bool, has_table: bool, dead: list[str]) -> list[str]:
    """What became of tables that are computed or never used."""
    if diffusers:
        notes = (
            ["the fixed position table was left out: diffusers computes it"]
            if has_table and not rotary
            else []
        )
        return notes + ([f"left out, without use: {', '.join(dead)}"] if dead else [])
    if not rotary:
        return [] if has_table else ["the fixed position table was computed"]
    return [] if dead else ["transformer.position_embeddings.weight, which SAT never uses, is not written"]


def _with_entries(plan: Plan) -> Plan:
    def entries() -> Iterator[Entry]:
        for group in plan.groups:
            shells = {}
            for name in group:
                header = plan.model.headers[name]
                shells[name] = torch.empty(header.shape, dtype=getattr(torch, header.dtype), device="meta")
            for name, shell in plan.convert(shells).items():
                yield Entry(name, tuple(shell.shape), shell.dtype)
        for name, make in plan.added.items():
            tensor = make()
            yield Entry(name, tuple(tensor.shape), tensor.dtype)

    plan.entries = list(entries())
    return plan


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and not tensor.is_meta and result.isinf().any() and not tensor.isinf().any():
        raise ValueError(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, float16 ends at 65504: use --dtype bf16 or fp32"
        )
    return result


def _source_notes(model: Model, dtype: torch.dtype | None) -> list[str]:
    notes = []
    if model.reader.used_ema:
        kept = str(dtype or model.dtype).removeprefix("torch.")
        notes.append(f"averaged weights (EMA), written as {kept}; --no-ema takes the last ones")
    if model.masters:
        notes.append(f"fp32 masters of the optimizer, more precise than its {model.stored_dtype} weights")
    if model.others:
        groups = sorted({".".join(name.split(".")[:2]) for name in model.others})
        shown = ", ".join(groups[:4]) + (" ..." if len(groups) > 4 else "")
        notes.append(f"ignored, of other models in the file: {len(model.others)} tensors ({shown})")
    published = model.reader.info.published_dtype
    if dtype == torch.float16 and published == "bfloat16":
        notes.append("it was trained in bf16, and overflows when it runs in fp16 (black videos)")
    return notes


def _latent_scale(model: Model, transformer: Plan | None) -> tuple[float | None, str]:
    """The scale, and where it was taken from if no configuration states it."""
    stated = model.known.get("scaling_factor")
    if transformer is not None and "scaling_factor" not in model.given:
        # The transformer was trained with it, the VAE was not.
        trained_with = transformer.model.reader.info.latent_scale
        if trained_with is not None and stated not in (None, trained_with):
            return (
                trained_with,
                f"that of {transformer.variant.name}; the VAE's own configuration says {stated:g}",
            )
    if stated is not None:
        return float(stated), ""
    if transformer is not None:
        return transformer.latent_scale, f"that of {transformer.variant.name}"
    for beside in sorted(model.files[0].parent.parent.glob("transformer*/")):
        info = identify(beside, "transformer")
        if info.latent_scale is not None:
            return info.latent_scale, f"that of {info.variant} in {beside}"
    named = variant_named_in(model.path.absolute())
    return (named.latent_scale, f"that of {named.name}, by its path") if named else (None, "")


def _by_block(names: Sequence[str]) -> list[list[str]]:
    """q, k, v of diffusers become one tensor of SAT, so a block's tensors convert together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"transformer_blocks\.\d+\.", name)
        groups.setdefault(block[0] if block else name, []).append(name)
    return list(groups.values())


def _stored_table(model: Model) -> Tensor:
    return model.tensor(next(name for name in model.headers if name in TABLE_KEYS))
