"""The profiler window: which steps it records, what it writes, and which windows are refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from workers.train_toy import make_trainer

from cogvideox import dist


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def recorded(folder: Path) -> list[str]:
    """The steps in the trace, and that they hold operators."""
    events = json.loads(gzip.decompress((folder / "profile" / "rank0.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert "aten::addmm" in names
    return sorted({name for name in names if name.startswith("step ")})


def test_the_window_is_a_chrome_trace_of_its_steps_and_a_table(tmp_path: Path) -> None:
    make_trainer({"run_dir": str(tmp_path), "train": {"steps": 5, "profile_steps": [2, 3]}}).run()
    assert recorded(tmp_path) == ["step 2", "step 3"]
    table = (tmp_path / "profile" / "rank0.txt").read_text()
    assert "aten::addmm" in table and "Self CPU" in table
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == ["rank0.json.gz", "rank0.txt"]


def test_a_run_resumed_inside_its_window_records_the_rest_and_one_after_it_nothing(tmp_path: Path) -> None:
    run = {"run_dir": str(tmp_path), "train": {"steps": 6, "profile_steps": [2, 5]}}
    make_trainer(run | {"terminate_at": 2}).run()  # during step 3, which it still ends
    assert recorded(tmp_path) == ["step 2", "step 3"]
    make_trainer(run).run()
    assert recorded(tmp_path) == ["step 4", "step 5"]
    trace = tmp_path / "profile" / "rank0.json.gz"
    trace.unlink()
    make_trainer(run | {"train": {"steps": 8, "profile_steps": [2, 5]}}).run()
    assert not trace.exists()


def test_another_rank_than_those_asked_for_records_nothing(tmp_path: Path, monkeypatch) -> None:
    from cogvideox.engine.profile import ProfileWindow

    window = ProfileWindow(tmp_path, [1, 2], [1], dist.device())
    with window.step(1):
        pass
    window.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [[3], [0, 2], [4, 2], [2, 7], [1, 2, 3], []])
def test_an_impossible_window_is_one_clear_error(tmp_path: Path, steps: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"train.profile_steps=\[.*\]: expected \[first, last\].*train.steps=6"
    ):
        make_trainer({"run_dir": str(tmp_path), "train": {"steps": 6, "profile_steps": steps}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [[], [1], [-1]])
def test_a_rank_that_does_not_exist_is_one_clear_error(tmp_path: Path, ranks: list[int]) -> None:
    train = {"steps": 6, "profile_steps": [1, 2], "profile_ranks": ranks}
    with pytest.raises(ValueError, match=r"train.profile_ranks=\[.*\]: expected ranks of 0 to 0"):
        make_trainer({"run_dir": str(tmp_path), "train": train})
