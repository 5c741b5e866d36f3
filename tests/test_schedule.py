"""The noise schedule, against the published tables and against diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.spacing import SPACINGS

SHIFTS = [1, 3]


@pytest.fixture(scope="module")
def published(reference: Path) -> dict[str, torch.Tensor]:
    return load_file(reference / "fixtures/schedule/outputs.safetensors")


@pytest.mark.parametrize("shift", SHIFTS)
def test_table_is_the_published_one(published, shift: int) -> None:
    assert torch.equal(ZeroSNRSchedule(shift).table, published[f"s{shift}.table1000"])


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [50, 7])
def test_sub_schedule_is_the_published_one(published, shift: int, steps: int) -> None:
    schedule, key = ZeroSNRSchedule(shift), f"s{shift}.n{steps}."
    assert torch.equal(schedule.timesteps(steps), published[key + "timestep_at_step"])
    torch.testing.assert_close(
        schedule.alphas(steps), published[key + "sampler_alpha_cumprod_sqrt"], rtol=0, atol=1e-7
    )
    index, value = schedule.quantise(schedule.alphas(steps)[:-1])
    assert torch.equal(index, published[key + "quantized_idx"])
    assert torch.equal(value, published[key + "quantized_alpha_seen_by_denoiser"])


def test_upstreams_unpublished_options_can_be_expressed(published) -> None:
    start = 8.5e-4
    keep_start = ZeroSNRSchedule(3, linear_start=start / (3 + (1 - 3) * start))
    torch.testing.assert_close(keep_start.table, published["s3.keep_start.table1000"], rtol=0, atol=1e-7)
    post_shift = ZeroSNRSchedule(3, shift_after_rescale=True)
    torch.testing.assert_close(post_shift.table, published["s3.post_shift.table1000"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("shift", SHIFTS)
def test_table_matches_diffusers(shift: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=float(shift), rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    table = scheduler.alphas_cumprod.double().sqrt()
    schedule = ZeroSNRSchedule(shift)
    # diffusers multiplies up 1000 float32 factors and squares the result; ours is float64 until the last step.
    torch.testing.assert_close(schedule.table.double(), table, rtol=0, atol=1e-6)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == schedule.timesteps(50).tolist()
    # The known difference: SAT rescales to zero SNR after sub-sampling, diffusers before.
    apart = (schedule.alphas(50)[:-1] - table[scheduler.timesteps]).abs().max()
    assert 1e-4 < apart < 1.2e-3


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 999, 1000])
def test_every_number_of_steps_goes_from_pure_noise_to_clean(steps: int) -> None:
    schedule = ZeroSNRSchedule(3)
    alphas, timesteps = schedule.alphas(steps), schedule.timesteps(steps)
    assert alphas.shape == (steps + 1,) and timesteps.shape == (steps,)
    assert alphas[0] == 0 and alphas[-1] == 1 and (alphas.diff() > 0).all()
    assert timesteps[0] == 999 and timesteps[-1] >= 0 and (timesteps.diff() < 0).all()


def test_all_thousand_steps_are_the_table_itself() -> None:
    schedule = ZeroSNRSchedule()
    assert torch.equal(schedule.alphas(1000)[:-1].flip(0), schedule.table)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range_is_an_error(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"sample.steps={steps}.*1 to 1000"):
        ZeroSNRSchedule().timesteps(steps)


@pytest.mark.parametrize("wrong", [{"snr_shift": 0}, {"num_timesteps": 1}, {"linear_start": 0.5}])
def test_an_impossible_schedule_is_an_error(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ZeroSNRSchedule(**wrong)


# ---------------------------------------------------------------------------------------------------- sub-schedules


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_falls_from_pure_noise_to_clean(spacing: str, shift: int) -> None:
    schedule = ZeroSNRSchedule(shift, spacing=spacing)
    for steps in (1, 2, 3, 50, 600, 999, 1000):
        alphas, timesteps = schedule.alphas(steps), schedule.timesteps(steps)
        assert alphas[0] == 0 and alphas[-1] == 1 and (alphas.diff() > 0).all()
        assert timesteps.dtype == torch.int64 and timesteps.shape == (steps,)
        assert timesteps[-1] >= 0 and timesteps[0] <= 999 and (timesteps.diff() < 0).all()
        assert timesteps[0] == 999 or (spacing == "leading" and steps < 1000)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_even_spacings_are_those_of_diffusers(spacing: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDDIMScheduler(timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(steps)
    assert ZeroSNRSchedule(spacing=spacing).timesteps(steps).tolist() == scheduler.timesteps.tolist()


def test_trailing_is_the_default() -> None:
    for steps in (7, 50):
        assert torch.equal(
            ZeroSNRSchedule(3).alphas(steps), ZeroSNRSchedule(3, spacing="trailing").alphas(steps)
        )


def before_the_rescale(shift: int, timesteps: torch.Tensor) -> torch.Tensor:
    """sqrt((1 - a^2) / a^2) by the formula of the betas, in float64: finite at 999, as the spacings need it."""
    betas = torch.linspace(8.5e-4**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    ratio = (1 - betas).log().cumsum(0).neg().expm1()  # noise over signal, squared; the shift multiplies it
    return (shift * ratio[timesteps]).sqrt()


@pytest.mark.parametrize("shift", SHIFTS)
def test_karras_is_even_in_the_seventh_root_of_sigma(shift: int) -> None:
    timesteps = ZeroSNRSchedule(shift, spacing="karras").timesteps(10)
    ours = before_the_rescale(shift, timesteps)
    ramp = torch.linspace(0, 1, 10, dtype=torch.float64)
    theirs = (ours[0] ** (1 / 7) + ramp * (ours[-1] ** (1 / 7) - ours[0] ** (1 / 7))) ** 7
    # An integer timestep is at most half a one away, which at the clean end is a quarter of sigma.
    torch.testing.assert_close(ours[:-3], theirs[:-3], rtol=0.02, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0.15, atol=0)


def test_log_snr_is_even_in_it() -> None:
    timesteps = ZeroSNRSchedule(spacing="log_snr").timesteps(10)
    steps = before_the_rescale(1, timesteps).log().diff()
    torch.testing.assert_close(steps[:-3], steps[:-3].mean().expand(6), rtol=0.1, atol=0)


def test_karras_and_log_snr_spend_more_steps_near_the_clean_end() -> None:
    median = {name: ZeroSNRSchedule(spacing=name).timesteps(20)[10].item() for name in SPACINGS}
    assert median["log_snr"] < median["karras"] < median["linspace"]


def test_an_unknown_spacing_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="spacing='trailling': did you mean trailing.*leading, linspace, karras"
    ):
        ZeroSNRSchedule(spacing="trailling")


# ------------------------------------------------------------------------------------------------ noise and velocity


def test_velocity_is_the_derivative_along_the_arc() -> None:
    """With a = cos(phi), v = d x_t / d phi; here by central differences in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    schedule, t = ZeroSNRSchedule(), torch.tensor([0, 10, 400, 998, 999])
    phi, d = schedule.table.double()[t].acos()[:, None], 1e-6
    slope = ((phi + d).cos() - (phi - d).cos()) * x0 + ((phi + d).sin() - (phi - d).sin()) * noise
    # float32 table: 1 - a^2 at t = 0 is 8.5e-4, known to 6e-8.
    torch.testing.assert_close(schedule.velocity(x0, noise, t), slope / (2 * d), rtol=0, atol=1e-5)


def test_the_clean_sample_follows_from_its_velocity() -> None:
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 3, 2, 2, 2, generator=generator)
    schedule, t = ZeroSNRSchedule(3), torch.tensor([0, 321, 998, 999])
    x_t, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    alpha = schedule.table[t].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(schedule.predict_x0(v, x_t, alpha), x0, rtol=0, atol=1e-6)
    assert torch.equal(x_t[3], noise[3])  # pure noise at the last timestep, exactly


def test_bfloat16_latents_are_noised_in_float32() -> None:
    x0 = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    assert ZeroSNRSchedule().add_noise(x0, x0, torch.tensor([5])).dtype == torch.float32
