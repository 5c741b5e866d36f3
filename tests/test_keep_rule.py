"""Which checkpoints are kept: the newest, the best, every n-th; and the loss that makes one the best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from workers.train_toy import make_trainer

from cogvideox import dist
from cogvideox.engine.checkpoint_folders import KeepRule

STEPS = [100, 200, 300, 400, 500]


@pytest.mark.parametrize(
    ("rule", "losses", "doomed"),
    [
        (KeepRule(None), {}, []),
        (KeepRule(2), {}, [100, 200, 300]),
        (KeepRule(1), {}, [100, 200, 300, 400]),
        (KeepRule(9), {}, []),
        (KeepRule(2), {100: 0.5, 200: 0.3, 300: 0.4}, [100, 300]),  # the best, which is not among the newest
        (KeepRule(2), {400: 0.1, 300: 0.4}, [100, 200, 300]),  # the best is one of the newest
        (KeepRule(1), {200: 0.3, 300: 0.3}, [100, 300, 400]),  # of equal ones the earliest
        (KeepRule(2, every=200), {}, [100, 300]),
        (KeepRule(1, every=250), {100: 0.1}, [200, 300, 400]),
    ],
)
def test_the_newest_the_best_and_every_nth_stay(rule: KeepRule, losses: dict, doomed: list[int]) -> None:
    assert sorted(rule.doomed(STEPS, 500, losses)) == doomed


def test_an_abandoned_branch_goes_first_and_is_neither_best_nor_every_nth() -> None:
    # The run was sent back to 200 and has saved 300 now; 400 and 500 are of the branch that was left.
    assert sorted(KeepRule(2, every=250).doomed(STEPS, 300, {500: 0.1, 200: 0.2})) == [100, 400, 500]
    assert KeepRule(4).doomed(STEPS, 300, {}) == [500]


@pytest.fixture
def _alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def trained(folder: Path, losses: list[float], **train: Any) -> Any:
    """A run of as many steps, all saved, whose held-out losses are these."""
    trainer = make_trainer(
        {
            "run_dir": str(folder),
            "train": {"steps": len(losses), "save_every": 1, "validate_every": 1} | train,
        }
    )
    trainer.looks.validate = lambda module: {"val/loss": losses[trainer.step - 1]}
    trainer.run()
    return trainer


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def test_the_best_checkpoint_outlives_the_newest_and_is_known_after_a_resume(
    tmp_path: Path, _alone: None
) -> None:
    losses = [0.9, 0.4, 0.6, 0.7, 0.8]
    assert trained(tmp_path, losses, keep_checkpoints=2).looks.best == {"step": 2, "val/loss": 0.4}
    assert steps(tmp_path) == [2, 4, 5]
    resumed = trained(tmp_path, [*losses, 0.5, 0.3, 0.35], keep_checkpoints=2)
    assert resumed.looks.best == {"step": 7, "val/loss": 0.3}
    assert steps(tmp_path) == [7, 8]  # 2 is the best no longer
    state = json.loads((tmp_path / "checkpoints" / "8" / "state.json").read_text())
    assert (state["best"], state["val/loss"]) == ({"step": 7, "val/loss": 0.3}, 0.35)


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path, _alone: None) -> None:
    trainer = trained(tmp_path, [math.nan, 0.5, -math.inf, math.nan], keep_checkpoints=1)
    assert trainer.looks.best == {"step": 2, "val/loss": 0.5}
    assert steps(tmp_path) == [2, 4]


def test_without_keep_best_only_the_newest_stay(tmp_path: Path, _alone: None) -> None:
    trained(tmp_path, [0.1, 0.4, 0.6], keep_checkpoints=1, keep_best=False)
    assert steps(tmp_path) == [3]


def test_a_checkpoint_between_two_validations_is_not_the_best(tmp_path: Path, _alone: None) -> None:
    # Validated at 2, 4, 5 (the last); 0.9 was measured at step 2, not of what is saved at step 3.
    trained(tmp_path, [0.0, 0.3, 0.0, 0.9, 0.8], keep_checkpoints=1, validate_every=2, save_every=3)
    assert steps(tmp_path) == [5]
