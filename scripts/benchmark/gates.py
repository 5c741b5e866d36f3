"""What has to be reached, and whether it is: every gate once, with the rows that decide it.

Gates on counted values are tests (tests/test_counted.py), because they are the same on every machine; gates on times
are read off the last results and never fail a build.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.benchmark.counted import OURS, forward_case, training_case, vae_case
from scripts.benchmark.results import Row

COUNTED, CPU, H200 = "counted", "CPU", "H200"
MET, MISSED, UNKNOWN = "met", "not met", "not yet measured"

Value = Callable[[Sequence[Row]], float | None]
"""Reads a gate's number off the rows of its machine; None where no row says it. Of several the worst."""


@dataclass(frozen=True)
class Gate:
    """what: in words.  limit, unit: the number; ``at_least`` or at most.  where: COUNTED, CPU or H200.

    today: of a counted gate that is missed, what holds at present, so that it does not become worse: the tests hold
    this one, until it is taken out because the limit is reached.
    """

    what: str
    limit: float
    unit: str
    where: str
    value: Value
    at_least: bool = False
    today: float | None = None

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def holds(self, value: float) -> bool:
        """Whether it is no worse than today."""
        return self.is_met(value) or (self.today is not None and value <= self.today)

    def status(self, rows: Sequence[Row]) -> tuple[str, float | None]:
        value = self.value(rows)
        if value is None:
            return UNKNOWN, None
        return (MET if self.is_met(value) else MISSED), value


def _count(case: str, name: str) -> Value:
    def value(rows: Sequence[Row]) -> float | None:
        return max(
            (row.counted[name] for row in rows if (row.case, row.candidate) == (case, OURS)), default=None
        )

    return value


def _of(rows: Sequence[Row], benchmark: str, case: Sequence[str]) -> list[Row]:
    """Rows of a benchmark whose case has all of these words."""
    return [row for row in rows if row.benchmark == benchmark and all(word in row.case for word in case)]


def _ratio(benchmark: str, baseline: str, *case: str) -> Value:
    """The baseline's time to ours."""

    def value(rows: Sequence[Row]) -> float | None:
        found = [r for r in _of(rows, benchmark, case) if r.candidate == baseline and r.ratio]
        return min((row.ratio.median for row in found), default=None)

    return value


def _memory_ratio(benchmark: str, baseline: str, *case: str) -> Value:
    """Our peak memory to the baseline's, both above what was held before."""

    def value(rows: Sequence[Row]) -> float | None:
        peaks: dict[str, dict[str, int]] = {}
        for row in _of(rows, benchmark, case):
            if "above" in row.memory:
                peaks.setdefault(row.case, {})[row.candidate] = row.memory["above"]
        found = [peak[OURS] / peak[baseline] for peak in peaks.values() if peak.keys() >= {OURS, baseline}]
        return max(found, default=None)

    return value


def _seconds(benchmark: str, *case: str) -> Value:
    """Our fastest time, compiled or not, of the worst case."""

    def value(rows: Sequence[Row]) -> float | None:
        found: dict[str, float] = {}
        for row in _of(rows, benchmark, case):
            if row.candidate.startswith(OURS) and row.seconds is not None:
                found[row.case] = min(found.get(row.case, row.seconds), row.seconds)
        return max(found.values(), default=None)

    return value


def _utilisation(*case: str) -> Value:
    """Of our fastest training step."""

    def value(rows: Sequence[Row]) -> float | None:
        found = [row for row in _of(rows, "train", case) if row.candidate.startswith(OURS)]
        return max((row.bound_fraction for row in found if row.bound_fraction is not None), default=None)

    return value


def _training_gigabytes(*case: str) -> Value:
    """Of our smallest training step, weights included."""

    def value(rows: Sequence[Row]) -> float | None:
        found = [row for row in _of(rows, "train", case) if row.candidate.startswith(OURS)]
        return min((row.memory["total"] / 1e9 for row in found if "total" in row.memory), default=None)

    return value


# ------------------------------------------------------------------------------- counted: what the tests hold

# One number each: `today` goes when the limit is reached.
COUNTED_GATES = (
    Gate(
        "5B layer, forward",
        45.0,
        "passes",
        COUNTED,
        _count(forward_case("5B"), "passes per layer"),
    ),
    Gate(
        "2B layer, forward",
        45.0,
        "passes",
        COUNTED,
        _count(forward_case("2B"), "passes per layer"),
    ),
    Gate("5B forward of a guidance pair, live", 1.77, "GB", COUNTED, _count(forward_case("5B"), "live GB")),
    Gate("2B forward of a guidance pair, live", 1.11, "GB", COUNTED, _count(forward_case("2B"), "live GB")),
    Gate("VAE decode", 290.3, "TFLOP", COUNTED, _count(vae_case("5B", "decode", None), "TFLOP")),
    Gate("VAE decode, live", 8.0, "GB", COUNTED, _count(vae_case("5B", "decode", None), "live GB")),
    Gate("VAE encode", 144.4, "TFLOP", COUNTED, _count(vae_case("5B", "encode", 8), "TFLOP")),
    Gate("VAE encode, live", 5.0, "GB", COUNTED, _count(vae_case("5B", "encode", 8), "live GB")),
    Gate(
        "5B full training, kept per layer",
        12.0,
        "units",
        COUNTED,
        _count(training_case("5B", "full", "none"), "units kept per layer"),
        today=20.1,
    ),
    Gate(
        "5B LoRA training, kept per layer",
        12.0,
        "units",
        COUNTED,
        _count(training_case("5B", "LoRA", "none"), "units kept per layer"),
        today=13.3,
    ),
    Gate(
        "5B LoRA training, checkpointed, live",
        6.2,
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

# ------------------------------------------------------------------------------------ measured: what the report says

PEFT = "diffusers + PEFT, checkpointing"

MEASURED_GATES = (
    Gate(
        "forward, to diffusers eager, float32",
        1.1,
        "x",
        CPU,
        _ratio("model", "diffusers", "rope", "float32"),
        True,
    ),
    Gate(
        "forward, to diffusers eager, bf16",
        1.1,
        "x",
        CPU,
        _ratio("model", "diffusers", "rope", "bfloat16"),
        True,
    ),
    Gate("forward, to diffusers compiled", 1.0, "x", CPU, _ratio("model", "diffusers, compiled"), True),
    Gate("VAE decode, to diffusers", 1.1, "x", CPU, _ratio("vae", "diffusers", "decode"), True),
    Gate("VAE decode, memory to diffusers'", 0.5, "x", CPU, _memory_ratio("vae", "diffusers", "decode")),
    Gate(
        "LoRA step at equal memory, to diffusers + PEFT", 1.15, "x", CPU, _ratio("train", PEFT, "LoRA"), True
    ),
    Gate(
        "loading, to naive decord", 1.4, "x", CPU, _ratio("loader", "decord, all frames, as published"), True
    ),
    Gate(
        "loading, memory to naive decord's",
        0.5,
        "x",
        CPU,
        _memory_ratio("loader", "decord, all frames, as published"),
    ),
    Gate("2B, 50 steps with guidance, 49x480x720", 26.0, "s", H200, _seconds("sample", "2B", "50 steps")),
    Gate("5B, 50 steps with guidance, 49x480x720", 67.0, "s", H200, _seconds("sample", "5B", "50 steps")),
    Gate("forward, to diffusers eager", 1.3, "x", H200, _ratio("model", "diffusers"), True),
    Gate("forward, to diffusers compiled", 1.1, "x", H200, _ratio("model", "diffusers, compiled"), True),
    Gate("5B LoRA step, utilisation (MFU)", 0.4, "", H200, _utilisation("LoRA", "5B"), True),
    Gate("2B LoRA training", 10.0, "GB", H200, _training_gigabytes("LoRA", "2B")),
    Gate("5B LoRA training", 24.0, "GB", H200, _training_gigabytes("LoRA", "5B")),
)
"""Full fine-tuning of the 2B in 40 GB is measured by scripts.benchmark_memory."""
