"""DPM-Solver++ with three points. Those with two, which the published models use, are in ``samplers``."""

from __future__ import annotations

import math

from torch import Tensor

from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.stepping import (
    Callback,
    Denoise,
    Noise,
    Predictions,
    log_snr,
    report,
    sampling_steps,
    state,
)


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    schedule: ZeroSNRSchedule,
    *,
    steps: int,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 1.0,
) -> Tensor:
    """DPM-Solver++(3M) with fresh noise in every step: k-diffusion's "DPM++ 3M SDE".

    The prediction is extrapolated through the last three, as a polynomial in lambda = log(a / sqrt(1 - a^2)), and
    integrated exactly against the linear part (Lu et al. 2022, "DPM-Solver++", appendix A; the SDE, section 5).

    eta: 0 ... 1, how much noise. 0 draws nothing: the deterministic DPM-Solver++(3M).
    Draws: one in each step but the last. The first step has lambda = -inf: by the limit, nothing of the starting noise
    is left after it (at eta 0 all is), and no slope goes back to it: the next step is of first order, as it is, and
    the number of points rises from there.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler eta={eta}: expected a number from 0 (deterministic) to 1")
    predict = Predictions(denoise, steps)
    x, past = state(x), []  # (step size, prediction) of the last two steps, newest first
    for i, t, a, a_next in sampling_steps(schedule, steps):
        x0 = predict(x, t, i)
        if a_next == 1:
            x = x0
        else:
            h = log_snr(a_next) - log_snr(a)
            sigma, sigma_next = math.sqrt(1 - a**2), math.sqrt(1 - a_next**2)
            fresh = eta * h if eta > 0 else 0.0  # h may be infinite
            x = sigma_next / sigma * math.exp(-fresh) * x + a_next * _integral(x0, past, h, (1 + eta) * h)
            if eta > 0:
                x = x + sigma_next * math.sqrt(-math.expm1(-2 * fresh)) * noise(x)
            past = [(h, x0), *past[:1]]
        report(callback, i, steps, t, x, x0)
    return predict.settled(x)


def _integral(x0: Tensor, past: list[tuple[float, Tensor]], h: float, decay: float) -> Tensor:
    """(1 - e^-decay) x0 plus what the slope and the curvature of the prediction add over a step of size h.

    A step of infinite size in ``past`` (the first one, from pure noise) has no slope: the order is one lower.
    """
    total = -math.expm1(-decay) * x0
    known = [(size / h, x) for size, x in past if size < math.inf]
    if not known:
        return total
    (r0, x1), phi_2 = known[0], math.expm1(-decay) / decay + 1
    slope = (x0 - x1) / r0
    if len(known) == 1:
        return total + phi_2 * slope
    (r1, x2), phi_3 = known[1], phi_2 / decay - 0.5
    # Half the weight of an exact quadratic, as in the authors' code, k-diffusion and diffusers, so of second order in
    # the end. The full weight has a smaller error in the middle of a run, and a larger one from pure noise.
    bend = (slope - (x1 - x2) / r1) / (r0 + r1)
    return total + phi_2 * (slope + r0 * bend) - phi_3 * bend
