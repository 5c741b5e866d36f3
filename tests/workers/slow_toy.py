"""A toy with a part that is slow on purpose, through the real Trainer: ``slow_toy.py RUNS.json``.

Each entry of RUNS.json is one of ``train_toy.py``'s, and {"slow": part, "seconds": s, "on_rank": rank or null}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds only its own folder
from workers.train_toy import SEED, Toy, ToyLoader, train_config

from cogvideox import dist
from cogvideox.command_line import leave
from cogvideox.config import Part
from cogvideox.engine.trainer import Trainer
from cogvideox.phases import untimed


class SlowToy(Toy):
    """``wait(part)`` is called in each part; text and VAE lie inside the forward pass, as in the real system."""

    def __init__(self, wait: Callable[[str], None], **toy: Any):
        super().__init__(**toy)
        self.wait, self.phases = wait, untimed

    def forward(self, batch: dict[str, Any], rng: dist.RandomStreams) -> tuple[Tensor, dict[str, Tensor]]:
        with self.phases("vae"):
            self.wait("vae")
        with self.phases("text"):
            self.wait("text")
        self.wait("forward")
        loss, metrics = super().forward(batch, rng)
        loss.register_hook(lambda gradient: self.wait("backward"))
        return loss, metrics


class SlowAdamW(torch.optim.AdamW):
    wait: Callable[[str], None]

    def step(self, closure: Any = None) -> None:
        self.wait("optimizer")
        super().step(closure)


def slow_trainer(run: dict[str, Any]) -> Trainer:
    def wait(part: str) -> None:
        if part == run["slow"] and run.get("on_rank") in (None, dist.rank()):
            time.sleep(run["seconds"])

    SlowAdamW.wait = staticmethod(wait)
    config = train_config(**run.get("train", {}))
    config.optimizer = Part(f"{SlowAdamW.__module__}.SlowAdamW", {"lr": 0.01})
    return Trainer(
        SlowToy(wait, **run.get("toy", {})),
        ToyLoader(config.batch_size, before=lambda k, batch: wait("data")),
        config,
        run["run_dir"],
        deepspeed_overrides=run.get("deepspeed"),
        seed=SEED,
    )


def main(runs: list[dict[str, Any]]) -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)
    for run in runs:
        slow_trainer(run).run()
    dist.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    leave(0)
