"""What a run says: one console line per logging step, a bar with the time left, ``metrics.jsonl``, and trackers."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cogvideox import dist
from cogvideox.engine.events import Events
from cogvideox.engine.trackers import Trackers


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def get_logger() -> logging.Logger:
    """The logger ``cogvideox``: rank 0 speaks, the other ranks report errors only."""
    logger = logging.getLogger("cogvideox")
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        handler = _ConsoleHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if dist.is_main() else logging.ERROR)
    return logger


class Means:
    """Running means of tensors on their device; ranks and devices are only waited for when they are read.

    A 0-d tensor is one value, another one as many as it has elements (one for each clip of a batch). Values that are
    not finite do not count: a skipped step leaves the mean of the others, and a metric that exists in some steps only
    (the loss of a timestep band without a sample) may be NaN in the rest.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            value = value.detach().float()
            finite = torch.isfinite(value)
            if name not in self._sums:
                self._sums[name] = value.new_zeros(())
                self._counts[name] = value.new_zeros(())
            self._sums[name] += torch.where(finite, value, 0.0).sum()
            self._counts[name] += finite.sum()

    def state(self) -> dict[str, tuple[float, float]]:
        """Name -> (sum, count) of this rank; exact in JSON."""
        return {name: (self._sums[name].item(), self._counts[name].item()) for name in self._sums}

    def load(self, parts: Sequence[Mapping[str, tuple[float, float]]], device: torch.device) -> None:
        """Go on from what ``state()`` said: one, or several of which this rank takes over all."""
        self._sums.clear()
        self._counts.clear()
        for name, (total, count) in ((name, pair) for part in parts for name, pair in part.items()):
            for kept, value in ((self._sums, total), (self._counts, count)):
                value = torch.tensor(float(value), device=device)
                kept[name] = kept[name] + value if name in kept else value

    def flush(self) -> dict[str, float | None]:
        """Means over everything added on all ranks since the last flush (every rank must call); None: no value."""
        ranks = dist.gather(self.state())
        self._sums.clear()
        self._counts.clear()
        return combine(ranks)


def combine(parts: list[dict[str, tuple[float, float]]]) -> dict[str, float | None]:
    """Means from (sum, count) pairs, added in the order given."""
    names = dict.fromkeys(name for part in parts for name in part)
    means: dict[str, float | None] = {}
    for name in names:
        pairs = [part[name] for part in parts if name in part]
        total, count = math.fsum(p[0] for p in pairs), sum(p[1] for p in pairs)
        means[name] = total / count if count else None
    return means


class RunLog:
    """``metrics.jsonl``, the console line, the bar and the trackers of one run. Only rank 0's writes anything."""

    def __init__(self, run_dir: Path, *, steps: int, start: int, trackers: list[str]):
        """start: steps already done, -1 for a new run. Lines of ``metrics.jsonl`` after it are dropped: they will be
        made again, in a new run also that of step 0.
        """
        self.path = run_dir / "metrics.jsonl"
        self.steps, self.start, self.began = steps, max(start, 0), time.perf_counter()
        self.logger = get_logger()
        self._trackers: Trackers | None = None
        self._file = None
        if dist.is_main():
            run_dir.mkdir(parents=True, exist_ok=True)
            truncate(self.path, start)
            self._trackers = Trackers(trackers, run_dir, Events(run_dir))
            self._file = open(self.path, "a")
        # disable=None: no bar where stderr is not a terminal; the console lines carry the time left there.
        self._bar = tqdm(
            total=steps,
            initial=self.start,
            unit="step",
            dynamic_ncols=True,
            disable=None if dist.is_main() else True,
        )

    def advance(self) -> None:
        self._bar.update()

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
        """One step's line, everywhere. A value that is not finite is stored as null."""
        if self._file is None:
            return
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        self.logger.info(console_line(step, self.steps, clean, self._seconds_left(step)))
        self._trackers.log(step, {k: v for k, v in clean.items() if v is not None})

    def sync(self) -> None:
        """Before a checkpoint of this step is published: its lines reach the disk first."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self, tracker_seconds: float = 60.0) -> None:
        """tracker_seconds: how long each tracker may take to send what it still has."""
        self._bar.close()
        if self._trackers is not None:
            self._trackers.close(tracker_seconds)
        if self._file is not None:
            self._file.close()

    def _seconds_left(self, step: int) -> float | None:
        """None before the first step of this start."""
        done = step - self.start
        return (time.perf_counter() - self.began) / done * (self.steps - step) if done else None


def console_line(
    step: int, steps: int, record: Mapping[str, float | None], seconds_left: float | None
) -> str:
    """``step  120/1800  loss 0.1234  grad 0.56  lr 1.0e-04  0.181 s/step  data 0.002 s    9600 tok/s  left 0:05:12``"""
    columns = (
        ("train/loss", "loss {:.4f}"),
        ("val/loss", "val {:.4f}"),
        ("val/delta", "change {:+.4f}"),
        ("val/delta_se", "+- {:.4f}"),
        ("train/grad_norm", "grad {:8.3g}"),
        ("train/lr", "lr {:.2e}"),
        ("preview/saturation", "preview: saturation {:.3f}"),
        ("preview/brightness", "brightness {:.3f}"),
        ("preview/motion", "motion {:.4f}"),
        ("perf/step_s", "{:.3f} s/step"),
        ("perf/data_s", "data {:.3f} s"),
        ("perf/tokens_s", "{:6.0f} tok/s"),
        ("perf/mfu", "MFU {:5.1%}"),
        ("mem/rss_gib", "{:.1f} GiB"),
        ("mem/alloc_gib", "{:.1f} GiB"),
    )
    parts = [f"step {step:{len(str(steps))}d}/{steps}"]
    for name, pattern in columns:
        if name in record:
            value = record[name]
            parts.append(pattern.format(math.nan if value is None else value))
    if record.get("train/skipped_steps"):
        parts.append(f"skipped {record['train/skipped_steps']:.0f}")
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"left {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
    return "  ".join(parts)


def truncate(path: Path, step: int) -> None:
    """Keep the lines of ``metrics.jsonl`` up to ``step``; a line that a kill cut short goes too."""
    if not path.is_file():
        return
    _replace(path, [line for line, record in _records(path) if record["step"] <= step])


def forget(path: Path, step: int, prefix: str) -> None:
    """Drop from ``metrics.jsonl`` the lines of ``step`` with nothing but metrics that begin with ``prefix``."""
    if not path.is_file():
        return
    kept = [
        line
        for line, record in _records(path)
        if record["step"] != step or not all(k.startswith(prefix) for k in record.keys() - {"step"})
    ]
    _replace(path, kept)


def _replace(path: Path, lines: list[str]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines))
    os.replace(temporary, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, also of one that is being written."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_text().split("\n")
    for line in lines[:-1]:  # what follows the last newline was cut short
        yield line, json.loads(line)
