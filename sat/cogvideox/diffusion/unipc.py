"""UniPC: a predictor and a corrector that share one evaluation of the denoiser per step."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def unipc(
    denoise: Denoise,
    x: Tensor,
    schedule: ZeroSNRSchedule,
    *,
    steps: int,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC-2 on the predicted clean sample, with B(h) = e^h - 1 (Zhao et al. 2023, "UniPC"; diffusers calls it bh2).

    The prediction made for a step also corrects the step before it, which reaches third order so. The predictor is
    DPM-Solver++(2M) with the slope of the last two predictions. Deterministic.

    The first step has lambda = -inf. By the limit it is x' = sqrt(1 - a'^2) x + a' D, corrected to the mean of both
    predictions, and the second step's slopes use one point less. The state of the callback is not yet corrected.
    """
    predict = Predictions(denoise, steps)
    x, last, h = state(x), None, math.inf
    for i, t, a, a_next in sampling_steps(schedule, steps):
        x0 = predict(x, t, i)
        if last is not None:
            x = _corrected(last, x0, a)
        if a_next == 1:
            x = x0
        else:
            previous_h, h = h, log_snr(a_next) - log_snr(a)
            base = math.sqrt((1 - a_next**2) / (1 - a**2)) * x - a_next * math.expm1(-h) * x0
            # Without a step before it there is no slope; one from lambda = -inf, of infinite size, makes it 0.
            slope = None if last is None else h * (x0 - last.x0) / previous_h
            x = base if slope is None else base - a_next * math.expm1(-h) / 2 * slope
            last = _Step(base, x0, slope, h, previous_h / h)
        report(callback, i, steps, t, x, x0)
    return predict.settled(x)


@dataclass
class _Step:
    """What the corrector needs of a step."""

    base: Tensor  # the state after it, with the prediction at its start alone
    x0: Tensor  # that prediction
    slope: Tensor | None  # of the predictions before it, over a step of this size
    h: float  # its size in lambda
    ratio: float  # the size of the step before it, in units of h


def _corrected(step: _Step, x0: Tensor, a: float) -> Tensor:
    """UniC: the state after ``step`` again, now with the prediction ``x0`` made there. a: after the step."""
    scale, rise = -a * math.expm1(-step.h), x0 - step.x0
    if step.slope is None:
        return step.base + scale / 2 * rise
    # The weights of Zhao et al., theorem 3.1, for the points -ratio and 1 in units of h, counted from the step's start.
    first = (math.expm1(-step.h) / -step.h - 1) / math.expm1(-step.h)
    second = 2 * ((math.expm1(-step.h) / -step.h - 1) / -step.h - 0.5) / math.expm1(-step.h)
    weight = (first - second) / (step.ratio + 1)
    return step.base + scale * (weight * step.slope + (first - weight) * rise)
