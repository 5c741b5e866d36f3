"""Kept regions: exact inside, and how far the rest follows them, against the conditional Gaussian."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cogvideox.diffusion.ancestral import euler_ancestral
from cogvideox.diffusion.constraints import KeepRegion
from cogvideox.diffusion.dpm import dpmpp_3m_sde
from cogvideox.diffusion.heun import heun
from cogvideox.diffusion.partial import TailSchedule, noised_start
from cogvideox.diffusion.samplers import ddim, dpmpp_2m, dpmpp_2m_sde, noise_source
from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.unipc import unipc

SAMPLERS = [ddim, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, euler_ancestral, heun, unipc]
SHAPE = (2, 5, 3, 4, 4)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def prefix(frames: int, total: int = SHAPE[1]) -> torch.Tensor:
    return (torch.arange(total) < frames).float().view(1, -1, 1, 1, 1)


def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.4 * x + 0.2 * x.roll(1, dims=1) + torch.sin(t / 100.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_region_comes_out_exactly_and_the_rest_is_changed_by_it(sampler) -> None:
    schedule, known, mask = ZeroSNRSchedule(), draw(0), prefix(2)
    plain = sampler(denoise, draw(1), schedule, steps=6, noise=noise_source([1, 2]))
    keep = KeepRegion(denoise, schedule, known, mask, draw(1), 6)
    kept = sampler(keep, draw(1), schedule, steps=6, noise=noise_source([1, 2]))
    assert torch.equal(kept[:, :2], known[:, :2])
    assert not torch.allclose(kept[:, 2:], plain[:, 2:], atol=1e-3)


def test_a_mask_may_be_one_items_and_of_single_pixels() -> None:
    schedule, known = ZeroSNRSchedule(), draw(0)
    mask = torch.zeros(2, 5, 1, 4, 4)
    mask[0, 1, :, 2, 3] = 1
    kept = ddim(KeepRegion(denoise, schedule, known, mask, draw(1), 4), draw(1), schedule, steps=4)
    plain = ddim(denoise, draw(1), schedule, steps=4)
    assert torch.equal(kept[0, 1, :, 2, 3], known[0, 1, :, 2, 3])
    assert torch.equal(kept[1], plain[1])  # nothing is kept in the other item


def test_an_empty_mask_changes_nothing() -> None:
    schedule = ZeroSNRSchedule()
    keep = KeepRegion(denoise, schedule, draw(0), prefix(0), draw(2), 5)
    assert torch.equal(ddim(keep, draw(1), schedule, steps=5), ddim(denoise, draw(1), schedule, steps=5))


def test_the_network_sees_the_region_at_the_noise_of_its_step() -> None:
    schedule, known, noise, seen = ZeroSNRSchedule(3), draw(0), draw(1), {}

    def spy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen[int(t)] = x[:, :2]
        return denoise(x, t)

    dpmpp_2m(KeepRegion(spy, schedule, known, prefix(2), noise, 7), draw(2), schedule, steps=7)
    for t, a in zip(schedule.timesteps(7).tolist(), schedule.alphas(7), strict=False):
        expected = a * known + (1 - a**2).sqrt() * noise
        torch.testing.assert_close(seen[t], expected[:, :2], rtol=0, atol=1e-6)


def test_a_tail_keeps_its_region_at_the_noise_of_the_full_run() -> None:
    schedule, known, noise, seen = ZeroSNRSchedule(), draw(0), draw(1), []
    tail = TailSchedule(schedule, 10, 0.5)

    def spy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return denoise(x, t)

    start = noised_start(known, noise, tail)
    kept = ddim(KeepRegion(spy, tail, known, prefix(2), noise, tail.steps), start, tail, steps=tail.steps)
    torch.testing.assert_close(seen[0], start, rtol=0, atol=1e-6)
    assert torch.equal(kept[:, :2], known[:, :2])


def seam(sampler, steps: int, kept: int = 3, frames: int = 8) -> tuple[float, torch.Tensor]:
    """A Gaussian field whose frames i, j correlate by exp(-|i - j| / 20), its first frames kept.

    Returns (error of the prefix, and how much of its conditional mean each later frame follows: the slope of the
    regression on it, 1 where the distribution is the conditional one).
    """
    schedule, noise, i = ZeroSNRSchedule(), noise_source([1]), torch.arange(frames, dtype=torch.float64)
    covariance = torch.exp(-(i[:, None] - i).abs() / 20)
    exact = {}
    for t, a in zip(schedule.timesteps(steps).tolist(), schedule.alphas(steps).tolist(), strict=False):
        noised = a**2 * covariance + (1 - a**2) * torch.eye(frames, dtype=torch.float64)
        exact[t] = a * covariance @ torch.linalg.inv(noised)  # E[x0 | x_t] is this matrix times x_t

    def field(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,bjchw->bichw", matrix, x)

    start = noise(torch.empty(1, frames, 1, 60, 60, dtype=torch.float64))
    known = field(torch.linalg.cholesky(covariance), noise(start))
    keep = KeepRegion(
        lambda x, t: field(exact[int(t)], x), schedule, known, prefix(kept, frames), start, steps
    )
    result = sampler(keep, start, schedule, steps=steps, noise=noise)
    weights = covariance[kept:, :kept] @ torch.linalg.inv(covariance[:kept, :kept])
    mean = weights @ known[0, :kept].reshape(kept, -1)
    rest = result[0, kept:].reshape(frames - kept, -1)
    return (result - known)[:, :kept].abs().max().item(), (rest * mean).sum(1) / mean.square().sum(1)


# The bounds stand beside what was measured for the first frame after the prefix (3,600 samples: +-0.02).
@pytest.mark.parametrize(
    ("sampler", "low", "high"),
    [
        pytest.param(ddim, 0.5, 0.7, id="ddim 0.59"),
        pytest.param(dpmpp_2m_sde, 0.65, 0.85, id="dpmpp_2m_sde 0.74"),
        pytest.param(partial(euler_ancestral, repeats=5), 0.88, 1.02, id="repeats 0.93"),
    ],
)
def test_the_rest_follows_the_region_as_far_as_the_sampler_lets_it(sampler, low: float, high: float) -> None:
    """The replacement method's known bias (Ho et al. 2022, section 3.1), and what resampling does about it."""
    error, slopes = seam(sampler, steps=30)
    assert error == 0
    assert low < slopes[0] < high, slopes
    assert (slopes > 0.25).all()


@pytest.mark.parametrize(
    ("known", "mask", "noise", "message"),
    [
        (draw(0), prefix(2), draw(1)[:, :4], "its noise"),
        (draw(0), prefix(2)[:, :4], draw(1), "the mask is"),
        (draw(0), prefix(2)[0], draw(1), "the mask is"),
        (draw(0), 0.5 * prefix(2), draw(1), "values between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_an_error(known, mask, noise, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeepRegion(denoise, ZeroSNRSchedule(), known, mask, noise, 5)


def test_a_state_or_a_timestep_of_another_run_is_an_error() -> None:
    keep = KeepRegion(denoise, ZeroSNRSchedule(), draw(0), prefix(2), draw(1), 5)
    with pytest.raises(ValueError, match="the state is"):
        keep(draw(1)[:1], 999)
    with pytest.raises(ValueError, match="timestep 500 is none"):
        keep(draw(1), 500)
