"""The instrument of scripts.benchmark: pairs, peaks of memory, the file of results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from scripts.benchmark import __main__ as command
from scripts.benchmark import results
from scripts.benchmark.memory import peak_of
from scripts.benchmark.pairs import Candidate, Ratio, max_difference, paired, ratio_of
from scripts.benchmark.results import Row
from scripts.benchmark.settings import Settings

MB = 2**20


def test_candidates_take_turns_and_warm_up_apart() -> None:
    order: list[str] = []
    candidates = [Candidate(name, lambda name=name: order.append(name)) for name in "AB"]
    times = paired(candidates, Settings(rounds=3, warmups=2))
    assert order == [*"AABB", *"AB", *"BA", *"AB"]
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"A": 3, "B": 3}


def test_a_budget_ends_the_rounds_after_three() -> None:
    times = paired([Candidate("A", lambda: None)], Settings(rounds=50), budget_s=0.0)
    assert len(times.seconds["A"]) == 3


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that becomes ten times slower after two rounds changes nothing: each round says 2."""
    assert ratio_of([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == Ratio(2.0, 2.0, 2.0)
    ratio = ratio_of([float(n) for n in range(1, 12)], [1.0] * 11)  # 1 ... 11: tenths at 2 and 10
    assert ratio == Ratio(6.0, 2.0, 10.0)


def test_the_time_is_that_of_the_process_not_of_the_clock() -> None:
    import time

    times = paired([Candidate("asleep", lambda: time.sleep(0.2))], Settings(rounds=3, warmups=0))
    assert times.median("asleep") < 0.1  # it slept for 0.2 s


def test_results_that_are_not_the_same_work_are_refused() -> None:
    assert max_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]).bfloat16()) == 0.5
    with pytest.raises(ValueError, match="not the same work"):
        max_difference(torch.zeros(2), torch.zeros(2, 1))


def hold_for_a_moment(megabytes: int):
    """A case of ``peak_of``: it holds that much, and has 8 MB before it starts."""
    before = torch.ones(8 * MB // 4)

    def work() -> None:
        held = torch.ones(megabytes * MB // 4)
        del held
        torch.ones(1) + before[:1]

    return work


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc: Linux only")
def test_the_peak_of_a_process_is_what_the_work_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    peak = peak_of("test_benchmark:hold_for_a_moment", 64)
    # The library makes some buffers of its own; Linux counts resident pages in batches per thread.
    assert 63 * MB < peak.above < 68 * MB
    assert peak.before > 8 * MB and peak.total == peak.before + peak.above


def test_a_case_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(RuntimeError, match="has no attribute 'nothing'"):
        peak_of("test_benchmark:nothing")


def test_rows_of_one_benchmark_replace_its_own_and_no_others(tmp_path: Path) -> None:
    old = Row("vae", "decode", "ours", 2.0, memory={"above": 5})
    other = Row("model", "forward", "diffusers", 1.0, Ratio(1.2, 1.1, 1.3), 1e-6, counted={"TFLOP": 290.0})
    new = Row("vae", "decode", "ours", 1.0)
    for row in (old, other, new):
        results.save(tmp_path, row.benchmark, [row], command="test", seconds=1.0)
    assert results.load(tmp_path) == {"vae": [new], "model": [other]}
    machine = json.loads((tmp_path / "speed.json").read_text())["vae"]["machine"]
    assert machine["torch"] == torch.__version__ and machine["cpu_cores"] == os.cpu_count()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modle"], "invalid choice: 'modle'"),
        (["model", "--rounds", "0"], "--rounds=0: expected at least 1"),
        (["model", "--quick"], "give it an --output of its own"),
        (["model", "--device", "cuda"], "torch finds no GPU here"),
    ],
)
def test_a_wrong_command_is_said_at_once(arguments: list[str], message: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_the_model_benchmark_compares_equal_networks(tmp_path: Path) -> None:
    command.main(["model", "--quick", "--no-compile", "--rounds", "3", "--output", str(tmp_path)])
    ours, theirs = results.load(tmp_path)["model"]
    assert (ours.candidate, theirs.candidate) == ("ours", "diffusers")
    # float32 on both sides, random weights, outputs near 1.
    assert 0 < theirs.max_difference < 1e-5 and ours.ratio is None
    assert theirs.ratio.low <= theirs.ratio.median <= theirs.ratio.high
    assert ours.memory["above"] > 0 and theirs.memory["above"] > 0
