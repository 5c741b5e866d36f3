"""Short names in a configuration become import paths, before the paths are looked for. Neither torch nor SAT."""

from __future__ import annotations

from typing import Any

from cogvideox.config_merge import ConfigError
from cogvideox.diffusion.names import GUIDANCES, LOSSES, SAMPLERS, TIMESTEPS, target_of
from cogvideox.optimizer_names import OPTIMIZERS, check_installed

_KNOWN = {
    "sampler": SAMPLERS,
    "guidance": GUIDANCES,
    "model.loss": LOSSES,
    "model.timesteps": TIMESTEPS,
    "train.optimizer": OPTIMIZERS,
}


def spell_out(tree: dict[str, Any]) -> None:
    """``sampler=heun`` and ``sampler.target=heun`` become the full path, in place; so do the others.

    Raises ConfigError for an unknown name, and for what the checks of targets and keys that follow would call by
    another name: a library that is missing, a learning rate that got lost, a LoRA's key without a LoRA.
    """
    for key, known in _KNOWN.items():
        _spell_out(tree, key, known)
    _check_optimizer(tree)
    _check_quantized_base(tree)


def _spell_out(tree: dict[str, Any], key: str, known: dict[str, str]) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section)
        if not isinstance(tree, dict):
            return
    part = tree.get(name)
    part = {"target": part} if isinstance(part, str) else part
    if isinstance(part, dict) and isinstance(part.get("target"), str):
        try:
            tree[name] = {**part, "target": target_of(part["target"], known, key)}
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _check_optimizer(tree: dict[str, Any]) -> None:
    """Before targets are looked for: a library that is missing, a learning rate that got lost with another target."""
    train = tree.get("train")
    part = train.get("optimizer") if isinstance(train, dict) else None
    if not isinstance(part, dict) or part.get("target") not in OPTIMIZERS.values():
        return
    try:
        check_installed(part["target"])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if "lr" not in (part.get("params") or {}):
        raise ConfigError(
            "train.optimizer.params.lr is missing: an optimizer that takes the place of another keeps none of its "
            "params; give train.optimizer.params.lr=... and what else differs from its defaults"
        )


def _check_quantized_base(tree: dict[str, Any]) -> None:
    section = tree.get("lora")
    if isinstance(section, dict) and section.get("quantize_base") is not None and "rank" not in section:
        raise ConfigError(
            f"lora.quantize_base={section['quantize_base']} without a LoRA: rounded weights cannot be trained, an "
            f"update of a few parts in a thousand would be lost in the rounding. Add configs/lora.yaml (or lora.rank), "
            f"or train in full without lora.quantize_base"
        )
