"""Checkpoints are whole or absent, hold what was trained, and refuse what does not fit."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from workers.train_toy import Toy, make_trainer

from cogvideox import dist
from cogvideox.engine import checkpoint
from cogvideox.engine.ema import deal
from cogvideox.engine.logging import read_metrics


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def run(folder: Path, **train: Any) -> dict[str, Any]:
    return {"run_dir": str(folder), "train": {"steps": 4, "save_every": 2, "ema_decay": 0.9} | train}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, saved at 2 and 4; copy it before changing anything."""
    dist.init(timeout_minutes=2.0, model_parallel=False)
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text("seed: 7\n")
    make_trainer(run(folder)).run()
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_holds_only_what_was_trained_and_the_merged_config(finished: Path) -> None:
    folder = finished / "checkpoints" / "4"
    module = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert set(module) == {
        f"{layer}.{kind}" for layer in ("first", "norm", "last") for kind in ("weight", "bias")
    }
    assert set(load_file(folder / "ema_rank_00.safetensors")) == set(module)
    assert (folder / "config.yaml").read_text() == "seed: 7\n"
    assert json.loads((folder / "state.json").read_text())["step"] == 4
    assert (finished / "checkpoints" / "latest").read_text() == "4"


def test_no_file_of_a_checkpoint_needs_unpickling_of_code(finished: Path) -> None:
    files = sorted((finished / "checkpoints" / "4").glob("*.pt"))
    assert len(files) == 2
    for path in files:
        checkpoint._load_file(str(path))  # weights_only, with DeepSpeed's four classes


def test_a_pickle_that_would_run_code_is_refused(copy: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    path = copy / "checkpoints" / "4" / "mp_rank_00_model_states.pt"
    for write in (
        lambda: torch.save({"module": Bomb()}, path),
        lambda: path.write_bytes(pickle.dumps(Bomb())),
    ):
        write()
        with pytest.raises(
            ValueError, match=r"mp_rank_00_model_states.pt is missing, damaged, or holds more"
        ):
            make_trainer(run(copy))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_is_named(copy: Path, damage: str) -> None:
    path = copy / "checkpoints" / "4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{path.name} is missing, damaged"):
        make_trainer(run(copy))


def test_old_checkpoints_are_pruned_and_leftovers_of_killed_runs_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / "9.tmp"
    leftover.mkdir(parents=True)
    make_trainer(run(tmp_path, steps=5, save_every=1, keep_checkpoints=2)).run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5", "latest"]


def test_without_room_nothing_is_written_and_the_last_checkpoint_stays(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(copy)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=r"could not save step 6 .*0.00 GiB free.*checkpoint 4 is whole"
    ) as error:
        make_trainer(run(copy, steps=8)).run()
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["2", "4", "latest"]


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_disk_that_fills_up_in_the_middle_of_a_save_leaves_the_last_checkpoint_whole(
    copy: Path, name: str
) -> None:
    size = (copy / "checkpoints" / "4" / name).stat().st_size - 500  # this file fits but for its end
    trainer = make_trainer(run(copy, steps=6))
    with (
        files_no_larger_than(size),
        pytest.raises(OSError, match=r"could not save step 6.*checkpoint 4 is whole"),
    ):
        trainer.checkpoints.save(6, {})
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["2", "4", "latest"]
    assert make_trainer(run(copy, steps=6)).run().step == 6  # and the same command goes on from it


def test_a_failed_write_is_an_oserror_also_where_torch_calls_it_a_runtime_error(copy: Path) -> None:
    trainer = make_trainer(run(copy))

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0") from OSError(
            errno.ENOSPC, "no space"
        )

    trainer.ema.save = full
    with pytest.raises(OSError, match="PytorchStreamWriter failed.*checkpoint 4 is whole"):
        trainer.checkpoints.save(6, {})
    assert not list((copy / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        ({"world_size": 2}, "torchrun"),
        ({"precision": "bf16"}, "train.precision"),
        ({"zero_stage": 3}, "stage"),
    ],
)
def test_a_checkpoint_of_other_ranks_precision_or_stage_is_refused(
    copy: Path, found: dict[str, Any], remedy: str
) -> None:
    path = copy / "checkpoints" / "4" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | found))
    ((key, value),) = found.items()
    with pytest.raises(ValueError, match=f"written with {key}={value}, this run has .*{remedy}"):
        make_trainer(run(copy))


def test_a_checkpoint_of_other_parameters_is_refused(copy: Path) -> None:
    toy = Toy()
    toy.last.requires_grad_(False)
    toy.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks 2 parameters \(frozen.bias, frozen.weight\)"):
        make_trainer(run(copy, ema_decay=None), module=toy)


def test_an_average_that_the_checkpoint_lacks_is_asked_for_in_vain(copy: Path) -> None:
    (copy / "checkpoints" / "4" / "ema_rank_00.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no averaged weights.*train.ema_decay=null"):
        make_trainer(run(copy))


def test_where_to_start_from(finished: Path, tmp_path: Path) -> None:
    checkpoints = finished / "checkpoints"
    assert checkpoint.find(checkpoints, "auto") == checkpoints / "4"
    assert checkpoint.find(tmp_path, "auto") is None and checkpoint.find(tmp_path, "never") is None
    for path, step in ((finished, "4"), (checkpoints, "4"), (checkpoints / "2", "2")):
        assert checkpoint.find(tmp_path, str(path)) == checkpoints / step
    with pytest.raises(ValueError, match="train.resume=never but .* holds checkpoints"):
        checkpoint.find(checkpoints, "never")
    with pytest.raises(ValueError, match="expected auto, never, a run folder, or a checkpoint"):
        checkpoint.find(checkpoints, str(tmp_path))


def test_a_pointer_to_a_missing_checkpoint_is_an_error_that_names_another(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints" / "4")
    with pytest.raises(ValueError, match=r"latest names 4, which is not there; set train.resume=.*/2"):
        checkpoint.find(copy / "checkpoints", "auto")


def test_going_back_to_an_older_checkpoint_abandons_the_later_ones(copy: Path) -> None:
    older = run(copy, steps=3, save_every=1, keep_checkpoints=2, resume=str(copy / "checkpoints" / "2"))
    make_trainer(older).run()
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["2", "3", "latest"]
    assert (copy / "checkpoints" / "latest").read_text() == "3"
    assert [record["step"] for record in read_metrics(copy / "metrics.jsonl")] == [1, 2, 3]


def test_a_finished_run_started_again_does_nothing(copy: Path) -> None:
    before = (copy / "metrics.jsonl").read_text()
    result = make_trainer(run(copy)).run()
    assert (result.step, result.finished) == (4, True)
    assert (copy / "metrics.jsonl").read_text() == before


def test_the_average_is_dealt_evenly() -> None:
    sizes = {f"layer{i}": size for i, size in enumerate([70, 10, 30, 40, 30, 20])}
    owners = deal(sizes, 2)
    assert owners == deal(dict(reversed(sizes.items())), 2)
    assert [sum(sizes[n] for n, owner in owners.items() if owner == rank) for rank in (0, 1)] == [100, 100]


def test_a_note_is_added_to_a_whole_checkpoint_and_nothing_else_changes(copy: Path) -> None:
    folder = copy / "checkpoints" / "4"
    before, names = json.loads((folder / "state.json").read_text()), sorted(folder.iterdir())
    make_trainer(run(copy)).checkpoints.note(4, {"found_later": {"step": 4}})
    assert json.loads((folder / "state.json").read_text()) == before | {"found_later": {"step": 4}}
    assert sorted(folder.iterdir()) == names


def test_a_note_that_cannot_be_written_is_an_error_and_the_checkpoint_stays(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(run(copy))
    before = (copy / "checkpoints" / "4" / "state.json").read_text()
    with files_no_larger_than(100), pytest.raises(OSError, match="checkpoint 4 is whole"):
        trainer.checkpoints.note(4, {"x": "y" * 1000})
    assert (copy / "checkpoints" / "4" / "state.json").read_text() == before
