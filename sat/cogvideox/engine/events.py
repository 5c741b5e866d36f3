"""``events.jsonl``: what happened to a run besides its numbers, one line per event, appended and never rewritten.

``metrics.jsonl`` joins the lives of a run into one curve; this file keeps them apart: each start and its end, each
step that was skipped, each clip that was put aside, each checkpoint that could not be used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvideox import dist

FILE = "events.jsonl"


class Events:
    """``events.write("skipped_step", step=7, ...)``. Only rank 0's writes anything; ``append`` is for any rank."""

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / FILE

    def write(self, kind: str, **facts: Any) -> None:
        """Append ``{"time": seconds since 1970, "kind": kind, **facts}``; facts are JSON values."""
        if dist.is_main():
            self.append(kind, **facts)

    def append(self, kind: str, **facts: Any) -> None:
        """``write`` from a rank that alone knows, while rank 0 may be unable to."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")  # a kill cut the line before
            file.write(json.dumps({"time": round(time.time(), 3), "kind": kind, **facts}).encode() + b"\n")


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """The events of a run folder, oldest first; none where it has no such file. A line that a kill cut is left out."""
    return list(_records(Path(run_dir) / FILE))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # cut by a kill; the next life began a new line behind it
