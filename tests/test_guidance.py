"""Guidance scales, and the denoiser that applies them."""

from __future__ import annotations

import math

import pytest
import torch

from cogvideox.diffusion.denoiser import GuidedDenoiser
from cogvideox.diffusion.guidance import (
    ConstantGuidance,
    DynamicStepGuidance,
    DynamicTimestepGuidance,
    IntervalGuidance,
    RescaledGuidance,
)
from cogvideox.diffusion.heun import heun
from cogvideox.diffusion.samplers import ddim
from cogvideox.diffusion.schedule import ZeroSNRSchedule

SCHEDULE = ZeroSNRSchedule()


def network(x, t, condition):
    """Linear in the condition, so that guidance has a closed form: v = 0.1 x + mean(tokens) + concat."""
    network.batches.append(len(x))
    v = 0.1 * x + condition["tokens"].mean((1, 2)).view(-1, 1, 1, 1, 1)
    return v + condition["concat"] if "concat" in condition else v


@pytest.fixture(autouse=True)
def _no_batches() -> None:
    network.batches = []


def conditions(u: float, c: float) -> tuple[dict, dict]:
    return {"tokens": torch.full((2, 3, 4), c)}, {"tokens": torch.full((2, 3, 4), u)}


def test_published_dynamic_guidance_jumps() -> None:
    guidance = DynamicTimestepGuidance(scale=6, exponent=5)
    scales = [guidance(i, t, 50) for i, t in enumerate(SCHEDULE.timesteps(50))]
    # The values of CONVENTIONS.md, section 5, from running the published code.
    assert [round(s, 4) for s in scales[:5]] == [2.2915, 2.5435, 6.9744, 6.4204, 2.7881]


def test_published_dynamic_guidance_is_evaluated_in_float64() -> None:
    # (50 - 999) / 50 to the fifth is -2.5e6: a float32 angle would be off by about half a radian.
    angle = math.pi * ((50 - 999) / 50) ** 5
    assert DynamicTimestepGuidance(6)(0, torch.tensor(999), 50) == 1 + 6 * (1 - math.cos(angle)) / 2
    single = torch.tensor(angle, dtype=torch.float32).cos().item()
    assert abs(single - math.cos(angle)) > 1e-3


def test_dynamic_guidance_matches_the_formula_of_diffusers() -> None:
    for steps in (7, 25, 50):
        for i, t in enumerate(SCHEDULE.timesteps(steps)):
            expected = 1 + 6 * ((1 - math.cos(math.pi * ((steps - t.item()) / steps) ** 5.0)) / 2)
            assert DynamicTimestepGuidance(6)(i, int(t), steps) == pytest.approx(expected, abs=1e-9)


def test_step_guidance_rises_smoothly_from_one() -> None:
    scales = [
        DynamicStepGuidance(scale=6, exponent=5)(i, t, 50) for i, t in enumerate(SCHEDULE.timesteps(50))
    ]
    assert scales[0] == 1 and scales == sorted(scales) and scales[-1] < 7
    assert scales[25] == pytest.approx(1 + 3 * (1 - math.cos(math.pi / 32)))


def test_a_fractional_exponent_of_the_published_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="whole number"):
        DynamicTimestepGuidance(6, 4.5)


# --------------------------------------------------------------------------------------------- interval, rescaled


def test_outside_the_interval_the_unconditional_pass_is_skipped() -> None:
    cond, uncond = conditions(u=0.2, c=0.5)
    denoise = GuidedDenoiser(network, SCHEDULE, 7, IntervalGuidance(6.0, 300, 800), cond, uncond)
    ddim(denoise, torch.zeros(2, 1, 2, 2, 2), SCHEDULE, steps=7)
    assert network.batches == [2, 2, 4, 4, 4, 2, 2]  # timesteps 999, 856, 713, 570, 428, 285, 142
    network.batches = []
    heun(denoise, torch.zeros(2, 1, 2, 2, 2), SCHEDULE, steps=7)  # each timestep but the first twice
    assert network.batches == [2, 2, 2, 4, 4, 4, 4, 4, 4, 2, 2, 2, 2]


def test_the_interval_has_both_its_ends() -> None:
    guidance = IntervalGuidance(6, 285, 713)
    assert [guidance(0, t, 50) for t in (284, 285, 713, 714)] == [1.0, 6.0, 6.0, 1.0]
    assert IntervalGuidance(6)(0, 0, 50) == IntervalGuidance(6)(0, 999, 50) == 6.0


@pytest.mark.parametrize(("low", "high"), [(500, 400), (-1, 400)])
def test_an_empty_interval_is_an_error(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"low={low}, high={high}"):
        IntervalGuidance(6, low, high)


def velocities(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(seed)).unbind(0)


def test_the_rescaled_guidance_has_the_contrast_of_the_conditional_prediction() -> None:
    u, c = velocities()
    guided = RescaledGuidance(7.5, factor=1.0).combine(u, c, 7.5)
    for item, expected in zip(guided, c, strict=True):
        assert item.std().item() == pytest.approx(expected.std().item(), rel=1e-5)
    torch.testing.assert_close(
        RescaledGuidance(7.5, factor=0.0).combine(u, c, 7.5), u + 7.5 * (c - u), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("factor", [0.3, 0.7])
def test_rescaled_guidance_matches_diffusers(factor: float) -> None:
    pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    u, c = velocities()
    theirs = rescale_noise_cfg(u + 7.5 * (c - u), c, guidance_rescale=factor)
    ours = RescaledGuidance(7.5, factor).combine(u, c, 7.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_denoiser_lets_the_guidance_combine_the_networks_outputs() -> None:
    both = torch.cat(velocities())
    x, cond = (
        torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(3)),
        {"tokens": torch.zeros(3, 1)},
    )
    guidance, step = RescaledGuidance(7.5, 0.7), 4
    denoise = GuidedDenoiser(lambda x, t, c: both, SCHEDULE, 7, guidance, cond, cond)
    alpha = SCHEDULE.quantise(SCHEDULE.alphas(7)[step])[1].item()
    expected = SCHEDULE.predict_x0(guidance.combine(*both.chunk(2), 7.5), x, alpha)
    torch.testing.assert_close(denoise(x, SCHEDULE.timesteps(7)[step]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [-0.1, 1.1])
def test_a_rescale_factor_out_of_range_is_an_error(factor: float) -> None:
    with pytest.raises(ValueError, match=f"factor={factor}: expected a number from 0 to 1"):
        RescaledGuidance(7.5, factor)


# ---------------------------------------------------------------------------------------------------- the denoiser


def test_denoiser_combines_both_predictions_in_one_call() -> None:
    cond, uncond = conditions(u=0.2, c=0.5)
    denoise = GuidedDenoiser(network, SCHEDULE, 7, ConstantGuidance(3.0), cond, uncond)
    x, step = torch.randn(2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0)), 3
    t = SCHEDULE.timesteps(7)[step]
    alpha = SCHEDULE.quantise(SCHEDULE.alphas(7)[step])[1]
    v = 0.1 * x + 0.2 + 3.0 * (0.5 - 0.2)
    torch.testing.assert_close(denoise(x, t), alpha * x - (1 - alpha**2).sqrt() * v, rtol=0, atol=1e-6)
    assert network.batches == [4]


def test_scale_one_skips_the_unconditional_half_without_changing_the_result() -> None:
    cond, uncond = conditions(u=0.2, c=0.5)
    x, t = torch.ones(2, 1, 2, 2, 2), SCHEDULE.timesteps(7)[2]
    skipped = GuidedDenoiser(network, SCHEDULE, 7, ConstantGuidance(1.0), cond, uncond)(x, t)
    whole = GuidedDenoiser(network, SCHEDULE, 7, lambda *_: 1 + 1e-15, cond, uncond)(x, t)
    assert network.batches == [2, 4]
    torch.testing.assert_close(skipped, whole, rtol=0, atol=1e-6)


def test_a_negative_prompt_changes_the_result() -> None:
    cond, zeros = conditions(u=0.0, c=0.5)
    _, negative = conditions(u=-0.4, c=0.5)
    x, t = torch.ones(2, 1, 2, 2, 2), SCHEDULE.timesteps(7)[0]
    plain = GuidedDenoiser(network, SCHEDULE, 7, ConstantGuidance(6.0), cond, zeros)(x, t)
    guided = GuidedDenoiser(network, SCHEDULE, 7, ConstantGuidance(6.0), cond, negative)(x, t)
    # At t = 999, x0 = -v, and guidance 6 moves v by -5 times the change of the unconditional half.
    torch.testing.assert_close(guided - plain, torch.full_like(plain, 5 * -0.4), rtol=0, atol=1e-5)


def test_guidance_sees_step_timestep_and_number_of_steps() -> None:
    seen = []
    cond, uncond = conditions(0.0, 1.0)
    denoise = GuidedDenoiser(network, SCHEDULE, 7, lambda *a: seen.append(a) or 2.0, cond, uncond)
    for t in SCHEDULE.timesteps(7):
        denoise(torch.zeros(2, 1, 1, 1, 1), t)
    assert seen == [(i, t, 7) for i, t in enumerate([999, 856, 713, 570, 428, 285, 142])]


def test_a_network_in_bfloat16_gives_a_float32_prediction() -> None:
    cond, uncond = conditions(0.0, 1.0)
    half = lambda x, t, c: network(x, t, c).bfloat16()  # noqa: E731
    x0 = GuidedDenoiser(half, SCHEDULE, 7, ConstantGuidance(2.0), cond, uncond)(
        torch.zeros(2, 1, 1, 1, 1), 999
    )
    assert x0.dtype == torch.float32


def test_conditions_of_different_shapes_are_an_error() -> None:
    cond, uncond = conditions(0.0, 1.0)
    cond["concat"] = torch.zeros(2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="same keys and shapes"):
        GuidedDenoiser(network, SCHEDULE, 7, ConstantGuidance(2.0), cond, uncond)


def test_a_timestep_that_is_no_sampling_step_is_an_error() -> None:
    cond, uncond = conditions(0.0, 1.0)
    with pytest.raises(ValueError, match="timestep 500 is none of the 7"):
        GuidedDenoiser(network, SCHEDULE, 7, ConstantGuidance(2.0), cond, uncond)(
            torch.zeros(2, 1, 1, 1, 1), 500
        )
