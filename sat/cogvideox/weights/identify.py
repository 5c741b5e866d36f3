"""``identify(path)``: which model a file or folder holds, from names and shapes alone: no torch, no data."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox.weights.geometry import (
    LORA_KEY,
    T5_ALIAS,
    Shapes,
    find_model,
    is_optional,
    lora_geometry,
    shapes_of,
    transformer_geometry,
    vae_geometry,
)
from cogvideox.weights.headers import Headers, is_safetensors, read_headers
from cogvideox.weights.locate import COMPONENTS, STATES, Source, locate
from cogvideox.weights.variants import variants_with


@dataclass
class WeightsInfo:
    """What ``identify`` found. ``str(info)`` is a table, ``info.as_dict()`` goes into json. None: does not apply."""

    path: Path
    family: str
    # transformer, vae, t5, lora or unknown: the main thing in the file.
    variant: str
    # "CogVideoX-5B", "unknown CogVideoX-type", "CogVideoX VAE", "LoRA for CogVideoX-2B" ...
    layout: str
    naming: str
    # Whose names the keys carry: SAT, diffusers, transformers, kohya.
    prefix: str
    dtype: str
    # Of most parameters.
    num_tensors: int
    num_parameters: int
    # Of this family alone, without LoRA and optional keys.
    size_bytes: int
    num_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    patch_size: tuple[int, int, int] | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    time_embed_dim: int | None = None
    text_hidden_size: int | None = None
    ofs_embed_dim: int | None = None
    learned_table: bool | None = None
    table_tokens: int | None = None
    channels: int | None = None
    channel_multipliers: tuple[int, ...] | None = None
    num_res_blocks: int | None = None
    z_channels: int | None = None
    latent_scale: float | None = None
    snr_shift: float | None = None
    published_dtype: str | None = None
    # The precision the published model was trained in.
    config: str | None = None
    # The configuration file that fits.
    lora_rank: int | None = None
    lora_targets: list[str] = field(default_factory=list)
    lora_layers: int | None = None
    optional_keys: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    # Further models in the same file or folder.
    has_ema: bool = False
    has_optimizer: bool = False
    step: int | None = None
    refused_globals: list[str] = field(default_factory=list)
    # Names in the pickle for which loading refuses the file.

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        shown = {**self.as_dict(), "num_parameters": f"{self.num_parameters:,}"}
        shown["size_bytes"] = f"{self.size_bytes:,} ({self.size_bytes / 2**30:.2f} GiB)"
        shown["others"] = "; ".join(f"{name}: {what}" for name, what in self.others.items())
        rows = [(key, value) for key, value in shown.items() if value not in (None, "", (), [], False)]
        return "\n".join(f"{key.replace('_', ' '):<20} {_plain(value)}" for key, value in rows)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def identify(path: str | Path, component: str | None = None) -> WeightsInfo:
    """Identify a file or folder. ``component``: which part of a pipeline folder (transformer first by default).

    Reads headers only, under two seconds for any size. Raises ValueError where there is nothing to read (locate.py,
    headers.py); weights of another kind are no error: their family is "unknown".
    """
    source = locate(path, component)
    headers = read_headers(source.files)
    info = describe(headers, source)
    if component is None and source.path.is_dir():
        taken = [source.folder, *source.folder.parents]
        for folder in (source.path / name for name in COMPONENTS):
            if folder.is_dir() and folder not in taken:
                info.others[folder.name] = _summary(folder)
    return info


def describe(headers: Headers, source: Source) -> WeightsInfo:
    """``identify`` for headers that have been read."""
    found = {family: find_model(headers.tensors, family) for family in ("transformer", "vae", "t5")}
    families = [family for family, place in found.items() if place]
    lora = lora_geometry(shapes_of(headers.tensors))
    family = families[0] if families else "lora" if lora else "unknown"
    prefix, naming = found.get(family) or ("", lora["naming"] if lora else "unknown")
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
        step=next(
            (headers.metadata[k] for k in ("global_steps", "iteration") if k in headers.metadata), None
        ),
        refused_globals=headers.foreign_globals,
    )
    shapes = shapes_of(headers.tensors, prefix)
    {"transformer": _fill_transformer, "vae": _fill_vae, "t5": _fill_t5}.get(family, _fill_rest)(
        info, shapes, source
    )
    if lora:
        _fill_lora(info, lora)
    counted = [
        n for n in shapes if n not in info.optional_keys and (family == "lora" or not LORA_KEY.search(n))
    ]
    others = [found[other][0] for other in families[1:]]
    info.num_parameters = sum(
        headers.tensors[prefix + n].numel for n in counted if not any(o and n.startswith(o) for o in others)
    )
    info.others |= {other: f"under {found[other][0] or 'no prefix'}" for other in families[1:]}
    return info


def _summary(folder: Path) -> str:
    try:
        return identify(folder).variant
    except ValueError as error:
        return f"unreadable ({error})"


def _fill_transformer(info: WeightsInfo, shapes: Shapes, source: Source) -> None:
    geometry = transformer_geometry(shapes, info.naming)
    if geometry is None:
        info.variant = "a part of a CogVideoX-type transformer"
        return
    for key, value in dataclasses.asdict(geometry).items():
        setattr(info, key, value)
    info.optional_keys = [n for n in shapes if is_optional(n, geometry.learned_table)]
    variant = geometry.variant()
    info.variant = variant.name if variant else "unknown CogVideoX-type"
    if variant:
        info.latent_scale, info.snr_shift = variant.latent_scale, variant.snr_shift
        info.published_dtype, info.config = variant.dtype, variant.config


def _fill_vae(info: WeightsInfo, shapes: Shapes, source: Source) -> None:
    for key, value in vae_geometry(shapes, info.naming).items():
        setattr(info, key, value)
    published = (info.channels, info.channel_multipliers, info.num_res_blocks) == (128, (1, 2, 2, 4), 3)
    info.variant = "CogVideoX VAE" if published and info.z_channels == 16 else "unknown CogVideoX-type VAE"
    # 2B and 5B have VAEs of one shape; only a diffusers config beside the file tells their scales apart.
    config = source.folder / "config.json"
    if config.is_file():
        info.latent_scale = json.loads(config.read_text()).get("scaling_factor")
    info.optional_keys = [name for name in shapes if name.startswith("loss.")]


def _fill_t5(info: WeightsInfo, shapes: Shapes, source: Source) -> None:
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


def _fill_rest(info: WeightsInfo, shapes: Shapes, source: Source) -> None:
    if info.family == "unknown":
        names = ", ".join(list(shapes)[:3])
        info.variant = f"unknown ({len(shapes)} tensors: {names}{' ...' if len(shapes) > 3 else ''})"


def _fill_lora(info: WeightsInfo, lora: dict[str, Any]) -> None:
    info.lora_rank, info.lora_targets, info.lora_layers = lora["ranks"][-1], lora["targets"], lora["layers"]
    if len(lora["ranks"]) > 1:
        info.others["LoRA ranks"] = _plain(lora["ranks"])
    if info.family != "lora":
        info.variant += f" with LoRA (rank {info.lora_rank})"
        return
    fits = [v.name for v in variants_with(num_layers=lora["layers"], hidden_size=lora["width"])]
    info.num_layers, info.hidden_size = lora["layers"], lora["width"]
    info.variant = (
        f"LoRA for {' or '.join(fits) or f'a network of {info.num_layers} layers x {info.hidden_size}'}"
    )


def _dtype(headers: Headers, prefix: str) -> str:
    counts: Counter[str] = Counter()
    for name, tensor in headers.tensors.items():
        if name.startswith(prefix):
            counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0] if counts else "unknown"


def _layout(headers: Headers, source: Source, family: str) -> str:
    if source.files[0].name == STATES:
        return "DeepSpeed run folder" if "ds_version" in headers.metadata else "SAT folder"
    container = "safetensors" if is_safetensors(source.files[0]) else "torch"
    amount = f"{len(source.files)} {container} shards" if len(source.files) > 1 else f"one {container} file"
    if source.layout == "diffusers folder":
        return f"{'transformers' if family == 't5' else 'diffusers'} folder, {amount}"
    if family == "vae" and container == "torch":
        return "SAT VAE file"
    return amount
