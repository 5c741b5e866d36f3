"""A run that is killed again and again, each time started with the same command, is the run that never was.

Twenty kills (-9) at random moments for one and two ranks, full and LoRA: inside steps, files, renames, prunings,
validations and previews. What is compared: every line of ``metrics.jsonl``, and every bit of the last checkpoint.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from cogvideox.data.moving_shapes import combinations, make_dataset
from cogvideox.engine.events import read_events
from cogvideox.engine.logging import read_metrics
from cogvideox.sampling.video_io import write_video

if TYPE_CHECKING:
    from workers.fork_server import ForkServer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STEPS = 120
TOY = [(1, None, "fp32"), (1, 2, "bf16"), (2, None, "fp32"), (2, 2, "bf16")]  # ranks, LoRA rank, precision
DOOR = [(1, "lora"), (2, "full")]


def toy_name(case: tuple[Any, ...]) -> str:
    ranks, lora, precision = case
    return f"{ranks}rank-{'full' if lora is None else 'lora'}-{precision}"


def toy_job(folder: Path, case: tuple[Any, ...]) -> dict[str, Any]:
    train = {
        "steps": STEPS,
        "save_every": 3,
        "validate_every": 2,
        "preview_every": 6,
        "log_every": 2,  # so that lines cover steps on both sides of a save
        "ema_decay": 0.95,
        "precision": case[2],
        "gradient_accumulation_steps": 2,
        "keep_checkpoints": 2,
        "keep_every": 30,
        "lr_schedule": "cosine",
        "warmup_steps": 3,
        "trackers": ["wandb"],  # disabled, but for its id
    }
    return {"toy": [{"run_dir": str(folder), "toy": {"lora_rank": case[1]}, "train": train, "preview": True}]}


def toy_moments(ranks: int, seed: str) -> list[dict[str, Any]]:
    """Twenty moments, some by the clock and some inside what a killed process must not break."""
    draw = random.Random(seed)
    kinds = ["clock"] * 7 + ["file"] * 7 + ["write"] * 3 + ["validate"] * 2 + ["preview"]
    draw.shuffle(kinds)
    moments = []
    for kind in kinds:
        rank = draw.randrange(ranks)
        # Beside its own two files of a save, rank 1 changes nothing in the run folder.
        most = {"file": 45 if rank == 0 else 5, "write": 40, "validate": 6, "preview": 3}
        if kind == "clock":
            moments.append({"rank": rank, "seconds": draw.uniform(0.0, 0.1)})
        else:
            moments.append({"rank": rank, "at": kind, "count": draw.randint(1, most[kind])})
    return moments


def killed_and_finished(
    forks: ForkServer, job: dict[str, Any], ranks: int, log: Path, moments: list[dict[str, Any]]
) -> None:
    for number, kill in enumerate(moments):
        codes = forks.run(job, ranks, log, kill)
        assert codes[kill["rank"]] == -9, (number, kill, codes, tail(log))
    assert forks.run(job, ranks, log) == [0] * ranks, tail(log)


def tail(log: Path) -> str:
    return Path(f"{log}.0").read_text()[-3000:]


@pytest.fixture(scope="module", params=TOY, ids=toy_name)
def toys(
    request: pytest.FixtureRequest, forks: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The folders of a run that was killed twenty times and of one that was not."""
    case, root = request.param, tmp_path_factory.mktemp("toys")
    killed, reference = root / "killed", root / "reference"
    for folder in (killed, reference):
        folder.mkdir()
    assert forks.run(toy_job(reference, case), case[0], root / "log") == [0] * case[0], tail(root / "log")
    moments = toy_moments(case[0], toy_name(case))
    killed_and_finished(forks, toy_job(killed, case), case[0], root / "log", moments)
    return killed, reference


def trained(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what a clock or a machine decides."""
    return [
        {key: value for key, value in record.items() if not key.startswith(("perf/", "mem/"))}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def check_equal(killed: Path, reference: Path) -> None:
    assert trained(killed) == trained(reference)
    ours, theirs = (sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (killed, reference))
    assert ours == theirs  # the same were pruned, and nothing half written is left
    for name in ours:
        if name == "latest":
            assert (killed / "checkpoints" / name).read_text() == (
                reference / "checkpoints" / name
            ).read_text()
            continue
        ours_state, theirs_state = (
            json.loads((f / "checkpoints" / name / "state.json").read_text()) for f in (killed, reference)
        )
        averages = [file for file in ours_state["files"] if file.startswith("ema_")]
        # Weights, masters and moments: bytes and SHA-256 of each file.
        for state in (ours_state, theirs_state):
            for key in ("sha256", "cogvideox", "resources"):  # over paths, the command, and times
                del state[key]
            state["files"].pop("config.yaml", None)  # run.dir
            for file in averages:  # safetensors writes the two entries of its metadata in any order
                del state["files"][file]
        assert ours_state == theirs_state
        for file in averages:
            ours_average, theirs_average = (
                load_file(f / "checkpoints" / name / file) for f in (killed, reference)
            )
            assert ours_average and ours_average.keys() == theirs_average.keys()
            assert all(torch.equal(ours_average[key], theirs_average[key]) for key in ours_average)


def test_a_run_killed_twenty_times_is_bitwise_the_run_that_was_not(toys: tuple[Path, Path]) -> None:
    killed, reference = toys
    check_equal(killed, reference)
    start, *lines = trained(reference)
    assert start["step"] == 0 and "val/loss" in start  # the validation before the first step
    assert [r["step"] for r in lines] == list(range(2, STEPS + 1, 2))  # of a whole curve
    assert len({r["train/loss"] for r in lines}) == len({r["val/loss"] for r in lines}) == STEPS / 2


def test_each_life_of_the_run_is_an_event_and_the_tracker_keeps_its_id(toys: tuple[Path, Path]) -> None:
    killed, _ = toys
    events = read_events(killed)
    starts = [e for e in events if e["kind"] == "started"]
    resumes = [e for e in events if e["kind"] == "resumed"]
    assert 5 <= len(starts) <= 21 and len(resumes) < len(starts)  # some were killed before they said so
    assert "torch" in starts[0]["versions"] and starts[0]["command"]
    steps = [e["step"] for e in resumes]
    assert steps == sorted(steps) and steps[-1] > 0  # how far a life comes depends on the machine
    assert not [e for e in events if e["kind"] == "checkpoint_damaged"]  # a kill damages nothing
    assert len((killed / "wandb_id").read_text()) == 8


# -------------------------------------------------------------------------- the real model through train_video.main


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    make_dataset(folder, combinations()[0][:8], 1, seed=0, write_video=write_video)
    return folder


def door_job(folder: Path, clips: Path, method: str, *more: str) -> dict[str, Any]:
    overlays = [str(CONFIGS / "lora.yaml")] if method == "lora" else []
    arguments = [
        "model.transformer.num_layers=1",
        "model.conditions.0.params.config.num_layers=1",
        "sample.steps=1",
        f"run.dir={folder}",
        f"data.path={clips}",
        f"data.validation_path={clips}",
        f"data.latent_cache={folder.parent / 'latents'}",
        "train.steps=9",
        "train.batch_size=2",
        "train.save_every=2",
        "train.validate_every=3",
        "train.validation_batches=2",
        "train.log_every=1",
        "train.precision=fp32",
        "train.ema_decay=0.9",
        "train.preview_prompts=[a red circle moving right]",
        "train.preview_every=4",
        *(["lora.rank=4", f"load.transformer={folder.parent / 'base'}"] if method == "lora" else []),
        *more,
    ]
    return {"door": ["--base", str(CONFIGS / "tiny_t2v.yaml"), *overlays, *arguments]}


@pytest.mark.parametrize(("ranks", "method"), DOOR, ids=[f"{r}rank-{m}" for r, m in DOOR])
def test_the_real_model_killed_again_and_again_is_bitwise_the_one_that_was_not(
    forks: ForkServer, clips: Path, tmp_path: Path, ranks: int, method: str
) -> None:
    killed, reference = tmp_path / "killed", tmp_path / "reference"
    if method == "lora":
        # A new network's last layer is zero, behind which no adapter gets a gradient.
        base = door_job(tmp_path / "base", clips, "full", "train.steps=2", "train.preview_prompts=[]")
        assert forks.run(base, 1, tmp_path / "log") == [0], tail(tmp_path / "log")
    moments = [
        {"rank": 0, "at": "write", "count": 5},  # in the first file of the first checkpoint
        {"rank": ranks - 1, "at": "validate", "count": 1},
        {"rank": 0, "at": "file", "count": random.Random(method).randint(20, 40)},
        {"rank": ranks - 1, "seconds": random.Random(f"{method} clock").uniform(0.0, 1.0)},
        {"rank": 0, "at": "preview", "count": 1},
    ]
    killed_and_finished(forks, door_job(killed, clips, method), ranks, tmp_path / "log", moments)
    assert forks.run(door_job(reference, clips, method), ranks, tmp_path / "log") == [0] * ranks
    check_equal(killed, reference)
    lines = [r for r in trained(killed) if "train/loss" in r]
    assert [r["step"] for r in lines] == list(range(1, 10)) and all(
        r["train/grad_norm"] > 0 for r in lines[1:]
    )
