"""Is it getting better? The loss of fixed clips with fixed noise at fixed timesteps, held-out and training ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from cogvideox import dist
from cogvideox.config import Config
from cogvideox.data.fixed_batches import FixedBatches
from cogvideox.dist import RandomStreams
from cogvideox.engine.validation import STREAM, HeldOutLoss, evaluating
from cogvideox.evaluation.clips import FixedClips, drawn_clips, first_clips
from cogvideox.evaluation.paired import paired_difference
from cogvideox.evaluation.timestep_grid import TimestepGrid

logger = logging.getLogger("cogvideox")


class FixedNoiseLosses:
    """``losses(module, clips) -> (clips, timesteps)``: everything fixed but the weights.

    Clip i always meets the draws of (seed, i), made on the CPU, alone: the numbers are bitwise the same whenever they
    are taken and on however many ranks, and another batch size changes no draw. Nothing of the training is touched: no
    gradient is made, and the modes of the modules and the global random state are as they were.
    """

    def __init__(self, grid: TimestepGrid, seed: int, at_once: int = 1):
        """at_once: timesteps in one forward pass, a matter of memory."""
        self.grid, self.seed, self.at_once = grid, seed, at_once
        self.pulse: Callable[[], None] = lambda: None  # called between clips; the trainer's, while it trains

    def __call__(self, module: nn.Module, clips: FixedClips) -> np.ndarray:
        """(clips, timesteps) float64, on every rank; every rank must call.

        module: with ``losses_at(batch, t, generator, at_once) -> (timesteps,)`` for a batch of one clip.
        """
        rank, ranks, count = dist.rank(), dist.world_size(), len(clips)
        device = next(module.parameters()).device
        results: dict[int, list[float]] = {}
        with evaluating(module), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            for first in range(0, count, ranks):
                # As many forward passes on every rank (ZeRO-3 gathers weights in them); one too many is not counted.
                place = min(first + rank, count - 1)
                rng = RandomStreams.at(self.seed, place, STREAM)
                rng.seed_global()
                batch = dist.to_device(clips[place], device)
                losses = module.losses_at(batch, self.grid.timesteps, rng.local, self.at_once)
                if first + rank < count:
                    results[place] = losses.double().tolist()
                self.pulse()
        gathered = {place: row for part in dist.gather(results) for place, row in part.items()}
        return np.array([gathered[place] for place in range(count)])


class HeldOutValidation:
    """``validation(module) -> metrics`` of the trainer, compared with the same clips before the first step.

    val/loss, val/loss_by_t/BAND        held-out clips, mean and by band; under the last timestep's number, that alone
    val/train_loss, val/train_loss_by_t/BAND    as many fixed clips of the training set
    val/gap                             val/loss - val/train_loss: read it against its value at step 0
    val/delta, val/delta_se             mean paired change of the held-out loss since step 0, its standard error
                                        (``paired_difference``); None for the error of a single clip

    The first call is the one of step 0. A resumed run is given it by ``load``; without, val/delta is left out.
    """

    def __init__(self, losses: FixedNoiseLosses, held_out: FixedClips, training: FixedClips | None):
        self.losses, self.held_out, self.training = losses, held_out, training
        self._start: np.ndarray | None = None
        self._now: list[float] | None = None
        self._is_resumed = False

    @property
    def pulse(self) -> Callable[[], None]:
        return self.losses.pulse

    @pulse.setter
    def pulse(self, pulse: Callable[[], None]) -> None:
        self.losses.pulse = pulse

    def __call__(self, module: nn.Module) -> dict[str, float | None]:
        """Every rank must call."""
        grid = self.losses.grid
        losses = self.losses(module, self.held_out)
        now = grid.mean(losses)
        if self._start is None and not self._is_resumed:
            self._start = now
        self._now = now.tolist()
        metrics: dict[str, float | None] = loss_metrics(grid, losses, "val/loss")
        if self._start is not None:
            difference = paired_difference(self._start, now[: len(self._start)])
            metrics |= {"val/delta": difference.mean, "val/delta_se": difference.standard_error}
        if self.training is not None:
            metrics |= loss_metrics(grid, self.losses(module, self.training), "val/train_loss")
            metrics["val/gap"] = metrics["val/loss"] - metrics["val/train_loss"]
        return metrics

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the losses of step 0 by clip, those of the last call, and what they are of. JSON values,
        exact."""
        if self._start is None:
            return self._fits() | {"start": None, "now": self._now}
        fits, count = self._fits(), len(self._start)
        now = None if self._now is None else self._now[:count]
        return fits | {"clips": fits["clips"][:count], "start": self._start.tolist(), "now": now}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take up ``state`` of the checkpoint that is resumed; None where it has none.

        With more or fewer clips than then (another batch size), those that are in both are compared.
        """
        self._is_resumed, self._start = True, None
        before, now = state or {}, self._fits()
        if before.get("start") is None:
            reason = "it was not measured then"
        elif changed := [name for name in ("timesteps", "seed") if before[name] != now[name]]:
            reason = f"other {' and '.join(changed)} than then"
        elif not (count := _common(before["clips"], now["clips"])):
            reason = "other clips than then"
        else:
            self._start = np.array(before["start"][:count])
            self._now = before["now"] and before["now"][:count]
            if count < max(len(before["clips"]), len(now["clips"])):
                logger.warning(
                    "val/delta, the change since step 0, is of %d clips from here on: there were %d then, and are %d "
                    "now",
                    count,
                    len(before["clips"]),
                    len(now["clips"]),
                )
            return
        logger.warning("val/delta, the change since step 0, is left out from here on: %s", reason)

    def _fits(self) -> dict[str, Any]:
        return {
            "clips": self.held_out.keys,
            "timesteps": self.losses.grid.timesteps.tolist(),
            "seed": self.losses.seed,
        }


def _common(before: list[str], now: list[str]) -> int:
    """How many of the first clips are the same: a clip's noise depends on its place."""
    pairs = zip(before, now, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(now)))


def loss_metrics(grid: TimestepGrid, losses: np.ndarray, name: str) -> dict[str, float]:
    """``name`` and ``name_by_t/BAND`` -> means over the clips: losses (clips, timesteps)."""
    bands = {f"{name}_by_t/{band}": values for band, values in grid.by_band(losses).items()}
    return {key: math.fsum(v) / len(v) for key, v in {name: grid.mean(losses), **bands}.items()}


def build_validation(
    config: Config, system: nn.Module, held_out: Dataset, training: Dataset
) -> Callable[[nn.Module], dict[str, float | None]]:
    """What the trainer calls. A system without ``losses_at``, such as the VAE's, gets the plain ``HeldOutLoss``.

    held_out, training: the datasets of data.validation_path and data.path. Every rank must call.
    """
    train = config.train
    if not hasattr(system, "losses_at"):
        return HeldOutLoss(FixedBatches(held_out, train.batch_size, train.validation_batches), config.seed)
    clips = first_clips(held_out, clip_count(config), "data.validation_path")
    compared = drawn_clips(training, len(clips), config.seed, "data.path")
    return HeldOutValidation(fixed_losses(config, system), clips, compared)


def clip_count(config: Config) -> int:
    """Clips that are looked at, of each of the two sets, where there are as many."""
    return config.train.validation_batches * config.train.batch_size


def fixed_losses(config: Config, system: nn.Module) -> FixedNoiseLosses:
    train = config.train
    grid = TimestepGrid(system.schedule.num_timesteps, train.validation_timesteps, train.timestep_bands)
    return FixedNoiseLosses(grid, config.seed, train.batch_size)
