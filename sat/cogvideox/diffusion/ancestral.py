"""Euler's method with fresh noise in every step."""

from __future__ import annotations

import math

from torch import Tensor

from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.stepping import Callback, Denoise, Noise, Predictions, report, sampling_steps, state


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    schedule: ZeroSNRSchedule,
    *,
    steps: int,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 1.0,
    repeats: int = 1,
) -> Tensor:
    """DDIM with eta (Song et al. 2021, eq. 12 and 16): k-diffusion's "Euler a".

    With s = sqrt(1 - a^2) / a and primes after the step, x' / a' = D + s_down eps + s_up n, where
    s_up = eta s' sqrt(1 - (s' / s)^2) is fresh noise and s_down^2 = s'^2 - s_up^2; at pure noise s' / s = 0.

    eta: 0 ... 1. 1 is the ancestral sampling of Ho et al. 2020; 0 draws nothing and is ``ddim``.
    repeats: how often each step but the last is made, with fresh noise back to its start in between (Lugmayr et al.
    2022, "RePaint", algorithm 1). With a ``KeepRegion`` the rest comes to fit the kept region, at that many times the
    cost; without one it changes nothing that matters.
    Draws: one in each step but the last, and two in each repetition.
    """
    if repeats < 1:
        raise ValueError(f"sampler repeats={repeats}: expected at least 1")
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler eta={eta}: expected a number from 0 (deterministic) to 1 (ancestral)")
    x, predict = state(x), Predictions(denoise, steps)
    for i, t, a, a_next in sampling_steps(schedule, steps):
        sigma, sigma_next = math.sqrt(1 - a**2), math.sqrt(1 - a_next**2)
        up = eta * sigma_next * math.sqrt(1 - (sigma_next * a / (a_next * sigma)) ** 2)
        keep = math.sqrt(sigma_next**2 - up**2) / sigma
        for repetition in range(repeats if a_next < 1 else 1):
            if repetition > 0:
                back = a / a_next
                x = back * x + math.sqrt(sigma**2 - (back * sigma_next) ** 2) * noise(x)
            x0 = predict(x, t, i)
            x = keep * x + (a_next - a * keep) * x0
            if up > 0:
                x = x + up * noise(x)
        report(callback, i, steps, t, x, x0)
    return predict.settled(x)
