"""Heun's method: second order, two evaluations of the denoiser per step."""

from __future__ import annotations

import math

from torch import Tensor

from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.stepping import Callback, Denoise, Noise, Predictions, report, sampling_steps, state


def heun(
    denoise: Denoise,
    x: Tensor,
    schedule: ZeroSNRSchedule,
    *,
    steps: int,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """An Euler step, then its slope averaged with the one at its end (Karras et al. 2022, EDM, algorithm 1).

    Deterministic; 2 steps - 1 evaluations, at the same timesteps as the other samplers'. EDM's variables are
    s = sqrt(1 - a^2) / a and x / a; its Euler step is DDIM's, and the average adds to it (D' - D) / 2 times
    a' (s / s' - 1), with D and D' the predictions at both ends. From pure noise s is infinite and the average of the
    slopes has no limit; that one step averages them over 1 / s instead, where it is finite: a' (1 - s' / s) = a'.
    """
    x, predict = state(x), Predictions(denoise, steps)
    timesteps = schedule.timesteps(steps)
    for i, t, a, a_next in sampling_steps(schedule, steps):
        x0 = predict(x, t, i)
        sigma, sigma_next = math.sqrt(1 - a**2), math.sqrt(1 - a_next**2)
        keep = sigma_next / sigma
        x = keep * x + (a_next - a * keep) * x0
        if a_next < 1:  # else the step ends at the prediction
            gain = a_next * (sigma * a_next / (a * sigma_next) - 1) if a > 0 else a_next
            x = x + gain / 2 * (predict(x, timesteps[i + 1], i + 1) - x0)
        report(callback, i, steps, t, x, x0)
    return predict.settled(x)
