"""Losses that weight the timesteps by their signal-to-noise ratio, for a network that predicts the velocity.

With snr = a^2 / (1 - a^2), the squared error of the velocity v is worth (snr + 1) times that of the clean sample and
(snr + 1) / snr times that of the noise (Salimans & Ho 2022). So a weight that a paper puts on the error of x0 is
divided by snr + 1 here, and one on the error of the noise multiplied by snr / (snr + 1): finite at zero terminal SNR.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cogvideox.diffusion.loss import v_prediction_loss
from cogvideox.diffusion.schedule import ZeroSNRSchedule


class WeightedLoss(ABC):
    """The mean over samples of weight(snr_t) times the mean squared error of the velocity.

    normalise: divide by the weights' mean over all timesteps, so that uniformly drawn timesteps weigh 1 on average, and
    ``train.gradient_clipping`` and SGD's learning rate keep their meaning.
    huber: c, above which an error counts linearly: 2 c (sqrt(e^2 + c^2) - c) in place of e^2, about e^2 for e << c.
    None: squares.
    """

    def __init__(self, normalise: bool = True, huber: float | None = None):
        if huber is not None and not huber > 0:
            raise ValueError(
                f"model.loss.params.huber={huber}: expected a positive number, or null for squares"
            )
        self.normalise, self.huber = normalise, huber
        self._tables: dict[tuple[int, torch.device], tuple[ZeroSNRSchedule, Tensor]] = {}

    @abstractmethod
    def weight(self, snr: Tensor) -> Tensor:
        """The weight of the velocity's squared error. snr: any shape, float64, from 0 to about 10^3."""

    def __call__(
        self, prediction: Tensor, target: Tensor, t: Tensor, schedule: ZeroSNRSchedule
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As ``loss.v_prediction_loss``; metrics: ``loss/unweighted``, which compares with runs of any weighting."""
        with torch.no_grad():
            unweighted, _ = v_prediction_loss(prediction, target, t, schedule)
        square = (prediction.float() - target.float()).square()
        if self.huber is not None:
            square = 2 * self.huber * ((square + self.huber**2).sqrt() - self.huber)
        per_sample = square.flatten(1).mean(dim=1)  # (B,)
        return (self.table(schedule, t.device)[t] * per_sample).mean(), {"loss/unweighted": unweighted}

    def table(self, schedule: ZeroSNRSchedule, device: torch.device | None = None) -> Tensor:
        """The weight of every timestep: (N,) float32, made once for a schedule and a device."""
        key = (id(schedule), torch.device("cpu") if device is None else device)
        if key not in self._tables:
            signal = schedule.table.double().square()
            weights = self.weight(signal / (1 - signal))
            if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
                raise ValueError(
                    f"model.loss: {type(self).__name__} is not finite and positive at every timestep of this schedule "
                    f"(weights {weights.min():g} to {weights.max():g}): change model.loss.params"
                )
            weights = weights / weights.mean() if self.normalise else weights
            # The schedule is kept, so that its id is not given to another.
            self._tables[key] = schedule, weights.float().to(key[1])
        return self._tables[key][1]


class Constant(WeightedLoss):
    """1: the published loss, with ``huber`` where it is wanted."""

    def weight(self, snr: Tensor) -> Tensor:
        return torch.ones_like(snr)


class MinSNR(WeightedLoss):
    """min(snr, gamma) / (snr + 1)  (Hang et al. 2023, section 3.4: min(snr, gamma) on the error of x0).

    0 at zero SNR: the step from pure noise is not trained by it. gamma: 5 in the paper.
    """

    def __init__(self, gamma: float = 5.0, normalise: bool = True, huber: float | None = None):
        super().__init__(normalise, huber)
        self.gamma = _positive("gamma", gamma)

    def weight(self, snr: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma) / (snr + 1)


class SoftMinSNR(WeightedLoss):
    """snr gamma / (snr + gamma) / (snr + 1): min-SNR without its kink  (Crowson et al. 2024, HDiT; gamma = 4 there)."""

    def __init__(self, gamma: float = 4.0, normalise: bool = True, huber: float | None = None):
        super().__init__(normalise, huber)
        self.gamma = _positive("gamma", gamma)

    def weight(self, snr: Tensor) -> Tensor:
        return snr * self.gamma / (snr + self.gamma) / (snr + 1)


class P2(WeightedLoss):
    """snr / (snr + 1) / (k + snr)^gamma  (Choi et al. 2022: 1 / (k + snr)^gamma on the error of the noise)."""

    def __init__(
        self, k: float = 1.0, gamma: float = 1.0, normalise: bool = True, huber: float | None = None
    ):
        super().__init__(normalise, huber)
        self.k, self.gamma = _positive("k", k), gamma

    def weight(self, snr: Tensor) -> Tensor:
        return snr / (snr + 1) / (self.k + snr) ** self.gamma


class SNRPower(WeightedLoss):
    """snr^k / (snr + 1): snr^k on the error of x0.

    k = 0: the error of the clean sample;  k = 1: that of the noise, the loss of Ho et al. 2020;  between: both.
    """

    def __init__(self, k: float = 0.0, normalise: bool = True, huber: float | None = None):
        super().__init__(normalise, huber)
        if k < 0:
            raise ValueError(
                f"model.loss.params.k={k}: expected at least 0, as snr^k is infinite at zero SNR"
            )
        self.k = k

    def weight(self, snr: Tensor) -> Tensor:
        return snr**self.k / (snr + 1)


class Debiased(WeightedLoss):
    """sqrt(snr) / (snr + 1)  (Yu et al. 2023, "Debias the training of diffusion models": 1 / sqrt(snr) on noise)."""

    def weight(self, snr: Tensor) -> Tensor:
        return snr.sqrt() / (snr + 1)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"model.loss.params.{name}={value}: expected a positive number")
    return value
