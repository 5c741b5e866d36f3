"""The two doors from end to end on a tiny model, and what they say to bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import sample_video
import train_video
from cogvideox import dist
from cogvideox.command_line import run_door
from cogvideox.data.moving_shapes import combinations, make_dataset
from cogvideox.engine.logging import read_metrics
from cogvideox.sampling.video_io import write_video

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = str(CONFIGS / "tiny_t2v.yaml")
SMALL = ["model.transformer.num_layers=1", "model.conditions.0.params.config.num_layers=1", "sample.steps=2"]


def train(*argv: str) -> int:
    return run_door(
        train_video.main,
        ["--traceback", "--base", *map(str, argv), "train.save_every=2", "train.log_every=1"],
    )


def sample(*argv: str) -> int:
    return run_door(sample_video.main, ["--traceback", *map(str, argv)])


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    make_dataset(folder, combinations()[0][:8], 1, seed=0, write_video=write_video)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clips: Path) -> Path:
    """A VAE run, a text-to-video run over cached latents, and a LoRA run on top of it."""
    root = tmp_path_factory.mktemp("runs")
    data = f"data.path={clips}"
    assert (
        train(CONFIGS / "tiny_vae.yaml", data, f"run.dir={root}/vae", "train.steps=2", "train.batch_size=2")
        == 0
    )
    t2v = [TINY, *SMALL, data, f"load.vae={root}/vae", "train.batch_size=4"]
    cached = [f"data.latent_cache={root}/latents", f"data.validation_path={clips}"]
    assert train(*t2v, *cached, f"run.dir={root}/t2v", "train.steps=4", "train.validate_every=2") == 0
    base = [f"load.transformer={root}/t2v", f"load.text_encoder={root}/t2v", "lora.rank=4", "lora.alpha=4"]
    lora = [TINY, CONFIGS / "lora.yaml", *SMALL, data, *base, f"load.vae={root}/vae", "train.precision=fp32"]
    assert train(*lora, f"run.dir={root}/lora", "train.steps=2", "train.batch_size=2") == 0
    return root


def test_training_leaves_a_run_folder_that_explains_itself(runs: Path) -> None:
    for name in ("vae", "t2v", "lora"):
        files = {p.name for p in (runs / name).iterdir()}
        assert {"config.yaml", "command.txt", "metrics.jsonl", "checkpoints", "loss.png"} <= files
    records = read_metrics(runs / "t2v" / "metrics.jsonl")
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "val/loss" in r] == [0, 2, 4]


def test_a_lora_run_stores_only_what_it_trained(runs: Path) -> None:
    state = torch.load(
        runs / "lora" / "checkpoints" / "2" / "mp_rank_00_model_states.pt", weights_only=False
    )["module"]
    assert state and all(".matrix_A." in key or ".matrix_B." in key for key in state)


def test_the_same_command_goes_on_and_joins_the_metrics(runs: Path, clips: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "t2v", tmp_path / "t2v")
    shutil.rmtree(tmp_path / "t2v" / "checkpoints" / "4")
    (tmp_path / "t2v" / "checkpoints" / "latest").write_text("2")
    arguments = [TINY, *SMALL, f"data.path={clips}", f"load.vae={runs}/vae", "train.batch_size=4"]
    cached = [f"data.latent_cache={runs}/latents", f"data.validation_path={clips}"]
    assert (
        train(*arguments, *cached, f"run.dir={tmp_path}/t2v", "train.steps=4", "train.validate_every=2") == 0
    )
    before, after = (
        [
            (r["step"], r.get("train/loss"), r.get("val/loss"), r.get("val/delta_se"))
            for r in read_metrics(folder / "t2v" / "metrics.jsonl")
        ]
        for folder in (runs, tmp_path)
    )
    assert before == after


def test_the_seed_alone_decides_a_new_run(runs: Path, clips: Path, tmp_path: Path) -> None:
    losses = {}
    for name, seed in {"first": 3, "again": 3, "other": 4}.items():
        torch.manual_seed(len(losses))  # whatever the process drew before
        arguments = [TINY, *SMALL, f"data.path={clips}", f"load.vae={runs}/vae", "train.batch_size=2"]
        assert train(*arguments, f"seed={seed}", "train.steps=2", f"run.dir={tmp_path}/{name}") == 0
        losses[name] = [r["train/loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert losses["first"] == losses["again"] != losses["other"]


def loaded(runs: Path) -> list[str]:
    return [f"load.vae={runs}/vae", f"load.transformer={runs}/t2v", f"load.text_encoder={runs}/t2v"]


def test_sampling_writes_a_video_and_a_sidecar_that_makes_it_again(runs: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving right\n\na blue square moving up\n")
    arguments = ["--base", TINY, *SMALL, *loaded(runs), "--prompt-file", prompts, "--seed", 7]
    assert sample(*arguments, "--output-dir", tmp_path / "out", "--frames", 5, "--size", "16x32") == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [
        "0000-a-red-circle-moving-right.json",
        "0000-a-red-circle-moving-right.mp4",
        "0001-a-blue-square-moving-up.json",
        "0001-a-blue-square-moving-up.mp4",
    ]
    with av.open(str(tmp_path / "out" / names[1])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, float(stream.average_rate), stream.width, stream.height) == (
            "h264",
            8,
            32,
            16,
        )
        assert len(list(container.decode(stream))) == 5
    sidecar = json.loads((tmp_path / "out" / names[2]).read_text())
    assert (sidecar["prompt"], sidecar["seed"], sidecar["num_frames"]) == ("a blue square moving up", 8, 5)
    assert sample("--from", tmp_path / "out" / names[2], "--output-dir", tmp_path / "again") == 0
    again = tmp_path / "again" / "0000-a-blue-square-moving-up.mp4"
    assert (
        frames_of(again).sub(frames_of(tmp_path / "out" / names[3])).abs().max() <= 1
    )  # another batch size rounds differently


def frames_of(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack(
            [torch.from_numpy(f.to_ndarray(format="rgb24")).int() for f in container.decode(video=0)]
        )


def png_frames(folder: Path) -> torch.Tensor:
    """Of the only video in ``folder``, which were written by ``--output frames``: what an mp4 loses is in them."""
    pictures = [Image.open(path) for path in sorted(folder.glob("*/*.png"))]
    return torch.stack([torch.from_numpy(np.array(picture)).int() for picture in pictures])


def test_lora_changes_the_sample_and_merging_it_does_not(runs: Path, tmp_path: Path) -> None:
    # Two steps leave B near zero: scale it up, so that its effect is seen.
    shutil.copytree(runs / "lora", tmp_path / "lora")
    for path in (tmp_path / "lora" / "checkpoints").glob("*/mp_rank_00_model_states.pt"):
        state = torch.load(path, weights_only=False)
        for key, value in state["module"].items():
            if ".matrix_B." in key:
                value.copy_(20 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
        torch.save(state, path)
    arguments = [
        "--base",
        TINY,
        *SMALL,
        *loaded(runs),
        "--prompt",
        "a red circle moving right",
        "--output-dir",
    ]
    for name, extra in {
        "plain": [],
        "merged": [f"load.lora={tmp_path}/lora"],
        "apart": ["sample.merge_lora=false", "--lora", f"{tmp_path}/lora"],
        "off": ["--lora", f"{tmp_path}/lora:0"],
        "halves": ["--lora", f"{tmp_path}/lora:0.5", f"{tmp_path}/lora:5e-1"],
    }.items():
        assert sample(*arguments, tmp_path / name, *extra, "--output", "frames") == 0
    plain, merged, apart, off, halves = (
        png_frames(tmp_path / n) for n in ("plain", "merged", "apart", "off", "halves")
    )
    assert (merged - apart).abs().max() <= 1 < (merged - plain).abs().max()  # a pixel between two integers
    assert (merged - halves).abs().max() <= 1
    assert torch.equal(off, plain)


def test_lora_on_the_command_line_is_load_lora(capsys) -> None:
    argv = ["--base", TINY, "sample.merge_lora=false", "--dry-run", "--lora"]
    assert sample(*argv, "runs/a:0.5", "hf://org/name", "b.safetensors:-2", "odd:name", "--prompt", "a") == 0
    config = next(yaml.safe_load_all(capsys.readouterr().out.partition("\n\n")[0]))
    assert config["load"]["lora"] == [
        {"path": "runs/a", "strength": 0.5},
        {"path": "hf://org/name", "strength": 1.0},
        {"path": "b.safetensors", "strength": -2.0},
        {"path": "odd:name", "strength": 1.0},
    ]


def test_prompts_come_from_standard_input_too(runs: Path, tmp_path: Path, monkeypatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("a red circle moving right\n"))
    assert sample("--base", TINY, *SMALL, *loaded(runs), "--output-dir", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1


def test_image_to_video_from_the_command_line(runs: Path, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    i2v = [
        "--base",
        CONFIGS / "tiny_i2v.yaml",
        *SMALL,
        f"load.vae={runs}/vae",
        "--output-dir",
        tmp_path / "out",
    ]
    assert sample(*i2v, "--prompt", f"it moves@@{tmp_path}/red.png") == 0
    sidecar = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert sidecar["image"] == str(tmp_path / "red.png")


# ------------------------------------------------------------------------------------------------------ bad input

TRAIN_MISTAKES = {
    "a misspelt key": (["train.batchsize=2"], r"train\.batchsize.*did you mean train\.batch_size"),
    "a wrong type": (["train.steps=many"], r"train\.steps='many'.*whole number"),
    "no data path": (["data.path=null"], r"data\.path is missing"),
    "frames": (["data.num_frames=10"], r"data\.num_frames=10.*9 or 13"),
    "size": (["data.height=33"], r"data\.height=33.*multiple of 8.*32 or 40"),
    "heads": (
        ["model.transformer.num_attention_heads=5"],
        r"num_attention_heads=5 does not divide.*nearest.* 4",
    ),
    "a folder without videos": (["data.path={tmp}"], r"no videos|nothing found|holds no"),
    "a folder that is not there": (["data.path={tmp}/nowhere"], r"nowhere"),
    "fp16 on a CPU": (["train.precision=fp16"], r"train\.precision=fp16.*(CPU|GPU)"),
    "weights that are not there": (["load.transformer={tmp}/nowhere"], r"nowhere"),
    "a truncated checkpoint": (["load.transformer={tmp}/short.safetensors"], r"short\.safetensors"),
    "another model's weights": (["load.transformer={runs}/vae"], r"(?i)vae"),
    "an unknown tracker": (["train.trackers=[wandbb]"], r"wandbb"),
    "an unknown target": (["model.loss.target=cogvideox.diffusion.loss.v_loss"], r"has no v_loss"),
    "an argument that a part lacks": (["model.schedule.params.shift=3"], r"params\.shift.*snr_shift"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is refused on a CPU only")
@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_training_refuses_in_one_line_and_writes_nothing(mistake, runs, clips, tmp_path, capsys) -> None:
    overrides, message = TRAIN_MISTAKES[mistake]
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    overrides = [o.format(tmp=tmp_path, runs=runs) for o in overrides]
    argv = ["--base", TINY, *SMALL, f"data.path={clips}", f"run.dir={tmp_path}/run", *overrides]
    check_refusal(run_door(train_video.main, argv), capsys, message)
    assert not (tmp_path / "run").exists()


def test_a_corrupted_clip_is_named(clips: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(clips, tmp_path / "clips")
    broken = sorted((tmp_path / "clips" / "videos").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:200])
    argv = ["--base", TINY, f"data.path={tmp_path}/clips", f"run.dir={tmp_path}/run"]
    check_refusal(run_door(train_video.main, argv), capsys, broken.name, lines=4)


SAMPLE_MISTAKES = {
    "an empty prompt": (["--prompt", " "], r"empty prompt"),
    "an over-long prompt": (["--prompt", "a" * 50], r"51 tokens.*32"),
    "an empty prompt file": (["--prompt-file", "{tmp}/empty.txt"], r"no prompt"),
    "no such prompt file": (["--prompt-file", "{tmp}/none.txt"], r"none\.txt"),
    "frames": (["--prompt", "a", "--frames", "10"], r"sample\.num_frames=10.*9 or 13"),
    "size": (["--prompt", "a", "--size", "30x32"], r"sample\.height=30"),
    "a size that is none": (["--prompt", "a", "--size", "big"], r"--size big.*480x720"),
    "an image for a text model": (["--prompt", "a", "--image", "{tmp}/empty.txt"], r"takes no image"),
    "a sampler that is none": (
        ["--prompt", "a", "sampler.target=cogvideox.diffusion.samplers.dimm"],
        r"ddim",
    ),
    "a LoRA that is none": (["--prompt", "a", "--lora", "{runs}/t2v"], r"t2v.*no LoRA in it"),
    "a LoRA that is not there": (["--prompt", "a", "--lora", "{tmp}/no:0.5"], r"/no does not exist"),
    "a strength that is none": (
        ["--prompt", "a", "--lora", "{runs}/lora:nan"],
        r"load\.lora\.0: strength='NaN': expected a number",
    ),
    "several LoRAs to start one": (
        ["--prompt", "a", "lora.rank=4", "--lora", "{runs}/lora", "{runs}/lora"],
        r"names 2 LoRAs, but the section lora has one set",
    ),
    "a sidecar that is none": (["--from", "{tmp}/empty.txt"], r"not a sidecar"),
}


@pytest.mark.parametrize("mistake", SAMPLE_MISTAKES)
def test_sampling_refuses_in_one_line_and_writes_nothing(mistake, runs, tmp_path, capsys) -> None:
    arguments, message = SAMPLE_MISTAKES[mistake]
    (tmp_path / "empty.txt").write_text("")
    argv = ["--base", TINY, *SMALL, *loaded(runs), "--output-dir", f"{tmp_path}/out"]
    argv += [a.format(tmp=tmp_path, runs=runs) for a in arguments]
    check_refusal(run_door(sample_video.main, argv), capsys, message)
    assert not (tmp_path / "out").exists()


def check_refusal(code: int, capsys, message: str, lines: int = 1) -> None:
    import re

    dist.shutdown()
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ") or lines > 1]
    assert code == 2
    assert len(error) >= 1 and re.search(message, "\n".join(error)), error
