"""A killed run, started again with the same command, makes the numbers of a run that was never killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from workers.launch import launch

from cogvideox.engine.logging import read_metrics

STEPS = 11


def run(folder: Path, precision: str, **accident: Any) -> dict[str, Any]:
    train = {"steps": STEPS, "save_every": 4, "validate_every": 3, "ema_decay": 0.95, "precision": precision}
    train |= {
        "gradient_accumulation_steps": 2,
        "keep_checkpoints": 2,
        "lr_schedule": "cosine",
        "warmup_steps": 3,
    }
    return {"run_dir": str(folder), "train": train, **accident}


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Three launches: fp32 dies in a step; fp32 goes on, bf16 dies in a save; bf16 goes on, then both undisturbed."""
    ranks, root = request.param, tmp_path_factory.mktemp("resume")
    fp32, bf16 = root / "fp32_killed", root / "bf16_killed"
    # Micro-batch 13 belongs to the seventh step: six steps are logged, four are saved.
    first = launch([run(fp32, "fp32", kill_at=13)], ranks, root)
    assert first.returncode != 0, first.stdout
    assert [r["step"] for r in read_metrics(fp32 / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    second = launch([run(fp32, "fp32"), run(bf16, "bf16", die_in_save=8)], ranks, root)
    assert second.returncode != 0, second.stdout
    assert (bf16 / "checkpoints" / "8.tmp").is_dir() and (bf16 / "checkpoints" / "latest").read_text() == "4"
    undisturbed = [run(root / f"{p}_reference", p) for p in ("fp32", "bf16")]
    third = launch([run(bf16, "bf16"), *undisturbed], ranks, root)
    assert third.returncode == 0, third.stdout
    return root, ranks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_joined_log_is_bitwise_that_of_an_undisturbed_run(runs: tuple[Path, int], precision: str) -> None:
    root, _ = runs
    killed = read_metrics(root / f"{precision}_killed" / "metrics.jsonl")
    reference = read_metrics(root / f"{precision}_reference" / "metrics.jsonl")
    assert [record["step"] for record in killed] == list(range(STEPS + 1))  # no line twice, none missing
    for name in ("train/loss", "train/mean", "train/grad_norm", "train/lr", "val/loss"):
        assert [r.get(name) for r in killed] == [r.get(name) for r in reference], name
    assert (
        len({record["train/loss"] for record in killed[1:]}) == STEPS
    )  # the line of step 0 has val/loss alone


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_last_weights_and_averages_are_bitwise_the_same(runs: tuple[Path, int], precision: str) -> None:
    root, ranks = runs
    killed, reference = (
        root / f"{precision}_{kind}" / "checkpoints" / str(STEPS) for kind in ("killed", "reference")
    )
    name = "mp_rank_00_model_states.pt"
    ours, theirs = (torch.load(path / name, weights_only=False)["module"] for path in (killed, reference))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for rank in range(ranks):
        ours, theirs = (load_file(path / f"ema_rank_{rank:02d}.safetensors") for path in (killed, reference))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_kill_during_a_save_leaves_no_trace(runs: tuple[Path, int]) -> None:
    root, _ = runs
    checkpoints = root / "bf16_killed" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["11", "8", "latest"]
    assert (checkpoints / "latest").read_text() == "11"
