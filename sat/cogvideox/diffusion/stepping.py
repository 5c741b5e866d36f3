"""What every sampler does at a step: the contract's types, coefficients as Python floats, the check, the report.

Nothing here waits for the work of the step at hand: a device that computes behind the host is never left idle.
"""

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


class Predictions:
    """``denoise`` as a sampler calls it: in the dtype of the state, and checked.

    predict = Predictions(denoise, steps)
    x0 = predict(x, t, i)        # at step i, as often as the sampler wants
    return predict.settled(x)    # at the end

    Whether a prediction is finite is read when the next one has been queued: reading at once would wait for the device
    and leave it without work, never reading would let the host, and the progress it shows, run steps ahead of it.
    Raises FloatingPointError that names the step.
    """

    def __init__(self, denoise: Denoise, steps: int):
        self._denoise, self._steps = denoise, steps
        self._unread: tuple[_OnHost, int, int] | None = None

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        x0 = self._denoise(x, t).to(x.dtype)
        if x0.is_meta:  # shapes alone: there is nothing to look at
            return x0
        earlier, self._unread = self._unread, (_OnHost(torch.isfinite(x0).all()), step, int(t))
        self._check(earlier)
        return x0

    def settled(self, x: Tensor) -> Tensor:
        """``x``, once the last prediction is known to be finite: here the device is waited for."""
        self._check(self._unread)
        self._unread = None
        return x

    def _check(self, flag: tuple[_OnHost, int, int] | None) -> None:
        if flag is None:
            return
        is_finite, step, t = flag
        if not is_finite.read():
            raise FloatingPointError(
                f"step {step + 1} of {self._steps} (timestep {t}): the predicted latent is not finite. "
                f"In fp16 use bf16 or fp32 instead (sample.precision); otherwise the weights or the input hold NaN"
            )


class _OnHost:
    """A 0-d tensor on its way to the host. ``read`` waits for what was queued before it, and for nothing after it."""

    def __init__(self, value: Tensor):
        self._value, self._arrived = value, None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)


def report(callback: Callback | None, step: int, steps: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
    """Call ``callback``, if there is one, with what a step has done."""
    if callback is not None:
        callback({"step": step, "steps": steps, "t": int(t), "x": x, "denoised": x0})


def log_snr(a: float) -> float:
    """lambda = log(a / sqrt(1 - a^2)), half the log signal-to-noise ratio; -inf for pure noise, inf for clean."""
    if a in (0, 1):
        return -math.inf if a == 0 else math.inf
    return math.log(a / math.sqrt(1 - a**2))
