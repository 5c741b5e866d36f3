"""Memory of training: planned, counted, and measured where there is a GPU. Writes docs/benchmarks/memory.{json,md}.

    python -m scripts.benchmark_memory

Counted: the live tensors of forward and backward pass at full size on the meta device, and of whole steps of the real
engine at a small size on the CPU. Measured (CUDA): torch's peak of the same forward and backward pass, and of whole
steps of each target through the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox import dist, plan
from cogvideox.build import build
from cogvideox.config import Config, Part, TrainConfig, load_config
from cogvideox.flops import clip_of
from cogvideox.live_memory import LiveMemory
from cogvideox.model.lora import freeze_base, inject_lora
from cogvideox.planning import states
from cogvideox.planning.activations import activations
from cogvideox.planning.memory import optimizer_bytes, training_peak
from cogvideox.planning.states import Method
from cogvideox.recompute import KEPT
from cogvideox.system import build_transformer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks"
MODELS = {"2B": "cogvideox_2b", "5B": "cogvideox_5b", "1.5-5B": "cogvideox1.5_5b"}
METHODS = {"full": "sft", "LoRA": "lora"}
POLICIES = (*KEPT, "2")
COMMAND = "python -m scripts.benchmark_memory"


@dataclass(frozen=True)
class Target:
    """A run on one GPU with cached latents and text, 49 x 480 x 720, batch 1. published: of CogVideo's trainer."""

    name: str
    files: tuple[str, ...]
    overrides: tuple[str, ...]
    gigabytes: float
    published: float


CACHED = ("data.latent_cache=cache", "data.text_cache=cache")
TARGETS = (
    Target(
        "2B LoRA",
        ("cogvideox_2b", "lora"),
        (*CACHED, "model.transformer.checkpoint_activations=full"),
        10,
        47,
    ),
    Target(
        "5B LoRA",
        ("cogvideox_5b", "lora"),
        (*CACHED, "model.transformer.checkpoint_activations=full"),
        24,
        63,
    ),
    Target(
        "2B full",
        ("cogvideox_2b", "sft"),
        (*CACHED, "model.transformer.checkpoint_activations=selective"),
        40,
        62,
    ),
)


def load(*names: str, overrides: tuple[str, ...] = ()) -> Config:
    return load_config([ROOT / "configs" / f"{name}.yaml" for name in names], overrides)


def config_of(model: str, method: str, policy: str, *overrides: str) -> Config:
    setting = f"model.transformer.checkpoint_activations={policy}"
    return load(MODELS[model], METHODS[method], overrides=(*CACHED, setting, *overrides))


# ------------------------------------------------------------------------------- forward and backward at full size


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """The kernel that a GPU picks: on the meta device torch would take the unfused one, with a table of S x S."""
    before = nn.functional.scaled_dot_product_attention

    def flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, **_: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    nn.functional.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = before


def network(config: Config, device: str) -> nn.Module:
    """What trains, with uninitialised weights, as the engine holds it."""
    net = build_transformer(config, device=device, skip_init=True).to(torch.bfloat16)
    if config.lora:
        inject_lora(net, config.lora.rank, config.lora.alpha, config.lora.layers)
        freeze_base(net)
    return net


def loss_of(config: Config, net: nn.Module, device: str) -> Tensor:
    """The steps of ``VideoDiffusion.forward`` after the latents and the text features."""
    clip, t, batch = clip_of(config, config.data), config.model.transformer, config.train.batch_size
    shape = (batch, clip.latents, t.out_channels, clip.height, clip.width)
    schedule, loss = build(config.model.schedule), build(config.model.loss)
    x0, noise = torch.empty(shape, device=device), torch.empty(shape, device=device)
    context = torch.empty(batch, t.text_length, t.text_hidden_size, device=device, dtype=torch.bfloat16)
    if device == "meta":  # the schedule's table is read on the CPU
        noisy, target, steps = torch.empty_like(x0), torch.empty_like(x0), torch.zeros(batch, device=device)
        prediction = net(noisy, steps, context)
        return (prediction.float() - target).square().mean()
    steps = torch.full((batch,), 500, device=device)
    prediction = net(schedule.add_noise(x0, noise, steps), steps, context)
    return loss(prediction.float(), schedule.velocity(x0, noise, steps), steps, schedule)[0]


def planned_pass(config: Config) -> tuple[float, float]:
    """Bytes of activations kept by the blocks after the forward pass, and the peak of both passes with gradients."""
    needed, trained = activations(config), plan.trained_parameters(config)
    gradients = trained * plan.BYTES[config.train.precision]
    return needed.kept, max(needed.start, needed.end + gradients - needed.pending)


def counted_pass(config: Config) -> tuple[int, int]:
    """Bytes of all live tensors after the forward pass, and at the peak of both, gradients of weights included."""
    net = network(config, "meta")
    with fused_attention(), LiveMemory() as memory:
        loss = loss_of(config, net, "meta")
        after = memory.live_bytes
        loss.backward()
    return after, memory.peak_bytes


def measured_pass(config: Config) -> int | None:
    """torch's peak on a GPU beside the weights; None without a GPU or where they do not fit."""
    if not torch.cuda.is_available():
        return None
    try:
        net = network(config, "cuda")
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(config, net, "cuda").backward()
        return torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        return None
    finally:
        net = None
        gc.collect()
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------- steps of the engine, at a small size


class Stack(nn.Module):
    """Linear layers on one row: hardly an activation, so that what is counted are the states.

    Their biases are a second group of the optimizer, as there are always several.
    """

    def __init__(self, layers: int = 8, width: int = 512, frozen: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for layer in self.layers[:frozen]:
            layer.requires_grad_(False)

    def forward(self, batch: dict[str, Tensor], rng: Any) -> tuple[Tensor, dict]:
        x = batch["x"].to(self.layers[0].weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean(), {}


class Rows:
    def iterate(self, start: int) -> Iterator[dict[str, Tensor]]:
        while True:
            yield {"x": torch.ones(1, 512, device=dist.device())}


def counted_states(
    stage: int,
    precision: str = "bf16",
    *,
    optimizer: str = "torch.optim.AdamW",
    frozen: int = 0,
    **params: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """(planned, counted) bytes after a step, at the end of a backward pass and at the peak of the update."""
    from cogvideox.engine.trainer import Trainer

    zero = {"stage": stage, "overlap_comm": False}
    config = TrainConfig(
        steps=1, batch_size=1, optimizer=Part(optimizer, {"lr": 1e-3, **params}), precision=precision
    )
    with tempfile.TemporaryDirectory() as folder, LiveMemory(device="cpu") as memory:
        module = Stack(frozen=frozen)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        still = sum(p.numel() for p in module.parameters()) - trained
        trainer = Trainer(module, Rows(), config, folder, deepspeed_overrides={"zero_optimization": zero})
        engine, batch = trainer.engine, next(Rows().iterate(0))
        counted: dict[str, float] = {}
        for _ in range(2):  # the first makes the optimizer's states
            loss, _ = engine(batch, None)
            engine.backward(loss)
            del loss
            counted["after backward"] = memory.live_bytes
            memory.peak_bytes = 0
            engine.step()
            counted |= {"update": memory.peak_bytes, "between steps": memory.live_bytes}
        del engine, trainer, module
    size = plan.BYTES[precision]
    kept, temporaries = optimizer_bytes(optimizer, params)
    method = Method(trained, still, size, kept, temporaries, stage, overlaps=False)
    resident, gradients = sum(states.resident(method).values()), states.gradients(method)
    always = states.buckets(method) - (trained + still) * size + gradients if stage == 3 else 0.0
    planned = {
        "between steps": resident + always,
        "after backward": resident + max(always, gradients),
        "update": resident + max(always, gradients) + states.update(method),
    }
    return planned, counted


# ------------------------------------------------------------------------------------------------------ the report


def collect(models: list[str]) -> dict[str, Any]:
    rows = []
    for model in models:
        for method in METHODS:
            for policy in POLICIES:
                config = config_of(model, method, policy)
                kept, peak = planned_pass(config)
                after, counted = counted_pass(config)
                rows.append(
                    {
                        "model": model,
                        "method": method,
                        "policy": policy,
                        "planned_kept": kept,
                        "counted_kept": after,
                        "planned": peak,
                        "counted": counted,
                        "measured": measured_pass(config),
                    }
                )
                print(
                    f"{model} {method} {policy}: planned {peak / 1e9:.2f} GB, counted {counted / 1e9:.2f} GB"
                )
    engine = []
    for stage in range(4):
        for precision in ("bf16", "fp32"):
            planned, counted = counted_states(stage, precision)
            engine.append({"stage": stage, "precision": precision, "planned": planned, "counted": counted})
    targets = []
    for target in TARGETS:
        config = load(*target.files, overrides=target.overrides)
        targets.append(
            {
                "name": target.name,
                "command": " ".join([*(f"configs/{f}.yaml" for f in target.files), *target.overrides]),
                "target_gb": target.gigabytes,
                "published_gb": target.published,
                "planned": training_peak(config, 1),
                "measured": measured_step(config),
            }
        )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "passes": rows, "engine": engine, "targets": targets}


class OnePass(nn.Module):
    """The network with its loss, as the engine calls a module."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.net = network(config, "cuda")
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, batch: Any, rng: Any) -> tuple[Tensor, dict]:
        return loss_of(self.config, self.net, "cuda"), {}


def measured_step(config: Config) -> int | None:
    """torch's peak of two whole steps through the engine on a GPU, weights included; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    from cogvideox.engine.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(OnePass(config), Rows(), config.train, folder, deepspeed_overrides=config.deepspeed)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            trainer.engine.backward(trainer.engine(None, None)[0])
            trainer.engine.step()
        most = torch.cuda.max_memory_allocated()
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return most


def markdown(results: dict[str, Any]) -> str:
    gpu = results["gpu"]
    column = gpu or "measured"
    missing = "not yet measured"
    lines = [
        f"Written by `{COMMAND}` (torch {results['torch']}). GB are 10^9 bytes.",
        "",
        "### Forward and backward pass, one clip, gradients included, weights not",
        "",
        "49 x 480 x 720 (1.5: 81 x 768 x 1360), bfloat16, LoRA of rank 128. Counted: live tensors at full size.",
        "",
        f"| model | method | keeps | planned GB | counted GB | off by | {column} GB |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in results["passes"]:
        measured = f"{row['measured'] / 1e9:.2f}" if row["measured"] else missing
        policy = "every 2nd block full" if row["policy"] == "2" else row["policy"]
        off = row["planned"] / row["counted"] - 1
        lines.append(
            f"| {row['model']} | {row['method']} | {policy} | {row['planned'] / 1e9:.2f} | "
            f"{row['counted'] / 1e9:.2f} | {off:+.1%} | {measured} |"
        )
    lines += [
        "",
        "### States, in bytes per trained parameter",
        "",
        "A stack of linear layers through the real engine on one CPU rank with torch's AdamW; planned / counted.",
        "",
        "| ZeRO | precision | between steps | after a backward pass | at the peak of the update |",
        "|---|---|---|---|---|",
    ]
    parameters = sum(p.numel() for p in Stack().parameters())
    for row in results["engine"]:
        cells = [
            f"{row['planned'][key] / parameters:.2f} / {row['counted'][key] / parameters:.2f}"
            for key in ("between steps", "after backward", "update")
        ]
        lines.append(f"| {row['stage']} | {row['precision']} | {' | '.join(cells)} |")
    lines += [
        "",
        "### Targets: one GPU, 49 x 480 x 720, batch 1, latents and text features cached",
        "",
        f"| run | published GB | target GB | planned GB | {column} GB | configuration |",
        "|---|---:|---:|---:|---|---|",
    ]
    for row in results["targets"]:
        measured = f"{row['measured'] / 1e9:.1f}" if row["measured"] else missing
        lines.append(
            f"| {row['name']} | {row['published_gb']} | {row['target_gb']} | {row['planned'] / 1e9:.1f} | {measured} | "
            f"`{row['command']}` |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    dist.init(model_parallel=False)
    results = collect(arguments.models)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "memory.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "memory.md").write_text(markdown(results))
    dist.shutdown()


if __name__ == "__main__":
    main()
