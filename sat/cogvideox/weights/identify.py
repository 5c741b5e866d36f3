"""``identify(path)``: which model a file or folder holds, from names and shapes alone: no torch, no data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cogvideox.weights import provenance
from cogvideox.weights.beside import Beside, contradictions, read_beside, stated_geometry
from cogvideox.weights.files.headers import Headers, is_safetensors, read_headers
from cogvideox.weights.files.locate import COMPONENTS, Source, locate
from cogvideox.weights.files.zero import stage
from cogvideox.weights.geometry import (
    T5_ALIAS,
    Shapes,
    find_model,
    is_optional,
    shapes_of,
    transformer_geometry,
    vae_geometry,
)
from cogvideox.weights.info import WeightsInfo
from cogvideox.weights.lora.formats import is_lora
from cogvideox.weights.lora.info import fill_lora, find_lora, lora_tool, take_constants
from cogvideox.weights.nearest import looks_like
from cogvideox.weights.variants import VARIANTS

__all__ = ["WeightsInfo", "describe", "identify"]


def identify(path: str | Path, component: str | None = None) -> WeightsInfo:
    """Identify a file, a folder or an ``hf://`` address. ``component``: which part of a pipeline folder (transformer
    first by default; the other parts are then in ``components``).

    Reads headers only, under two seconds for any size. Raises ValueError where there is nothing to read (locate.py,
    headers.py, hub.py); weights of another kind are no error: their family is "unknown".
    """
    source = locate(path, component)
    info = describe(read_headers(source.files), source)
    if info.family == "vae" and info.latent_scale is None:
        _take_scale_of_neighbour(info, source.folder)
    if component is None and source.path.is_dir():
        taken = [source.folder, *source.folder.parents]
        for folder in (source.path / name for name in COMPONENTS):
            if folder.is_dir() and folder not in taken:
                _add_component(info, folder)
    return info


def describe(headers: Headers, source: Source) -> WeightsInfo:
    """``identify`` for headers that have been read."""
    found = {family: find_model(headers.tensors, family) for family in ("transformer", "vae", "t5")}
    families = [family for family, place in found.items() if place]
    lora, unreadable = find_lora(headers)
    family = families[0] if families else "lora" if lora else "unknown"
    prefix, naming = found.get(family) or ("", lora.names.format if lora else "unknown")
    beside = read_beside(source.folder)
    record = provenance.read(headers.metadata, source.folder if beside.state else None)
    if not beside.config_yaml and isinstance(record.get("config"), dict):
        beside.config_yaml = record["config"]
    info = WeightsInfo(
        path=source.path,
        family=family,
        variant="unknown",
        layout=_layout(headers, source, family),
        naming=naming,
        prefix=prefix,
        dtype=_dtype(headers, prefix),
        num_tensors=len(headers.tensors),
        num_parameters=0,
        size_bytes=headers.size_bytes,
        has_ema=bool(source.ema_files),
        has_optimizer=any(source.folder.glob("*optim_states.pt")),
        zero_stage=beside.state.get("zero_stage", headers.metadata.get("zero_stage")),
        step=_step(headers, beside),
        refused_globals=headers.foreign_globals,
        notes=list(beside.problems),
    )
    if info.zero_stage is None and info.has_optimizer:
        _read_zero_stage(info, source.folder)
    info.format, info.provenance = _format(headers, source, info, beside), record
    shapes = shapes_of(headers.tensors, prefix)
    fill = {"transformer": _fill_transformer, "vae": _fill_vae, "t5": _fill_t5}.get(family)
    if fill:
        fill(info, shapes, beside)
        info.notes += contradictions(beside, family, vars(info))
    if unreadable and family != "unknown":
        info.notes.append(f"its LoRA cannot be read: {unreadable}")
    elif family == "unknown":
        kind = f"a LoRA that cannot be read: {unreadable}" if unreadable else looks_like(shapes)
        first = f"{', '.join(list(shapes)[:3])}{' ...' if len(shapes) > 3 else ''}"
        info.variant = f"unknown ({len(shapes)} tensors: {first}): {kind}"
    if lora:
        fill_lora(info, lora, headers, source, beside)
    _tell_run(info, beside)
    optional = {
        *info.optional_keys,
        *(n for n in shapes if is_lora(n) and (family != "lora" or n.endswith(".alpha"))),
    }
    counted = [n for n in shapes if n not in optional]
    others = [found[other][0] for other in families[1:]]
    info.num_parameters = sum(
        headers.tensors[prefix + n].numel for n in counted if not any(o and n.startswith(o) for o in others)
    )
    info.others |= {other: f"under {found[other][0] or 'no prefix'}" for other in families[1:]}
    return info


def _read_zero_stage(info: WeightsInfo, folder: Path) -> None:
    """Of a checkpoint that another project wrote. Its weights are whole whatever its optimizer files are."""
    try:
        info.zero_stage = stage(folder)
    except ValueError as error:
        info.notes.append(f"its optimizer state cannot be read: {error}")


# ----------------------------------------------------------------------------------------------- the models


def _fill_transformer(info: WeightsInfo, shapes: Shapes, beside: Beside) -> None:
    geometry = transformer_geometry(shapes, info.naming)
    if geometry is None:
        info.variant = "a part of a CogVideoX-type transformer"
        info.notes.append(looks_like(shapes))
        return
    stated, where = stated_geometry(beside)
    if geometry.variant() is None and stated:
        told = transformer_geometry(shapes, info.naming, **stated)
        if told != geometry:
            patch = "x".join(map(str, told.patch_size))
            table = f", {'a learned' if told.learned_table else 'no learned'} position table"
            info.notes.append(f"patch {patch}{table}: taken from {where}; the tensors do not tell")
            geometry = told
    for key, value in asdict(geometry).items():
        setattr(info, key, value)
    info.optional_keys = [n for n in shapes if is_optional(n, geometry.learned_table)]
    variant = geometry.variant()
    info.variant = variant.name if variant else "unknown CogVideoX-type"
    if variant:
        take_constants(info, variant)
        info.config = variant.config


def _fill_vae(info: WeightsInfo, shapes: Shapes, beside: Beside) -> None:
    for key, value in vae_geometry(shapes, info.naming).items():
        setattr(info, key, value)
    published = (info.channels, info.channel_multipliers, info.num_res_blocks) == (128, (1, 2, 2, 4), 3)
    info.variant = "CogVideoX VAE" if published and info.z_channels == 16 else "unknown CogVideoX-type VAE"
    # 2B and 5B have VAEs of one shape; only what stands beside the file tells their scales apart. A run that trains a
    # VAE never uses its scale: what its configuration says is no property of the weights.
    info.latent_scale = beside.config_json.get("scaling_factor")
    info.optional_keys = [name for name in shapes if name.startswith("loss.")]


def _fill_t5(info: WeightsInfo, shapes: Shapes, beside: Beside) -> None:
    blocks = [int(m[1]) for name in shapes if (m := re.match(r"encoder\.block\.(\d+)\.", name))]
    info.num_layers = 1 + max(blocks)
    info.hidden_size = info.text_hidden_size = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][1]
    bias = shapes.get("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    info.num_attention_heads = bias[1] if bias else None
    info.variant = (
        "T5-v1.1-XXL encoder" if (info.num_layers, info.hidden_size) == (24, 4096) else "T5 encoder"
    )
    info.optional_keys = [
        name for name in shapes if name.startswith(("decoder.", "lm_head.")) or name == T5_ALIAS
    ]


# ------------------------------------------------------------------------------------------- what belongs to it


def _tell_run(info: WeightsInfo, beside: Beside) -> None:
    """A checkpoint of a run of ours, or a file made from one: not the published weights, and used with its config."""
    if beside.is_run:
        info.config = str(beside.config_file)
    if beside.config_yaml and info.family in ("transformer", "lora"):
        _take_constants_of_run(info, beside)
    if info.provenance.get("merged"):
        info.variant += f" with {len(info.provenance['merged'])} LoRA merged in"
    if info.family == "unknown" or not (beside.is_run or "step" in info.provenance):
        return
    if info.family == "lora":
        info.variant += " (run of this project)"
    elif info.lora_rank is None:
        key = {"t5": "text_encoder"}.get(info.family, info.family)
        begun = not beside.config_yaml or beside.section("load").get(key)
        info.variant += ", fine-tuned" if begun else ", trained from random weights"


def _take_constants_of_run(info: WeightsInfo, beside: Beside) -> None:
    schedule = beside.section("model", "schedule", "params")
    used = {
        "latent_scale": beside.section("vae").get("scale_factor"),
        "snr_shift": schedule.get("snr_shift", 1.0),
    }
    for name, value in used.items():
        published = getattr(info, name)
        if value is not None and published not in (None, value):
            info.notes.append(f"{info.base} has {name.replace('_', ' ')} {published}, the run used {value}")
        setattr(info, name, published if value is None else value)


def _take_scale_of_neighbour(info: WeightsInfo, folder: Path) -> None:
    """The latent scale of the transformer in the same pipeline, where there is one or all agree."""
    found: dict[float, str] = {}
    for neighbour in sorted(p for p in folder.parent.glob("transformer*") if p.is_dir()):
        try:
            other = identify(neighbour)
        except (ValueError, OSError):
            continue
        if other.latent_scale is not None:
            found[other.latent_scale] = f"{other.variant} in {neighbour.name}/"
    if len(found) == 1:
        ((info.latent_scale, whose),) = found.items()
        info.notes.append(f"latent scale: that of the {whose}")
    elif info.variant == "CogVideoX VAE":
        scales = " or ".join(f"{v.latent_scale} ({v.name})" for v in (VARIANTS[0], VARIANTS[1]))
        info.notes.append(f"latent scale: {scales}; all published VAEs have one shape")


def _add_component(info: WeightsInfo, folder: Path) -> None:
    try:
        part = identify(folder)
    except ValueError as error:
        info.others[folder.name] = f"unreadable ({error})"
        return
    info.others[folder.name] = part.variant
    info.components[folder.name] = part


def _step(headers: Headers, beside: Beside) -> int | None:
    kept: list[Mapping[str, Any]] = [beside.state, headers.metadata]
    found = (known[key] for known in kept for key in ("step", "global_steps", "iteration") if key in known)
    return next((step for step in found if isinstance(step, int)), None)


def _dtype(headers: Headers, prefix: str) -> str:
    counts: Counter[str] = Counter()
    for name, tensor in headers.tensors.items():
        if name.startswith(prefix):
            counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0] if counts else "unknown"


def _is_states(source: Source) -> bool:
    return source.files[0].name.endswith("_model_states.pt")


def _layout(headers: Headers, source: Source, family: str) -> str:
    if _is_states(source):
        return "DeepSpeed run folder" if "ds_version" in headers.metadata else "SAT folder"
    container = "safetensors" if is_safetensors(source.files[0]) else "torch"
    amount = f"{len(source.files)} {container} shards" if len(source.files) > 1 else f"one {container} file"
    if source.layout == "diffusers folder":
        return f"{'transformers' if family == 't5' else 'diffusers'} folder, {amount}"
    if family == "vae" and container == "torch":
        return "SAT VAE file"
    return amount


def _format(headers: Headers, source: Source, info: WeightsInfo, beside: Beside) -> str:
    """WeightsInfo.format."""
    if _is_states(source):
        return "DeepSpeed run" if "ds_version" in headers.metadata or beside.is_run else "SAT"
    if info.family == "lora":
        return f"{lora_tool(headers, source, info.naming)} LoRA"
    if source.layout == "diffusers folder":
        return "transformers" if info.family == "t5" else "diffusers"
    if is_safetensors(source.files[0]):
        return "safetensors"
    return "SAT" if info.naming == "SAT" else "torch"
