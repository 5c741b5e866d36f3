"""A rank that hangs, noticed and named before the collectives of the others run out of time.

A collective that times out says that somebody is missing, not who or where. So a thread on every rank publishes,
through the store of the process group, in which phase of which step its rank is, and reads what the others publish.
The rank that has made no progress for too long is named in one line, with its step and phase; then every rank ends.

The training loop pays an attribute assignment for each phase. Clocks of different machines are never compared: a rank
publishes ages, and what is not published any more ages by the reader's clock.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn
from uuid import uuid4

from cogvideox import dist
from cogvideox.engine.events import Events
from cogvideox.engine.logging import get_logger

EXIT_CODE = 4
"""Of a process that the watchdog ended."""

_LONGEST_PERIOD_SECONDS = 5.0


@dataclass(frozen=True)
class Place:
    """Where a rank is, as another one knows it."""

    step: int
    number: int
    """Of the phase within the step: ranks go through the same ones."""
    phase: str
    idle: float
    """Seconds since the rank came there."""
    silence: float
    """Seconds since its watchdog was last heard of: long for a process that is stopped."""
    paused: bool = False
    """It does something that may take any time."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


class Watchdog:
    """``at(step, phase)`` at each change of phase, between ``start`` and ``close``.

    limit_seconds: a rank that stays in a phase for longer hangs.
    """

    def __init__(self, limit_seconds: float, events: Events):
        self.limit_seconds, self.events = limit_seconds, events
        self.period_seconds = min(_LONGEST_PERIOD_SECONDS, limit_seconds / 8)
        self._mark: tuple[int, int, str, float, bool] = (0, 0, "start", time.monotonic(), False)
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def at(self, step: int, phase: str) -> None:
        """This rank begins a phase of ``step``, counted from 1. The same phase again is progress too."""
        last = self._mark
        self._mark = (step, last[1] + 1 if step == last[0] else 0, phase, time.monotonic(), False)

    @contextmanager
    def paused(self, step: int, phase: str) -> Iterator[None]:
        """For a phase that may take any time, such as a save: nobody is suspected while a rank is in it."""
        self.rest(step, phase)
        try:
            yield
        finally:
            self.at(step, phase)

    def rest(self, step: int, phase: str) -> None:
        """``paused`` until the next phase begins."""
        self.at(step, phase)
        self._mark = (*self._mark[:-1], True)

    @property
    def place(self) -> str:
        return f"step {self._mark[0]}, {self._mark[2]}"

    def start(self) -> None:
        """Begin to watch. Every rank must call."""
        name = dist.gather(uuid4().hex)[0]
        self._store = dist.store(f"watchdog/{name}", timedelta(seconds=self.limit_seconds))
        self._keys = [str(rank) for rank in range(dist.world_size())]
        self._rank, self._beat = dist.rank(), 0
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (beat, when it was first seen)
        self.at(self._mark[0], "start")  # building took its time
        self._publish(left=False)
        dist.barrier()  # from here on every key is there: reading waits for those that are not
        self.at(self._mark[0], "start")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End watching this rank; the others do not miss it."""
        if self._thread is not None:
            self._closing.set()
            self._thread.join(timeout=2 * self.period_seconds + 1.0)
            self._thread = None

    # --------------------------------------------------------------------------------------------- the thread's part

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._closing.wait(self.period_seconds):
            try:
                self._publish(left=False)
                places = self._read()
            except Exception as error:  # the store's host may be gone, or stopped
                if time.monotonic() - answered > self.limit_seconds:
                    self._end(f"the store through which the ranks meet has not answered ({error})", {})
                continue
            answered = time.monotonic()
            found = suspect(places, self.limit_seconds, self.period_seconds)
            if found is not None:
                self._report(found, places)
        with suppress(Exception):
            self._publish(left=True)

    def _publish(self, left: bool) -> None:
        self._beat += 1
        step, number, phase, since, paused = self._mark
        state = [self._beat, left, step, number, phase, time.monotonic() - since, paused]
        self._store.set(str(self._rank), json.dumps(state))

    def _read(self) -> dict[int, Place]:
        now, places = time.monotonic(), {}
        for rank, text in enumerate(self._store.multi_get(self._keys)):
            beat, left, step, number, phase, idle, paused = json.loads(text)
            if self._heard.get(rank, (None, 0.0))[0] != beat:
                self._heard[rank] = (beat, now)
            silence = now - self._heard[rank][1]
            if not left:
                places[rank] = Place(step, number, phase, idle + silence, silence, paused)
        return places

    def _report(self, rank: int, places: dict[int, Place]) -> NoReturn:
        text = describe(rank, places, self.limit_seconds)
        spokesman = min((r for r, p in places.items() if p.silence < self.limit_seconds / 2), default=rank)
        if self._rank != spokesman:
            # Launchers end all ranks when the first one ends: the line comes before.
            time.sleep(2 * self.period_seconds + 1.0)
            os._exit(EXIT_CODE)
        place = places[rank]
        self._end(
            text, {"rank": rank, "step": place.step, "phase": place.phase, "seconds": round(place.idle, 1)}
        )

    def _end(self, text: str, facts: dict[str, Any]) -> NoReturn:
        get_logger().error(
            f"stalled: {text}. Every rank ends; the same command goes on from the last checkpoint "
            f"(train.timeout_minutes={self.limit_seconds / 60:g} is the limit)"
        )
        with suppress(OSError):
            self.events.append("stalled", message=text, **facts)
        os._exit(EXIT_CODE)


def suspect(places: dict[int, Place], limit_seconds: float, period_seconds: float) -> int | None:
    """The rank for which the others wait, once any has been in its phase for too long; None while all is well.

    It is one that is not heard of any more, else the one that is furthest behind, else the one that came there first.
    """
    silence = max(5 * period_seconds, limit_seconds / 2)
    if any(place.paused and place.silence < silence for place in places.values()):
        return None
    if all(place.idle <= limit_seconds for place in places.values()):
        return None

    def order(rank: int) -> tuple[bool, int, int, float]:
        place = places[rank]
        return place.silence < silence, place.step, place.number, -place.idle

    return min(places, key=order)


def describe(rank: int, places: dict[int, Place], limit_seconds: float) -> str:
    """``rank 3 has been in step 118, data, for 31 s; the others wait in step 118, backward``"""
    place = places[rank]
    text = f"rank {rank} has been in {place}, for {place.idle:.0f} s"
    if place.silence > limit_seconds / 2:
        text = (
            f"rank {rank} has not answered for {place.silence:.0f} s (its process is stopped, or in native code that "
            f"does not return) and was last heard of in {place}"
        )
    where: dict[str, list[int]] = {}
    for other, at in places.items():
        if other != rank:
            where.setdefault(str(at), []).append(other)
    if len(where) == 1:
        (others,) = where
        text += f"; {'the others wait' if len(places) > 2 else f'rank {where[others][0]} waits'} in {others}"
    elif where:
        parts = [f"{_ranks(ranks)} in {at}" for at, ranks in where.items()]
        text += f"; the others: {', '.join(parts[:4])}" + (" ..." if len(parts) > 4 else "")
    return text


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {listed}"
