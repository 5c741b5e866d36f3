"""The noise schedule, against the published tables and against diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvideox.diffusion.schedule import ZeroSNRSchedule

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
