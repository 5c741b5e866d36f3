"""What has to be reached, and whether it is: every gate once, with the row that decides it.

Gates on counted values are tests (tests/test_counted.py), because they are the same on every machine; gates on times
are read off the last results and never fail a build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scripts.benchmark.counted import OURS, forward_case, training_case, vae_case
from scripts.benchmark.results import Row

COUNTED, CPU, H200 = "counted", "CPU", "H200"
MET, MISSED, UNKNOWN = "met", "not met", "not yet measured"


@dataclass(frozen=True)
class Gate:
    """what: in words.  limit, unit: the number; ``at_least`` or at most.  where: COUNTED, CPU or H200.

    value: reads it from a row, None from a row that does not decide.  today: of a counted gate that is missed, what
    holds at present, so that it does not become worse: the tests hold this one until it is taken out.
    """

    what: str
    limit: float
    unit: str
    where: str
    value: Callable[[Row], float | None]
    at_least: bool = False
    today: float | None = None

    def is_met(self, value: float, limit: float | None = None) -> bool:
        limit = self.limit if limit is None else limit
        return value >= limit if self.at_least else value <= limit

    def status(self, rows: Iterable[Row]) -> tuple[str, float | None]:
        """Of the rows of the machine in question; of several that decide, the worst counts."""
        found = [value for row in rows if (value := self.value(row)) is not None]
        if not found:
            return UNKNOWN, None
        worst = min(found) if self.at_least else max(found)
        return (MET if self.is_met(worst) else MISSED), worst


def _count(case: str, name: str) -> Callable[[Row], float | None]:
    return lambda row: row.counted.get(name) if (row.case, row.candidate) == (case, OURS) else None


def _is(row: Row, benchmark: str, case: tuple[str, ...], candidate: str) -> bool:
    return (
        row.benchmark == benchmark and all(word in row.case for word in case) and row.candidate == candidate
    )


def _ratio(benchmark: str, candidate: str, *case: str) -> Callable[[Row], float | None]:
    """Of a baseline's time to ours."""

    def value(row: Row) -> float | None:
        return row.ratio.median if row.ratio and _is(row, benchmark, case, candidate) else None

    return value


def _seconds(benchmark: str, *case: str) -> Callable[[Row], float | None]:
    return lambda row: row.seconds if _is(row, benchmark, case, OURS) else None


# ------------------------------------------------------------------------------- counted: what the tests hold

# One number each: `today` goes when the limit is reached.
COUNTED_GATES = (
    Gate(
        "5B layer, forward",
        45.0,
        "passes",
        COUNTED,
        _count(forward_case("5B"), "passes per layer"),
        today=94.1,
    ),
    Gate(
        "2B layer, forward",
        45.0,
        "passes",
        COUNTED,
        _count(forward_case("2B"), "passes per layer"),
        today=57.0,
    ),
    Gate("5B forward of a guidance pair, live", 2.42, "GB", COUNTED, _count(forward_case("5B"), "live GB")),
    Gate("2B forward of a guidance pair, live", 1.51, "GB", COUNTED, _count(forward_case("2B"), "live GB")),
    Gate("VAE decode", 290.3, "TFLOP", COUNTED, _count(vae_case("5B", "decode", None), "TFLOP"), today=296.2),
    Gate("VAE decode, live", 8.0, "GB", COUNTED, _count(vae_case("5B", "decode", None), "live GB")),
    Gate("VAE encode", 149.0, "TFLOP", COUNTED, _count(vae_case("5B", "encode", 8), "TFLOP")),
    Gate("VAE encode, live", 5.0, "GB", COUNTED, _count(vae_case("5B", "encode", 8), "live GB")),
    Gate(
        "5B full training, kept per layer",
        12.0,
        "units",
        COUNTED,
        _count(training_case("5B", "full", "none"), "units kept per layer"),
        today=23.2,
    ),
    Gate(
        "5B LoRA training, kept per layer",
        12.0,
        "units",
        COUNTED,
        _count(training_case("5B", "LoRA", "none"), "units kept per layer"),
        today=14.4,
    ),
    Gate(
        "5B LoRA training, checkpointed, live",
        7.1,
        "GB",
        COUNTED,
        _count(training_case("5B", "LoRA", "full"), "live GB"),
    ),
    Gate(
        "2B full training, checkpointed, live",
        5.3,
        "GB",
        COUNTED,
        _count(training_case("2B", "full", "full"), "live GB"),
    ),
)
