"""Is this the run that the checkpoint belongs to? Its configuration against the present one, key by key.

A run goes on exactly only under the configuration it began with. Keys that leave what is trained as it is may change
(_FREE says which and why), and are listed; any other is refused, unless ``run.force`` accepts it. What a key points at
counts more than its name: a moved folder of clips is the same by its fingerprint, moved weights by their SHA-256.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cogvideox import dist
from cogvideox.config import Config, ConfigError, config_from_dict
from cogvideox.engine import checkpoint_folders, integrity
from cogvideox.engine.global_batch import clips_per_step, with_accumulation
from cogvideox.engine.optim import learning_rate_factor
from cogvideox.weights import provenance
from cogvideox.weights.files import hub
from cogvideox.weights.files.locate import COMPONENTS, locate

_FREE = {
    "names a folder, or asks for this very check": ["run.*", "train.resume"],
    "what is said, kept and measured of the training": [
        "train.log_every",
        "train.save_every",
        "train.keep_*",
        "train.validate_*",
        "train.validation_*",
        "train.preview_*",
        "train.profile_*",
        "train.timestep_bands",
        "train.trackers*",
        "data.validation_path",
        "sample.*",
        "sampler.*",
        "guidance.*",
    ],
    "when a run gives up": ["train.timeout_minutes", "train.max_nonfinite_steps"],
    "how clips are read, not which": [
        "data.num_workers",
        "data.clip_timeout_seconds",
        "data.cache_in_memory_gib",
    ],
    "the same numbers, recomputed or one by one": [
        "model.transformer.checkpoint_activations",
        "vae.slice_batch",
    ],
    "permissions": ["load.force_*"],
    "how ranks exchange what they exchange": [
        f"deepspeed.zero_optimization.{name}"
        for name in ("overlap_comm", "*_bucket_size", "contiguous_gradients", "reduce_scatter")
    ],
}
Result = TypeVar("Result")
_BATCH = ("train.batch_size", "train.gradient_accumulation_steps", "train.global_batch_size")


@dataclasses.dataclass(frozen=True)
class Difference:
    key: str
    old: Any
    new: Any
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}{f' ({self.remark})' if self.remark else ''}"


def check_same_run(config: Config) -> list[str]:
    """How ``config`` differs from that of the checkpoint the run will go on from, in words. Every rank must call.

    Before anything is built. Empty where there is no checkpoint. Raises ConfigError where a difference changes what is
    trained, unless ``run.force``: then those are in the list too.
    """
    return _on_main(lambda: _check(config))


def check_same_clips(config: Config, fingerprint: str | None) -> list[str]:
    """As ``check_same_run``, for the clips.  fingerprint: of the training set; needed on rank 0."""

    def check() -> list[str]:
        known = _record(_state(_folders(config))).get("dataset")
        if known is None or fingerprint is None or known == fingerprint:
            return []
        difference = Difference(
            f"data.path={config.data.path}", f"fingerprint {known[:12]}", fingerprint[:12], "other clips"
        )
        return _decided([], [difference], config, "the order of the clips goes on only over the same ones")

    return _on_main(check)


def recorded(config: Config, name: str) -> Any:
    """What the checkpoint that the run will go on from says of ``name`` (the trainer's ``facts``); None where nothing.

    Every rank must call.
    """
    return _on_main(lambda: _record(_state(_folders(config))).get(name))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Of two trees of mappings, leaf by leaf; a section that only one has counts as a leaf."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        path, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{path}.")
        elif before != after:
            found.append(Difference(path, before, after))
    return found


def _check(config: Config) -> list[str]:
    folders = _folders(config)
    saved = _saved_config(folders, Path(config.run.dir))
    if saved is None:
        return []
    try:
        # Read as a configuration of today, so that keys that are new since then hold their defaults.
        old = config_from_dict(saved)
    except ConfigError as error:
        if config.run.force:
            return [f"the configuration of {folders[0]} was not compared: {error}"]
        raise ConfigError(
            f"the configuration of {folders[0]} cannot be compared with this one: {error}. Go on without comparing "
            f"with run.force=true, or choose another run.dir"
        ) from error
    state = _state(folders)
    accepted, refused = [], []
    for difference in differences(dataclasses.asdict(old), dataclasses.asdict(config)):
        remark = _why_free(difference, config, state)
        if remark is None:
            refused.append(difference)
        else:
            accepted.append(dataclasses.replace(difference, remark=remark))
    return _decided(accepted, refused, config, f"{folders[0]} was made with another configuration")


def _decided(accepted: list[Difference], refused: list[Difference], config: Config, reason: str) -> list[str]:
    if refused and not config.run.force:
        raise ConfigError(
            f"{reason}: {'; '.join(map(str, refused))}. Set back what differs, choose another run.dir, or accept it "
            f"with run.force=true"
        )
    return [str(d) for d in accepted] + [f"{d} (changes the training; run.force)" for d in refused]


def _why_free(difference: Difference, config: Config, state: Mapping[str, Any]) -> str | None:
    """Why a difference leaves the training as it is; None if it does not."""
    key = difference.key
    for reason, patterns in _FREE.items():
        if any(fnmatchcase(key, pattern) for pattern in patterns):
            return reason
    if key == "train.steps":
        return _other_length(config, difference.old, state.get("step", 0))
    if key in _BATCH:
        ranks = dist.world_size()
        now = clips_per_step(with_accumulation(config.train, ranks), ranks)
        return f"still {now} clips per step" if now == state.get("global_batch_size") else None
    if key == "data.path":
        return "the clips are compared by their fingerprint"
    if key in ("data.latent_cache", "data.text_cache") and None not in (difference.old, difference.new):
        return "its entries go by what they were made from"
    section, _, name = key.partition(".")
    if section == "load" and name in COMPONENTS and None not in (difference.old, difference.new):
        known = _record(state).get("sources", {}).get(name, {}).get("sha256")
        if known and _sha256(difference.new, name) == known:
            return "moved: the same files by SHA-256"
    return None


def _other_length(config: Config, steps_before: int, step: int) -> str:
    """Always free: to train longer is what most people resume for. Where it bends the schedule, that is said."""
    train = config.train
    then, now = (
        learning_rate_factor(
            step,
            steps=steps,
            schedule=train.lr_schedule,
            warmup_steps=train.warmup_steps,
            min_ratio=train.min_lr_ratio,
        )
        for steps in (steps_before, train.steps)
    )
    if then == now:
        return "where the training ends"
    return (
        f"train.lr_schedule={train.lr_schedule} follows: the next step has {now:.3g} of the full learning rate, "
        f"{then:.3g} before"
    )


def _folders(config: Config) -> list[Path]:
    if config.train.resume == "never":
        return []  # checkpoint.py refuses a used folder
    return checkpoint_folders.find(Path(config.run.dir) / "checkpoints", config.train.resume).folders


def _saved_config(folders: list[Path], run_dir: Path) -> dict[str, Any] | None:
    """Of the newest checkpoint that has one that can be read; that of the run folder where none has."""
    for path in [*(folder / "config.yaml" for folder in folders), run_dir / "config.yaml"] if folders else []:
        try:
            saved = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue  # missing or damaged: checkpoint.py says so
        if isinstance(saved, dict):
            return saved
    return None


def _state(folders: list[Path]) -> dict[str, Any]:
    for folder in folders:
        try:
            return integrity.read_state(folder)
        except integrity.Damaged:
            continue
    return {}


def _record(state: Mapping[str, Any]) -> dict[str, Any]:
    return state.get(provenance.KEY, {})


def _sha256(path: str, component: str) -> str | None:
    try:
        source = locate(hub.resolve(path, component), component)
        return provenance.sha256([*source.files, *source.ema_files])
    except (ValueError, OSError):
        return None


def _on_main(check: Callable[[], Result]) -> Result:
    """The result of ``check`` on rank 0, or its ConfigError, on every rank."""
    result, problem = None, None
    if dist.is_main():
        try:
            result = check()
        except ValueError as error:
            problem = str(error)
    result, problem = dist.gather((result, problem))[0]
    if problem is not None:
        raise ConfigError(problem)
    return result


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
