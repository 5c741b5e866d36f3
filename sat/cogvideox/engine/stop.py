"""Signals that ask a run to stop, and how what is under way hears of them on every rank alike."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from cogvideox import dist


class Abandoned(Exception):
    """A validation or preview was ended before its time, on every rank: somebody asked the run to stop."""


class StopSignal:
    """SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 (Slurm: ``--signal=USR1@90``) asks all ranks for a last checkpoint.

    A second one ends the process at once. torchrun passes SIGTERM and SIGINT on, and kills what is left after 30 s.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    # Launchers and terminals may both deliver the same signal: within this time it counts once.
    _DUPLICATE_SECONDS = 1.0

    def __init__(self) -> None:
        self.name = "another rank's signal"
        self._received_at: float | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._receive) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at, self.name = now, signal.Signals(number).name
        elif now - self._received_at > self._DUPLICATE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def is_asked(self) -> bool:
        """Whether this rank received one. The others may not have: ``agreed`` tells."""
        return self._received_at is not None

    @property
    def seconds(self) -> float | None:
        """Since the signal; None on a rank that received none."""
        return None if self._received_at is None else time.monotonic() - self._received_at

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call, once a step."""
        return dist.any_rank(self.is_asked)


class Pulse:
    """What a long look at the model (a validation, a preview) calls between its pieces: ``pulse()``.

    A callable of the trainer that has an attribute ``pulse`` is given one. It tells the watchdog that there is
    progress, and raises ``Abandoned`` on every rank as soon as one was asked to stop. Ranks call it equally often, or
    each ends with ``pulse(done=True)``, which waits for the others.
    """

    def __init__(self, stop: StopSignal, mark: Callable[[], None]):
        self._stop, self._mark = stop, mark

    def __call__(self, done: bool = False) -> None:
        while True:
            self._mark()
            stopping, others_go_on = dist.any_rank_of_each(self._stop.is_asked, not done)
            if stopping:
                raise Abandoned
            if not (done and others_go_on):
                return
