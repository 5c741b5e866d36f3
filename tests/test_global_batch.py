"""The clips of one optimizer step over all ranks: a number that stays when the number of ranks changes."""

from __future__ import annotations

import pytest
from workers.train_toy import train_config

from cogvideox.engine.global_batch import clips_per_step, with_accumulation


@pytest.mark.parametrize(("ranks", "micro_steps"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_micro_steps_follow_from_the_global_batch(ranks: int, micro_steps: int) -> None:
    config = with_accumulation(train_config(batch_size=2, global_batch_size=16), ranks)
    assert config.gradient_accumulation_steps == micro_steps
    assert clips_per_step(config, ranks) == 16


def test_without_one_the_micro_steps_stay_as_they_are() -> None:
    config = train_config(batch_size=2, gradient_accumulation_steps=3)
    assert with_accumulation(config, 4) == config
    assert clips_per_step(config, 4) == 24


@pytest.mark.parametrize(
    ("batch", "asked", "ranks", "message"),
    [
        (2, 14, 4, r"global_batch_size=14: train.batch_size=2 on 4 ranks make 8 clips.*the nearest is 16$"),
        (2, 9, 4, r"make 8 clips.*the nearest is 8$"),
        (4, 2, 1, r"batch_size=4 on 1 rank make 4 clips.*the nearest is 4, or set train.batch_size=2"),
    ],
)
def test_a_global_batch_that_the_ranks_cannot_make_is_refused_with_the_nearest(
    batch: int, asked: int, ranks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with_accumulation(train_config(batch_size=batch, global_batch_size=asked), ranks)


def test_micro_steps_that_contradict_it_are_refused_with_both_keys() -> None:
    config = train_config(batch_size=2, global_batch_size=16, gradient_accumulation_steps=4)
    assert with_accumulation(config, 2).gradient_accumulation_steps == 4  # they agree
    with pytest.raises(
        ValueError, match=r"gradient_accumulation_steps=4 but train\.global_batch_size=16.*means 8"
    ):
        with_accumulation(config, 1)
