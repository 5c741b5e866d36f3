"""How accurate the further samplers are: orders of convergence, diffusers' steps, and the limit at pure noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cogvideox.diffusion.ancestral import euler_ancestral
from cogvideox.diffusion.dpm import dpmpp_3m_sde
from cogvideox.diffusion.heun import heun
from cogvideox.diffusion.samplers import ddim, dpmpp_2m, dpmpp_2m_sde, noise_source
from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.unipc import unipc

MEAN, STD = 0.7, 0.5


def dpmpp_3m(*arguments, noise=None, **options) -> torch.Tensor:
    """DPM-Solver++(3M), the deterministic one."""
    return dpmpp_3m_sde(*arguments, noise=noise, eta=0.0, **options)


def grid(alphas: Callable[[int], torch.Tensor]) -> SimpleNamespace:
    """A schedule in float64 whose ``alphas(steps)`` end at 1 after ``alphas``."""
    one = torch.ones(1, dtype=torch.float64)
    return SimpleNamespace(
        alphas=lambda n: torch.cat([alphas(n), one]), timesteps=lambda n: torch.arange(n - 1, -1, -1)
    )


def sigmoid(log_snr: torch.Tensor) -> torch.Tensor:
    return (1 / (1 + torch.exp(-2 * log_snr))).sqrt()


# Even in log-SNR, where the multistep solvers have their textbook order; and from pure noise, evenly along the arc.
FINITE = grid(lambda n: sigmoid(torch.linspace(-2, 2, n, dtype=torch.float64)))
FROM_NOISE = grid(lambda n: torch.sin(torch.linspace(0, math.pi / 2, n + 1, dtype=torch.float64))[:-1])


def exact_denoiser(schedule, steps: int) -> Callable:
    """E[x0 | x_t] of N(MEAN, STD^2)."""
    alphas = dict(zip(schedule.timesteps(steps).tolist(), schedule.alphas(steps).tolist(), strict=False))

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alphas[int(t)]
        return MEAN + a * STD**2 / (a**2 * STD**2 + 1 - a**2) * (x - a * MEAN)

    return denoise


def flow_error(sampler: Callable, schedule, steps: int) -> float:
    """Of the state before the last step, against the exact flow: x at a is a MEAN + sqrt(a^2 STD^2 + 1 - a^2) z."""
    z = torch.randn(1, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def exact(a: float) -> torch.Tensor:
        return a * MEAN + math.sqrt(a**2 * STD**2 + 1 - a**2) * z

    alphas, log = schedule.alphas(steps).tolist(), []
    sampler(exact_denoiser(schedule, steps), exact(alphas[0]), schedule, steps=steps, callback=log.append)
    return (log[-2]["x"] - exact(alphas[-2])).abs().max().item()


# ---------------------------------------------------------------------------------------------- order of convergence


@pytest.mark.parametrize(
    ("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2), (heun, 2), (dpmpp_3m, 2), (unipc, 3)]
)
def test_error_falls_with_the_order_of_the_solver(sampler: Callable, order: int) -> None:
    """dpmpp_3m weighs the curvature by half (see there): of second order, with less error than dpmpp_2m."""
    coarse, fine = (flow_error(sampler, FINITE, n) for n in (128, 256))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 0.95), (heun, 1.85), (dpmpp_3m, 2.0), (unipc, 1.85)])
def test_error_falls_so_from_pure_noise_too(sampler: Callable, order: float) -> None:
    """Steps of finite size in log-SNR remain at -inf however many there are: second order is what can be had."""
    coarse, fine = (flow_error(sampler, FROM_NOISE, n) for n in (128, 256))
    assert math.log2(coarse / fine) > order


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("sampler", [heun, dpmpp_3m, unipc])
def test_the_further_samplers_beat_ddim_on_the_published_schedule(sampler: Callable, shift: int) -> None:
    schedule = ZeroSNRSchedule(shift)
    steps = 25 if sampler is heun else 50  # for the same number of evaluations
    assert flow_error(sampler, schedule, steps) < flow_error(ddim, schedule, 50) / 4


def test_a_prediction_linear_in_log_snr_is_integrated_exactly() -> None:
    """x / sigma grows by the integral of e^lambda D(lambda), from the second step on without error."""
    steps, log = 9, []
    lambdas = torch.linspace(-2, 2, steps, dtype=torch.float64)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (0.3 - 0.5 * lambdas[steps - 1 - int(t)]).expand_as(x)

    dpmpp_3m(denoise, torch.zeros(1, 1, dtype=torch.float64), FINITE, steps=steps, callback=log.append)
    grown = (
        torch.stack([entry["x"] for entry in log[:-1]]).squeeze()
        / (1 - FINITE.alphas(steps)[1:-1] ** 2).sqrt()
    )
    integral = lambdas.exp() * (0.3 - 0.5 * (lambdas - 1))  # of e^s (0.3 - 0.5 s)
    torch.testing.assert_close(grown.diff(), integral[1:].diff(), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- diffusers


CASES = {
    "EulerDiscreteScheduler": (ddim, {}),
    "EulerAncestralDiscreteScheduler": (euler_ancestral, {}),
    "HeunDiscreteScheduler": (heun, {}),
    "UniPCMultistepScheduler": (unipc, {"solver_order": 2, "solver_type": "bh2"}),
    "DPMSolverMultistepScheduler": (
        dpmpp_3m,
        {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_diffusers_on_a_schedule_of_finite_snr(name: str) -> None:
    """Euler's method in k-diffusion's variables is DDIM, therefore the first case."""
    diffusers = pytest.importorskip("diffusers")
    sampler, options = CASES[name]
    betas = {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012}
    scheduler = getattr(diffusers, name)(
        **betas, prediction_type="v_prediction", timestep_spacing="trailing", **options
    )
    scheduler.set_timesteps(12)
    scheduler.sigmas = scheduler.sigmas.double()  # its coefficients come from these
    sigmas = torch.unique(scheduler.sigmas.double(), sorted=True).flip(0)  # Heun's are listed twice
    alphas = 1 / (1 + sigmas**2).sqrt()
    schedule = SimpleNamespace(alphas=lambda n: alphas, timesteps=lambda n: torch.arange(n - 1, -1, -1))
    start = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def prediction(x: torch.Tensor, a: float) -> torch.Tensor:
        return torch.tanh(x) + 0.3 * a * x.roll(1, -1) + a

    in_edm_variables = "Multistep" not in name  # x / a instead of x
    theirs = start / alphas[0].item() if in_edm_variables else start
    generator = torch.Generator().manual_seed(2)
    extra = {"generator": generator} if sampler is euler_ancestral else {}
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(theirs, t)
        a = (1 / (1 + scheduler.sigmas[i].double() ** 2).sqrt()).item()
        v = (a * x - prediction(x, a)) / math.sqrt(1 - a**2)
        theirs = scheduler.step(v, t, theirs, return_dict=False, **extra)[0]

    ours_generator = torch.Generator().manual_seed(2)

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=ours_generator, dtype=x.dtype)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return prediction(x, alphas[11 - int(t)].item())

    ours = sampler(denoise, start, schedule, steps=12, noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # diffusers steps in float32


# ---------------------------------------------------------------------------------------------------- fresh noise


def trajectory(sampler: Callable, steps: int = 9, schedule=None) -> tuple[torch.Tensor, int]:
    """(x0 for a nonlinear prediction, number of draws)."""
    noise, draws = noise_source([5]), []

    def counted(x: torch.Tensor) -> torch.Tensor:
        draws.append(1)
        return noise(x)

    start = torch.randn(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = sampler(
        lambda x, t: torch.tanh(x) + torch.sin(t / 200.0),
        start,
        schedule or ZeroSNRSchedule(3),
        steps=steps,
        noise=counted,
    )
    return x0, len(draws)


def test_ancestral_sampling_without_noise_is_ddim() -> None:
    quiet, draws = trajectory(partial(euler_ancestral, eta=0.0))
    torch.testing.assert_close(quiet, trajectory(ddim)[0], rtol=0, atol=1e-12)
    assert draws == 0


@pytest.mark.parametrize(("sampler", "draws"), [(euler_ancestral, 8), (dpmpp_3m_sde, 8), (dpmpp_2m_sde, 15)])
def test_the_draws_are_as_documented(sampler: Callable, draws: int) -> None:
    assert trajectory(sampler)[1] == draws


def test_the_first_two_steps_are_those_of_the_second_order_solver() -> None:
    """From pure noise one step is of first order, and so is the next: nothing is known of the slope."""
    logs = []
    for sampler in (dpmpp_2m, dpmpp_3m, unipc):
        log = []
        sampler(lambda x, t: torch.tanh(x), torch.ones(1, 3), ZeroSNRSchedule(), steps=9, callback=log.append)
        logs.append(log)
    for other in logs[1:]:
        torch.testing.assert_close(other[0]["x"], logs[0][0]["x"], rtol=0, atol=1e-6)
    torch.testing.assert_close(logs[1][1]["x"], logs[0][1]["x"], rtol=0, atol=1e-6)


def test_repeated_steps_keep_the_distribution() -> None:
    schedule, noise = ZeroSNRSchedule(), noise_source([3])
    samples = euler_ancestral(
        exact_denoiser(schedule, 300),
        noise(torch.empty(1, 40_000, dtype=torch.float64)),
        schedule,
        steps=300,
        noise=noise,
        repeats=3,
    )
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert samples.std().item() == pytest.approx(STD, rel=0.05)


def test_heun_evaluates_twice_a_step_but_once_in_the_last() -> None:
    seen = []
    schedule = ZeroSNRSchedule()
    heun(lambda x, t: seen.append(int(t)) or x, torch.zeros(1, 2), schedule, steps=4)
    a, b, c, d = schedule.timesteps(4).tolist()
    assert seen == [a, b, b, c, c, d, d]


@pytest.mark.parametrize("sampler", [euler_ancestral, dpmpp_3m_sde])
@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_an_eta_out_of_range_is_an_error(sampler: Callable, eta: float) -> None:
    with pytest.raises(ValueError, match=f"eta={eta}: expected a number from 0"):
        trajectory(partial(sampler, eta=eta))


def test_no_repetition_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="repeats=0: expected at least 1"):
        trajectory(partial(euler_ancestral, repeats=0))
