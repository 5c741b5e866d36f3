"""The global batch: clips per optimizer step over all ranks, whatever their number."""

from __future__ import annotations

import dataclasses

from cogvideox.config import TrainConfig


def with_accumulation(config: TrainConfig, ranks: int) -> TrainConfig:
    """``config`` with the micro-steps that make up ``train.global_batch_size``; as it is where that is not given.

    Raises ValueError if the ranks' batches do not add up to it, or if the micro-steps were chosen too.
    """
    asked = config.global_batch_size
    if asked is None:
        return config
    micro = config.batch_size * ranks
    where = f"train.batch_size={config.batch_size} on {ranks} rank{'s' if ranks > 1 else ''}"
    if asked % micro:
        legal = sorted(
            {max(asked // micro, 1) * micro, (asked // micro + 1) * micro}, key=lambda n: abs(n - asked)
        )
        batches = [b for b in range(1, config.batch_size) if asked % (b * ranks) == 0]
        raise ValueError(
            f"train.global_batch_size={asked}: {where} make {micro} clips per micro-step, of which it must be a "
            f"multiple; the nearest is {legal[0]}"
            + (f", or set train.batch_size={batches[-1]}" if batches else "")
        )
    steps, given = asked // micro, config.gradient_accumulation_steps
    if given not in (1, steps):
        raise ValueError(
            f"train.gradient_accumulation_steps={given} but train.global_batch_size={asked}, which with {where} means "
            f"{steps}: leave one of the two out"
        )
    return dataclasses.replace(config, gradient_accumulation_steps=steps)


def clips_per_step(config: TrainConfig, ranks: int) -> int:
    return config.batch_size * config.gradient_accumulation_steps * ranks
