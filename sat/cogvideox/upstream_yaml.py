"""YAML files written for CogVideo's own ``sat/`` folder, translated into this project's configuration.

``translate`` takes each key that it understands out of the mapping. A key without effect here is taken with a reason,
and all of those are reported together in the log; what is left in the end, or holds a value that this project cannot
express, is named in one ConfigError. Nothing is dropped in silence. The facts are in ``upstream_rules.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from cogvideox import environment
from cogvideox.config_merge import resolve_interpolations
from cogvideox.upstream_diffusion import translate_diffusion
from cogvideox.upstream_model import translate_model
from cogvideox.upstream_rules import (
    FIXED,
    KINDS,
    UPSTREAM_DATA_KEYS,
    UPSTREAM_MODEL_KEYS,
    UPSTREAM_MODULES,
    WITHOUT_EFFECT,
)
from cogvideox.upstream_run import translate_run, translate_sizes
from cogvideox.upstream_source import UpstreamSource

logger = logging.getLogger("cogvideox")

_OWN_SECTIONS = {"run", "seed", "system", "vae", "load", "lora", "train", "sampler", "guidance", "sample"}


def is_upstream(loaded: dict[str, Any]) -> bool:
    """Was this YAML mapping written for CogVideo's ``sat/`` folder?"""
    if "args" in loaded:
        return True
    model, data, deepspeed = (_mapping(loaded.get(name)) for name in ("model", "data", "deepspeed"))
    if UPSTREAM_MODEL_KEYS & model.keys() or UPSTREAM_DATA_KEYS & _mapping(data.get("params")).keys():
        return True
    # Here the optimizer has its home in train.optimizer; SAT reads it from DeepSpeed's section.
    return "optimizer" in deepspeed or any(t.split(".")[0] in UPSTREAM_MODULES for t in _targets(loaded))


def translate(upstream: dict[str, Any]) -> dict[str, Any]:
    """The same experiment as a mapping of this project's sections.

    Sections of which the files say nothing are left out, so that the result can be merged with files of this project.
    Raises ConfigError, one for all keys that cannot be translated. Logs the keys that have no effect here.
    """
    # Interpolations name upstream's keys: they are resolved before these are gone.
    source = UpstreamSource(resolve_interpolations(upstream))
    source.check_kinds(KINDS)
    mode = source.get("args.mode")
    training = source.has("deepspeed") or mode in ("finetune", "pretrain")
    result: dict[str, Any] = {"model": {}, "vae": {}, "load": {}, "train": {}, "sample": {}}
    for path, (allowed, why) in FIXED.items():
        source.only(path, *allowed, why=why)
    for path, reason in WITHOUT_EFFECT.items():
        source.ignore(path, reason)
    translate_sizes(source, result)
    translate_model(source, result, training)
    translate_diffusion(source, result, training)
    translate_run(source, result, mode, training)
    report = source.report(_OWN_SECTIONS)
    if report and environment.rank() == 0:
        logger.warning("CogVideo's YAML is translated.\n%s", report)
    return {name: section for name, section in result.items() if section not in ({}, None)}


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("target"), str):
            yield node["target"]
        node = list(node.values())
    for item in node if isinstance(node, list) else []:
        yield from _targets(item)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
