"""What sampling is doing: one line with the stage, how far it is, the time left and the memory in use."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

_GIB = 2**30
_STATM = Path("/proc/self/statm")


class Stages:
    """``with stages("denoising 2/10", total=50, unit="step") as advance: ... advance(1)``; the line goes at its end.

    ``left`` of all videos is added once one is finished: see ``finished``.
    """

    def __init__(self, device: torch.device, videos: int, is_shown: bool = True):
        self.device, self.is_shown = device, is_shown
        self._videos, self._done, self._seconds = videos, 0, 0.0

    @contextmanager
    def __call__(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        # A log file gets a line every ten seconds, not one per step.
        every = 0.1 if sys.stderr.isatty() else 10.0
        with tqdm(
            total=total,
            desc=name,
            unit=unit,
            disable=not self.is_shown,
            dynamic_ncols=True,
            leave=False,
            mininterval=every,
            postfix=self.note(),
        ) as bar:

            def advance(count: int = 1) -> None:
                bar.set_postfix_str(self.note(), refresh=False)
                bar.update(count)

            yield advance

    def finished(self, videos: int, seconds: float) -> None:
        """So many videos took so long."""
        self._done, self._seconds = self._done + videos, self._seconds + seconds

    def note(self) -> str:
        note = f"{memory_in_use(self.device) / _GIB:.1f} GiB"
        if 0 < self._done < self._videos:
            left = self._seconds / self._done * (self._videos - self._done)
            note += f", all videos {tqdm.format_interval(left)} left"
        return note


def memory_in_use(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, of the process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if _STATM.is_file():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # systems without /proc only tell the peak
    return peak if sys.platform == "darwin" else peak * 1024
