"""What ``VideoDiffusion.load_weights`` does: checks first, from headers alone, then weights, then LoRAs."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch

from cogvideox.build import factory
from cogvideox.model.lora import adapted_layers, attach_lora, inject_lora, lora_scales
from cogvideox.model.quantize import check_method, quantize_base
from cogvideox.system_text import load_text_encoders
from cogvideox.weights import load
from cogvideox.weights.fill import LoadReport
from cogvideox.weights.identify import WeightsInfo, identify
from cogvideox.weights.lora import apply as apply_lora
from cogvideox.weights.lora.file import LoraFile

logger = logging.getLogger("cogvideox")

System = Any
"""A VideoDiffusion, which imports this file."""


def check_weights(system: System) -> list[tuple[LoraFile, float]]:
    """Compare the headers of what ``load`` names with the system, and read the LoRAs; errors as of ``load_weights``."""
    section, infos = system.config.load, {}
    lora = system.config.lora
    if lora is not None:  # patterns without a match, before weights are read
        adapted_layers(
            system.transformer, lora.layers, lora.transformer_layers, lora.rank_pattern, lora.alpha_pattern
        )
        if lora.quantize_base is not None:
            check_method(lora.quantize_base, "lora.quantize_base")
    if section.transformer:
        infos["transformer"] = load.check_transformer(
            system.transformer, section.transformer, ema=section.ema
        )
    if section.vae:
        infos["vae"] = identify(section.vae, "vae")
    _check_constants(system, infos)
    _settle_precision(system, infos.get("transformer"))
    return _read_loras(system, infos.get("transformer"))


def load_weights(system: System) -> list[LoadReport]:
    """Load what ``load`` names. Errors name the file, what it holds and what was expected; see ``weights.load``."""
    section, reports = system.config.load, []
    loras = check_weights(system)  # headers are compared first, heavy work comes after
    if section.transformer:
        reports.append(
            load.load_transformer(system.transformer, section.transformer, ema=section.ema, base_only=True)
        )
    reports += system.frozen_vae.load()
    reports += load_text_encoders(system.conditioner.embedders, section)
    _warn_about_random_weights(system)
    return reports + _apply_loras(system, loras)


def _read_loras(system: System, info: WeightsInfo | None) -> list[tuple[LoraFile, float]]:
    """Those of ``load.lora`` and, first, that of a full checkpoint with LoRA in ``load.transformer``."""
    section = system.config.load
    sources = [(source.path, source.strength, source.alpha) for source in section.loras]
    named = [Path(path).expanduser() for path, *_ in sources]
    if info is not None and info.lora_rank and Path(section.transformer).expanduser() not in named:
        sources.insert(0, (section.transformer, 1.0, None))
    return apply_lora.read_loras(sources, system.transformer, ema=section.ema)


def _apply_loras(system: System, loras: list[tuple[LoraFile, float]]) -> list[LoadReport]:
    """Without the section ``lora``: into the weights, or beside them. With it, the last one starts the adapters."""
    section, start = system.config.lora, None
    if section is not None and loras:
        *loras, start = loras
    merge = section is not None or system.config.sample is None or system.config.sample.merge_lora
    total, reports = apply_lora.applied(loras, "merged" if merge else "kept beside the weights")
    if merge:
        apply_lora.add_to_network(system.transformer, total)
    else:
        attach_lora(system.transformer, apply_lora.adapter_matrices(total))
    if section is not None:
        if section.quantize_base is not None:
            quantize_base(system.transformer, section.quantize_base)
        generator = torch.Generator().manual_seed(system.config.seed)
        wrapped = inject_lora(
            system.transformer,
            section.rank,
            section.alpha,
            section.layers,
            section.transformer_layers,
            generator,
            rank_pattern=section.rank_pattern,
            alpha_pattern=section.alpha_pattern,
            rslora=section.rslora,
            dropout=section.dropout,
            dora=section.dora,
        )
        logger.info("lora: %d layers are adapted, %s ... %s", len(wrapped), wrapped[0], wrapped[-1])
    if start is not None:
        file, strength = start
        scales = lora_scales(system.transformer)
        reports.append(apply_lora.start_adapters(system.transformer, file, strength, scales))
    return reports


def _check_constants(system: System, infos: dict[str, WeightsInfo]) -> None:
    """The latent scale and the SNR shift belong to published weights; another value trains and samples garbage."""
    force, schedule = system.config.load.force_constants, factory(system.config.model.schedule)
    for info in infos.values():
        scale = system.config.vae.scale_factor
        load.check_constant(info, "vae.scale_factor", scale, info.latent_scale, force=force)
    shift = inspect.signature(schedule).parameters.get("snr_shift")  # its default is what params say
    if "transformer" in infos and shift is not None:
        info, key = infos["transformer"], "model.schedule.params.snr_shift"
        load.check_constant(info, key, shift.default, info.snr_shift, force=force)


def _settle_precision(system: System, info: WeightsInfo | None) -> None:
    """Put the checkpoint's own precision where ``sample.precision`` is null; refuse one that overflows."""
    sample, force = system.config.sample, system.config.load.force_fp16
    if sample is not None and sample.precision is None:
        sample.precision = "fp32" if info is None else load.own_precision(info, "sample.precision")
        source = "the network's random weights" if info is None else info.path
        logger.info("sample.precision is null: %s, as %s", sample.precision, source)
    for name in ("train", "sample") if info is not None else ():
        section = getattr(system.config, name)
        if section is not None:
            load.check_precision(info, section.precision, f"{name}.precision", force=force)


def _warn_about_random_weights(system: System) -> None:
    section = system.config.load
    for name in ("transformer", "vae"):
        if getattr(section, name) is None:
            logger.warning("load.%s is not set: the %s starts from random weights", name, name)
