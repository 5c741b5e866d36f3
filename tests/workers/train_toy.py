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
    """Every kind of randomness and parameter: a norm, biases, dropout, local and shared noise, a frozen layer.

    lora_rank: freeze it all and train two factors of a change of the first layer's weight instead.
    """

    def __init__(
        self,
        dropout: float = 0.1,
        noise: float = 0.1,
        lora_rank: int | None = None,
        quantize: str | None = None,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.first, self.norm, self.last = nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.Linear(16, 1)
        self.dropout, self.noise = nn.Dropout(dropout), noise
        for parameter in self.parameters():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.lora_A = self.lora_B = None
        if lora_rank is not None:
            self.requires_grad_(False)
            self.lora_A = nn.Parameter(torch.randn(lora_rank, WIDTH, generator=generator))
            self.lora_B = nn.Parameter(torch.zeros(16, lora_rank))
        if quantize is not None:
            self.frozen = EightBitLinear(self.frozen, quantize, persistent=False)

    def forward(self, batch: dict[str, Tensor], rng: dist.RandomStreams) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"].to(self.first.weight.dtype)
        x = x + self.noise * torch.randn(x.shape, generator=rng.local, device=x.device).to(x)
        shift = torch.randn((), generator=rng.shared, device=x.device).to(x)
        z = self.frozen(x)
        h = self.first(z) if self.lora_A is None else self.first(z) + z @ self.lora_A.T @ self.lora_B.T
        y = self.last(self.dropout(self.norm(torch.tanh(h)))) + self.noise * shift
        loss = (y.float() - batch["y"]).square().mean()
        return loss * batch["spoil"], {"mean": y.detach().float().mean()}


class ToyLoader:
    """The k-th batch of rank r: samples (k * ranks + r) * size and following. ``before(k, batch)`` is the test's."""

    def __init__(self, size: int, before: Callable[[int, dict[str, Any]], None] = lambda k, batch: None):
        self.size, self.before = size, before

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        everyone = self.size * dist.world_size()
        while True:
            batch = samples(start + dist.rank() * self.size, self.size)
            self.before(start // everyone, batch)
            yield batch
            start += everyone


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


def train_config(lr: float = 0.01, optimizer: Any = None, **fields: Any) -> TrainConfig:
    """optimizer: {"target", "params"}; None: AdamW with ``lr``."""
    adamw = {"target": "torch.optim.AdamW", "params": {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.1}}
    optimizer = optimizer if isinstance(optimizer, Part) else Part(**(optimizer or adamw))
    defaults = {"steps": 6, "batch_size": 2, "precision": "fp32", "log_every": 1, "save_every": 1000}
    return TrainConfig(**{"optimizer": optimizer, "timeout_minutes": 2.0, **defaults, **fields})


def make_trainer(run: dict[str, Any], module: nn.Module | None = None) -> Trainer:
    fields = dict(run.get("train", {}))
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
        preview=Preview(Path(run["run_dir"])) if run.get("preview") else None,
    )


class Preview:
    """Stands for videos: what the module makes of one sample, written by rank 0 in two halves."""

    def __init__(self, run_dir: Path):
        self.folder = run_dir / "previews"

    def __call__(self, module: nn.Module, step: int) -> dict[str, Any]:
        _, metrics = module(samples(20_000, 1), dist.RandomStreams.at(SEED, 0))
        if dist.is_main():
            self.folder.mkdir(exist_ok=True)
            for half in ("first", "second"):
                (self.folder / f"{step}_{half}.txt").write_text(f"{metrics['mean'].item()!r}\n")
        return {"step": step}


def accident(run: dict[str, Any], k: int, batch: dict[str, Any]) -> None:
    """What the test wants to happen to this rank before batch ``k``."""
    if run.get("list_clips"):
        with (Path(run["run_dir"]) / f"clips_{dist.rank()}.txt").open("a") as file:
            file.writelines(f"{key}\n" for key in batch["key"])
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


def export(trainer: Trainer, path: str) -> None:
    """What the ranks hold together: masters, moments and averages by parameter, joined in the order of the ranks."""
    slices = dist.gather(_slices(trainer.engine))
    state: dict[str, Any] = {
        name: torch.cat([part[name] for part in slices if name in part])
        for name in dict.fromkeys(name for part in slices for name in part)
    }
    shares = dist.gather((trainer.ema.updates, trainer.ema.shadow))
    state |= {f"{name} average": shadow for _, share in shares for name, shadow in share.items()}
    state["settings"] = [
        {key: value for key, value in group.items() if key != "params"}
        for group in trainer.optimizer.param_groups
    ]
    state["updates"] = [updates for updates, _ in shares][0]
    if dist.is_main():
        torch.save(state, path)


def _slices(engine: Any) -> dict[str, Tensor]:
    """This rank's slices, by parameter and kind; under ZeRO-3 rank 0 has them whole, as DeepSpeed joins them."""
    kinds = ("fp32", "exp_avg", "exp_avg_sq")
    if engine.zero_optimization_stage() == 3:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        whole = {f"{name} fp32": safe_get_full_fp32_param(p) for name, p in trained}
        whole |= {
            f"{name} {kind}": safe_get_full_optimizer_state(p, kind)
            for kind in kinds[1:]
            for name, p in trained
        }
        return {name: tensor.flatten() for name, tensor in whole.items()} if dist.is_main() else {}
    optimizer = engine.optimizer
    bf16 = getattr(optimizer, "fp32_groups_flat_partition", None)  # stage 1 in bf16 has a class of its own
    flats = optimizer.single_partition_of_fp32_groups if bf16 is None else bf16
    slices = {}
    for flat, addresses in zip(flats, optimizer._param_slice_mappings, strict=True):
        vectors = {"fp32": flat} | optimizer.optimizer.state[flat]
        for name, address in addresses.items():
            for kind in kinds:
                slices[f"{name} {kind}"] = (
                    vectors[kind].narrow(0, address.start, address.numel).detach().clone()
                )
    return slices


def main(runs: list[dict[str, Any]]) -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)
    for run in runs:
        if "die_in_save" in run:
            die_in_save(run["die_in_save"])
        try:
            trainer = make_trainer(run)
            if "export_before" in run:
                export(trainer, run["export_before"])
            result: dict[str, Any] = dataclasses.asdict(trainer.run())
            if "quantize" in run.get("toy", {}):
                result["frozen"] = str(trainer.engine.module.frozen.weight.dtype)
            if "export_after" in run:
                export(trainer, run["export_after"])
        except (FloatingPointError, OSError, ValueError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        (Path(run["run_dir"]) / f"result_{dist.rank()}.json").write_text(json.dumps(result))
    dist.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    leave(0)
