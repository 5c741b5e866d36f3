"""Held-out loss with everything fixed but the weights: the same clips, the same noise, the same timesteps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cogvideox import dist
from cogvideox.dist import RandomStreams
from cogvideox.engine.logging import Means, combine

# Stands where training has its micro-step, so that no validation stream is ever a training stream.
STREAM = 2**32 - 1


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; the mode of every submodule as it was after it."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


class HeldOutLoss:
    """``held_out(module) -> {"val/loss": ..., "val/<metric>": ...}``: means over ``batches``.

    Batch i is always seen with the random streams of (seed, i), as if by one rank alone, and the means are added in
    the order of i: the numbers are the same whenever they are taken and on however many ranks.
    """

    def __init__(self, batches: Sequence[Any], seed: int):
        """batches: indexable, the same on every rank; a rank reads only its share, item by item, at each call."""
        if not len(batches):
            raise ValueError(
                "validation has no batches: data.validation_path holds fewer clips than one batch"
            )
        self.batches, self.seed = batches, seed
        self.pulse: Callable[[], None] = lambda: (
            None
        )  # called between batches; the trainer's, while it trains

    def __call__(self, module: nn.Module) -> dict[str, float | None]:
        """Every rank must call, with ``module(batch, rng) -> (loss, metrics)``."""
        rank, ranks, count = dist.rank(), dist.world_size(), len(self.batches)
        device = next(module.parameters()).device
        results = {}
        with evaluating(module), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            for first in range(0, count, ranks):
                # As many forward passes on every rank (ZeRO-3 gathers weights in them); one too many is not counted.
                index = min(first + rank, count - 1)
                rng = RandomStreams.at(self.seed, index, STREAM, device=device)
                rng.seed_global()
                loss, metrics = module(dist.to_device(self.batches[index], device), rng)
                if first + rank < count:
                    means = Means()
                    means.add({"val/loss": loss, **{f"val/{name}": value for name, value in metrics.items()}})
                    results[index] = means.state()
                self.pulse()
        gathered = {index: state for part in dist.gather(results) for index, state in part.items()}
        return combine([gathered[index] for index in sorted(gathered)])
