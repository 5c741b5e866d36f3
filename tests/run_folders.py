"""Run folders as the trainer writes them, with every kind of number, made in a moment and without a model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from cogvideox.config import load_config, save_config
from cogvideox.sampling.video_io import write_video

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny_t2v.yaml"
BANDS = ("0000-0249", "0250-0499", "0500-0749", "0750-0999")
PROMPTS = ("a red circle moving right", "a blue square & <b>moving</b> up")
PARTS = {"data": 0.02, "text": 0.03, "vae": 0.1, "forward": 0.3, "backward": 0.55, "optimizer": 0.08}


def make_run(
    folder: Path,
    *,
    steps: int = 400,
    log_every: int = 5,
    lr: float = 1e-3,
    better: bool = True,
    previews: tuple[int, ...] = (0, 200, 400),
    clips: tuple[float, ...] = (0.3, 0.25, 0.4, 0.35),
    config: dict[str, Any] | None = None,
) -> Path:
    """All metrics, events, summary, quarantine and previews.

    config: further overrides.  clips: the loss of each held-out clip at step 0.
    """
    draw = random.Random(f"{lr} {better}")
    folder.mkdir(parents=True)
    overrides = [f"run.dir={folder}", f"train.steps={steps}", f"train.optimizer.params.lr={lr}"]
    overrides += ["load.transformer=runs/base", *(f"{key}={value}" for key, value in (config or {}).items())]
    save_config(load_config([TINY], overrides), folder / "config.yaml")
    (folder / "command.txt").write_text(
        f"train_video.py --base {TINY} train.optimizer.params.lr={lr}\n  1 ranks, python 3.11, torch 2\n"
    )
    final = [loss * (0.7 if better else 1.3) + 0.002 * i for i, loss in enumerate(clips)]
    records = [validation(0, clips, clips), *(looks(step, step / steps) for step in previews if step == 0)]
    for step in range(log_every, steps + 1, log_every):
        records.append(training(step, steps, lr, draw))
        if step % (steps // 4) == 0:
            part = step / steps
            now = [(1 - part) * a + part * b for a, b in zip(clips, final, strict=True)]
            records[-1] |= {k: v for k, v in validation(step, clips, now).items() if k != "step"}
        if step in previews:
            records.append(looks(step, step / steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_events(folder, steps)
    (folder / "summary.json").write_text(json.dumps(summary(steps, sum(final) / len(final))))
    checkpoint = folder / "checkpoints" / str(steps)
    checkpoint.mkdir(parents=True)
    keys = [f"clip{i}" for i in range(len(clips))]
    held_out = {"clips": keys, "timesteps": [100, 900], "seed": 0, "start": list(clips), "now": final}
    (checkpoint / "state.json").write_text(json.dumps({"step": steps, "validation": held_out}))
    for step in previews:
        write_previews(folder / "previews" / str(step), step / steps)
    return folder


def training(step: int, steps: int, lr: float, draw: random.Random) -> dict[str, Any]:
    loss = 0.1 + 0.3 * math.exp(-3 * step / steps) + draw.gauss(0, 0.01)
    record = {
        "step": step,
        "train/loss": loss,
        "train/lr": lr * (1 - step / steps),
        "train/skipped_steps": 1.0,
    }
    record |= {f"train/loss_by_t/{band}": loss * (1 + i / 3) for i, band in enumerate(BANDS)}
    record |= {"train/grad_norm": None if step == 50 else 0.3 + draw.random(), "train/samples": 4.0 * step}
    for i, group in enumerate(("attention", "mlp", "adaln")):
        record |= {
            f"train/grad_norm/{group}": 0.2 * (i + 1) + 0.1 * draw.random(),
            f"train/update_ratio/{group}": lr * (i + 1) * (0.5 + draw.random()),
        }
    record |= {f"perf/{name}_s": seconds * (0.9 + 0.2 * draw.random()) for name, seconds in PARTS.items()}
    record |= {"perf/step_s": sum(PARTS.values()) * 1.2, "mem/alloc_gib": 21.0, "mem/reserved_gib": 24.0}
    return record | {
        f"mem/{phase}_alloc_gib": 8.0 + 4 * i for i, phase in enumerate(("train", "validate", "preview"))
    }


def validation(step: int, start: Any, now: Any) -> dict[str, Any]:
    """The paired difference of a list of clips, by its definition."""
    count = len(start)
    changes = [b - a for a, b in zip(start, now, strict=True)]
    mean = sum(changes) / count
    spread = math.sqrt(sum((c - mean) ** 2 for c in changes) / (count - 1) / count)
    loss = sum(now) / count
    record = {"step": step, "val/loss": loss, "val/train_loss": loss - 0.01 - 0.02 * step / 400}
    record |= {f"val/loss_by_t/{band}": loss * (1 + i / 3) for i, band in enumerate(BANDS)}
    return record | {"val/gap": loss - record["val/train_loss"], "val/delta": mean, "val/delta_se": spread}


def looks(step: int, part: float) -> dict[str, Any]:
    now = {"saturation": 0.1 * (1 + part), "brightness": 0.3 * (1 - 0.2 * part), "motion": 0.02}
    drift = {"saturation": part, "brightness": -0.2 * part, "motion": 0.0}
    return {
        "step": step,
        **{f"preview/{name}": value for name, value in now.items()},
        **{f"preview/{name}_drift": value for name, value in drift.items()},
    }


def write_events(folder: Path, steps: int) -> None:
    begin = 1_700_000_000.0
    events = [
        {"time": begin, "kind": "started", "step": 0},
        {"time": begin + 50, "kind": "skipped_step", "step": 50, "cause": "rank 0: loss nan"},
        {
            "time": begin + 60,
            "kind": "quarantined",
            "clip": "c7",
            "reason": "<damaged>",
            "step": 60,
            "rank": 0,
        },
        {"time": begin + 99, "kind": "started", "step": steps // 2},
        {"time": begin + 99, "kind": "resumed", "step": steps // 2},
        {"time": begin + 300, "kind": "finished", "step": steps},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "quarantine.json").write_text(
        json.dumps([{"clip": "c7", "reason": "<damaged>", "step": 60, "rank": 0}])
    )


def summary(steps: int, best: float) -> dict[str, Any]:
    return {
        "steps": steps,
        "samples_seen": 4 * steps,
        "skipped_steps": 1,
        "skipped_clips": 1,
        "best": {"step": steps, "val/loss": best},
        "seconds": {"train": 3600.5, "validate": 120.0, "preview": 75.0, "save": 12.0},
        "peak_memory_gib": {"train": 21.0, "validate": 18.0, "preview": 30.5},
        "attempts": 2,
        "dataset": {"clips": 44, "sha256": "f00d"},
    }


def write_previews(folder: Path, part: float) -> None:
    for index, prompt in enumerate(PROMPTS):
        name = f"{index:04d}-preview"
        video = torch.zeros(9, 3, 32, 32, dtype=torch.uint8)
        for frame in range(9):
            left = 2 * frame + 4 * index
            video[frame, index, 8:20, left : left + 8] = int(120 + 135 * part)
        write_video(folder / f"{name}.mp4", video, fps=8)
        record = {"config": {}, "prompt": prompt, "seed": index, "height": 32, "width": 32}
        (folder / f"{name}.json").write_text(json.dumps(record))
