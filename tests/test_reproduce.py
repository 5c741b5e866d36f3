"""Previews of a run, and whether its weights still make them: train_video.py and scripts/reproduce.py, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_doors import frames_of

import sample_video
import train_video
from cogvideox import dist
from cogvideox.command_line import run_door
from cogvideox.config import load_config
from cogvideox.convert.lora import write_lora
from cogvideox.data.moving_shapes import combinations, make_dataset
from cogvideox.engine.logging import read_metrics
from cogvideox.sampling import preview
from cogvideox.sampling.preview import Previews, as_trained, recorded_values
from cogvideox.sampling.prompts import make_requests
from cogvideox.sampling.video_io import write_video
from cogvideox.system import build_vae
from cogvideox.weights import provenance
from cogvideox.weights.lora.file import read_lora
from scripts import reproduce

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = CONFIGS / "tiny_t2v.yaml"
SMALL = [
    "model.transformer.num_layers=1",
    "model.conditions.0.params.config.num_layers=1",
    "train.batch_size=2",
    "train.log_every=1",
    "train.warmup_steps=0",
    "sample.steps=2",
    "sample.num_frames=5",
]
PROMPTS = "train.preview_prompts=[a red circle moving right, a blue square moving up]"
NAMES = ["0000-a-red-circle-moving-right", "0001-a-blue-square-moving-up"]


def train(*argv: Any) -> None:
    assert run_door(train_video.main, ["--traceback", "--base", *map(str, argv)]) == 0


def again(*argv: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, what it printed)"""
    capsys.readouterr()
    code = run_door(reproduce.main, [*map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a VAE, a text-to-video run with previews at steps 2 and 4, and the same without."""
    folder = tmp_path_factory.mktemp("previews")
    make_dataset(folder / "clips", combinations()[0][:4], 1, seed=0, write_video=write_video)
    torch.manual_seed(0)
    save_file(build_vae(load_config([TINY])).state_dict(), folder / "vae.safetensors")
    t2v = [TINY, *SMALL, *places(folder), "train.steps=4", "train.save_every=2", "train.ema_decay=0.5"]
    train(*t2v, f"run.dir={folder}/t2v", PROMPTS)
    train(*t2v, f"run.dir={folder}/without")
    return folder


def places(root: Path) -> list[str]:
    return [f"data.path={root}/clips", f"load.vae={root}/vae.safetensors"]


@pytest.fixture(scope="module")
def lora(root: Path) -> Path:
    """A LoRA run in bf16 on that model, trained hard enough to change the videos."""
    base = [f"load.transformer={root}/t2v", f"load.text_encoder={root}/t2v"]
    overrides = ["train.steps=3", "lora.rank=2", "lora.alpha=4", "train.optimizer.params.lr=0.1"]
    overrides += ["train.gradient_clipping=1.0"]
    train(
        TINY, CONFIGS / "lora.yaml", *SMALL, *places(root), *base, *overrides, f"run.dir={root}/lora", PROMPTS
    )
    return root / "lora"


def record(run: Path, step: int) -> dict[str, Any]:
    return provenance.read({}, run / "checkpoints" / str(step))


# ---------------------------------------------------------------------------------------------------------- previews


def test_a_run_trains_bitwise_the_same_with_and_without_previews(root: Path) -> None:
    with_previews, without = (
        [
            (r["step"], r["train/loss"], r["train/grad_norm"])
            for r in read_metrics(root / name / "metrics.jsonl")
            if "train/loss" in r
        ]
        for name in ("t2v", "without")
    )
    assert with_previews == without and len(without) == 4
    assert not (root / "without" / "previews").exists()
    name = "checkpoints/4/ema_rank_00.safetensors"
    ours, theirs = (load_file(root / run / name) for run in ("t2v", "without"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_every_checkpoint_has_its_previews_as_video_sidecar_and_latents(root: Path) -> None:
    for step in ("2", "4"):
        files = sorted(path.name for path in (root / "t2v" / "previews" / step).iterdir())
        assert files == [f"{name}.{end}" for name in NAMES for end in ("json", "mp4", "safetensors")]
    videos = record(root / "t2v", 4)["preview"]["videos"]
    assert [(v["name"], v["prompt"], v["seed"]) for v in videos] == [
        (NAMES[0], "a red circle moving right", 0),
        (NAMES[1], "a blue square moving up", 1),
    ]
    latents = load_file(root / "t2v" / "previews" / "4" / f"{NAMES[1]}.safetensors")["latents"]
    assert latents.dtype == torch.float32 and list(latents.shape) == videos[1]["latents"]["shape"] == [
        2,
        8,
        8,
        8,
    ]
    assert videos[1]["latents"]["values"] == recorded_values(latents).tolist()  # JSON keeps every bit
    assert record(root / "t2v", 2)["preview"]["step"] == 2


def test_sample_video_makes_the_same_video_from_the_sidecar(root: Path, tmp_path: Path) -> None:
    folder = root / "t2v" / "previews" / "4"
    sidecar = folder / f"{NAMES[1]}.json"
    argv = ["--traceback", "--from", str(sidecar), "--output-dir", str(tmp_path)]
    assert run_door(sample_video.main, argv) == 0
    ours = frames_of(folder / f"{NAMES[1]}.mp4")
    assert torch.equal(frames_of(next(tmp_path.glob("*.mp4"))), ours)
    assert not torch.equal(ours, frames_of(root / "t2v" / "previews" / "2" / f"{NAMES[1]}.mp4"))


def test_a_checkpoint_knows_config_clips_sources_seed_and_command(root: Path) -> None:
    found = record(root / "t2v", 4)
    assert (found["step"], found["seed"], found["world_size"]) == (4, 0, 1)
    assert found["config"]["train"]["ema_decay"] == 0.5 and len(found["dataset"]) == 64 and found["command"]
    assert found["attention"] == "auto"  # the kernel that a resumed run goes on with
    assert found["sources"] == {
        "vae": {
            "path": f"{root}/vae.safetensors",
            "variant": "unknown CogVideoX-type VAE",
            "sha256": provenance.sha256([root / "vae.safetensors"]),
        }
    }


class Ranks:
    """One of two ranks, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int):
        monkeypatch.setattr(dist, "rank", lambda: rank)
        monkeypatch.setattr(dist, "world_size", lambda: 2)
        monkeypatch.setattr(dist, "gather", lambda value: [value])


@pytest.fixture
def system(root: Path):
    dist.init()
    config = load_config([root / "t2v" / "config.yaml"])
    return reproduce.load_system(as_trained(config, root / "t2v" / "checkpoints" / "4"))


def test_ranks_share_the_prompts_and_the_numbers_are_those_of_one_rank(
    root: Path, system, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["a red circle moving right", "a blue square moving up", "a green square moving up"]
    rendered = []
    for rank in (0, 1):
        Ranks(monkeypatch, rank)
        found = Previews(make_requests(lines, 0), system.config, tmp_path)(system, 4)
        rendered.append({video["name"]: video["latents"]["sha256"] for video in found["videos"]})
    assert [[name[:4] for name in part] for part in rendered] == [["0000", "0002"], ["0001"]]
    alone = {v["name"]: v["latents"]["sha256"] for v in record(root / "t2v", 4)["preview"]["videos"]}
    assert alone.items() <= (rendered[0] | rendered[1]).items()


def test_a_preview_that_fails_is_reported_and_the_others_are_kept(
    system, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails_for_seed_1(system, batch, condition, callback):
        if batch[0].seed == 1:
            raise FloatingPointError("NaN in step 1 of 2")
        return denoise(system, batch, condition, callback)

    denoise = preview.denoise
    monkeypatch.setattr(preview, "denoise", fails_for_seed_1)
    previews = Previews(make_requests(["a star", "a circle"], 0), system.config, tmp_path)
    assert [video["name"] for video in previews(system, 3)["videos"]] == ["0000-a-star"]
    assert "preview 1 of step 3 failed, the training goes on: NaN in step 1 of 2" in caplog.text


def test_the_text_of_a_frozen_encoder_is_encoded_once(lora: Path, tmp_path: Path) -> None:
    dist.init()
    system = reproduce.load_system(
        as_trained(load_config([lora / "config.yaml"]), lora / "checkpoints" / "3")
    )
    asked = []
    encode_prompts = system.encode_prompts
    system.encode_prompts = lambda *a, **k: asked.append(a) or encode_prompts(*a, **k)
    previews = Previews(make_requests(["a star"], 0), system.config, tmp_path)
    first, second = previews(system, 1), previews(system, 2)
    assert len(asked) == 1 and first["videos"] == second["videos"]


# --------------------------------------------------------------------------------------------------------- reproduce


def test_a_run_reproduces_its_previews_bitwise(root: Path, capsys) -> None:
    for options, step in (([], 4), (["--step", 2], 2)):
        code, text = again(root / "t2v", *options, capsys=capsys)
        assert code == 0, text
        assert f"checkpoints/{step}: step {step}, trained on {root}/clips, unchanged" in text
        assert "reproduced: 2 of 2 previews bitwise equal, worst relative error 0 (tolerance 0.001)" in text


def test_a_lora_run_in_bf16_reproduces_its_previews_bitwise(root: Path, lora: Path, capsys) -> None:
    code, text = again(lora / "checkpoints" / "3", capsys=capsys)
    assert code == 0 and "2 of 2 previews bitwise equal" in text
    ours, base = (
        load_file(run / "previews" / step / f"{NAMES[0]}.safetensors")["latents"]
        for run, step in ((lora, "3"), (root / "t2v", "4"))
    )
    assert (ours - base).norm() > 0.2 * base.norm()  # the adapters count


def test_an_image_to_video_run_reproduces_its_preview_bitwise(root: Path, tmp_path: Path, capsys) -> None:
    from PIL import Image

    Image.effect_noise((40, 40), 80).convert("RGB").save(tmp_path / "noise.png")
    run = tmp_path / "i2v"
    prompt = f"train.preview_prompts=['it moves@@{tmp_path}/noise.png']"
    train(CONFIGS / "tiny_i2v.yaml", *SMALL, *places(root), "train.steps=1", f"run.dir={run}", prompt)
    assert again(run, "--output-dir", tmp_path / "out", capsys=capsys)[0] == 0
    ours, then = (
        load_file(folder / "0000-it-moves.safetensors")["latents"]
        for folder in (tmp_path / "out", run / "previews" / "1")
    )
    assert torch.equal(ours, then)
    (tmp_path / "noise.png").unlink()
    code, text = again(run, capsys=capsys)
    assert code == 2 and f"0000-it-moves: its image {tmp_path}/noise.png is not there any more" in text


def test_other_weights_are_not_reproduced_and_the_difference_is_measured(
    root: Path, tmp_path: Path, capsys
) -> None:
    run = shutil.copytree(root / "t2v", tmp_path / "t2v")
    path = run / "checkpoints" / "4" / "ema_rank_00.safetensors"
    with_noise = {
        key: value + 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        for key, value in load_file(path).items()
    }
    save_file(with_noise, path, {"updates": "4", "decay": "0.5"})
    code, text = again(run, "--output-dir", tmp_path / "out", capsys=capsys)
    assert code == 1 and "NOT reproduced: 0 of 2 previews bitwise equal" in text
    ours, then = (
        load_file(folder / f"{NAMES[0]}.safetensors")["latents"]
        for folder in (tmp_path / "out", run / "previews" / "4")
    )
    difference = float((ours - then).abs().max())
    relative = float((ours - then).norm() / then.norm())
    assert f"max |difference| {difference:.3g}, relative error {relative:.3g} (of all values), PSNR" in text
    assert again(run, "--tolerance", 1e9, capsys=capsys)[0] == 0


def export(
    run: Path, step: int, path: Path, part: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """What an exporter writes: the averaged weights under SAT's names with the inherited record."""
    tensors = load_file(run / "checkpoints" / str(step) / "ema_rank_00.safetensors")
    known = provenance.inherited(record(run, step)) | changes
    tensors = {key: value.to(dtype) for key, value in tensors.items() if key.startswith(part)}
    save_file(tensors, path, provenance.stamp(**known))
    return path


def test_an_exported_model_is_compared_with_the_run_or_with_the_record_alone(
    root: Path, tmp_path: Path, capsys
) -> None:
    path = export(root / "t2v", 4, tmp_path / "model.safetensors", "model.")
    code, text = again(path, capsys=capsys)  # its text encoder is taken from the run folder
    assert code == 0 and "2 of 2 previews bitwise equal" in text
    config = record(root / "t2v", 4)["config"] | {"run": {"dir": str(tmp_path / "gone")}}
    path = export(root / "t2v", 2, tmp_path / "old.safetensors", "model.", config=config)
    code, text = again(path, capsys=capsys)
    assert code == 2 and "trained its text encoder too" in text and "load.text_encoder=PATH" in text
    # That of step 4 with the transformer of step 2: near, and not the same.
    code, text = again(path, f"load.text_encoder={root}/t2v", capsys=capsys)
    assert code == 1 and "(of 64 recorded values)" in text


def test_an_exported_lora_is_rendered_on_its_base(lora: Path, tmp_path: Path, capsys) -> None:
    metadata = provenance.stamp(**provenance.inherited(record(lora, 3)))
    path = write_lora(read_lora(lora), tmp_path / "lora.safetensors", "diffusers", metadata=metadata)
    code, text = again(path, capsys=capsys)
    # alpha / rank is 2 here: folding it into B changes an exponent and no digit.
    assert code == 0 and "2 of 2 previews bitwise equal" in text


def test_a_file_of_16_bits_gets_the_tolerance_of_its_rounding(root: Path, tmp_path: Path, capsys) -> None:
    path = export(root / "t2v", 4, tmp_path / "model.safetensors", "model.", dtype=torch.bfloat16)
    code, text = again(path, capsys=capsys)
    relative = float(text.split("worst relative error ")[1].split()[0])
    # bf16 rounds a weight by up to 2^-9; the error of a few layers and steps is of that order.
    assert code == 0 and "(tolerance 0.05)" in text and 0 < relative < 10 * 2**-9


# --------------------------------------------------------------------------------------------------- what is missing


def edit_record(run: Path, step: int, **changes: Any) -> None:
    path = run / "checkpoints" / str(step) / "state.json"
    state = json.loads(path.read_text())
    state[provenance.KEY] |= changes
    path.write_text(json.dumps(state))


def test_a_run_without_previews_says_what_asks_for_them(root: Path, capsys) -> None:
    code, text = again(root / "without", capsys=capsys)
    assert code == 2 and "rendered no previews up to step 4" in text and "train.preview_prompts" in text


def test_a_checkpoint_whose_preview_is_of_another_step_names_those_that_have_one(
    root: Path, tmp_path: Path, capsys
) -> None:
    run = shutil.copytree(root / "t2v", tmp_path / "t2v")
    edit_record(run, 4, preview=record(run, 2)["preview"])
    code, text = again(run, capsys=capsys)
    assert code == 2 and "weights of step 4, the last preview is of step 2" in text
    assert "checkpoints with their own previews: 2" in text
    code, text = again(run, "--step", 3, capsys=capsys)
    assert code == 2 and "no such checkpoint; it has 2, 4" in text


def test_base_weights_that_moved_are_named_and_may_be_given(root: Path, tmp_path: Path, capsys) -> None:
    run = shutil.copytree(root / "t2v", tmp_path / "t2v")
    config = record(run, 4)["config"]
    edit_record(run, 4, config=config | {"load": config["load"] | {"vae": f"{tmp_path}/old.safetensors"}})
    code, text = again(run, capsys=capsys)
    assert code == 2 and f"load.vae={tmp_path}/old.safetensors: not there any more" in text
    assert again(run, f"load.vae={root}/vae.safetensors", capsys=capsys)[0] == 0


def test_weights_of_others_carry_no_record(root: Path, capsys) -> None:
    code, text = again(root / "vae.safetensors", capsys=capsys)
    assert code == 2 and "carries no record of a training run" in text


def test_clips_that_changed_or_are_gone_are_said_and_do_not_matter(root: Path, tmp_path: Path) -> None:
    clips = shutil.copytree(root / "clips", tmp_path / "clips")
    config = load_config([root / "t2v" / "config.yaml"], [f"data.path={clips}"])
    known = record(root / "t2v", 4)
    assert reproduce.dataset_state(config, known) == f"trained on {clips}, unchanged"
    next(clips.rglob("*.txt")).write_text("something else")
    assert reproduce.dataset_state(config, known) == f"trained on {clips}, which has changed since"
    shutil.rmtree(clips)
    assert reproduce.dataset_state(config, known) == f"trained on {clips}, which is not there any more"
    assert "without a fingerprint" in reproduce.dataset_state(config, known | {"dataset": None})


# -------------------------------------------------------------------------------------------------- a mistaken config


MISTAKES = {
    "no section sample": (["sample=null", PROMPTS], r"preview_prompts needs the section sample"),
    "an image for a text model": (
        ["train.preview_prompts=['a@@b.png']"],
        r"preview_prompts.0=.*takes no image",
    ),
    "an empty prompt": (["train.preview_prompts=['a', ' ']"], r"preview_prompts.1=' ': the prompt is empty"),
    "an over-long prompt": ([f"train.preview_prompts=[{'a' * 50}]"], r"51 tokens.*32"),
    "no step at all": (["train.preview_every=0", PROMPTS], r"train\.preview_every=0: expected at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_previews_is_one_line_before_anything_is_written(
    mistake: str, root: Path, tmp_path: Path, capsys
) -> None:
    import re

    overrides, message = MISTAKES[mistake]
    argv = ["--base", TINY, *SMALL, *places(root), f"run.dir={tmp_path}/run", *overrides]
    assert run_door(train_video.main, [*map(str, argv)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), errors
    assert not (tmp_path / "run").exists()


def test_an_image_to_video_preview_needs_an_image_that_exists(root: Path, tmp_path: Path, capsys) -> None:
    for line, message in (
        ("it moves", "needs an image: prompt@@image.png"),
        ("it moves@@gone.png", "gone.png"),
    ):
        argv = ["--base", CONFIGS / "tiny_i2v.yaml", *places(root), f"train.preview_prompts=['{line}']"]
        assert run_door(train_video.main, [*map(str, argv), f"run.dir={tmp_path}/run"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
