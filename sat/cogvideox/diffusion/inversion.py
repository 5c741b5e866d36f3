"""DDIM inversion: the noise from which ``samplers.ddim`` makes a given latent."""

from __future__ import annotations

import math

from torch import Tensor

from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.stepping import Callback, Denoise, Predictions, report, sampling_steps, state


def ddim_invert(
    denoise: Denoise,
    x0: Tensor,
    schedule: ZeroSNRSchedule,
    *,
    steps: int,
    iterations: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """The noise x for which ``ddim(denoise, x, schedule, steps=steps)`` is close to ``x0`` (B, ...).

    A DDIM step takes x at alpha a to  x' = k x + (a' - a k) D(x, t),  k = sqrt((1 - a'^2) / (1 - a^2)). Its inverse
    needs D at the x that it looks for:  x = (x' - (a' - a k) D(x, t)) / k  is solved by fixed-point iteration
    (Pan et al. 2023, "Effective real image editing with accelerated iterative diffusion inversion"), starting from the
    D of the inversion's step before.

    iterations: evaluations of ``denoise`` per step. 1 reconstructs with an error that falls with the square of the
    number of steps; more make it exact where ``denoise`` is a mild enough function of x (guidance is 1).
    callback: after every step, with ``step`` counted from the clean side and ``x`` the state at the timestep ``t``:
    the trajectory by timestep is what an editing run takes as its reference.

    The ends: DDIM's last step, to a' = 1, returns D(x, t), which has lost its noise (k = 0). Its inverse is the x with
    D(x, t) = x0, by x + a (x0 - D(x, t)) from x = x0. At zero terminal SNR, a = 0, the step above is regular: it is
    written in D, as the noise that the network predicts there is the state itself and would end one step early.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: expected at least 1 evaluation per step")
    x, predict = state(x0), Predictions(denoise, steps)
    target, prediction = x, None
    for done, (i, t, a, a_next) in enumerate(reversed(list(sampling_steps(schedule, steps)))):
        keep = math.sqrt((1 - a_next**2) / (1 - a**2))
        gain = a_next - a * keep
        known = x  # the state after this step
        if keep > 0:
            x = (known - gain * prediction) / keep
        for _ in range(iterations):
            prediction = predict(x, t, i)
            x = (known - gain * prediction) / keep if keep > 0 else x + a * (target - prediction)
        report(callback, done, steps, t, x, prediction)
    return predict.settled(x)
