"""DDIM inversion, against the exact flow of a Gaussian and against the sampler that it inverts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from cogvideox.diffusion.inversion import ddim_invert
from cogvideox.diffusion.partial import TailSchedule
from cogvideox.diffusion.samplers import ddim
from cogvideox.diffusion.schedule import ZeroSNRSchedule

MEAN, STD = 0.7, 0.5
SHIFTS = [1, 3]  # 5B and 1.5; 2B


def exact_denoiser(schedule: ZeroSNRSchedule, steps: int) -> Callable:
    """E[x0 | x_t] of N(MEAN, STD^2)."""
    alphas = dict(zip(schedule.timesteps(steps).tolist(), schedule.alphas(steps).tolist(), strict=False))

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alphas[int(t)]
        return MEAN + a * STD**2 / (a**2 * STD**2 + 1 - a**2) * (x - a * MEAN)

    return denoise


def clip(size: int = 500) -> torch.Tensor:
    draws = torch.randn(1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MEAN + STD * draws


def errors(schedule: ZeroSNRSchedule, steps: int, iterations: int = 1) -> tuple[float, float]:
    """(of the reconstruction, of the noise against the exact flow, which takes x0 to (x0 - MEAN) / STD)."""
    denoise, x0 = exact_denoiser(schedule, steps), clip()
    noise = ddim_invert(denoise, x0, schedule, steps=steps, iterations=iterations)
    again = ddim(denoise, noise, schedule, steps=steps)
    return (again - x0).abs().mean().item(), (noise - (x0 - MEAN) / STD).abs().mean().item()


@pytest.mark.parametrize(("shift", "bound"), [(1, 4e-3), (3, 2e-2)])
def test_one_evaluation_per_step_reconstructs_closely(shift: int, bound: float) -> None:
    # Measured at 50 steps: 1.9e-3 and 1.2e-2, of a standard deviation of 0.5.
    assert errors(ZeroSNRSchedule(shift), 50)[0] < bound


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_reconstruction_error_falls_faster_than_the_step(shift: int) -> None:
    coarse, fine = (errors(ZeroSNRSchedule(shift), steps)[0] for steps in (20, 80))
    assert fine < coarse / 4**1.4


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_noise_tends_to_that_of_the_exact_flow(shift: int) -> None:
    """First order, as DDIM itself."""
    found = [errors(ZeroSNRSchedule(shift), steps)[1] for steps in (40, 160, 640)]
    assert found[1] < found[0] / 2 and found[2] < found[1] / 2


@pytest.mark.parametrize("shift", SHIFTS)
def test_more_evaluations_invert_the_sampler_exactly(shift: int) -> None:
    # Float64 state, table and coefficients: what is left is rounding, amplified over 50 steps.
    assert errors(ZeroSNRSchedule(shift), 50, iterations=40)[0] < 1e-11


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_few_steps_invert_too(steps: int) -> None:
    schedule, x0 = ZeroSNRSchedule(), clip()
    target = ddim(exact_denoiser(schedule, steps), torch.zeros_like(x0), schedule, steps=steps)
    noise = ddim_invert(exact_denoiser(schedule, steps), target, schedule, steps=steps, iterations=400)
    assert torch.isfinite(noise).all()
    again = ddim(exact_denoiser(schedule, steps), noise, schedule, steps=steps)
    torch.testing.assert_close(again, target, rtol=0, atol=1e-9)


def test_the_step_to_pure_noise_is_not_the_identity() -> None:
    """The noise that a v-prediction means at alpha 0 is its own input: a step written in it would stop at x_1."""
    schedule, steps, log = ZeroSNRSchedule(3), 10, []
    noise = ddim_invert(
        exact_denoiser(schedule, steps), clip(), schedule, steps=steps, iterations=40, callback=log.append
    )
    a = schedule.alphas(steps)[1].item()
    # With the exact denoiser, D(x, 999) is the mean, so x_1 = a MEAN + sqrt(1 - a^2) x.
    assert a > 0.01
    torch.testing.assert_close(log[-2]["x"], a * MEAN + math.sqrt(1 - a**2) * noise, rtol=0, atol=1e-9)


def test_the_callback_gives_the_trajectory_by_timestep() -> None:
    """What editing takes as its reference: the states of the reconstruction, in the other order."""
    schedule, steps, up, down = ZeroSNRSchedule(), 20, [], []
    denoise = exact_denoiser(schedule, steps)
    noise = ddim_invert(denoise, clip(), schedule, steps=steps, iterations=40, callback=up.append)
    ddim(denoise, noise, schedule, steps=steps, callback=down.append)
    assert [e["t"] for e in up] == schedule.timesteps(steps).tolist()[::-1]
    assert [e["step"] for e in up] == list(range(steps)) and up[-1]["steps"] == steps
    trajectory = {e["t"]: e["x"] for e in up}
    for before, after in zip(
        down, down[1:], strict=False
    ):  # x after a step is the state at the next timestep
        torch.testing.assert_close(trajectory[after["t"]], before["x"], rtol=0, atol=1e-8)


def test_a_tail_inverts_part_of_the_way() -> None:
    schedule, x0 = ZeroSNRSchedule(), clip()
    tail, denoise = TailSchedule(schedule, 50, 0.5), exact_denoiser(schedule, 50)
    x = ddim_invert(denoise, x0, tail, steps=tail.steps, iterations=40)
    torch.testing.assert_close(ddim(denoise, x, tail, steps=tail.steps), x0, rtol=0, atol=1e-9)
    nothing = TailSchedule(schedule, 50, 0.0)
    assert torch.equal(ddim_invert(denoise, x0, nothing, steps=0), x0)


def test_a_non_finite_prediction_names_its_step() -> None:
    with pytest.raises(FloatingPointError, match=r"step 7 of 7 \(timestep 142\)"):
        ddim_invert(lambda x, t: x * float("nan"), clip(), ZeroSNRSchedule(), steps=7)


def test_no_evaluation_is_an_error() -> None:
    with pytest.raises(ValueError, match="iterations=0: expected at least 1"):
        ddim_invert(lambda x, t: x, clip(), ZeroSNRSchedule(), steps=7, iterations=0)
