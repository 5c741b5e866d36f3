"""The LoRA part of ``identify``: rank, alpha, targets, and which published models it fits; from headers, no torch."""

from __future__ import annotations

import re

from cogvideox.weights.beside import Beside, stated_geometry
from cogvideox.weights.files.headers import Headers
from cogvideox.weights.files.locate import Source
from cogvideox.weights.geometry import LoraGeometry, has_lora, lora_geometry, shapes_of
from cogvideox.weights.info import WeightsInfo
from cogvideox.weights.lora import alpha as lora_alpha
from cogvideox.weights.lora import formats as lora_formats
from cogvideox.weights.variants import Variant, variants_with


def find_lora(headers: Headers) -> tuple[LoraGeometry | None, str]:
    """The LoRA, if there is one; else, where there are its matrices, why it cannot be read."""
    if not has_lora(headers.tensors):
        return None, ""
    try:
        return lora_geometry(shapes_of(headers.tensors)), ""
    except ValueError as error:
        return None, str(error)


def fill_lora(
    info: WeightsInfo, lora: LoraGeometry, headers: Headers, source: Source, beside: Beside
) -> None:
    info.lora_ranks = sorted(set(lora.ranks.values()))
    info.lora_rank, info.lora_layers = info.lora_ranks[-1], lora.num_layers
    info.lora_targets, info.lora_tensors = _targets(lora), 2 * len(lora.ranks)
    if 0 in info.lora_ranks:
        info.notes.append("rank 0: there is nothing in these LoRA matrices")
    else:
        _fill_alpha(info, lora, headers, source)
    if info.family != "lora":
        info.variant += f" with {lora.names.method} (rank {info.lora_rank})"
        return
    info.num_layers, info.hidden_size = lora.num_layers, lora.hidden_size
    fits = _fitting(info, beside)
    if len(fits) == 1:
        take_constants(info, fits[0])
        info.config = fits[0].config
    size = f"{info.num_layers} layers x {info.hidden_size or 'unknown width'}"
    info.variant = f"{lora.names.method} for {' or '.join(v.name for v in fits) or f'a network of {size}'}"


def _fitting(info: WeightsInfo, beside: Beside) -> list[Variant]:
    """The published models that a LoRA may be for. Only a run's configuration tells those of one size apart."""
    stated, _ = stated_geometry(beside)
    section = beside.section("model", "transformer")
    if stated and section:
        keys = ("num_layers", "hidden_size", "in_channels", "ofs_embed_dim")
        return variants_with(**{key: section.get(key) for key in keys}, **stated)
    fits = variants_with(num_layers=info.num_layers, hidden_size=info.hidden_size)
    if fits or info.hidden_size is None:
        return fits
    return [v for v in variants_with(hidden_size=info.hidden_size) if v.num_layers >= info.num_layers]


def _targets(lora: LoraGeometry) -> list[str]:
    """What is adapted inside a layer, and outside: SAT's layers in SAT's names, else diffusers' modules."""
    if lora.names.format == "SAT":
        layers = (lora_formats.sat_layer(module)[0] for module in lora.names.down)
        found = (
            re.sub(r"^transformer\.layers\.\d+\.", "", re.sub(r"(?<=adaLN_modulations\.)\d+", "*", layer))
            for layer in layers
        )
    else:
        found = (re.sub(r"^transformer_blocks\.\d+\.", "", module) for module in lora.ranks)
    return sorted(set(found))


def _fill_alpha(info: WeightsInfo, lora: LoraGeometry, headers: Headers, source: Source) -> None:
    try:
        scales, where = lora_alpha.find(lora.names, lora.ranks, headers, source)
    except ValueError as error:
        info.lora_alpha_source = str(error)
        return
    info.lora_alpha, info.lora_alpha_source = lora_alpha.common_alpha(scales, lora.ranks), where


def take_constants(info: WeightsInfo, variant: Variant) -> None:
    """The constants that belong to a published model."""
    info.base = variant.name
    info.latent_scale, info.snr_shift = variant.latent_scale, variant.snr_shift
    info.published_dtype = variant.dtype


def lora_tool(headers: Headers, source: Source, naming: str) -> str:
    """Which tool's file it is. diffusers' names without its ``transformer.`` are PEFT's own; those with
    ``.processor.`` are from before PEFT."""
    names = headers.tensors
    is_old = any(".processor." in name for name in names)
    is_peft = source.files[0].stem == "adapter_model" or not any(n.startswith("transformer.") for n in names)
    return "PEFT" if naming == "diffusers" and is_peft and not is_old else naming
