"""What a run spends where: seconds and peak memory by phase (load, cache, train, validate, preview, save).

A phase ends where the next begins, so the seconds add up to the life of the process. No device is waited for: the
allocator counts on the host.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

_GIB = 2**30
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter(Protocol):
    """Peaks in GiB since the last ``reset``, by kind; the sizes of now where no peak can be had."""

    def reset(self) -> None: ...

    def peaks(self) -> dict[str, float]: ...


class DeviceMeter:
    """``alloc``: of live tensors; ``reserved``: of what the allocator holds, its cache included."""

    def __init__(self, device: torch.device):
        self._device, self._backend = device, torch.get_device_module(device)

    def reset(self) -> None:
        self._backend.reset_peak_memory_stats(self._device)

    def peaks(self) -> dict[str, float]:
        return {
            "alloc": self._backend.max_memory_allocated(self._device) / _GIB,
            "reserved": self._backend.max_memory_reserved(self._device) / _GIB,
        }


class ResidentMeter:
    """``rss``: the process's resident size, without those of its loader's workers.

    Linux counts the peak since a reset. Where that is not allowed the size at the end of a phase stands for it, and
    where there is no /proc the peak since the start of the process.
    """

    def __init__(self) -> None:
        self._resets = os.access(_CLEAR, os.W_OK)

    def reset(self) -> None:
        if self._resets:
            try:
                _CLEAR.write_text("5")  # the high-water mark alone (proc(5))
            except OSError:
                self._resets = False

    def peaks(self) -> dict[str, float]:
        try:
            sizes = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
            return {"rss": int(sizes["VmHWM" if self._resets else "VmRSS"].split()[0]) / 2**20}
        except (OSError, KeyError):
            unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
            return {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB}


class Resources:
    """``with resources("validate"): ...``; the phase around it goes on after it."""

    def __init__(self, device: torch.device, phase: str = "load", meter: Meter | None = None):
        """phase: what the process has been in since its start. meter: for tests."""
        self._meter = meter or (ResidentMeter() if device.type == "cpu" else DeviceMeter(device))
        self.phase = phase
        self._since = time.monotonic() - _seconds_since_start()
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, dict[str, float]] = {}

    def begin(self, phase: str) -> None:
        """End the phase of now and begin another."""
        self._settle()
        self.phase = phase
        self._meter.reset()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        around = self.phase
        self.begin(phase)
        try:
            yield
        finally:
            self.begin(around)

    def seconds(self) -> dict[str, float]:
        """By phase, earlier lives of the run included."""
        self._settle()
        return dict(self._seconds)

    def peaks(self) -> dict[str, dict[str, float]]:
        """Phase -> kind -> GiB, the most at any time it was in this phase; earlier lives included."""
        self._settle()
        return {phase: dict(kinds) for phase, kinds in self._peaks.items()}

    def metrics(self) -> dict[str, float]:
        """For a log line: ``mem/rss_gib`` or ``mem/alloc_gib`` ..., over all phases, and ``mem/<phase>_rss_gib`` ..."""
        return memory_metrics(self.peaks())

    def state(self) -> dict[str, dict]:
        return {"seconds": self.seconds(), "peaks": self.peaks()}

    def load(self, state: Mapping[str, dict]) -> None:
        """Add what earlier lives of the run spent."""
        for phase, seconds in state["seconds"].items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        for phase, kinds in state["peaks"].items():
            self._note(phase, kinds)

    def _settle(self) -> None:
        now = time.monotonic()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._since
        self._since = now
        self._note(self.phase, self._meter.peaks())

    def _note(self, phase: str, kinds: Mapping[str, float]) -> None:
        self._peaks[phase] = highest([self._peaks.get(phase, {}), kinds])


def highest(sizes: list[Mapping[str, float]]) -> dict[str, float]:
    """The largest of each key."""
    return {
        key: max(each.get(key, 0.0) for each in sizes) for key in dict.fromkeys(k for s in sizes for k in s)
    }


def memory_metrics(peaks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Phase -> kind -> GiB, as the names of a log line."""
    total = {f"mem/{kind}_gib": size for kind, size in highest(list(peaks.values())).items()}
    return total | {
        f"mem/{phase}_{kind}_gib": size for phase, kinds in peaks.items() for kind, size in kinds.items()
    }


def _seconds_since_start() -> float:
    """Of this process; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError, ValueError):
        return 0.0
    return max(uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"), 0.0)  # field 22, starttime
