"""A damaged checkpoint is found before it is loaded, and the one before takes its place: nothing else is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workers.train_toy import make_trainer

from cogvideox import dist
from cogvideox.engine.events import read_events
from cogvideox.engine.logging import read_metrics
from cogvideox.weights.files.locate import locate
from cogvideox.weights.identify import identify

STEPS = 6
OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def run(folder: Path, **train: Any) -> dict[str, Any]:
    return {
        "run_dir": str(folder),
        "train": {"steps": STEPS, "save_every": 2, "ema_decay": 0.9, "validate_every": 3} | train,
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, saved at 2, 4 and 6; copy it before changing anything."""
    dist.init(timeout_minutes=2.0, model_parallel=False)
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text("seed: 7\n")
    make_trainer(run(folder)).run()
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_number(path: Path) -> None:
    text = path.read_text()
    assert '"samples_seen": 12' in text
    path.write_text(text.replace('"samples_seen": 12', '"samples_seen": 13'))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a file is missing": (OPTIMIZER, Path.unlink, "is missing"),
    "a file is cut short": (
        OPTIMIZER,
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        "has 1,000 bytes of",
    ),
    "a file is empty": (OPTIMIZER, lambda path: path.write_bytes(b""), "has 0 bytes of"),
    "a bit of the optimizer": (OPTIMIZER, flip_a_bit, "has been changed"),
    "a bit of the weights": ("mp_rank_00_model_states.pt", flip_a_bit, "has been changed"),
    "a bit of the average": ("ema_rank_00.safetensors", flip_a_bit, "has been changed"),
    "a bit of the configuration": ("config.yaml", flip_a_bit, "has been changed"),
    "state.json is missing": ("state.json", Path.unlink, "state.json is missing"),
    "state.json is cut short": (
        "state.json",
        lambda path: path.write_text(path.read_text()[:100]),
        "state.json is not JSON",
    ),
    "a number in state.json": ("state.json", change_a_number, "state.json has been changed"),
    "state.json is nothing": ("state.json", lambda path: path.write_text("null"), "not JSON of ours"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(
    finished: Path, copy: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, break_it, problem = DAMAGES[damage]
    break_it(copy / "checkpoints" / "6" / name)
    broken = {p.name: p.read_bytes() for p in (copy / "checkpoints" / "6").iterdir()}
    trainer = make_trainer(run(copy))
    assert trainer.step == 4
    said = capsys.readouterr().out
    assert problem in said and "6.damaged" in said and "going on from" in said
    (event,) = [e for e in read_events(copy) if e["kind"] == "checkpoint_damaged"]
    assert problem in event["problem"] and event["going_on_from"].endswith("/4")
    trainer.run()
    # Kept as it was, not counted in pruning, and in nobody's way.
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert names == ["2", "4", "6", "6.damaged", "latest"]
    assert broken == {p.name: p.read_bytes() for p in (copy / "checkpoints" / "6.damaged").iterdir()}
    for key in ("step", "train/loss", "train/grad_norm", "val/loss"):
        ours, theirs = ([r.get(key) for r in read_metrics(f / "metrics.jsonl")] for f in (copy, finished))
        assert ours == theirs, key


@pytest.mark.parametrize(
    "pointer",
    [None, "", "7", "../elsewhere", b"\xff\xfe\x00"],
    ids=["missing", "empty", "absent", "odd", "bytes"],
)
def test_a_pointer_to_nothing_is_said_and_the_newest_checkpoint_taken(
    copy: Path, pointer: str | bytes | None
) -> None:
    latest = copy / "checkpoints" / "latest"
    latest.unlink()
    if pointer is not None:
        latest.write_bytes(pointer.encode() if isinstance(pointer, str) else pointer)
    assert make_trainer(run(copy)).step == 6
    (event,) = [e for e in read_events(copy) if e["kind"] == "checkpoint_damaged"]
    assert "latest" in event["problem"] and event["going_on_from"].endswith("/6")
    assert latest.read_text() == "6"  # mended


def test_the_first_save_killed_before_its_pointer_is_no_damage(copy: Path) -> None:
    for step in ("4", "6"):
        shutil.rmtree(copy / "checkpoints" / step)
    (copy / "checkpoints" / "latest").unlink()
    assert make_trainer(run(copy)).step == 2
    assert not [e for e in read_events(copy) if e["kind"] == "checkpoint_damaged"]
    assert (copy / "checkpoints" / "latest").read_text() == "2"


def test_two_damaged_ones_fall_back_twice(copy: Path) -> None:
    for step in ("4", "6"):
        flip_a_bit(copy / "checkpoints" / step / OPTIMIZER)
    assert make_trainer(run(copy)).step == 2
    kept = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert kept == ["2", "4.damaged", "6.damaged", "latest"]


def test_when_all_are_damaged_one_error_names_each_and_nothing_is_touched(copy: Path) -> None:
    for step in ("2", "4", "6"):
        (copy / "checkpoints" / step / OPTIMIZER).unlink()
    before = sorted(str(path) for path in copy.rglob("*"))
    for _ in range(2):  # the same command again says the same, and does not begin anew
        with pytest.raises(
            ValueError, match="no checkpoint of this run can be used: .*/6: .*/4: .*/2: .*copy"
        ):
            make_trainer(run(copy))
    assert sorted(str(path) for path in copy.rglob("*")) == before


def test_a_run_whose_checkpoints_were_all_put_aside_does_not_begin_anew_in_silence(copy: Path) -> None:
    for step in ("2", "4", "6"):
        (copy / "checkpoints" / step).rename(copy / "checkpoints" / f"{step}.damaged")
    with pytest.raises(ValueError, match=r"holds no checkpoint to go on from, only 2.damaged, 4.damaged"):
        make_trainer(run(copy))


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_an_error_and_stays(
    copy: Path, tmp_path: Path
) -> None:
    named = copy / "checkpoints" / "4"
    flip_a_bit(named / OPTIMIZER)
    with pytest.raises(ValueError, match=r"train\.resume=.*is damaged.*has been changed"):
        make_trainer(run(tmp_path / "other", resume=str(named)))
    assert named.is_dir()


def test_a_second_damaged_checkpoint_of_a_step_gets_a_name_of_its_own(copy: Path) -> None:
    for _ in range(2):
        flip_a_bit(copy / "checkpoints" / "6" / OPTIMIZER)
        make_trainer(run(copy)).run()
    aside = sorted(path.name for path in (copy / "checkpoints").glob("*.damaged*"))
    assert aside == ["6.damaged", "6.damaged.2"]


def test_readers_of_weights_pass_over_what_is_damaged_or_half_written(copy: Path) -> None:
    checkpoints = copy / "checkpoints"
    before = identify(copy)
    shutil.copytree(checkpoints / "6", checkpoints / "8.damaged")
    shutil.copytree(checkpoints / "6", checkpoints / "9.tmp")
    (checkpoints / "8.damaged" / "state.json").write_text("{")
    (checkpoints / "9.tmp" / OPTIMIZER).unlink()
    assert locate(copy).folder == checkpoints / "6"
    assert identify(copy) == before
    assert (
        identify(checkpoints / "8.damaged").num_tensors == before.num_tensors
    )  # for who wants to look into it


def test_a_full_resume_checks_every_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogvideox.engine import integrity

    hashed: list[str] = []
    facts = integrity.facts
    monkeypatch.setattr(integrity, "facts", lambda path: hashed.append(path.name) or facts(path))
    make_trainer(run(copy))
    listed = json.loads((copy / "checkpoints" / "6" / "state.json").read_text())["files"]
    there = {path.name for path in (copy / "checkpoints" / "6").iterdir()} - {"state.json"}
    assert set(hashed) == set(listed) == there and len(hashed) == len(there)
