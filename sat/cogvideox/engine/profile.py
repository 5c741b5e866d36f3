"""A window of steps under torch's profiler, as a Chrome trace and a table of the most expensive operators.

``train.profile_steps=[11, 13]`` writes ``RUN/profile/rank0.json.gz`` (for ui.perfetto.dev or chrome://tracing) and
``RUN/profile/rank0.txt``. The steps of the window are slower: their times are not the run's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cogvideox import dist

logger = logging.getLogger("cogvideox")

_ROWS = 40


def check_profile(steps: list[int] | None, ranks: list[int], last_step: int, world_size: int) -> None:
    """ValueError for a window or a rank that the run does not have."""
    if steps is None:
        return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= last_step:
        raise ValueError(
            f"train.profile_steps={steps}: expected [first, last], two steps of 1 to train.steps={last_step}"
        )
    if not ranks or not all(0 <= rank < world_size for rank in ranks):
        raise ValueError(f"train.profile_ranks={ranks}: expected ranks of 0 to {world_size - 1}")


class ProfileWindow:
    """Records the steps ``first`` to ``last`` of this rank. A run resumed inside the window records the rest of it."""

    def __init__(self, run_dir: Path, steps: list[int] | None, ranks: list[int], device: torch.device):
        self.folder, self.device = run_dir / "profile", device
        self.steps = range(steps[0], steps[1] + 1) if steps and dist.rank() in ranks else range(0)
        self._profiler: Any = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a training step, numbered from 1."""
        if step not in self.steps:
            yield
            return
        if self._profiler is None:
            self._profiler = _profiler(self.device)
            self._profiler.start()
        with torch.profiler.record_function(f"step {step}"):
            yield
        if step == self.steps[-1]:
            self.close()

    def close(self) -> None:
        """Write what was recorded; a run that stops inside its window has a part of it."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank{dist.rank()}.json.gz"
        temporary = self.folder / f".{path.name}"
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
        spent = "self_cpu_time_total" if self.device.type == "cpu" else f"self_{self.device.type}_time_total"
        table = profiler.key_averages().table(sort_by=spent, row_limit=_ROWS, max_name_column_width=80)
        path.with_name(f"rank{dist.rank()}.txt").write_text(table + "\n")
        logger.info(f"profile of the steps {self.steps[0]} to {self.steps[-1]}: {path}")


def _profiler(device: torch.device) -> Any:
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] + ([getattr(kinds, device.type.upper())] if device.type != "cpu" else [])
    return torch.profiler.profile(activities=activities)
