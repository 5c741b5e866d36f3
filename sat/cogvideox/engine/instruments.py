"""What a run measures of itself between two log lines, under the names that are logged (docs/instruments.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogvideox import dist, gpus
from cogvideox.config import TrainConfig
from cogvideox.engine.communication import time_communication
from cogvideox.engine.group_norms import GroupNorms, first_part
from cogvideox.engine.profile import ProfileWindow
from cogvideox.phases import Phases

# Logged also where a step has nothing of them, as communication on one rank.
_PARTS = ("data", "forward", "backward", "optimizer", "communication")


@dataclass(frozen=True)
class Work:
    """What a training step does for one sample, for rates."""

    flops: float
    # That the mathematics asks for: nothing that is computed a second time counts.
    tokens: int


class Instruments:
    """Around each training step of a DeepSpeed engine; read at each log line."""

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        run_dir: Path,
        work: Work | None = None,
    ):
        """optimizer: the engine's own. work: None where it is not known; then no tokens/s and no FLOP/s."""
        module, device = engine.module, engine.device
        self.work, self.device = work, device
        self.samples_per_step = config.batch_size * config.gradient_accumulation_steps
        self.phases = Phases(device)
        if hasattr(module, "phases"):
            module.phases = self.phases
        time_communication(engine, self.phases)
        self.norms = GroupNorms(engine, optimizer, getattr(module, "parameter_group", first_part))
        self.profile = ProfileWindow(run_dir, config.profile_steps, config.profile_ranks, device)

    @contextmanager
    def step(self, step: int, is_logged: bool) -> Iterator[None]:
        """Around training step ``step``, numbered from 1."""
        self.norms.watch(is_logged)
        with self.profile.step(step), self.phases.step():
            yield

    def read(self, gradient_norm: float) -> dict[str, float]:
        """Since the last reading. Every rank must call; here the device is waited for."""
        return self.norms.read(gradient_norm) | self.times()

    def times(self) -> dict[str, float]:
        """``perf/...`` of this rank: means per optimizer step, and rates."""
        steps, seconds = self.phases.read()
        if not steps:
            return {}
        step_seconds = sum(seconds.values()) / steps
        parts = dict.fromkeys(_PARTS, 0.0) | {k: v for k, v in seconds.items() if k != Phases.REST}
        result = {"perf/step_s": step_seconds} | {f"perf/{name}_s": s / steps for name, s in parts.items()}
        samples_per_second = self.samples_per_step / step_seconds
        result["perf/samples_s"] = samples_per_second * dist.world_size()
        if self.work is not None:
            result["perf/tokens_s"] = samples_per_second * dist.world_size() * self.work.tokens
            result["perf/tflops"] = samples_per_second * self.work.flops / 1e12
            peak = peak_tflops(self.device)
            if peak is not None:
                result["perf/mfu"] = result["perf/tflops"] / peak
        return result

    def close(self) -> None:
        self.profile.close()


def peak_tflops(device: torch.device) -> float | None:
    """The device's bf16 rate by its data sheet; None for a CPU and for a GPU that ``gpus.py`` does not know."""
    if device.type == "cpu":
        return None
    found = gpus.find(torch.get_device_module(device).get_device_name(device))
    return found and found.bf16_tflops
