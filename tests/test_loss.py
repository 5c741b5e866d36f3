"""The v-prediction loss, against the published one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvideox.diffusion.loss import losses_by_item, v_prediction_loss
from cogvideox.diffusion.schedule import ZeroSNRSchedule


def toy_network(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The network of the fixtures (config.json)."""
    t, m = t.float().view(-1, 1, 1, 1, 1), context.mean((1, 2)).view(-1, 1, 1, 1, 1)
    k = ((torch.arange(x.shape[2]) + 1) / x.shape[2]).view(1, 1, -1, 1, 1)
    roll = torch.roll(x, shifts=1, dims=-1)
    return (0.3 + 0.4 * torch.cos(t / 400)) * x + 0.1 * roll + 0.25 * torch.sin(t / 150 + 0.5) * m * k


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("offset", [0, 0.1])
def test_loss_is_the_published_one(reference: Path, shift: int, offset: float) -> None:
    inputs = load_file(reference / "fixtures/loss/inputs.safetensors")
    outputs = load_file(reference / "fixtures/loss/outputs.safetensors")
    key = f"s{shift}." + (f"offset{offset}." if offset else "")
    schedule, t, x0 = ZeroSNRSchedule(shift), inputs["idx"], inputs["x0"]
    noise = inputs["noise"] + offset * inputs["offset_noise"].view(-1, 1, 1, 1, 1)
    close = {"rtol": 0, "atol": 1e-5}  # float32; upstream divides by 1 - a^2 what it multiplied before

    torch.testing.assert_close(schedule.table[t], outputs[key + "alpha_cumprod_sqrt"], **close)
    torch.testing.assert_close(
        1 / (1 - schedule.table[t] ** 2), outputs[key + "loss_weight"], rtol=1e-5, atol=1e-5
    )
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, outputs[key + "noised_input"], **close)
    prediction, target = toy_network(x_t, t, inputs["cond"]), schedule.velocity(x0, noise, t)
    loss, _ = v_prediction_loss(prediction, target, t, schedule)
    torch.testing.assert_close(loss, outputs[key + "loss_mean"].squeeze(), **close)
    for i in range(len(x0)):
        own, _ = v_prediction_loss(prediction[i : i + 1], target[i : i + 1], t[i : i + 1], schedule)
        torch.testing.assert_close(own, outputs[key + "loss_per_sample"][i], **close)


def test_loss_equals_the_weighted_error_of_the_clean_sample() -> None:
    """mean(1 / (1 - a^2) (x0_predicted - x0)^2), the form it was published in, in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, v = torch.randn(3, 4, 2, 3, 2, 2, generator=generator, dtype=torch.float64)
    schedule, t = ZeroSNRSchedule(3), torch.tensor([0, 17, 640, 999])
    alpha = schedule.table[t].double().view(-1, 1, 1, 1, 1)
    x_t = alpha * x0 + (1 - alpha**2).sqrt() * noise
    weighted = ((schedule.predict_x0(v, x_t, alpha) - x0) ** 2 / (1 - alpha**2)).mean()
    loss, metrics = v_prediction_loss(v, schedule.velocity(x0, noise, t), t, schedule)
    assert loss.shape == () and metrics == {}
    assert loss.item() == pytest.approx(weighted.item(), rel=1e-5)  # the loss is float32


def test_gradient_reaches_the_prediction_in_its_dtype() -> None:
    prediction = torch.ones(2, 1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = v_prediction_loss(
        prediction, torch.zeros(2, 1, 1, 1, 1), torch.tensor([1, 2]), ZeroSNRSchedule()
    )
    loss.backward()
    assert loss.dtype == torch.float32 and prediction.grad.flatten().tolist() == [1.0, 1.0]


def test_shapes_that_would_broadcast_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"predicts \(2, 1.*target is \(2, 3"):
        v_prediction_loss(torch.zeros(2, 1, 4), torch.zeros(2, 3, 4), torch.tensor([0, 0]), ZeroSNRSchedule())


def test_losses_by_item_are_the_mean_squared_errors_of_each_item() -> None:
    g = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 2, 4, 5, 6, generator=g)
    losses = losses_by_item(
        v_prediction_loss, prediction, target, torch.tensor([1, 2, 999]), ZeroSNRSchedule()
    )
    expected = ((prediction.double() - target.double()) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)  # float32 sums
