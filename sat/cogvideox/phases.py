"""Where the time of a training step goes: data, text, VAE, forward, backward, optimizer, communication.

    phases = Phases(device)
    with phases.step():
        with phases("forward"):
            with phases("vae"):     # taken out of "forward"
                ...
    phases.read()                   # at a log step: the only place that waits for the device

A phase's time is its own: that of a phase inside it is not counted twice, so the phases add up to the step. On a CPU
moments are read from the clock. On a device they are events in its main stream, so a phase lasts from the device's
arrival at its beginning to that at its end: work of the host that the device does not wait for takes no time, and work
in other streams (overlapped communication) takes time only where the main stream waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

# Moments kept before those that the device has passed are added up, so that a rare log line needs no memory.
_MOST_MOMENTS = 4096


def untimed(name: str) -> AbstractContextManager:
    """What a module's ``phases`` is until a trainer gives it its own."""
    return nullcontext()


class Clock(Protocol):
    def now(self) -> Any:
        """This moment; None where it does not belong to the timeline (another stream of the device)."""

    def is_past(self, moment: Any) -> bool:
        """Whether ``seconds`` up to this moment can be told without waiting."""

    def wait(self, moment: Any) -> None: ...

    def seconds(self, first: Any, last: Any) -> float: ...

    def release(self, moment: Any) -> None:
        """The moment is not asked for again."""


class HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def is_past(self, moment: float) -> bool:
        return True

    def wait(self, moment: float) -> None:
        pass

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def release(self, moment: float) -> None:
        pass


class DeviceClock:
    """Events in the stream that is current when the clock is made; used again after they were read."""

    def __init__(self, device: torch.device):
        self._backend = torch.get_device_module(device)
        self._device, self._stream = device, self._backend.current_stream(device)
        self._free: list[Any] = []

    def now(self) -> Any:
        if self._backend.current_stream(self._device) != self._stream:
            return None
        event = self._free.pop() if self._free else self._backend.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def is_past(self, moment: Any) -> bool:
        return moment.query()

    def wait(self, moment: Any) -> None:
        moment.synchronize()

    def seconds(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1e3

    def release(self, moment: Any) -> None:
        self._free.append(moment)


class Phases:
    """The time of training steps by phase. Outside of ``step()`` nothing is recorded: validation may use the names."""

    REST = "rest"
    # The part of a step that is in no phase.

    def __init__(self, device: torch.device, clock: Clock | None = None):
        """clock: for tests. None: the host's for a CPU, else the device's own."""
        self._clock = clock or (HostClock() if device.type == "cpu" else DeviceClock(device))
        self._open: list[str] = []
        # (moment, the phase that begins there); None begins the time between two steps.
        self._moments: list[tuple[Any, str | None]] = []
        self._seconds: dict[str, float] = {}
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """One training step. An exception inside leaves the numbers of a run that is over."""
        assert not self._open, self._open
        self._enter(self.REST)
        yield
        self._leave()
        self._steps += 1

    def __call__(self, name: str) -> AbstractContextManager:
        """A phase, inside of ``step()``; phases may nest."""
        return self._phase(name) if self._open else nullcontext()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        entered = self._enter(name)
        try:
            yield
        finally:
            if entered:
                self._leave()

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``function``, each call of it a phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return call

    def read(self) -> tuple[int, dict[str, float]]:
        """(steps, seconds of all of them by phase, ``rest`` included) since the last reading. Waits for the device."""
        assert not self._open, self._open
        if self._moments:
            self._clock.wait(self._moments[-1][0])
            self._add_up(lambda moment: True)
            self._clock.release(self._moments.pop()[0])
        steps, seconds = self._steps, self._seconds
        self._steps, self._seconds = 0, {}
        return steps, seconds

    def _enter(self, name: str) -> bool:
        moment = self._clock.now()
        if moment is None:
            return False
        self._open.append(name)
        self._note(moment, name)
        return True

    def _leave(self) -> None:
        self._open.pop()
        self._note(self._clock.now(), self._open[-1] if self._open else None)

    def _note(self, moment: Any, begins: str | None) -> None:
        self._moments.append((moment, begins))
        if len(self._moments) >= _MOST_MOMENTS:
            self._add_up(self._clock.is_past)

    def _add_up(self, is_known: Callable[[Any], bool]) -> None:
        """Into ``_seconds``, from the oldest moment to the last one known; it stays, as the next one's start."""
        done = 0
        for (first, name), (last, _) in zip(self._moments, self._moments[1:], strict=False):
            if not is_known(last):
                break
            if name is not None:
                self._seconds[name] = self._seconds.get(name, 0.0) + self._clock.seconds(first, last)
            self._clock.release(first)
            done += 1
        del self._moments[:done]
