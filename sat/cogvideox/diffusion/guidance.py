"""How strong the classifier-free guidance is at each sampling step.

A guidance is any callable ``(step_index, t, steps) -> float``: the 0-based index of the sampling step, the timestep
0..999 that the network is given there, and the number of steps. With its scale s, x0 = u + s (c - u), where u and c
are the unconditional and the conditional prediction (Ho & Salimans 2022): 1 is no guidance, and the unconditional
prediction is then not computed.

A guidance may also have ``combine(unconditional, conditional, scale) -> guided``: another formula than the one above,
on the network's outputs (velocities), (B, ...) and float32 or wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ConstantGuidance:
    """The same scale at every step."""

    scale: float = 6.0

    def __call__(self, step_index: int, t: int, steps: int) -> float:
        return float(self.scale)


@dataclass(frozen=True)
class DynamicTimestepGuidance:
    """Published "dynamic CFG" to the letter: 1 + scale (1 - cos(pi ((steps - t) / steps)^exponent)) / 2.

    It mixes units, a number of steps with a timestep of 0..999, so the scale jumps between 1 and 1 + scale from step
    to step (50 steps, scale 6: 2.29, 2.54, 6.97, 6.42, 2.79 ...). SAT and diffusers both do this, and the published
    samples were made with it: for reproducing them. ``DynamicStepGuidance`` is the smooth ramp that was meant.
    """

    scale: float = 6.0
    exponent: int = 5

    def __post_init__(self) -> None:
        if self.exponent != int(self.exponent):  # the base is negative for t > steps
            raise ValueError(f"guidance exponent={self.exponent}: the published form needs a whole number")

    def __call__(self, step_index: int, t: int, steps: int) -> float:
        return _power_cosine((steps - int(t)) / steps, self.scale, self.exponent)


@dataclass(frozen=True)
class DynamicStepGuidance:
    """Power-cosine ramp over the steps done: 1 + scale (1 - cos(pi (step_index / steps)^exponent)) / 2.

    It starts at 1, where the noise leaves nothing to guide, and rises towards 1 + scale (Gao et al. 2023, MDT,
    section 4). In the published formula, ``steps - t`` stands for the steps done.
    """

    scale: float = 6.0
    exponent: float = 5

    def __call__(self, step_index: int, t: int, steps: int) -> float:
        return _power_cosine(step_index / steps, self.scale, self.exponent)


@dataclass(frozen=True)
class IntervalGuidance:
    """``scale`` at timesteps low <= t <= high, 1 at the others, which then cost half (Kynkäänniemi et al. 2024,
    "Applying guidance in a limited interval improves sample and distribution quality in diffusion models").

    low, high: timesteps, 0 (clean) ... 999 (pure noise); the paper bounds the noise level, which rises with t.
    """

    scale: float = 6.0
    low: int = 0
    high: int = 999

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"guidance low={self.low}, high={self.high}: expected timesteps with 0 <= low <= high"
            )

    def __call__(self, step_index: int, t: int, steps: int) -> float:
        return float(self.scale) if self.low <= int(t) <= self.high else 1.0


@dataclass(frozen=True)
class RescaledGuidance:
    """The same scale at every step, with the contrast of the conditional prediction (Lin et al. 2024, section 3.4).

    Large scales with zero terminal SNR overexpose. The guided output is scaled to the standard deviation, over each
    item, of the conditional one, and mixed with itself: factor 0 is ``ConstantGuidance``, 1 is the rescaled one alone.
    """

    scale: float = 7.5
    factor: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1:
            raise ValueError(f"guidance factor={self.factor}: expected a number from 0 to 1")

    def __call__(self, step_index: int, t: int, steps: int) -> float:
        return float(self.scale)

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Eq. 13 to 16: (B, ...) each -> (B, ...)."""
        guided = unconditional + scale * (conditional - unconditional)
        items = list(range(1, guided.ndim))
        ratio = conditional.std(items, keepdim=True) / guided.std(items, keepdim=True)
        return (self.factor * ratio + 1 - self.factor) * guided


def _power_cosine(fraction: float, scale: float, exponent: float) -> float:
    # Python floats on purpose: with timesteps the angle reaches 1e7, where float32 knows the cosine no more.
    return 1 + scale * (1 - math.cos(math.pi * fraction**exponent)) / 2
