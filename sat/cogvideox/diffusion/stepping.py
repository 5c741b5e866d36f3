"""What every sampler does at a step: the contract's types, coefficients as Python floats, the check, the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cogvideox.diffusion.schedule import ZeroSNRSchedule

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]
Callback = Callable[[dict[str, Any]], None]


def sampling_steps(schedule: ZeroSNRSchedule, steps: int) -> Iterator[tuple[int, Tensor, float, float]]:
    """(step index, timestep, a before the step, a after it), from noise (a = 0) to clean (a = 1).

    Coefficients are then computed from Python floats: once per step, exact, and without touching the device.
    """
    alphas = schedule.alphas(steps).tolist()
    for i, t in enumerate(schedule.timesteps(steps)):
        yield i, t, alphas[i], alphas[i + 1]


def state(x: Tensor) -> Tensor:
    """``x`` in the dtype of a sampler's state: float32, or float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def predict(denoise: Denoise, x: Tensor, t: Tensor, step: int, steps: int) -> Tensor:
    """``denoise(x, t)`` in the dtype of ``x``. Raises FloatingPointError naming the step if it is not finite."""
    x0 = denoise(x, t).to(x.dtype)
    if not torch.isfinite(x0).all():
        raise FloatingPointError(
            f"step {step + 1} of {steps} (timestep {int(t)}): the predicted latent is not finite. "
            f"In fp16 use bf16 or fp32 instead (sample.precision); otherwise the weights or the input hold NaN"
        )
    return x0


def report(callback: Callback | None, step: int, steps: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
    """Call ``callback``, if there is one, with what a step has done."""
    if callback is not None:
        callback({"step": step, "steps": steps, "t": int(t), "x": x, "denoised": x0})


def log_snr(a: float) -> float:
    """lambda = log(a / sqrt(1 - a^2)), half the log signal-to-noise ratio; -inf for pure noise, inf for clean."""
    if a in (0, 1):
        return -math.inf if a == 0 else math.inf
    return math.log(a / math.sqrt(1 - a**2))
