"""Another number of ranks goes on where the others ended: the same state, the right clips, nearly the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_checkpoint import reseal
from workers.train_toy import make_trainer

from cogvideox import dist
from cogvideox.engine.events import read_events
from cogvideox.engine.logging import read_metrics

if TYPE_CHECKING:
    from workers.fork_server import ForkServer

CALM = {
    "dropout": 0.0,
    "noise": 0.0,
}  # no noise of a rank's own, which would be another on another number of them
ADAM = {"target": "torch.optim.AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1}}

CASES = [  # ZeRO stage, precision, LoRA rank, ranks before and after
    (1, "fp32", None, 1, 2),
    (1, "bf16", None, 2, 1),
    (2, "fp32", None, 1, 2),
    (2, "fp32", None, 2, 1),
    (2, "bf16", None, 1, 2),
    (2, "bf16", None, 2, 1),
    (2, "fp32", 2, 2, 1),
    (2, "bf16", 2, 1, 2),
    (3, "fp32", None, 2, 1),
    (3, "bf16", 2, 1, 2),
    (0, "fp32", None, 1, 2),
    (0, "bf16", None, 2, 1),
]
COMPARED = [case for case in CASES if case[0]]  # stage 0 slices nothing


def name(case: tuple[Any, ...]) -> str:
    stage, precision, rank, before, after = case
    return f"zero{stage}-{precision}-{'full' if rank is None else 'lora'}-{before}to{after}"


def entry(
    folder: Path, steps: int, stage: int = 2, precision: str = "fp32", rank: int | None = None, **more: Any
) -> dict[str, Any]:
    train = {"steps": steps, "save_every": 4, "ema_decay": 0.9, "precision": precision, "validate_every": 2}
    return {
        "run_dir": str(folder),
        "toy": CALM | {"lora_rank": rank},
        "train": train | {"global_batch_size": 4, "log_every": 3},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        **more,
    }


@pytest.fixture(scope="module")
def root(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case in four launches, of one, two, one and two ranks."""
    root = tmp_path_factory.mktemp("world_size")
    launches: list[list[dict[str, Any]]] = [[], [], [], []]
    for case in CASES:
        *what, before, _ = case
        folder = root / name(case)
        folder.mkdir()
        exports = {k: str(folder / f"{k}.pt") for k in ("export_after", "export_before")}
        exports = exports if case in COMPARED else {}
        first = before - 1  # the launch with so many ranks
        launches[first].append(
            entry(folder, 4, *what, **{k: v for k, v in exports.items() if k == "export_after"})
        )
        launches[first + 1].append(
            entry(folder, 6, *what, **{k: v for k, v in exports.items() if k == "export_before"})
        )
    (root / "twice").mkdir()
    (root / "straight").mkdir()
    for index, steps in ((1, 5), (2, 8), (3, 12)):  # 5: a save between two logging steps
        launches[index].append(entry(root / "twice", steps, list_clips=True))
    launches[3].append(entry(root / "straight", 12, list_clips=True))
    for index, runs in enumerate(launches):
        codes = forks.run({"toy": runs}, 1 + index % 2, root / f"log{index}")
        assert not any(codes), (root / f"log{index}.0").read_text()[-3000:]
    return root


@pytest.mark.parametrize("case", COMPARED, ids=name)
def test_every_number_of_the_state_is_bitwise_the_same_right_after_the_change(root: Path, case: Any) -> None:
    before, after = (
        torch.load(root / name(case) / f"export_{when}.pt", weights_only=False)
        for when in ("after", "before")
    )
    assert before.keys() == after.keys() and len(before) > 8
    for key, value in before.items():
        if key == "settings":
            # Groups keep their own weight decay; the learning rate is set in each step.
            assert [g["weight_decay"] for g in value] == [g["weight_decay"] for g in after[key]]
            assert [g["betas"] for g in value] == [g["betas"] for g in after[key]]
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[key])), key


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_same_command_goes_on_and_leaves_no_trace_of_the_conversion(root: Path, case: Any) -> None:
    folder = root / name(case)
    assert json.loads((folder / "result_0.json").read_text()) == {"step": 6, "finished": True}
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["4", "6", "latest"]
    resumed = [event for event in read_events(folder) if event["kind"] == "resumed"][-1]
    assert resumed["world_size"] == {"before": case[3], "now": case[4]}


def test_two_changes_leave_the_curve_within_rounding(root: Path) -> None:
    twice, straight = (read_metrics(root / run / "metrics.jsonl") for run in ("twice", "straight"))
    assert [r["step"] for r in straight if "train/loss" in r] == [3, 6, 9, 12]
    # Lines at 5 and 8 are of the parts' ends: the mean since the line before, so that 6 and 9 cover fewer steps.
    shared = [r["step"] for r in straight]
    for key in ("val/loss", "train/grad_norm"):
        theirs = {r["step"]: r[key] for r in straight if r.get(key) is not None}
        ours = {r["step"]: r[key] for r in twice if r.get(key) is not None and r["step"] in shared}
        # float32 gradients are summed in another order: as for every ZeRO stage against a plain loop.
        assert ours.keys() >= theirs.keys() and [ours[s] for s in theirs] == pytest.approx(
            list(theirs.values()), abs=1e-5
        )


def test_no_clip_is_skipped_or_repeated_over_two_changes(root: Path) -> None:
    for run in ("twice", "straight"):
        taken = [
            int(line.removeprefix("clip"))
            for path in (root / run).glob("clips_*.txt")
            for line in path.read_text().splitlines()
        ]
        assert sorted(taken) == list(range(4 * 12))


def test_a_step_holds_the_same_clips_on_any_number_of_ranks(root: Path) -> None:
    state = json.loads((root / "twice" / "checkpoints" / "12" / "state.json").read_text())
    assert (state["samples_seen"], state["global_batch_size"], state["world_size"]) == (48, 4, 2)


# -------------------------------------------------------------------------------------------------- what cannot be


@pytest.fixture
def alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def written_by_two(folder: Path, **train: Any) -> dict[str, Any]:
    """The entry of a run whose checkpoint says that two ranks wrote it: one file, as good as two for these errors."""
    run = {"run_dir": str(folder), "train": {"steps": 2, **train}}
    make_trainer(run).run()
    reseal(folder / "checkpoints" / "2", world_size=2)
    return run | {"train": run["train"] | {"steps": 3}}


def test_an_optimizer_that_deepspeed_cannot_spread_is_refused_with_what_to_do(
    tmp_path: Path, alone: None
) -> None:
    sgd = {"target": "torch.optim.SGD", "params": {"lr": 0.01, "momentum": 0.9}}
    run = written_by_two(tmp_path, optimizer=sgd)
    with pytest.raises(
        ValueError,
        match=r"written by 2 ranks and cannot be spread over 1: .*moments of Adam.*momentum_buffer.*torchrun",
    ):
        make_trainer(run)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_without_room_for_the_conversion_nothing_is_written(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    run = written_by_two(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"cannot be spread over 1: 0.00 GiB free in .*the conversion takes"):
        make_trainer(run)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_another_global_batch_is_said_and_the_clips_go_on(
    tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"run_dir": str(tmp_path), "train": {"steps": 2, "batch_size": 4}}
    make_trainer(run).run()
    trainer = make_trainer(run | {"train": {"steps": 4, "batch_size": 2}})
    said = capsys.readouterr().out
    assert "a step takes 2 clips from here on, 4 before" in said and "train.global_batch_size=4" in said
    assert trainer.samples_seen == 8
    trainer.run()
    assert trainer.samples_seen == 12
