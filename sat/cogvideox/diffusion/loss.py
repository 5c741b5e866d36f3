"""The training loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cogvideox.diffusion.schedule import ZeroSNRSchedule


def v_prediction_loss(
    prediction: Tensor, target: Tensor, t: Tensor, schedule: ZeroSNRSchedule
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the velocity, the mean over samples of the mean over elements.

    prediction: the network's output;  target: ``schedule.velocity(x0, noise, t)``; both (B, T, C, H, W).
    t: (B,) int64, unused here, as every timestep has the same weight.
    Returns (loss, {}), the loss 0-d float32.

    It equals the published mean(1 / (1 - a^2) (x0_predicted - x0)^2): the 1 / (1 - a^2) cancels the factor with which
    a velocity enters x0, and unlike the published order of operations nothing is divided by 1 - a^2 -> 0.
    """
    if prediction.shape != target.shape:  # they might broadcast
        raise ValueError(
            f"the network predicts {tuple(prediction.shape)}, the target is {tuple(target.shape)}"
        )
    return (prediction.float() - target.float()).square().mean(), {}


def losses_by_item(
    loss: Callable[..., tuple[Tensor, Any]],
    prediction: Tensor,
    target: Tensor,
    t: Tensor,
    schedule: ZeroSNRSchedule,
) -> Tensor:
    """``loss`` of each item alone: (B, ...), (B, ...) and (B,) -> (B,). Works for any loss of the contract above."""
    items = zip(prediction.split(1), target.split(1), t.split(1), strict=True)
    return torch.stack([loss(*item, schedule)[0] for item in items])
