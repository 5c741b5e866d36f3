"""Previews over training time: the base model first, every number in the log once whatever happens, and the sheet."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from workers.train_toy import make_trainer

import sample_video
import train_video
from cogvideox import dist
from cogvideox.command_line import run_door
from cogvideox.config import load_config
from cogvideox.data.moving_shapes import combinations, make_dataset
from cogvideox.engine.checkpoint import Checkpoints
from cogvideox.engine.logging import forget, read_metrics
from cogvideox.engine.trainer import Trainer
from cogvideox.sampling import preview_sheet
from cogvideox.sampling.preview_sheet import preview_steps, spread, write_preview_sheet
from cogvideox.sampling.video_io import write_contact_sheet, write_video
from cogvideox.system import build_vae
from cogvideox.weights import provenance

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny_t2v.yaml"


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0)


def toy(folder: Path, seen: list[int], die_in: int | None = None, **train: Any) -> Trainer:
    """A toy run whose preview logs a number that its weights decide, and may die while it is made."""
    config = {"steps": 6, "save_every": 2, "preview_every": 2, "validate_every": None, "ema_decay": 0.5}
    trainer = make_trainer({"run_dir": str(folder), "train": config | train})

    def preview(module: nn.Module, step: int) -> dict[str, Any]:
        seen.append(step)
        if step == die_in:
            raise Killed
        weights = sum(float(p.double().sum()) for p in module.parameters())
        return {"step": step, "metrics": {"preview/saturation": weights}}

    trainer.looks.preview = preview
    return trainer


def lines(folder: Path) -> list[tuple[int, float]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r["preview/saturation"]) for r in records if "preview/saturation" in r]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    dist.init(timeout_minutes=2.0)
    folder = tmp_path_factory.mktemp("undisturbed")
    toy(folder, []).run()
    found = lines(folder)
    assert [step for step, _ in found] == [0, 2, 4, 6] and len({value for _, value in found}) == 4
    return found


@pytest.mark.parametrize("die_in", [0, 2, 4, 6])
def test_a_preview_that_was_cut_off_is_made_by_the_next_start(
    tmp_path: Path, undisturbed, die_in: int
) -> None:
    seen: list[int] = []
    with pytest.raises(Killed):
        toy(tmp_path, seen, die_in).run()
    toy(tmp_path, seen).run()
    assert lines(tmp_path) == undisturbed  # bitwise: no line twice, none missing
    assert seen == sorted([0, 2, 4, 6, die_in])


def test_a_line_without_its_note_in_the_checkpoint_is_written_once(
    tmp_path: Path, undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "note", die)
        toy(tmp_path, []).run()
    assert [step for step, _ in lines(tmp_path)] == [0, 2]
    toy(tmp_path, []).run()
    assert lines(tmp_path) == undisturbed


def test_previews_between_two_saves_are_made_again_with_their_steps(tmp_path: Path) -> None:
    rhythm = {"preview_every": 1, "save_every": 3}
    toy(tmp_path / "reference", [], **rhythm).run()
    seen: list[int] = []
    with pytest.raises(Killed):
        toy(tmp_path / "killed", seen, die_in=5, **rhythm).run()
    toy(tmp_path / "killed", seen, **rhythm).run()
    assert seen == [0, 1, 2, 3, 4, 5, 4, 5, 6]  # not 3: its preview is noted in its checkpoint
    assert lines(tmp_path / "killed") == lines(tmp_path / "reference")


def test_a_finished_run_makes_no_preview_again(tmp_path: Path) -> None:
    toy(tmp_path, []).run()
    before, seen = (tmp_path / "metrics.jsonl").read_bytes(), []
    toy(tmp_path, seen).run()
    assert seen == [] and (tmp_path / "metrics.jsonl").read_bytes() == before


def test_going_on_from_another_runs_checkpoint_leaves_that_run_as_it_was(tmp_path: Path) -> None:
    toy(tmp_path / "first", [], steps=2, preview_every=5).run()
    state = tmp_path / "first" / "checkpoints" / "2" / "state.json"
    before, seen = state.read_bytes(), []
    toy(tmp_path / "second", seen, preview_every=2, steps=4, resume=str(tmp_path / "first")).run()
    assert state.read_bytes() == before
    assert seen == [4]  # step 2 was previewed by the first run, as its last


def test_forgetting_keeps_other_lines_of_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 0, "val/loss": 1.0}\n{"step": 2, "preview/motion": 1.0, "train/loss": 1.0}\n'
    path.write_text('{"step": 0, "preview/motion": 1.0}\n' + kept + '{"step": 2, "tra')
    forget(path, 0, "preview/")
    assert path.read_text() == kept
    forget(tmp_path / "nothing", 0, "preview/")


# -------------------------------------------------------------------------------------------------- the real previews


PROMPTS = "train.preview_prompts=[a red circle moving right, a blue square moving up]"
SMALL = ["model.transformer.num_layers=1", "model.conditions.0.params.config.num_layers=1", "sample.steps=2"]
SMALL += [
    "train.batch_size=2",
    "train.steps=4",
    "train.save_every=2",
    "train.log_every=1",
    "train.warmup_steps=0",
]
SMALL += ["train.optimizer.params.lr=0.05", "sample.num_frames=5"]


def train(*argv: Any) -> None:
    assert run_door(train_video.main, ["--traceback", "--base", *map(str, [TINY, *SMALL, *argv])]) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from random weights, then a fine-tune of it: undisturbed, and ended in its third step and started again."""
    folder = tmp_path_factory.mktemp("previews")
    make_dataset(folder / "clips", combinations()[0][:4], 1, seed=0, write_video=write_video)
    torch.manual_seed(0)
    save_file(build_vae(load_config([TINY])).state_dict(), folder / "vae.safetensors")
    places = [f"data.path={folder}/clips", f"load.vae={folder}/vae.safetensors"]
    train(*places, f"run.dir={folder}/scratch")
    tuned = [*places, f"load.transformer={folder}/scratch", f"load.text_encoder={folder}/scratch", PROMPTS]
    tuned += ["train.preview_drift_warning=0.001"]
    train(*tuned, f"run.dir={folder}/reference")
    step = Trainer._train_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_train_step", lambda self, batches: die_after(2, self, batches, step))
        train(*tuned, f"run.dir={folder}/killed")
    train(*tuned, f"run.dir={folder}/killed")
    return folder


def die_after(done: int, trainer: Trainer, batches: Any, step: Any) -> None:
    if trainer.step == done:
        raise Killed
    step(trainer, batches)


def previews(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run / "metrics.jsonl") if any(k.startswith("preview/") for k in r)]


def test_the_base_models_previews_come_before_the_first_step(root: Path) -> None:
    assert preview_steps(root / "reference") == [0, 2, 4]
    first, *later = previews(root / "reference")
    assert first["step"] == 0 and [r["step"] for r in later] == [2, 4]
    drifts = [f"preview/{name}_drift" for name in ("saturation", "brightness", "motion")]
    assert [first[name] for name in drifts] == [0.0, 0.0, 0.0]
    for record in later:
        for name in drifts:
            base, now = first[name.removesuffix("_drift")], record[name.removesuffix("_drift")]
            # The log's means are of the same two videos; the floor of 1/255 is far below.
            assert record[name] == pytest.approx((now - base) / base, rel=1e-6)
    assert any(abs(later[-1][name]) > 0 for name in drifts)


def test_sample_video_makes_the_base_models_preview_again(root: Path, tmp_path: Path) -> None:
    sidecar = min((root / "reference" / "previews" / "0").glob("*.json"))
    argv = ["--traceback", "--from", str(sidecar), "--output-dir", str(tmp_path)]
    assert run_door(sample_video.main, argv) == 0
    then, now = (json.loads(path.read_text()) for path in (sidecar, tmp_path / sidecar.name))
    assert then["config"]["load"]["transformer"] == str(root / "scratch")
    assert now["pixels_sha256"] == then["pixels_sha256"]


def test_drift_survives_a_resume_bitwise_and_the_base_is_rendered_once(root: Path) -> None:
    assert previews(root / "killed") == previews(root / "reference")
    record = provenance.read({}, root / "killed" / "checkpoints" / "4")["preview"]
    assert len(record["base"]) == 2 and record["step"] == 4


def test_a_drift_beyond_the_limit_is_a_warning(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from cogvideox.sampling.preview import Previews

    config = load_config([TINY], [PROMPTS, "load.transformer=x"])
    previews = Previews([], config, tmp_path)
    with caplog.at_level(logging.WARNING, logger="cogvideox"):
        previews._warn_of_drift({"preview/saturation_drift": 0.63, "preview/motion_drift": -0.2}, 40)
        assert "preview of step 40: saturation +63% against the base" in caplog.text
        assert "motion" not in caplog.text and "train.preview_drift_warning=0.5" in caplog.text
        caplog.clear()
        config.load.transformer = None  # nothing to burn in
        previews._warn_of_drift({"preview/saturation_drift": 9.0}, 40)
        previews.go_on_from({"step": 2})
    assert caplog.messages == [
        "the run has no preview of the base model: the drift of its previews is not known"
    ]


def test_the_sheet_has_a_row_per_prompt_and_a_column_per_step(root: Path) -> None:
    with Image.open(root / "reference" / "previews.png") as sheet:
        size = sheet.size
        cell, gap = preview_sheet._CELL_HEIGHT, 4
        cells = 3 * preview_sheet.FRAMES + 2  # three steps, and a white cell between neighbours
        assert size == (220 + cells * (cell + gap), 22 + 2 * (cell + gap) + gap)
        base, last = (sheet.crop((x, 26, x + cell, 26 + cell)) for x in (220, 220 + 8 * (cell + gap)))
        assert base.getextrema() != ((255, 255),) * 3 and list(base.getdata()) != list(last.getdata())


def test_the_sheet_leaves_out_an_abandoned_branch_and_fills_gaps_with_white(tmp_path: Path) -> None:
    assert write_preview_sheet(tmp_path) is None
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(4, 3, 72, 72)
    for step, names in ((0, "ab"), (10, "a"), (20, "ab")):
        for name in names:
            write_video(tmp_path / "previews" / str(step) / f"{name}.mp4", red, fps=8)
    write_preview_sheet(tmp_path, up_to=10)
    with Image.open(tmp_path / "previews.png") as sheet:
        pixels = {
            (row, column): sheet.getpixel((220 + 36 + column * 76, 26 + 36 + row * 76))
            for row in (0, 1)
            for column in (0, 4)
        }
    # yuv420p loses a few levels of a saturated red.
    assert all(pixels[key][0] > 240 and max(pixels[key][1:]) < 20 for key in ((0, 0), (0, 4), (1, 0)))
    assert pixels[1, 4] == (255, 255, 255)


def test_many_steps_are_spread_from_the_first_to_the_last() -> None:
    assert spread(list(range(0, 1100, 100)), 6) == [0, 200, 400, 600, 800, 1000]
    assert spread([0, 5], 6) == [0, 5]


def test_headings_stand_above_their_parts(tmp_path: Path) -> None:
    black = torch.zeros(5, 3, 20, 20, dtype=torch.uint8)
    for headings in ((), ("X", "X")):
        write_contact_sheet(
            tmp_path / f"{len(headings)}.png", [("a", black)], cell_height=20, headings=headings
        )
    plain, headed = (Image.open(tmp_path / f"{n}.png").convert("L") for n in (0, 2))
    assert headed.height == plain.height + 22
    dark = [x for x in range(headed.width) if any(headed.getpixel((x, y)) < 128 for y in range(22))]
    # Six cells of 24 pixels (five frames and the parting one) in two parts, from 220 on.
    assert dark and all(220 <= x < 236 or 292 <= x < 308 for x in dark)
