"""``scripts.evaluate``: validation of checkpoints of any kind, prompt scores, and what it says to bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cogvideox
import train_video
from cogvideox import dist
from cogvideox.command_line import run_door
from cogvideox.data.moving_shapes import Combination, combinations, draw_clip, make_dataset
from cogvideox.engine.logging import read_metrics
from cogvideox.sampling.video_io import write_video
from cogvideox.system import build_vae
from cogvideox.weights.reader import WeightsReader
from scripts.evaluate.__main__ import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = str(CONFIGS / "tiny_t2v.yaml")
SMALL = ["model.transformer.num_layers=1", "model.conditions.0.params.config.num_layers=1", "sample.steps=2"]


def evaluate(*argv: object) -> int:
    return run_door(main, list(map(str, argv)))


@pytest.fixture(autouse=True)
def _one_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "shutdown", lambda: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``full``, with checkpoints after steps 1 and 2, ``lora`` on top of it, and the data."""
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("train", 0), ("held_out", 1)):
        make_dataset(root / name, combinations()[0][:4], 1, seed=seed, write_video=write_video)
    torch.manual_seed(0)
    save_file(build_vae(cogvideox.load_config([TINY])).state_dict(), root / "vae.safetensors")
    common = [*SMALL, f"data.path={root}/train", f"data.validation_path={root}/held_out"]
    common += [f"load.vae={root}/vae.safetensors", "train.batch_size=2", "train.validation_batches=2"]
    common += ["train.steps=2", "train.save_every=1", "train.validate_every=1", "train.warmup_steps=0"]
    base = [f"load.transformer={root}/full", f"load.text_encoder={root}/full"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "shutdown", lambda: None)
        full = ["--base", TINY, *common, f"run.dir={root}/full", "train.ema_decay=null"]
        assert run_door(train_video.main, full) == 0
        lora = [
            "--base",
            TINY,
            str(CONFIGS / "lora.yaml"),
            *common,
            *base,
            f"run.dir={root}/lora",
            "sample=null",
        ]
        assert run_door(train_video.main, [*lora, "lora.rank=4", "train.precision=bf16"]) == 0
    return root


def last(run: Path) -> dict[str, float]:
    records = read_metrics(run / "metrics.jsonl")
    compared = ("val/delta", "val/delta_se")
    return {k: v for k, v in records[-1].items() if k.startswith("val/") and k not in compared}


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_has_the_numbers_of_its_last_validation(runs: Path, tmp_path: Path, name: str) -> None:
    result = tmp_path / "found.json"
    assert evaluate("validation", runs / name, "--json", result) == 0
    [found] = json.loads(result.read_text())["checkpoints"]
    for key, value in last(runs / name).items():
        # The same weights, clips and draws: kernels may add in another order where a tensor lies elsewhere in memory.
        # abs: the gap is a small difference of losses near 1.
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key


def test_two_checkpoints_are_compared_clip_by_clip(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "found.json"
    steps = [runs / "full" / "checkpoints" / step for step in ("1", "2")]
    assert evaluate("validation", *steps, "--json", result) in (0, 1)
    found, output = json.loads(result.read_text()), capsys.readouterr().out
    weights = torch.tensor([125, 125, 125, 125, 125, 125, 125, 124, 1]).double() / 1000
    first, second = (torch.tensor(c["losses"]["held_out"]).double() @ weights for c in found["checkpoints"])
    d = second - first
    assert len(d) == 4 and found["difference"]["val/loss"]["mean"] == pytest.approx(d.mean().item(), rel=1e-9)
    assert found["difference"]["val/loss"]["standard_error"] == pytest.approx((d.std() / 2).item(), rel=1e-9)
    logged = [r["val/loss"] for r in read_metrics(runs / "full" / "metrics.jsonl")][1:]
    assert [c["val/loss"] for c in found["checkpoints"]] == pytest.approx(logged, rel=1e-6)
    assert "4 clips of" in output and "(2) - (1)" in output and "val/loss_by_t/0999" in output
    assert "standard errors" in output.strip().splitlines()[-1]


def test_weights_without_a_run_are_evaluated_with_the_configuration_that_is_named_and_worse_ones_are_exit_code_1(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = WeightsReader(runs / "full", "transformer", ema=False)
    weights = {key: reader.tensor(key).clone() for key in reader.tensors if "diffusion_model" in key}
    save_file(weights, tmp_path / "same.safetensors")
    spoilt = {key: value + 0.3 * torch.randn(value.shape) for key, value in weights.items()}
    save_file(spoilt, tmp_path / "spoilt.safetensors")
    files = [tmp_path / "same.safetensors", tmp_path / "spoilt.safetensors"]
    rest = ["--base", runs / "full" / "config.yaml", f"load.text_encoder={runs}/full", "data.path=null"]
    result = tmp_path / "found.json"
    assert evaluate("validation", *files, *rest, "--json", result) == 1
    same, _ = json.loads(result.read_text())["checkpoints"]
    assert same["val/loss"] == pytest.approx(last(runs / "full")["val/loss"], rel=1e-6)
    assert "val/train_loss" not in same
    output = capsys.readouterr().out
    assert "the second is worse, by more than two standard errors" in output
    assert "data.path is null: no training subset" in output


def test_what_makes_losses_of_two_models_incomparable_is_said(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "full", tmp_path / "other")
    text = (runs / "full" / "config.yaml").read_text().replace("scale_factor: 1.0", "scale_factor: 0.7")
    (tmp_path / "other" / "checkpoints" / "2" / "config.yaml").write_text(text)
    assert evaluate("validation", runs / "full", tmp_path / "other", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "the two differ in vae.scale_factor: 1.0 -> 0.7: their losses are not of the same thing" in output
    assert "load.vae" not in output.split("# ")[0]


def test_a_mistake_is_one_line_before_anything_is_loaded(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogvideox.system.VideoDiffusion.__init__", None)  # nothing is built
    for arguments, complaint in (
        ([], "nothing to evaluate: name a run folder or a checkpoint, or --base FILE..."),
        ([tmp_path / "none"], "none"),
        ([runs / "full", runs / "lora", runs / "full"], "3 checkpoints were named"),
        ([runs / "full", "data.validation_path=null"], "data.validation_path is missing"),
        ([runs / "full", f"data.path={tmp_path}/gone"], "gone: not there; say where it is: data.path=DIR"),
        ([runs / "full", "train.validation_timesteps=2"], "train.validation_timesteps=2"),
        ([runs / "vae.safetensors"], "name its configuration with --base"),
        ([runs / "vae.safetensors", "--base", TINY], "expected a transformer or a LoRA"),
        (["--base", TINY, "data.path=null"], "data.validation_path is missing"),
        (["--base", CONFIGS / "tiny_vae.yaml"], "is of a VAE alone"),
    ):
        assert evaluate("validation", *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1, error


# ------------------------------------------------------------------------------------------------------ prompt scores


def test_drawn_clips_show_what_their_sidecars_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen, held_out = combinations()
    shown = [seen[0], held_out[0], Combination("purple", "circle", "left"), seen[5]]
    for index, combination in enumerate(shown):
        clip = draw_clip(*combination, 9, 32, torch.Generator().manual_seed(index))
        write_video(tmp_path / f"{index}.mp4", clip, 8, crf=8)
        told = combination if index < 3 else combination._replace(direction="down", colour="green")
        record = {"config": {}, "prompt": told.caption, "seed": index, "files": {"mp4": f"{index}.mp4"}}
        (tmp_path / f"{index}.json").write_text(json.dumps(record))
    assert shown[3].direction != "down" and shown[3].colour != "green"
    (tmp_path / "no_video.json").write_text(json.dumps({**record, "files": {"mp4": "gone.mp4"}}))
    (tmp_path / "scores.json").write_text("{}")  # no sidecar
    assert evaluate("prompts", "--videos", tmp_path, "--json", tmp_path / "found.json") == 0
    scores = json.loads((tmp_path / "found.json").read_text())["scores"]
    assert scores["all"] == {"n": 4, "colour": 0.75, "shape": 1.0, "direction": 0.75, "all": 0.75}
    assert scores["others"]["all"] == scores["held-out combinations"]["all"] == 1.0
    assert "1 sidecars without their mp4 are left out, first gone.mp4" in capsys.readouterr().out


def test_a_checkpoint_is_sampled_by_sample_video_and_judged(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving left\na blue square moving up\n")
    common = ["prompts", runs / "full", "--prompt-file", prompts, "--output-dir", tmp_path / "videos"]
    assert evaluate(*common, "--seed", 7, "--json", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["scores"]["all"]["n"] == 2 and len(found["videos"]) == 2
    sidecars = sorted((tmp_path / "videos").glob("*.json"))
    records = [json.loads(path.read_text()) for path in sidecars]
    assert [(r["prompt"], r["seed"]) for r in records] == [
        ("a red circle moving left", 7),
        ("a blue square moving up", 8),
    ]
    assert records[0]["config"]["load"]["transformer"].endswith("full/checkpoints/2")
    capsys.readouterr()
    assert evaluate(*common, "--seed", 7) == 0
    assert "2 of 2 are there" in capsys.readouterr().err


def test_prompts_that_cannot_be_judged_and_folders_without_videos_are_mistakes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat on a roof\n")
    for arguments, complaint in (
        (["--videos", tmp_path], "holds no mp4 with a sidecar json"),
        (["--videos", tmp_path / "none"], "there is no such folder"),
        (
            [runs / "full", "--prompt-file", tmp_path / "prompts.txt"],
            "'a cat on a roof' is no caption of the demo",
        ),
        ([runs / "full", runs / "lora"], "2 checkpoints were named"),
    ):
        assert evaluate("prompts", *arguments) == 2
        assert complaint in capsys.readouterr().err


def test_the_caption_of_a_combination_is_read_back() -> None:
    for group in combinations():
        assert all(Combination.of_caption(f" {c.caption}\n") == c for c in group)
