"""The training loop: DeepSpeed against a plain AdamW loop, and what happens on a bad day."""

from __future__ import annotations

import json
import math
import signal
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from workers.launch import launch
from workers.train_toy import SEED, Toy, make_trainer, samples, train_config

from cogvideox import dist
from cogvideox.dist import RandomStreams
from cogvideox.engine.logging import Means, combine, console_line, read_metrics, truncate
from cogvideox.engine.stop import Abandoned, StopSignal
from cogvideox.engine.trainer import poisoned_if_not_finite
from cogvideox.engine.validation import HeldOutLoss, evaluating
from cogvideox.weights import provenance

STEPS = 20
CALM = {"dropout": 0.0, "noise": 0.0}  # so that a plain loop needs no random streams
SCHEDULE = {
    "steps": STEPS,
    "lr_schedule": "cosine",
    "warmup_steps": 4,
    "min_lr_ratio": 0.1,
    "save_every": STEPS,
}


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def plain_adamw(batch_size: int) -> tuple[list[float], list[float], Toy, dict[str, Tensor]]:
    """20 steps of plain torch over the same data: losses, gradient norms, the model, its average in float64."""
    toy = Toy(**CALM)
    matrices = [toy.first.weight, toy.last.weight]
    vectors = [toy.first.bias, toy.norm.weight, toy.norm.bias, toy.last.bias]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    average = {name: p.detach().double() for name, p in toy.named_parameters() if p.requires_grad}
    losses, norms = [], []
    for step in range(STEPS):
        rate = (step + 1) / 4 if step < 4 else 0.1 + 0.9 * math.cos((step - 4) / 16 * math.pi / 2) ** 2
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * rate
        loss, _ = toy(samples(step * batch_size, batch_size), RandomStreams.at(SEED, step))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(toy.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        decay = min(0.9, (2 + step) / (11 + step))
        average = {
            name: decay * a + (1 - decay) * toy.get_parameter(name).double() for name, a in average.items()
        }
    return losses, norms, toy, average


def logged(folder: Path, name: str = "train/loss") -> list[float | None]:
    return [record[name] for record in read_metrics(folder / "metrics.jsonl") if name in record]


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"result_{rank}.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that needs two ranks, in one launch."""
    root = tmp_path_factory.mktemp("two_ranks")
    runs = [
        {
            "run_dir": str(root / f"zero{stage}_{precision}"),
            "toy": CALM,
            "train": {**SCHEDULE, "precision": precision, "ema_decay": 0.9},
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }
        for precision in ("fp32", "bf16")
        for stage in (0, 1, 2, 3)
    ]
    accidents = {"steps": 6, "save_every": 2}
    runs += [
        {
            "run_dir": str(root / f"nan_{precision}_zero{stage}"),
            "train": {**accidents, "precision": precision},
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "nan_at": [2, 3],
        }
        for precision, stage in (("fp32", 0), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 2))
    ]
    runs += [
        {
            "run_dir": str(root / "nan_for_good"),
            "train": {**accidents, "max_nonfinite_steps": 3},
            "nan_at": list(range(2, 99)),
        },
        {"run_dir": str(root / "terminated"), "train": {"steps": 99}, "terminate_at": 4},
        {"run_dir": str(root / "still"), "train": {"steps": 1, "validate_every": 1, "lr": 0.0}},
    ]
    done = launch(runs, 2, root)
    assert done.returncode == 0, done.stdout  # the terminated run included
    return root


# ------------------------------------------------------------------------------------------- against a plain loop


def test_zero_2_alone_gives_the_losses_of_plain_adamw(tmp_path: Path) -> None:
    make_trainer({"run_dir": str(tmp_path), "toy": CALM, "train": SCHEDULE}).run()
    losses, norms, _, _ = plain_adamw(batch_size=2)
    # float32 sums in another order; the issue asks for 1e-5.
    assert logged(tmp_path) == pytest.approx(losses, abs=1e-5)
    assert logged(tmp_path, "train/grad_norm") == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_on_two_ranks_gives_the_losses_of_plain_adamw(two_ranks: Path, stage: int) -> None:
    losses, norms, _, _ = plain_adamw(batch_size=4)
    folder = two_ranks / f"zero{stage}_fp32"
    assert logged(folder) == pytest.approx(losses, abs=1e-5)
    assert logged(folder, "train/grad_norm") == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_in_bf16_follows_plain_adamw_within_rounding(two_ranks: Path, stage: int) -> None:
    losses, _, _, _ = plain_adamw(batch_size=4)
    # bf16 has 8 bits: activations and weights are off by 2^-9 each, a loss of O(1) to 10 by a few times that.
    assert logged(two_ranks / f"zero{stage}_bf16") == pytest.approx(losses, rel=0.05, abs=0.02)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_average_on_two_ranks_is_its_closed_form(two_ranks: Path, stage: int) -> None:
    _, _, _, average = plain_adamw(batch_size=4)
    folder = two_ranks / f"zero{stage}_fp32" / "checkpoints" / str(STEPS)
    shares = [load_file(folder / f"ema_rank_{rank:02d}.safetensors") for rank in (0, 1)]
    assert all(shares) and not shares[0].keys() & shares[1].keys()
    found = shares[0] | shares[1]
    assert found.keys() == average.keys()
    for name, expected in average.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-5)  # that of the weights


def test_accumulation_equals_the_larger_batch(tmp_path: Path) -> None:
    train = SCHEDULE | {"batch_size": 2, "gradient_accumulation_steps": 2}
    make_trainer({"run_dir": str(tmp_path), "toy": CALM, "train": train}).run()
    losses, norms, _, _ = plain_adamw(batch_size=4)
    assert logged(tmp_path) == pytest.approx(losses, abs=1e-5)
    assert logged(tmp_path, "train/grad_norm") == pytest.approx(norms, rel=1e-5)


# ------------------------------------------------------------------------------------------------ non-finite steps


@pytest.mark.parametrize("name", ["fp32_zero0", "fp32_zero2", "fp32_zero3", "bf16_zero0", "bf16_zero2"])
def test_a_nan_on_one_rank_is_skipped_on_all_and_counted(two_ranks: Path, name: str) -> None:
    folder = two_ranks / f"nan_{name}"
    assert logged(folder, "train/skipped_steps") == [0, 0, 1, 2, 2, 2]
    assert all(value is not None for value in logged(folder))  # of the rank that was well
    norms = logged(folder, "train/grad_norm")
    assert [norm is None for norm in norms] == [False, False, True, True, False, False]
    assert result(folder) == {"step": 6, "finished": True}
    if "zero3" not in name:  # which stores slices
        before, after = (weights(folder, step) for step in (2, 4))
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not torch.equal(weights(folder, 6)["first.weight"], before["first.weight"])


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    path = folder / "checkpoints" / str(step) / "mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=False)["module"]


def test_too_many_nans_in_a_row_stop_every_rank_with_one_clear_error(two_ranks: Path) -> None:
    for rank in (0, 1):
        error = result(two_ranks / "nan_for_good", rank)["error"]
        assert error.startswith(
            "FloatingPointError: 3 consecutive steps up to 5 had a non-finite loss or gradient"
        )
        assert "rank 1: loss nan, batch ['clip18', 'clip19']" in error and "rank 0" not in error
        assert "train.max_nonfinite_steps=3" in error
    assert (two_ranks / "nan_for_good" / "checkpoints" / "latest").read_text() == "4"


def test_a_non_finite_loss_with_finite_gradients_trains_nothing() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    poisoned_if_not_finite(x * 3 + torch.inf).backward()
    assert x.grad.isnan()
    x.grad = None
    loss = poisoned_if_not_finite(x * 3)
    loss.backward()
    assert (loss.item(), x.grad.item()) == (6.0, 3.0)


# --------------------------------------------------------------------------------------------------------- signals


def test_sigterm_on_one_rank_saves_on_all_and_leaves_with_exit_code_0(two_ranks: Path) -> None:
    folder = two_ranks / "terminated"
    assert [result(folder, rank) for rank in (0, 1)] == [{"step": 5, "finished": False}] * 2
    assert (folder / "checkpoints" / "latest").read_text() == "5"


def test_a_stop_between_two_log_lines_changes_no_line(tmp_path: Path) -> None:
    train = {"steps": 12, "log_every": 5}
    stopped = {"run_dir": str(tmp_path / "stopped"), "train": train, "terminate_at": 6}
    assert make_trainer(stopped).run().step == 7
    del stopped["terminate_at"]
    assert make_trainer(stopped).run().finished
    make_trainer({"run_dir": str(tmp_path / "reference"), "train": train}).run()
    for name in ("step", "train/loss", "train/mean"):
        assert logged(tmp_path / "stopped", name) == logged(tmp_path / "reference", name)
    assert logged(tmp_path / "stopped", "step") == [5, 10, 12]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 3])  # 2: test_resume.py
def test_the_other_zero_stages_go_on_bitwise_after_a_stop(tmp_path: Path, stage: int, precision: str) -> None:
    common = {
        "train": {
            "steps": 6,
            "precision": precision,
            "ema_decay": 0.9,
            "validate_every": 3,
            "lr_schedule": "linear",
        },
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    folder, reference = tmp_path / "stopped", tmp_path / "reference"
    make_trainer({"run_dir": str(folder), "terminate_at": 2, **common}).run()
    assert logged(folder, "step") == [0, 1, 2, 3]  # 0: the validation before the first step
    make_trainer({"run_dir": str(folder), **common}).run()
    make_trainer({"run_dir": str(reference), **common}).run()
    for name in ("step", "train/loss", "train/grad_norm", "train/lr", "val/loss"):
        assert logged(folder, name) == logged(reference, name)


def test_a_second_signal_ends_the_process_at_once_but_a_duplicate_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = []
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.agreed()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the terminal's and the launcher's, within a second
        assert stop.agreed() and stop.name == "SIGTERM" and not ended
        monkeypatch.setattr(signal, "raise_signal", ended.append)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 5.0)
        stop._receive(signal.SIGTERM, None)
        assert ended == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------------------------------ validation


def test_the_held_out_loss_is_the_same_on_one_and_two_ranks(two_ranks: Path, tmp_path: Path) -> None:
    make_trainer({"run_dir": str(tmp_path), "train": {"steps": 1, "validate_every": 1, "lr": 0.0}}).run()
    assert logged(tmp_path, "val/loss") == logged(two_ranks / "still", "val/loss")
    assert logged(tmp_path, "val/mean") == logged(two_ranks / "still", "val/mean")


def test_the_held_out_loss_is_the_mean_over_batches_in_evaluation_mode() -> None:
    toy = Toy()
    toy.norm.eval()
    batches = [samples(100 + 2 * i, 2) for i in range(3)]
    found = HeldOutLoss(batches, SEED)(toy)
    modes = (toy.training, toy.norm.training, toy.dropout.training)
    assert modes == (True, False, True) and toy.first.weight.grad is None
    toy.eval()
    losses = [toy(b, RandomStreams.at(SEED, i, 2**32 - 1))[0].item() for i, b in enumerate(batches)]
    assert found["val/loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_validation_leaves_training_untouched(tmp_path: Path) -> None:
    for name, every in (("with", 2), ("without", None)):
        train = {"steps": 6, "validate_every": every, "ema_decay": 0.5}
        make_trainer({"run_dir": str(tmp_path / name), "train": train}).run()
    assert logged(tmp_path / "with") == logged(tmp_path / "without")
    assert len(logged(tmp_path / "with", "val/loss")) == 4  # before step 1, after 2, 4 and 6


def test_evaluation_sees_the_average_and_training_gets_its_weights_back(tmp_path: Path) -> None:
    trainer = make_trainer(
        {"run_dir": str(tmp_path), "train": {"steps": 4, "ema_decay": 0.9, "precision": "bf16"}}
    )
    trainer.run()
    before = {name: p.detach().clone() for name, p in trainer.engine.module.named_parameters()}
    with trainer.ema.applied():
        for name, shadow in trainer.ema.shadow.items():
            assert torch.equal(trainer.engine.module.get_parameter(name), shadow.to(torch.bfloat16))
            assert not torch.equal(shadow.to(torch.bfloat16), before[name])
    assert all(torch.equal(p, before[name]) for name, p in trainer.engine.module.named_parameters())
    with pytest.raises(Abandoned), trainer.ema.applied():
        raise Abandoned  # a signal ends a validation: the run still saves what it trained
    assert all(torch.equal(p, before[name]) for name, p in trainer.engine.module.named_parameters())


@pytest.mark.parametrize(
    ("every", "steps"), [(2, [0, 2, 4, 5]), (None, [0, 3, 5])], ids=["own rhythm", "each save"]
)
def test_the_preview_is_called_with_the_module_in_evaluation_mode(
    tmp_path: Path, every: int | None, steps: list[int]
) -> None:
    seen = []
    train = {"steps": 5, "save_every": 3, "preview_every": every, "keep_checkpoints": None}
    trainer = make_trainer({"run_dir": str(tmp_path), "train": train})

    def preview(module: nn.Module, step: int) -> dict[str, Any]:
        seen.append((module is trainer.engine.module, module.training, torch.is_grad_enabled()))
        return {"step": step}

    trainer.looks.preview = preview
    trainer.run()
    assert seen == [(True, False, False)] * len(steps)
    # Checkpoint 3 carries the preview of step 3 where there was one, else the last before it.
    assert [record(tmp_path, step)["preview"]["step"] for step in (3, 5)] == [steps[1], 5]


def record(folder: Path, step: int) -> dict[str, Any]:
    return provenance.read({}, folder / "checkpoints" / str(step))


def test_a_stop_is_not_held_up_by_a_preview_and_the_record_of_the_last_one_stays(tmp_path: Path) -> None:
    run = {"run_dir": str(tmp_path), "train": {"steps": 6, "preview_every": 2, "validate_every": None}}
    for terminate_at, steps in ((2, [0, 2]), (None, [4, 6])):  # stopped at 3, then on to the end
        trainer = make_trainer(run | {"terminate_at": terminate_at})
        seen = []
        trainer.looks.preview = lambda module, step, seen=seen: seen.append(step) or {"step": step}
        trainer.run()
        assert seen == steps
    assert record(tmp_path, 3)["preview"] == {"step": 2} and record(tmp_path, 6)["preview"] == {"step": 6}


def test_a_checkpoint_says_where_its_weights_come_from(tmp_path: Path) -> None:
    trainer = make_trainer({"run_dir": str(tmp_path), "train": {"steps": 2}})
    trainer.facts = lambda: {"config": {"seed": 1}, "dataset": None}
    trainer.run()
    found = record(tmp_path, 2)
    assert found.pop("version") == metadata.version("cogvideox")
    assert found == {
        "step": 2,
        "seed": SEED,
        "world_size": 1,
        "config": {"seed": 1},
    }  # what is not known is absent


def test_evaluating_restores_the_modes_after_an_error() -> None:
    toy = Toy()
    with pytest.raises(KeyError), evaluating(toy):
        raise KeyError
    assert toy.training and torch.is_grad_enabled()


# --------------------------------------------------------------------------------------------------------- logging


def test_means_ignore_what_is_not_finite_and_survive_a_checkpoint() -> None:
    means = Means()
    for value in (1.0, math.nan, 4.0):
        means.add({"a": torch.tensor(value), "b": torch.tensor(math.inf)})
    means.add({"late": torch.tensor(7.0)})
    restored = Means()
    restored.load([json.loads(json.dumps(means.state()))], torch.device("cpu"))
    assert restored.flush() == means.flush() == {"a": 2.5, "b": None, "late": 7.0}
    assert means.flush() == {}
    assert combine([{"a": (1.0, 1)}, {"b": (3.0, 2)}, {"a": (5.0, 1)}]) == {"a": 3.0, "b": 1.5}


def test_a_cut_line_and_later_steps_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "trai')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    truncate(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_console_lines_are_aligned() -> None:
    record = {
        "train/loss": 0.1234,
        "train/grad_norm": 0.5,
        "train/lr": 1e-4,
        "perf/step_s": 0.181,
        "mem/rss_gib": 3.2,
    }
    lines = [console_line(step, 1800, record, 312.4) for step in (5, 1200)]
    assert (
        lines[0]
        == "step    5/1800  loss 0.1234  grad      0.5  lr 1.00e-04  0.181 s/step  3.2 GiB  left 0:05:12"
    )
    assert len(lines[0]) == len(lines[1])


def test_trackers_get_every_line_and_wandb_works_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = {"run_dir": str(tmp_path), "train": {"steps": 2, "trackers": ["wandb", "tensorboard"]}}
    make_trainer(run).run()
    identity = (tmp_path / "wandb_id").read_text()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    run["train"]["steps"] = 3
    make_trainer(run).run()
    assert (tmp_path / "wandb_id").read_text() == identity
    with pytest.raises(ValueError, match="train.trackers has 'mlflow': expected any of wandb, tensorboard"):
        make_trainer({"run_dir": str(tmp_path), "train": {"trackers": ["mlflow"]}})


def test_fp16_on_a_cpu_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train.precision=fp16 needs a GPU"):
        make_trainer({"run_dir": str(tmp_path), "train": {"precision": "fp16"}}, module=nn.Identity())
    assert not list(tmp_path.iterdir()) and train_config().precision == "fp32"
