"""The folders of ``RUN/checkpoints/``: which to start from, which to keep, and what their names mean. No torch.

``1200/`` is a whole checkpoint, ``latest`` a text file with the name of the newest, ``*.tmp`` what a kill left behind,
and ``1200.damaged/`` one that could not be used: kept for who wants to look into it, and never counted again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cogvideox.engine import durable
from cogvideox.engine.integrity import STATE, Damaged, read_state

LATEST = "latest"


@dataclass(frozen=True)
class Candidates:
    """Where a run may start from."""

    folders: list[Path] = field(default_factory=list)
    # The one to go on from, then those to fall back to. Empty: start from the beginning.
    problem: str | None = None
    # What is wrong with ``latest``.
    are_own: bool = True
    # Those of the run folder itself, found by train.resume=auto; False: named by train.resume.


def find(directory: Path, resume: str) -> Candidates:
    """The checkpoints to start from, by name; their contents are looked at later.

    directory: ``RUN/checkpoints``.  resume: "auto" (where ``latest`` points; what stands before it to fall back to),
    "never" (ValueError if the run folder has checkpoints), or the path of a run folder, a checkpoints folder or one
    checkpoint, which is then the only one.
    """
    if resume == "auto":
        return _own(directory)
    if resume == "never":
        newest = next(reversed(numbered(directory)), None)
        if newest is not None:
            raise ValueError(
                f"train.resume=never but {directory} holds checkpoints (the last: {newest.name}): "
                f"choose another run.dir, or train.resume=auto to go on from there"
            )
        return Candidates()
    path = Path(resume)
    if (path / STATE).is_file():
        return Candidates([path], are_own=False)
    for place in (path, path / "checkpoints"):
        if found := _own(place).folders:
            return Candidates(found[:1], are_own=False)
    raise ValueError(
        f"train.resume={resume}: expected auto, never, a run folder, or a checkpoint (a folder with {STATE})"
    )


def _own(directory: Path) -> Candidates:
    steps, pointer = numbered(directory), directory / LATEST
    if not steps:
        aside = sorted(path.name for path in directory.glob("*.damaged*")) if directory.is_dir() else []
        if aside or pointer.exists():
            raise ValueError(
                f"{directory} holds no checkpoint to go on from, only {', '.join(aside) or pointer.name}: restore one "
                f"from a copy, choose another run.dir, or delete {directory} to start anew"
            )
        return Candidates()
    name = _read(pointer)
    if name in {path.name for path in steps}:
        return Candidates([path for path in reversed(steps) if int(path.name) <= int(name)])
    if name is None and len(steps) == 1:
        return Candidates(steps)  # the first save, killed between its rename and its ``latest``
    said = "is missing" if name is None else f"names {name[:40]!r}, which is not there"
    return Candidates(steps[::-1], problem=f"{pointer} {said}")


def _read(pointer: Path) -> str | None:
    try:
        return pointer.read_text(errors="replace").strip()
    except OSError:
        return None


def numbered(directory: Path) -> list[Path]:
    """The checkpoints by step, lowest first."""
    if not directory.is_dir():
        return []
    # Not "007" nor digits of other scripts: the name of step 7 is "7".
    steps = [p for p in directory.iterdir() if p.name.isdecimal() and p.name == str(int(p.name))]
    return sorted((path for path in steps if path.is_dir()), key=lambda path: int(path.name))


def put_aside(folder: Path) -> Path:
    """Keep a damaged checkpoint under a name that nothing loads, counts or deletes."""
    target = folder.with_name(f"{folder.name}.damaged")
    number = 2
    while target.exists():
        target, number = folder.with_name(f"{folder.name}.damaged.{number}"), number + 1
    os.rename(folder, target)
    durable.flush(folder.parent)
    return target


# ---------------------------------------------------------------------------------------------------------- pruning


@dataclass(frozen=True)
class KeepRule:
    """Which checkpoints stay: the ``newest``, the best one, and every n-th."""

    newest: int | None = None
    # None: all.
    best: bool = True
    every: int | None = None
    # Those of the steps it divides.

    def prune(self, directory: Path, step: int) -> None:
        """Delete what need not stay now that ``step`` has been saved. Damaged ones are not counted and not touched."""
        if self.newest is None:
            return
        folders = {int(path.name): path for path in numbered(directory)}
        losses = {
            number: loss for number, path in folders.items() if (loss := held_out_loss(path)) is not None
        }
        for number in self.doomed(folders, step, losses if self.best else {}):
            durable.remove_folder(folders[number])

    def doomed(self, steps: Iterable[int], step: int, losses: Mapping[int, float]) -> list[int]:
        """Which of ``steps`` go after the save of ``step``. losses: held-out losses of those that were validated.

        Steps beyond ``step`` are an abandoned branch (the run was sent back to an earlier checkpoint): they go first,
        and are neither the best nor kept as every n-th.
        """
        if self.newest is None:
            return []
        ordered = sorted(steps, key=lambda s: (s > step, abs(step - s)))  # the newest first, abandoned last
        stay = set(ordered[: self.newest]) | {step}
        past = {s: loss for s, loss in losses.items() if s <= step}
        if past:
            stay.add(min(past, key=lambda s: (past[s], s)))
        if self.every is not None:
            stay |= {s for s in ordered if s <= step and s % self.every == 0}
        return [s for s in ordered if s not in stay]


def held_out_loss(folder: Path) -> float | None:
    """The loss on held-out clips at exactly a checkpoint's step; None if it was not validated, or cannot be read."""
    try:
        loss = read_state(folder).get("val/loss")
    except (Damaged, ValueError):
        return None
    return loss if loss is not None and math.isfinite(loss) else None
