"""A run that starts part of the way: video to video with a strength (SDEdit, Meng et al. 2022, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogvideox.diffusion.schedule import ZeroSNRSchedule


class TailSchedule:
    """The last ``round(strength * steps)`` of ``steps`` sampling steps, as a schedule that samplers run on unchanged.

    >>> tail = TailSchedule(schedule, 50, 0.8)
    >>> x = noised_start(x0, noise(x0), tail)
    >>> sampler(denoise, x, tail, steps=tail.steps, noise=noise)

    strength: 0 ... 1. 1 is the whole run from pure noise, in which nothing of x0 is left; 0 takes no step.
    steps: of the full run.
    ``.steps`` is the number of steps taken, ``.first`` the index of the first of them in the full run, ``.full_steps``
    the argument. Anything else is the base schedule's (``.schedule``). Raises ValueError for
    another strength, and for one above 0 that rounds to no step.
    """

    # diffusers truncates instead of rounding: 50 steps with strength 0.58 (28.999... in floats) are 28 there, 29 here.

    def __init__(self, schedule: ZeroSNRSchedule, steps: int, strength: float):
        if not 0 <= strength <= 1:  # NaN too
            raise ValueError(
                f"strength={strength}: expected a number from 0 (the input as it is) to 1 (from noise)"
            )
        self.schedule, self.full_steps = schedule, steps
        self.steps = round(strength * steps)
        if strength > 0 and self.steps == 0:
            raise ValueError(
                f"strength={strength} of {steps} steps is less than one step: use at least {1 / steps:.2g}, or 0"
            )
        self.first = steps - self.steps

    def alphas(self, steps: int) -> Tensor:
        """sqrt(alpha_cumprod) before, between and after the steps taken: (steps + 1,) float32, the last one 1."""
        self._check(steps)
        return self.schedule.alphas(self.full_steps)[self.first :]

    def timesteps(self, steps: int) -> Tensor:
        """What the network is given at the steps taken: (steps,) int64, descending."""
        self._check(steps)
        return self.schedule.timesteps(self.full_steps)[self.first :]

    def _check(self, steps: int) -> None:
        if steps != self.steps:
            raise ValueError(
                f"steps={steps}: this part of a run of {self.full_steps} steps has {self.steps}; pass tail.steps"
            )

    def __getattr__(self, name: str) -> Any:
        if name == "schedule":  # not set yet, as while copying
            raise AttributeError(name)
        return getattr(self.schedule, name)


def noised_start(x0: Tensor, noise: Tensor, tail: TailSchedule) -> Tensor:
    """The state from which ``tail`` starts: a x0 + sqrt(1 - a^2) noise, with the a of its first step.

    x0, noise: (B, ...). Returns (B, ...), float32 or wider: ``noise`` itself at strength 1, ``x0`` at strength 0.
    """
    if x0.shape != noise.shape:  # they might broadcast
        raise ValueError(
            f"the clip's latents are {tuple(x0.shape)}, the noise is {tuple(noise.shape)}: sample the clip's own "
            f"size and number of frames"
        )
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    alpha = tail.alphas(tail.steps)[0].item()
    return alpha * x0 + (1 - alpha**2) ** 0.5 * noise
