"""Toy runs that meet an accident: ``train_faults.py RUNS.json`` makes the listed runs one by one, see ``launch.py``.

Each entry of RUNS.json: what ``train_toy.py`` knows, and

* ``clips``: a folder of videos, trained on through the real reader and loader. ``mend``: files copied over others
  before the run begins. ``hangs``: names of clips whose reader never returns, as native code does that holds the GIL.
* ``fragile``: {batch: "forward" or "backward"}: the layer ``norm.1`` breaks in it, on the last rank. ``search``: False
  leaves out the search for it.
* ``halt_at``: {batch: "sleep", "spin" or "stop"}: the last rank hangs there.
* ``slow``: seconds of each batch of the validation and each step of the preview. ``signal_in``: where the last rank
  sends itself SIGUSR1: "validation" or "preview".
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from workers.train_toy import SEED, Toy, ToyLoader, accident, samples, train_config

from cogvideox import dist
from cogvideox.command_line import leave
from cogvideox.data.loader import ResumableLoader
from cogvideox.data.video_folder import VideoFolder
from cogvideox.engine import skipped
from cogvideox.engine.trainer import Trainer
from cogvideox.engine.validation import HeldOutLoss


class Fragile(nn.Module):
    """The identity, until it is told to break."""

    way: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "forward":
            return x / torch.zeros(())
        return BreaksBackward.apply(x) if self.way == "backward" else x


class BreaksBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


class FaultyToy(Toy):
    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.norm = nn.Sequential(self.norm, Fragile())

    def forward(self, batch: dict[str, Any], rng: dist.RandomStreams) -> tuple[Tensor, dict[str, Tensor]]:
        self.norm[1].way = batch.get("fragile")
        halt = batch.get("halt")
        if halt == "stop":
            time.sleep(3.0)  # until the others have heard where this rank is
            signal.raise_signal(signal.SIGSTOP)
        while halt == "spin":
            pass
        return super().forward(batch, rng)


class ClipsToy(nn.Module):
    """Of each clip it sees the mean brightness of its frames: (B, F, 3, H, W) uint8 -> (B, F)."""

    def __init__(self, frames: int):
        super().__init__()
        self.last = nn.Linear(frames, 1)
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, batch: dict[str, Any], rng: dist.RandomStreams) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["video"].float().mean(dim=(2, 3, 4)) / 255
        loss = (self.last(x) - torch.randn((), generator=rng.local)).square().mean()
        return loss, {}


class Clips(VideoFolder):
    """A folder that is not looked at before training: what is wrong is found in the middle of it."""

    def __init__(self, folder: str, hangs: Sequence[str]):
        super().__init__(folder, num_frames=5, height=16, width=16, fps=8, scan=None, max_bad_fraction=0.5)
        self.hangs = hangs

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        if Path(self.clips[index].path).name in self.hangs:
            ctypes.PyDLL(None).sleep(1000)
        return super().item(index, epoch)


class SlowPreview:
    """Three prompts of twenty steps; rank 0 has one prompt less, as where the prompts do not divide evenly."""

    def __init__(self, run: dict[str, Any]):
        self.run, self.pulse, self.shown = run, lambda done=False: None, []

    def __call__(self, module: nn.Module, step: int) -> dict[str, Any]:
        for prompt in range(2 if dist.is_main() else 3):
            for number in range(20):
                time.sleep(self.run.get("slow", 0.0) if step else 0.0)
                if step and (prompt, number) == (2, 3):
                    signal_once(self.run, "preview")
                self.pulse()
        self.pulse(done=True)
        dist.barrier()
        self.shown.append(step)
        return {"step": step}


class SlowBatches(Sequence):
    """The first look at them, before the first step, is a quick one."""

    def __init__(self, run: dict[str, Any]):
        self.run, self.looks = run, 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.looks += index < dist.world_size()
        is_later = self.looks > 1
        time.sleep(self.run.get("slow", 0.0) if is_later else 0.0)
        if is_later and index > 4:
            signal_once(self.run, "validation")
        return samples(10_000 + 2 * index, 2)


def signal_once(run: dict[str, Any], place: str) -> None:
    if run.get("signal_in") == place and dist.rank() == dist.world_size() - 1 and "signalled" not in run:
        run["signalled"] = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR1)


def before(run: dict[str, Any], k: int, batch: dict[str, Any]) -> None:
    accident(run, k, batch)
    if dist.rank() == dist.world_size() - 1:
        batch["fragile"] = run.get("fragile", {}).get(str(k))
        halt = run.get("halt_at", {}).get(str(k))
        if halt == "sleep":
            time.sleep(1000)
        batch["halt"] = halt


def make(run: dict[str, Any]) -> Trainer:
    config = train_config(**run.get("train", {}))
    common = {"deepspeed_overrides": run.get("deepspeed"), "seed": SEED}
    if "clips" in run:
        for source, target in run.get("mend", {}).items():
            if dist.is_main():
                shutil.copy(source, target)
        dist.barrier()
        loader = ResumableLoader(
            Clips(run["clips"], run.get("hangs", ())),
            config.batch_size,
            SEED,
            dist.rank(),
            dist.world_size(),
            num_workers=2,
            clip_timeout_seconds=1.5,
        )
        return Trainer(ClipsToy(5), loader, config, run["run_dir"], **common)
    skipped._SEARCHES = 20 if run.get("search", True) else 0
    looks = {"validate": HeldOutLoss(SlowBatches(run), SEED), "preview": SlowPreview(run)}
    loader = ToyLoader(config.batch_size, before=lambda k, batch: before(run, k, batch))
    return Trainer(FaultyToy(**run.get("toy", {})), loader, config, run["run_dir"], **looks, **common)


def main(runs: list[dict[str, Any]]) -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)
    for run in runs:
        trainer = make(run)
        result: dict[str, Any] = dataclasses.asdict(trainer.run())
        if "signalled" in run:
            result["seconds"] = time.monotonic() - run["signalled"]
        result["previews"] = getattr(trainer.looks.preview, "shown", [])
        (Path(run["run_dir"]) / f"result_{dist.rank()}.json").write_text(json.dumps(result))
    dist.shutdown()


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text()))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave(2)
    leave(0)
