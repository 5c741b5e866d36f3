"""Clips that failed while training: left out from then on, by every rank, and after every resume."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from cogvideox.data.reader import VideoError

logger = logging.getLogger(__name__)


class Quarantine:
    """The clips that this rank has put aside, and those that it was told of.

    A clip put aside at one position of the order is out at all later positions of this rank. What the ranks put aside
    until some step is united after it (``load`` with the entries of all of them), and holds on each of them from the
    next batch on: so a checkpoint that keeps the united entries is enough to draw the same batches again, even if a
    file was mended meanwhile or a decoder hangs only now and then.
    """

    def __init__(self, num_clips: int, max_bad_fraction: float, rank: int = 0):
        self.num_clips, self.max_bad_fraction, self.rank = num_clips, max_bad_fraction, rank
        self.entries: list[dict[str, Any]] = []
        """``{"clip": key, "reason", "step", "rank"}``, JSON values, in the order in which they were put aside."""
        self.step: int | None = None
        """What new entries say of the time; set by the training loop."""
        self._clips: set[str] = set()

    def __contains__(self, clip: str) -> bool:
        return clip in self._clips

    def __bool__(self) -> bool:
        return bool(self.entries)

    def put_aside(self, clip: str, reason: str) -> None:
        """VideoError, with the list, where that is one too many."""
        logger.warning("put aside %s: %s", clip, reason)
        self._add({"clip": clip, "reason": reason, "step": self.step, "rank": self.rank})
        self._check()

    def load(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add what other ranks, or the run before this one, put aside. VideoError where that is too much."""
        for entry in entries:
            if entry["clip"] not in self._clips:
                self._add(entry)
        self._check()

    def _add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self._clips.add(entry["clip"])

    def _check(self) -> None:
        if len(self._clips) > self.max_bad_fraction * self.num_clips:
            listed = "\n".join(f"  {entry['clip']}: {entry['reason']}" for entry in self.entries)
            raise VideoError(
                f"{len(self._clips)} of {self.num_clips} clips failed while training, more than "
                f"data.params.max_bad_fraction={self.max_bad_fraction}:\n{listed}\n"
                "Mend or remove them, or raise data.params.max_bad_fraction, then run the same command again"
            )
