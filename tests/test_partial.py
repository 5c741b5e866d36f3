"""Runs that start part of the way, against the whole run, the exact Gaussian and diffusers' rule."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from cogvideox.diffusion.ancestral import euler_ancestral
from cogvideox.diffusion.denoiser import GuidedDenoiser
from cogvideox.diffusion.dpm import dpmpp_3m_sde
from cogvideox.diffusion.guidance import DynamicStepGuidance
from cogvideox.diffusion.heun import heun
from cogvideox.diffusion.partial import TailSchedule, noised_start
from cogvideox.diffusion.samplers import ddim, dpmpp_2m, dpmpp_2m_sde, noise_source
from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.unipc import unipc

SAMPLERS = [ddim, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, euler_ancestral, heun, unipc]
SHAPE = (2, 3, 4, 2, 2)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.4 * x + torch.sin(t / 100.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_one_is_plain_sampling_to_the_bit(sampler) -> None:
    schedule, clip, start = ZeroSNRSchedule(3), draw(0), draw(1)
    tail = TailSchedule(schedule, 9, 1.0)
    x = noised_start(clip, start, tail)
    assert torch.equal(x, start)  # the first alpha is 0: nothing of the clip is left
    plain = sampler(denoise, start, schedule, steps=9, noise=noise_source([1, 2]))
    assert torch.equal(sampler(denoise, x, tail, steps=tail.steps, noise=noise_source([1, 2])), plain)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_zero_returns_the_input(sampler) -> None:
    tail, clip = TailSchedule(ZeroSNRSchedule(), 9, 0.0), draw(0)
    x = noised_start(clip, draw(1), tail)
    assert torch.equal(sampler(denoise, x, tail, steps=tail.steps, noise=noise_source([1, 2])), clip)


@pytest.mark.parametrize("sampler", [ddim, heun])
def test_a_tail_goes_on_where_the_whole_run_stands(sampler) -> None:
    """One-step samplers do not remember: from the state after 4 of 9 steps, the last 5 end at the same place."""
    schedule, log = ZeroSNRSchedule(), []
    whole = sampler(denoise, draw(1), schedule, steps=9, callback=log.append)
    tail = TailSchedule(schedule, 9, 5 / 9)
    assert torch.equal(sampler(denoise, log[3]["x"], tail, steps=5), whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_a_noised_gaussian_comes_back_as_that_gaussian(sampler, strength: float) -> None:
    mean, std, steps = 0.7, 0.5, 500  # first order needs that many for 2 %
    schedule, noise = ZeroSNRSchedule(), noise_source([3])
    alphas = dict(zip(schedule.timesteps(steps).tolist(), schedule.alphas(steps).tolist(), strict=False))

    def exact(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alphas[int(t)]
        return mean + a * std**2 / (a**2 * std**2 + 1 - a**2) * (x - a * mean)

    clip = mean + std * draw(0, 1, 40_000)
    tail = TailSchedule(schedule, steps, strength)
    x0 = sampler(exact, noised_start(clip, noise(clip), tail), tail, steps=tail.steps, noise=noise)
    assert x0.mean().item() == pytest.approx(mean, abs=0.01)  # known to 0.0025
    assert x0.std().item() == pytest.approx(std, rel=0.02)
    kept = torch.corrcoef(torch.cat([clip, x0]))[0, 1].item()
    a = tail.alphas(tail.steps)[0].item()
    noised = a * std / math.sqrt(a**2 * std**2 + 1 - a**2)  # correlation of the clip with the start
    # The ODE's map is monotone: it keeps the correlation of the start. Fresh noise takes another factor as large.
    stochastic = sampler in (dpmpp_2m_sde, dpmpp_3m_sde, euler_ancestral)
    assert kept == pytest.approx(noised**2 if stochastic else noised, abs=0.02)


def test_the_guidance_is_told_of_the_full_run() -> None:
    schedule, seen = ZeroSNRSchedule(), []

    def guidance(step: int, t: int, steps: int) -> float:
        seen.append((step, t, steps))
        return DynamicStepGuidance()(step, t, steps)

    def network(x, t, condition):
        return 0.1 * x + condition["tokens"].mean((1, 2)).view(-1, 1, 1, 1, 1)

    cond, uncond = {"tokens": torch.ones(2, 3, 4)}, {"tokens": torch.zeros(2, 3, 4)}
    tail, results = TailSchedule(schedule, 10, 0.4), []
    for arguments in ((tail, tail.steps), (schedule, 10)):  # either may be given to the denoiser
        guided = GuidedDenoiser(network, *arguments, guidance, cond, uncond)
        results.append(ddim(guided, draw(1), tail, steps=tail.steps))
    assert seen[:4] == seen[4:] == [(i, t, 10) for i, t in enumerate([399, 299, 199, 99], start=6)]
    assert torch.equal(*results)


def test_the_steps_taken_are_those_of_diffusers_but_rounded() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing", rescale_betas_zero_snr=True)
    pipeline = diffusers.CogVideoXVideoToVideoPipeline.__new__(diffusers.CogVideoXVideoToVideoPipeline)
    pipeline.scheduler = scheduler
    rng, rounded_up = random.Random(0), 0
    for _ in range(300):
        steps, strength = rng.choice([4, 10, 25, 50]), rng.uniform(0.13, 1)
        scheduler.set_timesteps(steps)
        theirs, count = pipeline.get_timesteps(steps, scheduler.timesteps, strength, "cpu")
        assert count == len(theirs) == int(steps * strength)
        tail = TailSchedule(ZeroSNRSchedule(), steps, strength)
        ours = tail.timesteps(tail.steps).tolist()
        assert (
            ours[tail.steps - count :] == theirs.tolist()
        )  # the same last steps, and at most one before them
        assert tail.steps - count == (1 if steps * strength % 1 > 0.5 else 0)
        rounded_up += tail.steps - count
    assert 100 < rounded_up < 200


def test_the_start_is_noised_as_diffusers_noises_it_up_to_the_sub_schedule() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=3.0, timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    clip, noise = draw(0), draw(1)
    for strength in (0.2, 0.5, 0.8):
        tail = TailSchedule(ZeroSNRSchedule(3), 50, strength)
        theirs = scheduler.add_noise(clip, noise, tail.timesteps(tail.steps)[:1])
        # The sub-schedule is rescaled to zero SNR after sub-sampling, diffusers' before: alpha is up to 1.2e-3 apart.
        torch.testing.assert_close(noised_start(clip, noise, tail), theirs, rtol=0, atol=6e-3)


def test_the_rest_is_the_base_schedules() -> None:
    schedule = ZeroSNRSchedule(3)
    tail = copy.deepcopy(TailSchedule(schedule, 50, 0.8))
    assert (tail.steps, tail.first, tail.full_steps) == (40, 10, 50)
    assert tail.num_timesteps == 1000 and torch.equal(tail.quantise(0.3)[1], schedule.quantise(0.3)[1])
    assert torch.equal(tail.alphas(40), schedule.alphas(50)[10:])
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tail.no_such_thing


@pytest.mark.parametrize("strength", [-0.1, 1.2, float("nan")])
def test_a_strength_out_of_range_is_an_error(strength: float) -> None:
    with pytest.raises(ValueError, match=rf"strength={strength}: expected .* 0 .* 1"):
        TailSchedule(ZeroSNRSchedule(), 50, strength)


def test_a_strength_of_less_than_a_step_is_an_error() -> None:
    """diffusers ends in an empty tensor there."""
    with pytest.raises(ValueError, match="strength=0.02 of 20 steps .* at least 0.05, or 0"):
        TailSchedule(ZeroSNRSchedule(), 20, 0.02)


def test_another_number_of_steps_is_an_error() -> None:
    tail = TailSchedule(ZeroSNRSchedule(), 50, 0.8)
    with pytest.raises(ValueError, match="steps=50.*has 40"):
        ddim(denoise, draw(0), tail, steps=50)


def test_noise_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 2, 2\).*\(2, 3, 4, 2, 1\)"):
        noised_start(draw(0), draw(1)[..., :1], TailSchedule(ZeroSNRSchedule(), 50, 0.8))


def test_half_precision_latents_are_noised_in_float32() -> None:
    tail = TailSchedule(ZeroSNRSchedule(), 50, 0.8)
    assert noised_start(draw(0).bfloat16(), draw(1).bfloat16(), tail).dtype == torch.float32
