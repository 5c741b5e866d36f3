"""Rows of results as a page: every row is on it, a gate is read off the right rows, nothing is claimed unmeasured."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from scripts.benchmark import counted, report, results, scaling
from scripts.benchmark.counted import OURS, forward_case
from scripts.benchmark.gates import COUNTED_GATES, CPU, H200, MEASURED_GATES, MET, MISSED, UNKNOWN, Gate
from scripts.benchmark.pairs import Ratio
from scripts.benchmark.results import ON, Row

CASE = "rope, 2 layers x 512, float32"
OTHER = "rope, 2 layers x 512, bfloat16"


def rows(ratio: float = 1.2) -> list[Row]:
    return [
        Row("model", CASE, "ours", 0.5, memory={"above": 100_000_000, "total": 300_000_000}),
        Row("model", CASE, "diffusers", 0.6, Ratio(ratio, 1.15, 1.31), 2e-6, {"above": 160_000_000}, 0.41),
        Row(
            "model", CASE, "diffusers, compiled", 0.51, Ratio(1.02, 0.97, 1.05), note="against ours, compiled"
        ),
    ]


def page(folder: Path, *parts: tuple[str, list[Row]], gpu: str = "") -> str:
    for name, found in parts:
        results.save(folder, name, found, command=f"benchmark {name}", seconds=1.0)
    report.write(folder)
    return (folder / "speed.md").read_text()


def gate(what: str, where: str) -> Gate:
    (found,) = [gate for gate in MEASURED_GATES if (gate.what, gate.where) == (what, where)]
    return found


def test_a_row_shows_time_ratio_with_band_difference_memory_and_fraction_of_the_bound(tmp_path: Path) -> None:
    text = page(tmp_path, ("model", rows()))
    assert f"| {CASE} | diffusers | 0.6 | **1.20** (1.15-1.31) | 2e-06 | 160 | 41% |  |" in text
    assert "`benchmark model`" in text and "torch" in text and "A forward pass of the transformer" in text
    assert Image.open(tmp_path / "speed.png").size[0] == 1260  # 8.4 inches


def test_a_benchmark_is_replaced_alone(tmp_path: Path) -> None:
    page(tmp_path, ("model", rows()), ("loader", [Row("loader", "clips", "ours", 3.21)]))
    text = page(tmp_path, ("model", rows(1.77)))
    assert "**1.77**" in text and "**1.20**" not in text and "| clips | ours | 3.21 |" in text


def test_without_any_ratio_there_is_no_picture(tmp_path: Path) -> None:
    page(tmp_path, ("model", rows()))
    assert (tmp_path / "speed.png").exists()
    text = page(tmp_path, ("model", rows()[:1]))
    assert not (tmp_path / "speed.png").exists() and "speed.png" not in text


def test_a_gate_on_ratios_takes_the_worst_of_its_cases() -> None:
    fast, slow = rows(1.3)[1], Row("model", OTHER, "diffusers", 1.0, Ratio(1.05, 1.0, 1.1))
    assert gate("forward, to diffusers eager, float32", CPU).status([fast, slow]) == (MET, 1.3)
    assert gate("forward, to diffusers eager, bf16", CPU).status([fast, slow]) == (MISSED, 1.05)
    assert gate("forward, to diffusers compiled", CPU).status([fast, slow]) == (UNKNOWN, None)


def test_a_gate_on_memory_compares_within_a_case() -> None:
    def peaks(case: str, ours: int, theirs: int) -> list[Row]:
        return [
            Row("vae", case, OURS, memory={"above": ours}),
            Row("vae", case, "diffusers", memory={"above": theirs}),
        ]

    half = gate("VAE decode, memory to diffusers'", CPU)
    assert half.status(peaks("decode a", 4, 10)) == (MET, 0.4)
    assert half.status([*peaks("decode a", 4, 10), *peaks("decode b", 6, 10), *peaks("encode", 9, 10)]) == (
        MISSED,
        0.6,
    )


def test_a_counted_gate_that_is_missed_holds_as_long_as_it_does_not_become_worse() -> None:
    gate = Gate("passes", 45.0, "passes", "counted", lambda rows: None, today=94.1)
    assert gate.holds(94.0) and gate.holds(44.0) and not gate.holds(94.2)
    assert not gate.is_met(94.0)


def test_every_counted_gate_reads_a_case_that_is_counted() -> None:
    cases = {forward_case(m) for m in ("2B", "5B")} | set(counted.KNOWN_COUNTS)
    everything = [
        Row("counted", case, OURS, counted=dict.fromkeys(
            ("passes per layer", "live GB", "TFLOP", "units kept per layer"), 1.0
        )) for case in cases
    ]  # fmt: skip
    assert all(gate.value(everything) == 1.0 for gate in COUNTED_GATES)


def test_what_a_gpu_must_reach_is_not_read_off_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    title = "5B, 49 x 480 x 720, bfloat16, 50 steps"
    run = [Row("sample", title, "ours, compiled", 66.0)]
    text = page(tmp_path, ("sample", run))
    name = gate("5B, 50 steps with guidance, 49x480x720", H200).what
    assert f"| {name} | <= 67 s | - | H200 | {UNKNOWN} |" in text

    found = results.machine("torch") | {"gpu": "NVIDIA H200"}
    monkeypatch.setattr(results, "machine", lambda *packages: found)
    results.save(tmp_path, "sample", run, command="x", seconds=1.0, device="cuda")
    assert set(results.load(tmp_path)) == {"sample", f"sample{ON}NVIDIA H200"}
    report.write(tmp_path)
    text = (tmp_path / "speed.md").read_text()
    assert f"| {name} | <= 67 s | 66 s | H200 | {MET} |" in text and "A sampling run on NVIDIA H200" in text


def test_growth_is_drawn_and_says_of_each_number_where_it_is_from(tmp_path: Path) -> None:
    from scripts.benchmark.growth import CALCULATED, MEASURED

    def point(part: str, candidate: str, frames: int, pixels: int) -> Row:
        place = {"frames": frames, "pixels": pixels, "tokens": frames * pixels / 100}
        return Row(
            "growth",
            f"{part}, {frames}x{pixels}",
            candidate,
            0.1 * frames,
            memory={"above": 10**6},
            counted=place,
        )

    measured = [
        point(part, candidate, *place)
        for part in ("transformer", "VAE decode")
        for candidate in (MEASURED, CALCULATED)
        for place in ((1, 100), (5, 100), (9, 100), (5, 400), (5, 900))
    ]
    text = page(tmp_path, ("growth", measured + list(scaling.rows())))
    assert Image.open(tmp_path / "growth.png").size == (1560, 975)
    assert "| clip | seconds, measured | calculated |" in text and text.count("Calculated:") == 3
    assert "| 5B, 49x480x720, 50 steps, 8 H200 |" in text
