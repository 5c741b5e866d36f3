"""Times of several candidates in the same run: in turn, round after round, so that what disturbs one disturbs all.

A ratio is taken within each round and then its median over the rounds: a machine that becomes slower halfway changes
no ratio. On a CPU the time is the process's own CPU time, on a GPU that between two events of its stream.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scripts.benchmark.settings import Settings

FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Candidate:
    """``run()`` does the work once; what it returns is kept of the last round."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds, and the band in which 80 % of them lie."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Times:
    """seconds: name -> one per round.  results: name -> what the last run returned."""

    seconds: dict[str, list[float]]
    results: dict[str, Any]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, of: str, to: str) -> Ratio:
        """How many times as long ``of`` takes as ``to``."""
        return ratio_of(self.seconds[of], self.seconds[to])


def ratio_of(of: Sequence[float], to: Sequence[float]) -> Ratio:
    quotients = [a / b for a, b in zip(of, to, strict=True)]
    if len(quotients) == 1:
        return Ratio(*quotients * 3)
    tenths = statistics.quantiles(quotients, n=10, method="inclusive")
    return Ratio(statistics.median(quotients), tenths[0], tenths[-1])


def paired(candidates: Sequence[Candidate], settings: Settings, *, budget_s: float = 30.0) -> Times:
    """Run the candidates in turn ``settings.rounds`` times, in changing order.

    budget_s: no round starts later than this after the warm-ups, except the first three.
    """
    measure = _device_seconds if settings.is_cuda else _cpu_seconds
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    results: dict[str, Any] = {}
    for candidate in candidates:
        for _ in range(settings.warmups):
            results[candidate.name] = candidate.run()
    start = time.monotonic()
    for number in range(settings.rounds):
        if number >= FEWEST_ROUNDS and time.monotonic() - start > budget_s:
            break
        in_turn = candidates if number % 2 == 0 else list(reversed(candidates))
        for name, spent in measure(in_turn, results).items():
            seconds[name].append(spent)
    return Times(seconds, results)


def _cpu_seconds(candidates: Sequence[Candidate], results: dict[str, Any]) -> dict[str, float]:
    spent = {}
    for candidate in candidates:
        start = time.process_time()
        results[candidate.name] = candidate.run()
        spent[candidate.name] = time.process_time() - start
    return spent


def _device_seconds(candidates: Sequence[Candidate], results: dict[str, Any]) -> dict[str, float]:
    """One wait at the end of a round: within it the host runs ahead, as it does in a training or sampling loop."""
    events = {}
    for candidate in candidates:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        results[candidate.name] = candidate.run()
        end.record()
        events[candidate.name] = (start, end)
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs|, in float32."""
    if ours.shape != theirs.shape:
        raise ValueError(
            f"results of shapes {tuple(ours.shape)} and {tuple(theirs.shape)} are not the same work"
        )
    return (ours.float() - theirs.float()).abs().max().item()
