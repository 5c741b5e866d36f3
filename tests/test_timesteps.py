"""Training timesteps: uniform for each sample, stratified over the global batch."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from cogvideox.diffusion.timesteps import (
    LogitNormalTimesteps,
    ModeTimesteps,
    StratifiedTimesteps,
    UniformTimesteps,
    timestep_in_stratum,
)

N = 1000


def streams(step: int, rank: int, world_size: int) -> SimpleNamespace:
    return SimpleNamespace(
        local=torch.Generator().manual_seed(10_000 + step * 64 + rank),
        shared=torch.Generator().manual_seed(step),
        rank=rank,
        world_size=world_size,
    )


def global_batch(sampler, step: int, world_size: int, batch_size: int) -> torch.Tensor:
    draws = [sampler.sample(batch_size, streams(step, r, world_size), N) for r in range(world_size)]
    return torch.stack(draws)  # (ranks, batch)


@pytest.mark.parametrize("strata", [1, 3, 7, 48, 1000, 1500])
def test_every_timestep_is_equally_likely_whatever_the_number_of_strata(strata: int) -> None:
    """Exactly: stratum and offset run over an even grid, each integer must be hit the same number of times."""
    per_stratum = N * 3  # a multiple of N, so that the grid falls evenly on integers
    stratum = torch.arange(strata).repeat_interleave(per_stratum)
    offset = ((torch.arange(per_stratum, dtype=torch.float64) + 0.5) / per_stratum).repeat(strata)
    counts = timestep_in_stratum(stratum, offset, strata, N).bincount(minlength=N)
    assert counts.min() == counts.max() == 3 * strata


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (4, 2), (3, 5)])
def test_each_step_has_one_timestep_in_every_stratum(world_size: int, batch_size: int) -> None:
    strata = world_size * batch_size
    for step in range(20):
        t = global_batch(StratifiedTimesteps(), step, world_size, batch_size).flatten().sort().values
        borders = torch.arange(strata + 1, dtype=torch.float64) * N / strata
        assert (t >= borders[:-1].floor()).all() and (t < borders[1:].ceil()).all()


@pytest.mark.parametrize("sampler", [StratifiedTimesteps(), UniformTimesteps()])
def test_every_rank_and_position_sees_every_noise_level(sampler) -> None:
    t = torch.stack([global_batch(sampler, step, 3, 2) for step in range(3000)])  # (steps, ranks, batch)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < N
    for rank in range(3):
        for item in range(2):
            counts = (t[:, rank, item] // 100).bincount(minlength=10).double()
            chi_squared = ((counts - 300) ** 2 / 300).sum()
            assert chi_squared < 33.7  # 9 degrees of freedom, p = 1e-4; the seeds are fixed


def test_stratified_timesteps_lower_the_variance_of_a_batch_mean() -> None:
    means = {
        type(s): torch.stack([global_batch(s, i, 4, 4).double().mean() for i in range(300)]).var()
        for s in (StratifiedTimesteps(), UniformTimesteps())
    }
    # K independent draws: variance / K; one in each of K strata: variance / K^3. Here K = 16.
    assert means[StratifiedTimesteps] < means[UniformTimesteps] / 100


def test_an_offset_that_rounds_up_stays_in_range() -> None:
    offset = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert timestep_in_stratum(torch.tensor([47]), offset, 48, N).item() == N - 1


def drawn(sampler, steps: int = 400) -> torch.Tensor:
    return torch.cat([global_batch(sampler, step, 4, 4).flatten() for step in range(steps)]).double()


def test_logit_normal_timesteps_have_the_quantiles_of_their_distribution() -> None:
    """The medians of t / N and of its quarters are sigmoid(mean + std z), z of the normal distribution's table."""
    mean, std = 0.5, 1.2
    found = drawn(LogitNormalTimesteps(mean, std)) / N
    for share, z in ((0.25, -0.67449), (0.5, 0.0), (0.75, 0.67449)):
        # 6400 stratified draws: far below the 0.006 of independent ones.
        assert found.quantile(share).item() == pytest.approx(1 / (1 + math.exp(-mean - std * z)), abs=0.005)


def test_mode_timesteps_have_their_density_and_0_is_uniform() -> None:
    """P(t / N < f(u)) = u for SD3's f, here at u = 1/4: 3/4 - s (cos^2(3 pi / 8) - 1/4) from the other side."""
    scale = 1.29
    border = 0.25 - scale * (math.cos(3 * math.pi / 8) ** 2 - 0.25)
    assert (drawn(ModeTimesteps(scale)) < N * border).double().mean().item() == pytest.approx(0.25, abs=0.005)
    assert torch.equal(drawn(ModeTimesteps(0.0), 20), drawn(StratifiedTimesteps(), 20))


@pytest.mark.parametrize(
    ("make", "named"),
    [(lambda: ModeTimesteps(2.0), "scale=2.0"), (lambda: LogitNormalTimesteps(std=0.0), "std=0.0")],
)
def test_a_distribution_that_is_none_is_an_error(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
