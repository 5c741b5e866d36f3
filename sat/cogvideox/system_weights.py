"""What ``VideoDiffusion.load_weights`` does: checks first, from headers alone, then weights, then LoRAs."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch

from cogvideox.build import factory
from cogvideox.model.lora import attach_lora, inject_lora
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
        generator = torch.Generator().manual_seed(system.config.seed)
        inject_lora(
            system.transformer,
            section.rank,
            section.alpha,
            section.layers,
            section.transformer_layers,
            generator,
        )
    if start is not None:
        file, strength = start
        scale = section.alpha / section.rank
        reports.append(apply_lora.start_adapters(system.transformer, file, strength, scale))
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
