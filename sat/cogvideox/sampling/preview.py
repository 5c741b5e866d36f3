"""Previews: a run's own validation sample, rendered while it trains and again later by ``scripts/reproduce.py``.

Fixed prompts with fixed seeds go through the code of ``sample_video.py`` (``sampling/run.py``). Each video is rendered
alone, so that its numbers depend neither on the ranks nor on the other prompts. ``RUN/previews/STEP/`` gets an mp4, its
sidecar, and the final latents in float32, which can be compared as numbers where an mp4 has lost them. Those of step 0
show the base model: how far the others' looks move from them is their drift (``drift.py``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox import dist, environment
from cogvideox.config import Config, trains_text_encoder
from cogvideox.sampling import drift
from cogvideox.sampling.drift import Appearance
from cogvideox.sampling.memory import OncePerRun
from cogvideox.sampling.outputs import write_latents
from cogvideox.sampling.preview_sheet import write_preview_sheet
from cogvideox.sampling.prompts import Request
from cogvideox.sampling.run import write_sample
from cogvideox.sampling.targets import Target, name_of
from cogvideox.sampling.ways_in import Prepared, Sampled, denoise, prepare
from cogvideox.system import VideoDiffusion

logger = logging.getLogger("cogvideox")

_RECORDED_VALUES = 64


class Previews:
    """``previews(system, step)`` renders all prompts, shared out over the ranks, and returns their record.

    It draws from generators of its own and writes nothing into the system, so that a run trains the same with and
    without it. What cannot be rendered is reported, and the training goes on.
    """

    def __init__(self, requests: list[Request], config: Config, run_dir: str | Path):
        self.requests, self.config, self.run_dir = requests, config, Path(run_dir)
        self._conditions: dict[int, Prepared] = {}
        # Called after every denoising step, and with done=True after every prompt; the trainer's, while it trains.
        self.pulse: Callable[..., None] = lambda done=False: None
        self.base: list[dict[str, Any]] | None = None

    def go_on_from(self, record: dict[str, Any]) -> None:
        """After a resume: take the base model's looks from the last record that the run made."""
        self.base = record.get("base")
        if self.base is None:
            logger.warning("the run has no preview of the base model: the drift of its previews is not known")

    def __call__(self, system: VideoDiffusion, step: int) -> dict[str, Any] | None:
        """Every rank must call, with the system in evaluation mode. None where nothing could be rendered.

        The record: ``step``, ``precision``, ``device``, ``versions`` and ``videos``, for each the prompt, seed, image,
        file name, ``summary`` of its latents, ``pixels_sha256`` (uint8, before the lossy mp4) and ``appearance``;
        ``metrics`` over all of them, and ``base``, the looks at step 0, without which there is no drift.
        """
        count, ranks, rank = len(self.requests), dist.world_size(), dist.rank()
        rendered, failed = {}, {}
        devices = [] if system.device.type == "cpu" else [system.device]
        with torch.no_grad(), torch.random.fork_rng(devices=devices), _as_the_door_samples(system):
            for first in range(0, count, ranks):
                # As many passes on every rank (ZeRO-3 gathers weights in them); one too many is not written.
                index = min(first + rank, count - 1)
                try:
                    sampled, start = self._render(system, index)
                    if first + rank < count:
                        rendered[index] = self._write(system, sampled, index, step, start)
                except (RuntimeError, ValueError, OSError, FloatingPointError) as error:
                    failed[index] = str(error) or repr(error)
                self.pulse(done=True)
        gathered = dist.gather((rendered, failed))
        for index, reason in sorted({i: r for _, part in gathered for i, r in part.items()}.items()):
            logger.warning("preview %d of step %d failed, the training goes on: %s", index, step, reason)
        videos = {index: video for part, _ in gathered for index, video in part.items()}
        if not videos:
            return None
        made = [videos[index] for index in sorted(videos)]
        if step == 0:
            self.base = drift.base_of(made)
        metrics = drift.metrics(made, self.base)
        self._warn_of_drift(metrics, step)
        self._draw_sheet(step)
        return {
            "step": step,
            "precision": self.config.train.precision,
            "device": device_name(system.device),
            "versions": environment.versions(),
            "videos": made,
            "metrics": metrics,
            "base": self.base,
        }

    def _warn_of_drift(self, metrics: dict[str, float], step: int) -> None:
        limit = self.config.train.preview_drift_warning
        # From random weights every video that shows something has moved far.
        if limit is None or self.config.load.transformer is None:
            return
        moved = [f"{name} {value:+.0%}" for name, value in drift.beyond(metrics, limit).items()]
        if moved:
            logger.warning(
                "preview of step %d: %s against the base model's previews (train.preview_drift_warning=%g): look at "
                "%s; a fine-tune that burns in wants a lower learning rate or fewer steps",
                step,
                ", ".join(moved),
                limit,
                self.run_dir / "previews.png",
            )

    def _draw_sheet(self, step: int) -> None:
        if not dist.is_main():
            return
        try:
            write_preview_sheet(self.run_dir, up_to=step)
        except (ValueError, OSError) as error:
            logger.warning("previews.png could not be drawn, the training goes on: %s", error)

    def _render(self, system: VideoDiffusion, index: int) -> tuple[Sampled, float]:
        start, batch = time.perf_counter(), [self.requests[index]]
        condition = self._conditions.get(index) or prepare(system, batch)
        if next(system.conditioner.parameters(), None) is None:  # a trained encoder changes with every step
            self._conditions[index] = condition
        return denoise(system, batch, condition, lambda _: self.pulse()), start

    def _write(
        self, system: VideoDiffusion, sampled: Sampled, index: int, step: int, start: float
    ) -> dict[str, Any]:
        folder = self.run_dir / "previews" / str(step)
        checkpoint = self.run_dir / "checkpoints" / str(step)
        config = as_trained(self.config, checkpoint) if step else sampling_from(self.config)
        return write_preview(system, sampled, self.requests[index], folder, start, config)


@contextmanager
def _as_the_door_samples(system: VideoDiffusion) -> Iterator[None]:
    """Modulations once per run, as in sample_video, which thus renders a preview again to the bit."""
    before, system.once_per_run = system.once_per_run, OncePerRun(system)
    try:
        yield
    finally:
        system.once_per_run = before


def write_preview(
    system: VideoDiffusion, sampled: Sampled, request: Request, folder: Path, start: float, config: Config
) -> dict[str, Any]:
    """``NAME.mp4``, ``NAME.json`` and ``NAME.safetensors`` of one sampled video; returns their record.

    config: what makes the video again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = Target(request, folder, name_of(request))
    appearance = Appearance()
    written = write_sample(system, sampled, 0, target, start, config, observe=appearance.add)
    latents = final_latents(sampled)
    write_latents(target.path("latents"), [latents], {"prompt": request.prompt, "seed": request.seed})
    return {
        "name": target.name,
        "prompt": request.prompt,
        "seed": request.seed,
        "image": str(request.image.resolve()) if request.image else None,
        "latents": summary(latents),
        "pixels_sha256": written["pixels_sha256"],
        "appearance": appearance.result(),
    }


def final_latents(sampled: Sampled) -> Tensor:
    """(T, C, h, w) float32 of a single video, all its windows in a row."""
    return torch.cat([segment[0] for segment in sampled.segments]).float().cpu().contiguous()


def as_trained(config: Config, checkpoint: str | Path) -> Config:
    """The configuration that samples from a run's ``checkpoint`` what its preview showed."""
    weights = str(checkpoint)
    if config.lora is not None:
        return sampling_from(config, lora=weights)
    text_encoder = {"text_encoder": weights} if trains_text_encoder(config) else {}
    return sampling_from(config, transformer=weights, lora=None, **text_encoder)


def sampling_from(config: Config, **load: str | None) -> Config:
    """``config`` with other entries in ``load`` and the network as it trained: its precision, adapters apart."""
    sample = dataclasses.replace(config.sample, precision=config.train.precision, merge_lora=False)
    return dataclasses.replace(config, load=dataclasses.replace(config.load, ema=True, **load), sample=sample)


def summary(latents: Tensor) -> dict[str, Any]:
    """What a record keeps of latents (float32, any shape): enough to know them again and to measure a difference."""
    return {
        "shape": list(latents.shape),
        "sha256": hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
        "rms": latents.square().mean().sqrt().item(),
        "values": recorded_values(latents).tolist(),
    }


def recorded_values(latents: Tensor) -> Tensor:
    """(64,) of them, evenly spread from the first to the last; exact in JSON."""
    count, last = min(_RECORDED_VALUES, latents.numel()), latents.numel() - 1
    return latents.flatten()[torch.linspace(0, last, count, dtype=torch.float64).round().long()]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
