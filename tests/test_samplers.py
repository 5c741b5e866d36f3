"""Samplers, against the published trajectories, against diffusers, and against a Gaussian known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvideox.diffusion.ancestral import euler_ancestral
from cogvideox.diffusion.denoiser import GuidedDenoiser
from cogvideox.diffusion.dpm import dpmpp_3m_sde
from cogvideox.diffusion.guidance import ConstantGuidance, DynamicTimestepGuidance
from cogvideox.diffusion.heun import heun
from cogvideox.diffusion.samplers import ddim, dpmpp_2m, dpmpp_2m_sde, noise_source
from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.unipc import unipc

UPSTREAM = {"vpsde_dpmpp2m": dpmpp_2m_sde, "ddim": ddim, "vpode_dpmpp2m": dpmpp_2m}
GUIDANCE = {"dynamic": DynamicTimestepGuidance(6, 5), "vanilla": ConstantGuidance(6)}
SAMPLERS = [*UPSTREAM.values(), heun, euler_ancestral, dpmpp_3m_sde, unipc]


def toy_network(x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
    """The network of the fixtures (config.json)."""
    t, m = t.float().view(-1, 1, 1, 1, 1), condition["tokens"].mean((1, 2)).view(-1, 1, 1, 1, 1)
    k = ((torch.arange(x.shape[2]) + 1) / x.shape[2]).view(1, 1, -1, 1, 1)
    roll = torch.roll(x, shifts=1, dims=-1)
    return (0.3 + 0.4 * torch.cos(t / 400)) * x + 0.1 * roll + 0.25 * torch.sin(t / 150 + 0.5) * m * k


def toy_conditions(seed: int = 0) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    cond, uncond = torch.randn(2, 1, 4, 5, generator=generator)
    return {"tokens": cond}, {"tokens": uncond}


# ------------------------------------------------------------------------------------------- published trajectories


@pytest.mark.parametrize(
    ("name", "steps"),
    [("vpsde_dpmpp2m", 50), ("vpsde_dpmpp2m", 7), ("ddim", 50), ("ddim", 7), ("vpode_dpmpp2m", 7)],
)
@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_trajectory_is_the_published_one(
    reference: Path, name: str, shift: int, steps: int, guidance: str
) -> None:
    inputs = load_file(reference / "fixtures/sampler/inputs.safetensors")
    outputs = load_file(reference / "fixtures/sampler/outputs.safetensors")
    prefix = f"{name}.s{shift}.n{steps}.{guidance}."
    schedule, log, scales = ZeroSNRSchedule(shift), [], []
    draws = iter(outputs.get(f"{name}.s{shift}.n{steps}.draws", torch.zeros(0)))

    def spied_guidance(*arguments) -> float:
        scales.append(GUIDANCE[guidance](*arguments))
        return scales[-1]

    cond, uncond = {"tokens": inputs["cond"]}, {"tokens": inputs["uncond"]}
    denoise = GuidedDenoiser(toy_network, schedule, steps, spied_guidance, cond, uncond)
    x0 = UPSTREAM[name](
        denoise, inputs["x0"], schedule, steps=steps, noise=lambda x: next(draws), callback=log.append
    )

    assert next(draws, None) is None, "fewer draws than upstream"
    close = {"rtol": 0, "atol": 1e-5}  # float32 state over up to 50 steps; measured: 2.2e-6
    torch.testing.assert_close(torch.stack([entry["x"] for entry in log]), outputs[prefix + "x"], **close)
    torch.testing.assert_close(x0, outputs[prefix + "x"][-1], **close)
    if prefix + "denoised" in outputs:
        denoised = torch.stack([entry["denoised"] for entry in log])
        torch.testing.assert_close(denoised, outputs[prefix + "denoised"], **close)
    assert scales == pytest.approx(outputs[prefix + "guidance_scale"].tolist(), abs=1e-9)
    assert [entry["t"] for entry in log] == outputs[prefix + "timestep"].tolist()
    assert [(entry["step"], entry["steps"]) for entry in log] == [(i, steps) for i in range(steps)]


# ------------------------------------------------------------------------------------------------------- diffusers


class DiffusersSchedule:
    """The sub-schedule of a diffusers scheduler: rescaled to zero SNR before sub-sampling, SAT does it after."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def timesteps(self, steps: int) -> torch.Tensor:
        return self.scheduler.timesteps

    def alphas(self, steps: int) -> torch.Tensor:
        return torch.cat([self.scheduler.alphas_cumprod[self.scheduler.timesteps].sqrt(), torch.ones(1)])


@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m_sde])
@pytest.mark.parametrize(("shift", "steps"), [(1.0, 50), (3.0, 20), (3.0, 8)])
def test_sampler_matches_diffusers_on_its_schedule(sampler: Callable, shift: float, steps: int) -> None:
    """For steps that divide 1000: otherwise diffusers steps to t - 1000 // steps, which is not its next timestep."""
    diffusers = pytest.importorskip("diffusers")
    cls = diffusers.CogVideoXDDIMScheduler if sampler is ddim else diffusers.CogVideoXDPMScheduler
    scheduler = cls(
        snr_shift_scale=shift,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(steps)
    schedule, (cond, _) = DiffusersSchedule(scheduler), toy_conditions()
    start = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return toy_network(x, torch.as_tensor(t).reshape(1), cond)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha = scheduler.alphas_cumprod[t].sqrt()
        return ZeroSNRSchedule.predict_x0(velocity(x, t), x, alpha)

    generator = torch.Generator().manual_seed(2)
    theirs, previous = start, None
    for i, t in enumerate(scheduler.timesteps):
        if sampler is ddim:
            theirs = scheduler.step(velocity(theirs, t), t, theirs, return_dict=False)[0]
        else:
            back = scheduler.timesteps[i - 1] if i > 0 else None
            theirs, previous = scheduler.step(
                velocity(theirs, t), previous, t, back, theirs, generator=generator, return_dict=False
            )

    ours_generator = torch.Generator().manual_seed(2)
    ours = sampler(
        denoise, start, schedule, steps=steps, noise=lambda x: torch.randn(x.shape, generator=ours_generator)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # float32 over up to 50 steps


# ---------------------------------------------------------------------------------------------- a Gaussian, exactly

MEAN, STD = 0.7, 0.5


def sample_gaussian(sampler: Callable, steps: int, size: int = 40_000) -> torch.Tensor:
    """Samples of N(MEAN, STD^2) with its exact denoiser E[x0 | x_t], in float64."""
    schedule = ZeroSNRSchedule()
    alpha_at = dict(zip(schedule.timesteps(steps).tolist(), schedule.alphas(steps).tolist(), strict=False))

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alpha_at[int(t)]
        return MEAN + a * STD**2 / (a**2 * STD**2 + 1 - a**2) * (x - a * MEAN)

    noise = noise_source([3])
    return sampler(
        denoise, noise(torch.empty(1, size, dtype=torch.float64)), schedule, steps=steps, noise=noise
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_of_a_gaussian_have_its_mean_and_variance(sampler: Callable) -> None:
    # The ancestral sampler is of first order, and each step takes a little of the variance.
    samples = sample_gaussian(sampler, steps=800 if sampler is euler_ancestral else 200)
    # 40,000 samples: the mean is known to 0.0025 and the deviation to 0.4 % (1 sigma); the last step returns the
    # denoised sample, which makes the deviation 0.3 % too small.
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert samples.std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m, heun, unipc])
def test_deterministic_samplers_converge_with_the_number_of_steps(sampler: Callable) -> None:
    """An exact solver maps the noise z to MEAN + STD z."""
    z = noise_source([3])(torch.empty(1, 1000, dtype=torch.float64))
    errors = [(sample_gaussian(sampler, n, 1000) - MEAN - STD * z).abs().mean().item() for n in (8, 64, 512)]
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3


def test_the_second_order_sampler_is_closer_than_ddim_at_the_same_cost() -> None:
    z = noise_source([3])(torch.empty(1, 1000, dtype=torch.float64))
    exact = MEAN + STD * z
    first, second = ((sample_gaussian(s, 30, 1000) - exact).abs().mean().item() for s in (ddim, dpmpp_2m))
    assert second < first


@pytest.mark.parametrize("sampler", [dpmpp_2m_sde, dpmpp_3m_sde])
def test_stochastic_samples_keep_the_variance_with_few_steps(sampler: Callable) -> None:
    few = sample_gaussian(sampler, steps=20)
    assert few.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert few.std().item() == pytest.approx(STD, rel=0.1)


# ------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_returns_the_prediction(sampler: Callable) -> None:
    start = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x0 = sampler(lambda x, t: x * 0.5 + t, start, ZeroSNRSchedule(), steps=1, noise=noise_source([0]))
    assert torch.equal(x0, start * 0.5 + 999)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_state_is_the_last_prediction(sampler: Callable) -> None:
    log = []
    start = torch.zeros(1, 4)
    x0 = sampler(
        lambda x, t: x + 1, start, ZeroSNRSchedule(), steps=5, noise=noise_source([0]), callback=log.append
    )
    torch.testing.assert_close(x0, log[-1]["denoised"], rtol=0, atol=1e-6)
    assert torch.equal(x0, log[-1]["x"]) and [entry["t"] for entry in log][0] == 999


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_prediction_names_its_step(sampler: Callable, bad: float) -> None:
    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x0 = torch.zeros_like(x)
        x0[0, 1] = bad if t == 713 else 0.0
        return x0

    with pytest.raises(FloatingPointError, match=r"step 3 of 7 \(timestep 713\)"):
        sampler(denoise, torch.zeros(1, 4), ZeroSNRSchedule(), steps=7, noise=noise_source([0]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_state_is_float32_whatever_the_network_returns(sampler: Callable) -> None:
    start = torch.zeros(1, 4, dtype=torch.bfloat16)
    seen = []
    x0 = sampler(
        lambda x, t: seen.append(x.dtype) or x.bfloat16(),
        start,
        ZeroSNRSchedule(),
        steps=3,
        noise=noise_source([0]),
    )
    assert x0.dtype == torch.float32 and set(seen) == {torch.float32}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_number_of_steps_out_of_range_is_an_error(sampler: Callable) -> None:
    with pytest.raises(ValueError, match="sample.steps=1001"):
        sampler(lambda x, t: x, torch.zeros(1, 4), ZeroSNRSchedule(), steps=1001, noise=noise_source([0]))


def test_an_item_gets_the_same_noise_alone_and_in_a_batch() -> None:
    together, alone = noise_source([11, 12, 13]), noise_source([12])
    for _ in range(3):
        batch = together(torch.empty(3, 2, 4))
        assert torch.equal(batch[1:2], alone(torch.empty(1, 2, 4)))
    assert not torch.equal(batch[0], batch[1])


def test_an_item_gets_the_same_video_alone_and_in_a_batch() -> None:
    schedule = ZeroSNRSchedule()

    def sample(seeds: list[int]) -> torch.Tensor:
        noise = noise_source(seeds)
        start = noise(torch.empty(len(seeds), 8))
        return dpmpp_2m_sde(lambda x, t: 0.3 * x, start, schedule, steps=6, noise=noise)

    torch.testing.assert_close(sample([5, 6, 7])[2:], sample([7]), rtol=0, atol=0)


def test_noise_for_another_batch_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch of 3 .* 2 seeds"):
        noise_source([0, 1])(torch.empty(3, 4))
