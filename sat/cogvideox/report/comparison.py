"""Several runs against each other: what differs in what they were told, and whether what came out differs too."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogvideox.report import settings
from cogvideox.report.run_folder import RunFolder, read_run
from cogvideox.report.series import last, series
from cogvideox.report.verdict import BETTER, EVEN, UNKNOWN, WORSE, judged, skipped_clips
from cogvideox.sampling.drift import MEASURES


def read_runs(paths: Sequence[str | Path]) -> list[RunFolder]:
    """ValueError for a folder that is no run, one given twice, a single one, or runs that share no metric."""
    runs = [read_run(path) for path in paths]
    if len(runs) < 2:
        raise ValueError(
            f"{len(runs)} run to compare: name two or more (one alone: python -m scripts.report RUN)"
        )
    seen: set[Path] = set()
    for run in runs:
        if run.path.resolve() in seen:
            raise ValueError(f"{run.path} is named twice")
        seen.add(run.path.resolve())
    measured = [
        {
            name
            for record in run.records
            for name, value in record.items()
            if name != "step" and value is not None
        }
        for run in runs
    ]
    if not set.intersection(*measured):
        found = "; ".join(
            f"{run.path}: {', '.join(sorted(names)[:4]) or 'nothing'}"
            for run, names in zip(runs, measured, strict=True)
        )
        raise ValueError(f"these runs have no metric in common, there is nothing to compare ({found})")
    return runs


def short_names(runs: Sequence[RunFolder]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = [os.sep.join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def differences(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """Key of the configuration -> its value in each run, for those that differ."""
    rows = settings.differing([run.config for run in runs])
    return {key: [settings.shown(value) for value in values] for key, values in rows.items()}


def other_differences(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """Ranks and versions, dataset, starts: whichever differ."""
    rows = {
        "ranks and versions": [run.versions for run in runs],
        "dataset": [_dataset(run) for run in runs],
        "starts": [str(run.summary.get("attempts") or 1 + len(run.restarts)) for run in runs],
        "skipped steps": [str(run.skipped_steps) for run in runs],
        "clips put aside": [str(skipped_clips(run)) for run in runs],
    }
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _dataset(run: RunFolder) -> str:
    facts = run.dataset
    if isinstance(facts, dict):
        return ", ".join(f"{key} {settings.shown(value)}" for key, value in facts.items())
    return "not known" if facts is None else str(facts)


# ---------------------------------------------------------------------------------------------------- final numbers


@dataclass(frozen=True)
class Number:
    """One row of the final numbers. best: the places of the best values, none where it makes no sense."""

    name: str
    values: list[float | None]
    texts: list[str]
    best: set[int]


_Rows = list[tuple[str, Callable[[RunFolder], float | None], Callable[[float], str], str | None]]


def final_numbers(runs: Sequence[RunFolder]) -> list[Number]:
    """Rows that at least one run has a value for."""
    common = last_common_step(runs, "val/loss")
    rows: _Rows = [
        ("steps", lambda run: float(run.step), "{:.0f}".format, None),
        ("train/loss, last tenth", _last_tenth, "{:.4f}".format, None),
        (f"val/loss at step {common}", lambda run: _at(run, "val/loss", common), "{:.4f}".format, "low"),
        ("val/loss, newest", lambda run: last(run.records, "val/loss"), "{:.4f}".format, "low"),
        ("val/loss, lowest", _lowest, "{:.4f}".format, "low"),
        ("val/delta", lambda run: last(run.records, "val/delta"), "{:+.4f}".format, "low"),
        ("val/gap", lambda run: last(run.records, "val/gap"), "{:+.4f}".format, None),
        *(
            (f"{name} drift", lambda run, name=name: _drift(run, name), "{:+.0%}".format, "near")
            for name in MEASURES
        ),
        ("s/step, median", _step_seconds, "{:.3f}".format, "low"),
        ("samples/s", lambda run: last(run.records, "perf/samples_s"), "{:.2f}".format, "high"),
        ("MFU", lambda run: last(run.records, "perf/mfu"), "{:.1%}".format, "high"),
        ("peak memory, GiB", _peak_memory, "{:.2f}".format, "low"),
    ]
    numbers = []
    for name, of, pattern, wanted in rows:
        values = [of(run) for run in runs]
        if any(value is not None for value in values):
            texts = [settings.ABSENT if value is None else pattern(value) for value in values]
            numbers.append(
                Number(name, values, _with_errors(runs, name, texts), _best(values, texts, wanted))
            )
    return numbers


def _best(values: list[float | None], texts: list[str], wanted: str | None) -> set[int]:
    known = {index: value for index, value in enumerate(values) if value is not None}
    if wanted is None or len(known) < 2:
        return set()
    rank = {"low": lambda v: v, "high": lambda v: -v, "near": abs}[wanted]
    first = min(known, key=lambda index: rank(known[index]))
    best = {index for index in known if texts[index] == texts[first]}
    return best if len(best) < len(known) else set()  # all alike: none is the best


def _with_errors(runs: Sequence[RunFolder], name: str, texts: list[str]) -> list[str]:
    if name != "val/delta":
        return texts
    errors = [last(run.records, "val/delta_se") for run in runs]
    return [text if e is None else f"{text} ± {e:.4f}" for text, e in zip(texts, errors, strict=True)]


def last_common_step(runs: Sequence[RunFolder], name: str) -> int | None:
    steps = set.intersection(*({int(step) for step in series(run.records, name)[:, 0]} for run in runs))
    return max(steps, default=None)


def _at(run: RunFolder, name: str, step: int | None) -> float | None:
    return next((value for at, value in series(run.records, name) if at == step), None)


def _last_tenth(run: RunFolder) -> float | None:
    values = series(run.records, "train/loss")[:, 1]
    return float(values[-max(len(values) // 10, 1) :].mean()) if len(values) else None


def _lowest(run: RunFolder) -> float | None:
    values = series(run.records, "val/loss")[:, 1]
    return float(values.min()) if len(values) else None


def _drift(run: RunFolder, name: str) -> float | None:
    return last(run.records, f"preview/{name}_drift")


def _step_seconds(run: RunFolder) -> float | None:
    values = series(run.records, "perf/step_s")[:, 1]
    return float(np.median(values)) if len(values) else None


def _peak_memory(run: RunFolder) -> float | None:
    for name in ("mem/reserved_gib", "mem/alloc_gib", "mem/rss_gib"):
        values = series(run.records, name)[:, 1]
        if len(values):
            return float(values.max())
    return None


# ------------------------------------------------------------------------------------------------------ is it real?


@dataclass(frozen=True)
class Contest:
    """The newest held-out loss of a run less that of the first run, and whether that is beyond its error."""

    difference: float | None
    error: float | None
    kind: str
    # BETTER, WORSE, EVEN or UNKNOWN.
    words: str


def contest(first: RunFolder, other: RunFolder) -> Contest:
    """Paired over the held-out clips where both runs have the same ones, with the same noise and timesteps.

    With each clip's newest loss in both checkpoints the error is that of their paired differences, s / sqrt(n).
    Without, but with the same losses at step 0, the difference is that of the two val/delta, and its error is
    sqrt(se1^2 + se2^2): too large where the runs find the same clips hard, as they mostly do.
    """
    ours, theirs = (run.state.get("validation") or {} for run in (other, first))
    if not ours.get("clips") or not theirs.get("clips"):
        return _unknown(first, other, "the runs kept no losses by clip: unpaired, its error is not known")
    changed = [name for name in ("clips", "timesteps", "seed") if ours.get(name) != theirs.get(name)]
    if changed:
        return _unknown(first, other, f"measured with other {' and '.join(changed)}: not comparable", False)
    if ours.get("now") and theirs.get("now"):
        changes = np.array(ours["now"]) - np.array(theirs["now"])
        error = float(changes.std(ddof=1) / math.sqrt(len(changes))) if len(changes) > 1 else None
        steps = [run.state.get("step") for run in (other, first)]
        at = "" if steps[0] == steps[1] else f", step {steps[0]} against step {steps[1]}"
        return _judged(float(changes.mean()), error, f"paired over {len(changes)} clips{at}")
    deltas = [last(run.records, "val/delta") for run in (other, first)]
    errors = [last(run.records, "val/delta_se") for run in (other, first)]
    if ours.get("start") and ours["start"] == theirs.get("start") and None not in (*deltas, *errors):
        return _judged(
            deltas[0] - deltas[1], math.hypot(*errors), "same clips and start, errors added: an upper bound"
        )
    return _unknown(
        first, other, "no newest losses by clip, and other ones at step 0: unpaired, its error is not known"
    )


def _judged(difference: float, error: float | None, words: str) -> Contest:
    return Contest(difference, error, judged(difference, error), words)


def _unknown(first: RunFolder, other: RunFolder, words: str, is_comparable: bool = True) -> Contest:
    losses = [last(run.records, "val/loss") for run in (other, first)]
    is_known = is_comparable and None not in losses
    return Contest(losses[0] - losses[1] if is_known else None, None, UNKNOWN, words)


def sentence(name: str, first: str, found: Contest) -> str:
    """``b against a: held-out loss lower by 0.0123 ± 0.0030, beyond its error (paired over 64 clips)``"""
    if found.difference is None:
        return f"{name} against {first}: held-out losses cannot be compared ({found.words})"
    error = "" if found.error is None else f" ± {found.error:.4f}"
    ending = {BETTER: "better, beyond its error", WORSE: "worse, beyond its error", EVEN: "within its error"}
    judgement = f", {ending[found.kind]}" if found.kind in ending else ""
    way = "lower" if found.difference < 0 else "higher"
    size = f"{abs(found.difference):.4f}{error}"
    return f"{name} against {first}: held-out loss {way} by {size}{judgement} ({found.words})"


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column left-aligned, the others right-aligned."""
    table = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )
