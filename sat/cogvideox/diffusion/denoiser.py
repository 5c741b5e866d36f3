"""The denoiser that samplers call: a v-prediction network with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cogvideox.diffusion.partial import TailSchedule
from cogvideox.diffusion.schedule import ZeroSNRSchedule


class GuidedDenoiser:
    """``denoise(x, t) -> x0`` from ``network(x, t, condition) -> v``.

    network: takes x (B, T, C, H, W), t (B,) int64 on the CPU, all the same, so that whoever needs its value does not
        wait for a device, and a condition, {"tokens": (B, L, D), "concat": (B, T, C, H, W)}.
    steps: of the sampling run, so that the guidance knows how far it is. With a ``TailSchedule`` it is told of the full
        run: its step index and its number of steps.
    guidance: ``(step_index, t, steps) -> scale``, see ``diffusion.guidance``.
    cond, uncond: the two conditions, with the same keys and shapes. A negative prompt is an ``uncond``.

    Both predictions come from one call with the batch [uncond, cond]. A step whose scale is 1 asks for the conditional
    half alone: u + 1 (c - u) is c.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor],
        schedule: ZeroSNRSchedule,
        steps: int,
        guidance: Callable[[int, int, int], float],
        cond: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor],
    ):
        shapes = [{key: tuple(value.shape) for key, value in c.items()} for c in (uncond, cond)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"unconditional and conditional inputs differ: {shapes[0]} and {shapes[1]}; guidance needs the same "
                f"keys and shapes"
            )
        if isinstance(schedule, TailSchedule):  # the guidance counts the steps of the full run
            steps, schedule = schedule.full_steps, schedule.schedule
        self.network, self.schedule, self.steps, self.guidance = network, schedule, steps, guidance
        self.cond = dict(cond)
        self.both = {key: torch.cat([uncond[key], cond[key]]) for key in cond}
        self._step_of = {t: i for i, t in enumerate(schedule.timesteps(steps).tolist())}
        self._alphas = schedule.alphas(steps)

    def __call__(self, x: Tensor, t: int | Tensor) -> Tensor:
        """The guided prediction of the clean sample: x (B, ...) -> (B, ...), float32 or wider."""
        t = int(t)
        if t not in self._step_of:
            raise ValueError(
                f"timestep {t} is none of the {self.steps} sampling steps: {sorted(self._step_of)}"
            )
        step = self._step_of[t]
        # The published denoiser snaps the sampler's value to the training table, the sampler itself does not.
        alpha = self.schedule.quantise(self._alphas[step])[1].item()
        scale = self.guidance(step, t, self.steps)
        if scale == 1:
            return self.schedule.predict_x0(self._velocity(x, t, self.cond), x, alpha)
        velocities = self._velocity(torch.cat([x, x]), t, self.both)
        if hasattr(self.guidance, "combine"):
            guided = self.guidance.combine(*velocities.chunk(2), scale)
            return self.schedule.predict_x0(guided, x, alpha)
        # As published, the predictions of x0 are combined: the same up to rounding.
        both = self.schedule.predict_x0(velocities, torch.cat([x, x]), alpha)
        unconditional, conditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def _velocity(self, x: Tensor, t: int, condition: Mapping[str, Tensor]) -> Tensor:
        v = self.network(x, torch.full((len(x),), t), condition)
        return v.to(torch.promote_types(x.dtype, torch.float32))
