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
from cogvideox.engine import checkpoint, integrity
from cogvideox.engine.checkpoint_folders import find
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


def reseal(folder: Path, **changed: Any) -> None:
    """As if the checkpoint had been written like this."""
    files = {path.name: integrity.facts(path) for path in folder.iterdir() if path.name != "state.json"}
    state = json.loads((folder / "state.json").read_text()) | changed
    (folder / "state.json").write_text(integrity.seal(state, files))


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
        reseal(path.parent)
        with pytest.raises(
            ValueError, match=r"mp_rank_00_model_states.pt is missing, damaged, or holds more"
        ):
            make_trainer(run(copy))
    assert not (tmp_path / "exploded").exists()


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
        ({"precision": "bf16"}, "train.precision"),
        ({"zero_stage": 3}, "stage"),
    ],
)
def test_a_checkpoint_of_another_precision_or_stage_is_refused(
    copy: Path, found: dict[str, Any], remedy: str
) -> None:
    reseal(copy / "checkpoints" / "4", **found)
    ((key, value),) = found.items()
    with pytest.raises(ValueError, match=f"written with {key}={value}, this run has .*{remedy}"):
        make_trainer(run(copy))


def test_a_checkpoint_of_other_parameters_is_refused(copy: Path) -> None:
    toy = Toy()
    toy.last.requires_grad_(False)
    toy.frozen.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"lacks 2 parameters \(frozen.bias, frozen.weight\).*has 2 too many.*model\.\*"
    ):
        make_trainer(run(copy, ema_decay=None), module=toy)


def test_another_lora_rank_is_refused_with_the_parameter_its_two_shapes_and_the_key(tmp_path: Path) -> None:
    lora = {"run_dir": str(tmp_path), "train": {"steps": 1}}
    make_trainer(lora | {"toy": {"lora_rank": 2}}).run()
    with pytest.raises(
        ValueError, match=r"lora_A has the shape \[2, 6\] in it, and \[3, 6\] in this run.*lora\.rank"
    ):
        make_trainer(lora | {"toy": {"lora_rank": 3}})


def test_other_groups_of_the_same_parameters_are_refused(copy: Path) -> None:
    # DeepSpeed lays each group out as one vector: loaded into others, every weight would land somewhere else.
    state = json.loads((copy / "checkpoints" / "4" / "state.json").read_text())
    matrices, vectors = state["parameters"]
    reseal(copy / "checkpoints" / "4", parameters=[vectors, matrices])
    with pytest.raises(ValueError, match="the optimizer's groups of them are others"):
        make_trainer(run(copy))


def test_a_checkpoint_without_a_list_of_its_files_is_refused_with_a_way_to_use_it(copy: Path) -> None:
    path = copy / "checkpoints" / "4" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: state[key] for key in state.keys() - {"files", "sha256"}}))
    with pytest.raises(ValueError, match=r"an earlier version.*load\.transformer="):
        make_trainer(run(copy))
    assert path.is_file()  # not put aside as damaged


def test_an_average_that_the_checkpoint_lacks_is_asked_for_in_vain(copy: Path) -> None:
    (copy / "checkpoints" / "4" / "ema_rank_00.safetensors").unlink()
    reseal(copy / "checkpoints" / "4")
    with pytest.raises(ValueError, match="holds no averaged weights.*train.ema_decay=null"):
        make_trainer(run(copy))


def test_where_to_start_from(finished: Path, tmp_path: Path) -> None:
    checkpoints = finished / "checkpoints"
    assert find(checkpoints, "auto").folders == [checkpoints / "4", checkpoints / "2"]
    assert find(tmp_path, "auto").folders == find(tmp_path, "never").folders == []
    for path, step in ((finished, "4"), (checkpoints, "4"), (checkpoints / "2", "2")):
        assert find(tmp_path, str(path)).folders == [checkpoints / step]
    with pytest.raises(ValueError, match="train.resume=never but .* holds checkpoints"):
        find(checkpoints, "never")
    with pytest.raises(ValueError, match="expected auto, never, a run folder, or a checkpoint"):
        find(checkpoints, str(tmp_path))


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
    after = json.loads((folder / "state.json").read_text())
    assert after.pop("sha256") != before.pop("sha256")  # its own
    assert after == before | {"found_later": {"step": 4}}
    assert sorted(folder.iterdir()) == names


def test_a_note_that_cannot_be_written_is_an_error_and_the_checkpoint_stays(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(run(copy))
    before = (copy / "checkpoints" / "4" / "state.json").read_text()
    with files_no_larger_than(100), pytest.raises(OSError, match="checkpoint 4 is whole"):
        trainer.checkpoints.note(4, {"x": "y" * 1000})
    assert (copy / "checkpoints" / "4" / "state.json").read_text() == before
