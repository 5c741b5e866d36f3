"""``summary.json``: what it says of a run with two lives, skipped steps, validation and saves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from workers.train_toy import make_trainer

from cogvideox import dist
from cogvideox.engine.summary import _bad_clips, peak_memory


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_stopped_run_has_a_summary_and_its_end_covers_both_lives(tmp_path: Path) -> None:
    train = {
        "steps": 6,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "validate_every": 3,
        "save_every": 3,
    }
    run = {"run_dir": str(tmp_path), "train": train, "nan_at": [3]}
    first = make_trainer(run | {"terminate_at": 7})
    first.facts = lambda: {"dataset": {"clips": 12, "sha256": "0" * 64}}
    first.run()
    stopped = summary(tmp_path)
    assert (stopped["steps"], stopped["finished"], stopped["attempts"]) == (4, False, 1)
    assert stopped["samples_seen"] == 4 * 2 * 2 and stopped["skipped_steps"] == 1
    assert stopped["dataset"] == {"clips": 12, "sha256": "0" * 64}
    assert {"load", "train", "validate", "save"} <= stopped["seconds"].keys()
    assert stopped["skipped_clips"] is None  # the toy has no such thing
    assert stopped["best"]["step"] == 3

    second = make_trainer(run)
    second.loader.quarantine = SimpleNamespace(entries=[{"clip": "a.mp4", "reason": "truncated"}])
    second.looks.best = {"step": 3, "val/loss": -1.0}
    second.run()
    done = summary(tmp_path)
    assert (done["steps"], done["finished"], done["attempts"]) == (6, True, 2)
    assert done["samples_seen"] == 24 and done["skipped_clips"] == 1
    assert done["best"] == {"step": 3, "val/loss": -1.0}
    # A checkpoint holds the seconds up to its own writing; the rest of that save is in no later account.
    assert done["seconds"]["validate"] > stopped["seconds"]["validate"] > 0
    assert done["seconds"]["train"] > 0.5 * stopped["seconds"]["train"] > 0
    assert done["seconds"]["save"] > 0 and done["seconds"]["validate"] < done["seconds"]["load"]
    assert done["peak_memory_gib"].keys() == done["seconds"].keys()
    assert all(0.1 < gib < 100 for gib in done["peak_memory_gib"].values())
    assert "torch" in done["versions"] and done["ranks"] == 1


def test_a_quarantine_counts_each_clip_once() -> None:
    class Loader:
        class quarantine:  # noqa: N801
            entries = [{"clip": "a.mp4", "reason": "truncated"}, {"clip": "b.mp4", "reason": "hangs"}]

    assert _bad_clips(Loader()) == ["a.mp4", "b.mp4"] and _bad_clips(object()) is None


def test_the_peaks_are_those_of_the_highest_rank() -> None:
    ranks = [
        {"train": {"alloc": 3.0, "reserved": 9.0}, "save": {"alloc": 1.0, "reserved": 2.0}},
        {"train": {"alloc": 4.0, "reserved": 5.0}},
    ]
    assert peak_memory(ranks) == {
        "peak_memory_gib": {"train": 4.0, "save": 1.0},
        "peak_reserved_gib": {"train": 9.0, "save": 2.0},
    }
    assert peak_memory([{"train": {"rss": 2.5}}]) == {"peak_memory_gib": {"train": 2.5}}
