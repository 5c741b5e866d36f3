"""Samplers: from noise to a clean latent in a number of steps, given a denoiser.

Here are the published ones; ``heun``, ``ancestral``, ``dpm`` and ``unipc`` have others, ``names`` lists them all.

One contract: ``sampler(denoise, x, schedule, *, steps, noise, callback=None) -> x0``

* ``denoise(x, t) -> x0`` predicts the clean sample; ``t`` is a timestep of ``schedule.timesteps(steps)``, a 0-d int64
  tensor on the CPU. ``diffusion.denoiser.GuidedDenoiser`` makes one from a network.
* ``x`` is (B, ...) standard normal noise. The state is float32, or float64 where ``x`` is.
* ``noise(x)`` is the next random draw, shaped like ``x``; see ``noise_source``. Which draws happen is part of a seeded
  trajectory. ``ddim`` and ``dpmpp_2m`` draw nothing and take it only to be interchangeable.
* ``callback(dict(step=i, steps=n, t=t, x=x, denoised=x0))`` after every step, ``x`` being the new state.
* A prediction with a NaN or an infinity raises FloatingPointError that names the step (``stepping.Predictions``).

``schedule`` needs ``alphas(steps)`` and ``timesteps(steps)``: a ``ZeroSNRSchedule``, or a part of one, ``partial``. In
the formulas a is sqrt(alpha_cumprod), so that x_t = a x0 + sqrt(1 - a^2) noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
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


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: ZeroSNRSchedule,
    *,
    steps: int,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Deterministic first-order steps (Song et al. 2021, eq. 12 with eta = 0). Upstream: VideoDDIMSampler.

    The remaining noise is kept and scaled; the last step returns the prediction itself.
    """
    x, predict = state(x), Predictions(denoise, steps)
    for i, t, a, a_next in sampling_steps(schedule, steps):
        x0 = predict(x, t, i)
        keep = math.sqrt((1 - a_next**2) / (1 - a**2))
        x = keep * x + (a_next - a * keep) * x0
        report(callback, i, steps, t, x, x0)
    return predict.settled(x)


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    schedule: ZeroSNRSchedule,
    *,
    steps: int,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), deterministic (Lu et al. 2022, algorithm 2). Upstream: VPODEDPMPP2MSampler."""
    predict = Predictions(denoise, steps)
    x, previous_x0, previous_h = state(x), None, math.inf
    for i, t, a, a_next in sampling_steps(schedule, steps):
        x0 = predict(x, t, i)
        if a_next == 1:
            x = x0
        else:
            h = log_snr(a_next) - log_snr(a)
            target = _extrapolate(x0, previous_x0, h, previous_h)
            x = math.sqrt((1 - a_next**2) / (1 - a**2)) * x - a_next * math.expm1(-h) * target
            previous_x0, previous_h = x0, h
        report(callback, i, steps, t, x, x0)
    return predict.settled(x)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    schedule: ZeroSNRSchedule,
    *,
    steps: int,
    noise: Noise,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) with fresh noise in every step (Lu et al. 2022, SDE-DPM-Solver++(2M), appendix). The published
    sampler ("DPM++ 2M SDE"; upstream: VPSDEDPMPP2MSampler, diffusers: CogVideoXDPMScheduler).

    Draws: one in the first step, two in each later one of which the second is used, none in the last.
    """
    predict = Predictions(denoise, steps)
    x, previous_x0, previous_h = state(x), None, math.inf
    for i, t, a, a_next in sampling_steps(schedule, steps):
        x0 = predict(x, t, i)
        if a_next == 1:
            x = x0
        else:
            h = log_snr(a_next) - log_snr(a)
            target = _extrapolate(x0, previous_x0, h, previous_h)
            if i > 0:
                noise(x)  # Upstream draws for a first-order step that it then discards: seeds depend on it.
            sigma_next = math.sqrt(1 - a_next**2)
            x = (
                sigma_next / math.sqrt(1 - a**2) * math.exp(-h) * x
                - a_next * math.expm1(-2 * h) * target
                + sigma_next * math.sqrt(-math.expm1(-2 * h)) * noise(x)
            )
            previous_x0, previous_h = x0, h
        report(callback, i, steps, t, x, x0)
    return predict.settled(x)


def noise_source(seeds: Sequence[int], device: torch.device | str | None = None) -> Noise:
    """A ``noise(x)`` in which item i of the batch draws from a CPU generator of its own, seeded with ``seeds[i]``.

    An item therefore gets the same numbers alone, in any batch, and on any device. The starting noise is the first
    draw: ``x = noise(torch.empty(shape))``. Draws are float32, then moved to ``device`` (None: the device of ``x``) and
    cast to the dtype of ``x``.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(x: Tensor) -> Tensor:
        if len(x) != len(generators):
            raise ValueError(
                f"noise for a batch of {len(x)} was asked of {len(generators)} seeds: give one seed per item"
            )
        target = x.device if device is None else torch.device(device)
        # From pinned memory, as any other copy to a GPU may wait for what was queued there before it.
        draws = torch.empty(x.shape, dtype=torch.float32, pin_memory=target.type == "cuda")
        for item, generator in zip(draws, generators, strict=True):
            torch.randn(x.shape[1:], generator=generator, out=item)
        return draws.to(device=target, dtype=x.dtype, non_blocking=True)

    return noise


def _extrapolate(x0: Tensor, previous_x0: Tensor | None, h: float, previous_h: float) -> Tensor:
    """Second-order estimate of x0 over a step of size h, from this prediction and the one a step of previous_h before.

    The first step comes from lambda = -inf, so the second has previous_h = inf: by the limit it is first order.
    """
    if previous_x0 is None:
        return x0
    slope = h / (2 * previous_h)
    return (1 + slope) * x0 - slope * previous_x0
