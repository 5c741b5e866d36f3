"""What the loaders of all ranks put aside, united at the same step, kept in checkpoints, and told to people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from cogvideox import dist
from cogvideox.engine.events import Events
from cogvideox.engine.logging import get_logger

FILE = "quarantine.json"


class Quarantine(Protocol):
    """What a loader may offer as ``loader.quarantine``. The order of its batches must follow from ``entries``."""

    entries: list[dict[str, Any]]
    """What is out on this rank, as JSON values with at least ``clip``, ``reason``, ``step`` and ``rank``."""
    step: int | None
    """The step for which batches are drawn, from 1."""

    def load(self, entries: Iterable[dict[str, Any]]) -> None:
        """Have these out too, from the next batch on. ValueError where that is too much."""


class SharedQuarantine:
    """``RUN/quarantine.json``, the events and the checkpoint's share of ``loader.quarantine``; nothing without one."""

    def __init__(self, loader: Any, run_dir: Path, events: Events):
        self._own: Quarantine | None = getattr(loader, "quarantine", None)
        self._path, self._events = run_dir / FILE, events
        self._shared = 0  # of the own entries, known to all ranks and to the file

    def begin(self, step: int) -> None:
        if self._own is not None:
            self._own.step = step

    def share(self) -> None:
        """Unite what the ranks put aside since the last time. Every rank must call, after the same step."""
        if self._own is None or not dist.any_rank(len(self._own.entries) > self._shared):
            return
        known = {entry["clip"] for entry in self._own.entries[: self._shared]}
        new: dict[str, dict[str, Any]] = {}
        for entry in (e for entries in dist.gather(self._own.entries[self._shared :]) for e in entries):
            if entry["clip"] not in known:
                new.setdefault(entry["clip"], entry)
        for entry in new.values():
            self._events.write("quarantined", **entry)
            if entry["rank"] != 0:  # rank 0's own loader has said so
                get_logger().warning(
                    "rank %d put aside %s: %s", entry["rank"], entry["clip"], entry["reason"]
                )
        try:
            self._own.load(new.values())
        finally:  # too many, too, are to be read there
            self._shared = len(self._own.entries)
            self._write()

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint, after ``share``."""
        return [] if self._own is None else list(self._own.entries)

    def restore(self, state: list[dict[str, Any]]) -> None:
        if self._own is not None and state:
            self._own.load(state)
            self._shared = len(self._own.entries)
            self._write()
            get_logger().warning("%d clips were put aside before and stay so: %s", len(state), self._path)

    def _write(self) -> None:
        if not dist.is_main():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state(), indent=1) + "\n")
        os.replace(temporary, self._path)
