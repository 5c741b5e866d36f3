"""Validation loss of a checkpoint, as in training; of two, the difference clip by clip."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox import environment
from cogvideox.config import Config, ConfigError, to_yaml
from cogvideox.sampling.sidecar import config_difference
from scripts.evaluate.subject import Subject, add_subject_arguments, read_subjects

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.evaluation.clips import FixedClips
    from cogvideox.evaluation.paired import Difference
    from cogvideox.evaluation.timestep_grid import TimestepGrid

COMPARABLE = ("model.schedule", "model.loss", "model.offset_noise", "vae", "load.vae")
"""Where two checkpoints differ in these, their losses are of different things."""


def main(argv: list[str]) -> int:
    """1 where the second checkpoint is worse by more than two standard errors."""
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate validation", description=__doc__)
    add_subject_arguments(parser, most=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, clip by clip, here")
    arguments, subjects = read_subjects(parser, argv, most=2)
    for subject in subjects:
        check(subject.config)
    config = subjects[0].config
    for key in differences(*(subject.config for subject in subjects)) if len(subjects) == 2 else ():
        say(f"the two differ in {key}: their losses are not of the same thing")
    if arguments.dry_run:
        print("\n".join(f"# {subject.name}\n{to_yaml(subject.config)}" for subject in subjects))
        return 0
    grid, keys, measured = measure(config, subjects)
    training = all("training" in losses for losses in measured)
    compared = compare(grid, *measured) if len(measured) == 2 else {}
    if environment.rank() == 0:
        columns = [summary(grid, losses) for losses in measured]
        print_table(
            config, [subject.name for subject in subjects], columns, compared, len(keys), len(grid.timesteps)
        )
        if not training:
            print("data.path is null: no training subset to compare with")
        if arguments.json is not None:
            write_json(arguments.json, grid, keys, subjects, measured, columns, compared)
    return int(bool(compared) and compared["val/loss"].is_worse)


def check(config: Config) -> None:
    """ConfigError for what is missing, before anything is loaded."""
    for name in ("train", "data"):
        if getattr(config, name) is None:
            raise ConfigError(
                f"the section {name} is missing: name the configuration that was trained, --base FILE..."
            )
    if config.data.validation_path is None:
        raise ConfigError("data.validation_path is missing: a folder of held-out videos with captions")
    for key in ("path", "validation_path"):
        path = getattr(config.data, key)
        if path is not None and not Path(path).expanduser().exists():
            null = ", or data.path=null for none of the training clips" if key == "path" else ""
            raise ConfigError(f"data.{key}={path}: not there; say where it is: data.{key}=DIR{null}")


def differences(a: Config, b: Config) -> list[str]:
    """``key: value -> value`` wherever the two configurations differ in what makes losses comparable."""
    changed = config_difference(dataclasses.asdict(a), dataclasses.asdict(b))
    return [
        f"{key}: {old} -> {new}"
        for key, (old, new) in changed.items()
        if any(key == known or key.startswith(f"{known}.") for known in COMPARABLE)
    ]


def measure(
    config: Config, subjects: list[Subject]
) -> tuple[TimestepGrid, list[str], list[dict[str, np.ndarray]]]:
    """(grid, keys of the held-out clips, for each subject ``held_out`` and ``training`` (clips, timesteps)).

    Clips, noise and timesteps are those of ``config``, the first one's.
    """
    # torch, SAT and transformers are imported only now: a mistake above answers at once.
    from cogvideox import dist
    from cogvideox.data.overlap import warn_of_overlap
    from cogvideox.engine.logging import get_logger
    from cogvideox.evaluation.clips import drawn_clips, first_clips
    from cogvideox.evaluation.held_out import clip_count, fixed_losses
    from scripts.reproduce import load_system
    from train_video import open_data

    dist.init(config.train.timeout_minutes)
    get_logger()  # from here on rank 0 speaks
    held_out_set = open_data(config, config.data.validation_path)
    training_set = None if config.data.path is None else open_data(config, config.data.path)
    clips: dict[str, FixedClips] = {
        "held_out": first_clips(held_out_set, clip_count(config), "data.validation_path")
    }
    if training_set is not None:
        if dist.is_main():
            warn_of_overlap(training_set, held_out_set)
        count = len(clips["held_out"])
        clips["training"] = drawn_clips(training_set, count, config.seed, "data.path")
    measured, grid = [], None
    for subject in subjects:
        system = load_system(subject.config)
        if not hasattr(system, "losses_at"):
            raise ConfigError(
                f"{subject.name}: system.target={subject.config.system.target} has no losses_at"
            )
        losses = fixed_losses(config, system)
        if grid is not None and losses.grid != grid:
            raise ConfigError(
                f"{subject.name} has {losses.grid.num_timesteps} timesteps, {subjects[0].name} has "
                f"{grid.num_timesteps}: their losses cannot be compared"
            )
        grid = losses.grid
        measured.append({name: losses(system, chosen) for name, chosen in clips.items()})
        del system  # before the next one is loaded
    return grid, clips["held_out"].keys, measured


def summary(grid: TimestepGrid, losses: dict[str, np.ndarray]) -> dict[str, float]:
    """The names of ``metrics.jsonl`` -> values, without those that compare."""
    from cogvideox.evaluation.held_out import loss_metrics

    metrics = loss_metrics(grid, losses["held_out"], "val/loss")
    if "training" in losses:
        metrics |= loss_metrics(grid, losses["training"], "val/train_loss")
        metrics["val/gap"] = metrics["val/loss"] - metrics["val/train_loss"]
    return metrics


def compare(
    grid: TimestepGrid, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> dict[str, Difference]:
    """Name -> the paired difference, for the losses of each clip and those by band."""
    from cogvideox.evaluation.paired import paired_difference

    compared = {}
    for part, name in (("held_out", "val/loss"), ("training", "val/train_loss")):
        if part in before:
            a, b = before[part], after[part]
            compared[name] = paired_difference(grid.mean(a), grid.mean(b))
            bands = zip(grid.by_band(a).items(), grid.by_band(b).values(), strict=True)
            compared |= {f"{name}_by_t/{band}": paired_difference(old, new) for (band, old), new in bands}
    return compared


def print_table(
    config: Config,
    names: list[str],
    columns: list[dict[str, float]],
    compared: dict[str, Difference],
    clips: int,
    timesteps: int,
) -> None:
    print(f"{clips} clips of {config.data.validation_path}, {timesteps} timesteps each, seed {config.seed}")
    for number, name in enumerate(names, 1):
        print(f"  ({number}) {name}")
    heads = [f"({number})" for number in range(1, len(names) + 1)] + (["(2) - (1)", "+-"] if compared else [])
    print(f"{'':30}" + "".join(f"{head:>12}" for head in heads))
    for key in columns[0]:
        row = [f"{column[key]:12.5f}" for column in columns]
        if key in compared:
            error = compared[key].standard_error
            row += [f"{compared[key].mean:+12.5f}", f"{'':>12}" if error is None else f"{error:12.5f}"]
        print(f"{key:30}" + "".join(row))
    if compared:
        print(verdict(compared["val/loss"]))


def verdict(difference: Difference) -> str:
    if difference.standard_error is None:
        return "one clip has no standard error: more are needed to say which is better"
    if abs(difference.mean) <= 2 * difference.standard_error:
        return "no difference beyond two standard errors"
    return f"the second is {'worse' if difference.is_worse else 'better'}, by more than two standard errors"


def write_json(
    path: Path,
    grid: TimestepGrid,
    keys: list[str],
    subjects: list[Subject],
    measured: list[dict[str, np.ndarray]],
    columns: list[dict[str, float]],
    compared: dict[str, Difference],
) -> None:
    results: dict[str, Any] = {
        "clips": keys,
        "timesteps": grid.timesteps.tolist(),
        "checkpoints": [
            {
                "name": subject.name,
                **metrics,
                "losses": {part: rows.tolist() for part, rows in losses.items()},
            }
            for subject, metrics, losses in zip(subjects, columns, measured, strict=True)
        ],
        "difference": {
            key: {"mean": d.mean, "standard_error": d.standard_error} for key, d in compared.items()
        },
    }
    write(path, results)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def say(text: str) -> None:
    if environment.rank() == 0:
        print(text)
