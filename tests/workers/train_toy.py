"""A toy module and loader through the real Trainer: ``train_toy.py RUNS.json`` trains the listed runs one by one.

Each entry of RUNS.json: {"run_dir", "train": {TrainConfig fields}, "deepspeed": {}, and one of the accidents below}.
Rank 0 writes ``result.json`` with the outcome into each run_dir.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox import dist
from cogvideox.command_line import leave
from cogvideox.config import GroupConfig, Part, TrainConfig
from cogvideox.engine.trainer import Trainer
from cogvideox.engine.validation import HeldOutLoss
from cogvideox.model.quantize import EightBitLinear

SEED = 7
WIDTH = 6


class Toy(nn.Module):
    """Every kind of randomness and parameter: a norm, biases, dropout, local and shared noise, a frozen layer."""

    def __init__(self, dropout: float = 0.1, noise: float = 0.1, quantize: str | None = None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.first, self.norm, self.last = nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.Linear(16, 1)
        self.dropout, self.noise = nn.Dropout(dropout), noise
        for parameter in self.parameters():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if quantize is not None:
            self.frozen = EightBitLinear(self.frozen, quantize, persistent=False)

    def forward(self, batch: dict[str, Tensor], rng: dist.RandomStreams) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"].to(self.first.weight.dtype)
        x = x + self.noise * torch.randn(x.shape, generator=rng.local, device=x.device).to(x)
        shift = torch.randn((), generator=rng.shared, device=x.device).to(x)
        y = self.last(self.dropout(self.norm(torch.tanh(self.first(self.frozen(x)))))) + self.noise * shift
        loss = (y.float() - batch["y"]).square().mean()
        return loss * batch["spoil"], {"mean": y.detach().float().mean()}


class ToyLoader:
    """Batch k of rank r: the samples (k * ranks + r) * size and following. ``before(k, batch)`` is the test's hook."""

    def __init__(self, size: int, before: Callable[[int, dict[str, Any]], None] = lambda k, batch: None):
        self.size, self.before = size, before

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        k = start
        while True:
            first = (k * dist.world_size() + dist.rank()) * self.size
            batch = samples(first, self.size)
            self.before(k, batch)
            yield batch
            k += 1


def samples(first: int, count: int) -> dict[str, Any]:
    draws = [
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 + i))
        for i in range(first, first + count)
    ]
    x = torch.stack(draws)
    return {
        "x": x,
        "y": x[:, :1] * x[:, 1:2],
        "spoil": torch.tensor(1.0),
        "key": [f"clip{i}" for i in range(first, first + count)],
    }


def train_config(lr: float = 0.01, **fields: Any) -> TrainConfig:
    optimizer = Part("torch.optim.AdamW", {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.1})
    defaults = {"steps": 6, "batch_size": 2, "precision": "fp32", "log_every": 1, "save_every": 1000}
    return TrainConfig(**{"optimizer": optimizer, "timeout_minutes": 2.0, **defaults, **fields})


def make_trainer(run: dict[str, Any], module: nn.Module | None = None) -> Trainer:
    fields = dict(run.get("train", {}))
    if "optimizer" in fields:
        fields["optimizer"] = Part(**fields["optimizer"])
    fields["groups"] = [GroupConfig(**group) for group in fields.get("groups", [])]
    config = train_config(**fields)
    held_out = HeldOutLoss([samples(10_000 + 2 * i, 2) for i in range(3)], SEED)
    return Trainer(
        module or Toy(**run.get("toy", {})),
        ToyLoader(config.batch_size, before=lambda k, batch: accident(run, k, batch)),
        config,
        run["run_dir"],
        deepspeed_overrides=run.get("deepspeed"),
        seed=SEED,
        validate=held_out,
    )


def accident(run: dict[str, Any], k: int, batch: dict[str, Any]) -> None:
    """What the test wants to happen to this rank before batch ``k``."""
    if dist.rank() == dist.world_size() - 1:
        if k == run.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if k == run.get("terminate_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if k in run.get("nan_at", ()):
            batch["spoil"] = torch.tensor(float("nan"))


def die_in_save(step: int) -> None:
    """Kill this rank after the files of ``step`` are written and before their folder gets its name."""
    rename = os.rename

    def killed(source: Any, target: Any) -> None:
        if Path(target).name == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = killed


def main(runs: list[dict[str, Any]]) -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)
    for run in runs:
        if "die_in_save" in run:
            die_in_save(run["die_in_save"])
        try:
            trainer = make_trainer(run)
            result: dict[str, Any] = dataclasses.asdict(trainer.run())
            result["frozen"] = str(trainer.engine.module.frozen.weight.dtype)
        except (FloatingPointError, OSError, ValueError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        (Path(run["run_dir"]) / f"result_{dist.rank()}.json").write_text(json.dumps(result))
    dist.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    leave(0)
