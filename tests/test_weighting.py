"""Loss weightings against their papers' formulas on x0 and on the noise, their gradient, and the end at zero SNR."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideox.build import build
from cogvideox.config import ConfigError, load_config
from cogvideox.diffusion.loss import v_prediction_loss
from cogvideox.diffusion.names import LOSSES
from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.weighting import P2, Constant, Debiased, MinSNR, SNRPower, SoftMinSNR

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny_t2v.yaml"
SCHEDULE = ZeroSNRSchedule(3)
ALL = [Constant, MinSNR, SoftMinSNR, P2, SNRPower, Debiased]


def errors(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v, its target, and the mean squared errors per sample of x0 and noise that they mean, and the SNR; float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(t), 2, 3, 2, 2)
    x0, noise, v = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    alpha = SCHEDULE.table[t].double().view(-1, 1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    x_t, target = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
    of_x0 = ((alpha * x_t - sigma * v) - x0).square().flatten(1).mean(1)
    of_noise = ((sigma * x_t + alpha * v) - noise).square().flatten(1).mean(1)
    return v, target, of_x0, of_noise, (alpha**2 / (1 - alpha**2)).flatten()


# By the papers, on the error that they write them for.
PAPERS = {
    "min_snr": (MinSNR(5.0, normalise=False), lambda x, e, snr: snr.clamp(max=5.0) * x),
    "soft_min_snr": (SoftMinSNR(4.0, normalise=False), lambda x, e, snr: 4 * snr / (4 + snr) * x),
    "p2": (P2(1.0, 0.5, normalise=False), lambda x, e, snr: e / (1 + snr) ** 0.5),
    "x0": (SNRPower(0.0, normalise=False), lambda x, e, snr: x),
    "noise": (SNRPower(1.0, normalise=False), lambda x, e, snr: e),
    "debiased": (Debiased(normalise=False), lambda x, e, snr: e / snr.sqrt()),
    "constant": (Constant(normalise=False), lambda x, e, snr: x * (snr + 1)),
}


@pytest.mark.parametrize("name", PAPERS)
def test_each_weighting_is_its_papers_on_the_error_it_was_written_for(name: str) -> None:
    t = torch.tensor([0, 17, 250, 640, 998])
    v, target, x0, noise, snr = errors(t)
    loss, paper = PAPERS[name]
    found, _ = loss(v, target, t, SCHEDULE)
    # The loss is float32, and 1 - a^2 loses 3 of its 7 digits at t = 0.
    assert found.item() == pytest.approx(paper(x0, noise, snr).mean().item(), rel=2e-4)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("normalise", [True, False])
def test_every_weighting_is_finite_at_zero_snr_and_so_is_its_gradient(kind: type, normalise: bool) -> None:
    t = torch.tensor([999, 0])
    v, target, *_ = errors(t)
    v = v.float().requires_grad_()
    loss, _ = kind(normalise=normalise)(v, target, t, SCHEDULE)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(v.grad).all()
    expected_zero = kind not in (Constant, SNRPower)  # all but these have a factor snr
    assert bool((v.grad[0] == 0).all()) == expected_zero


@pytest.mark.parametrize("kind", ALL)
def test_normalised_weights_are_1_on_average_over_the_timesteps(kind: type) -> None:
    assert kind().table(SCHEDULE).double().mean().item() == pytest.approx(1.0, rel=1e-5)


def test_the_constant_weighting_is_the_published_loss_and_metrics_hold_it_for_all() -> None:
    t = torch.tensor([3, 500, 999])
    v, target, *_ = errors(t)
    published, _ = v_prediction_loss(v, target, t, SCHEDULE)
    assert Constant()(v, target, t, SCHEDULE)[0].item() == pytest.approx(published.item(), rel=1e-6)
    for kind in ALL:
        _, metrics = kind()(v, target, t, SCHEDULE)
        assert list(metrics) == ["loss/unweighted"] and torch.equal(metrics["loss/unweighted"], published)


@pytest.mark.parametrize("huber", [None, 0.3])
def test_the_gradient_is_that_of_finite_differences(huber: float | None) -> None:
    t = torch.tensor([100, 900])
    v, target, *_ = errors(t)
    v = v.float().requires_grad_()
    loss = MinSNR(huber=huber)
    loss(v, target, t, SCHEDULE)[0].backward()
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    ahead, behind = (loss(v.detach() + s * step * direction, target, t, SCHEDULE)[0] for s in (1, -1))
    numeric = (ahead - behind).item() / (2 * step)
    # Central differences of a float32 loss of O(1): 1e-7 / 1e-2 of rounding, step^2 of curvature.
    assert (v.grad * direction).sum().item() == pytest.approx(numeric, rel=1e-3, abs=1e-4)


def test_huber_is_the_square_for_small_errors_and_linear_for_large_ones() -> None:
    t, zero = torch.tensor([500]), torch.zeros(1, 1, 1, 1, 1)
    loss = Constant(huber=0.1)
    small, _ = loss(zero + 1e-2, zero, t, SCHEDULE)
    large, _ = loss(zero + 100.0, zero, t, SCHEDULE)
    assert small.item() == pytest.approx(1e-4, rel=0.01)  # next term: -(e / c)^2 / 4 = 0.25 %
    assert large.item() == pytest.approx(2 * 0.1 * (100 - 0.1), rel=1e-3)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MinSNR(0.0), "gamma=0.0: expected a positive number"),
        (lambda: SNRPower(-0.5), "k=-0.5: expected at least 0"),
        (lambda: Debiased(huber=-1.0), "huber=-1.0"),
    ],
)
def test_a_wrong_parameter_is_an_error(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("name", LOSSES)
def test_short_names_build(name: str) -> None:
    config = load_config([TINY], [f"model.loss={name}"])
    assert callable(build(config.model.loss))


def test_a_misspelt_loss_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model.loss=min_snf: did you mean min_snr\?"):
        load_config([TINY], ["model.loss=min_snf"])
    with pytest.raises(ConfigError, match="params.gama: MinSNR has no such argument; did you mean gamma"):
        load_config([TINY], ["model.loss=min_snr", "model.loss.params.gama=5"])
