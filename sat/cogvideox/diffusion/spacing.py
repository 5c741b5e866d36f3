"""Sub-schedules: which of the network's integer timesteps a run of n steps visits.

A spacing is ``(log_snr, steps) -> timesteps``: log_snr (N,) float64, half the log signal-to-noise ratio by timestep,
finite and falling (before the rescale to zero terminal SNR); timesteps (steps,) int64, falling strictly.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import numpy as np

Spacing = Callable[[np.ndarray, int], np.ndarray]

RHO = 7.0  # Karras et al. 2022, EDM, table 1


def trailing(log_snr: np.ndarray, steps: int) -> np.ndarray:
    """Even, from N - 1 downwards, one interval short of 0: the published one."""
    # numpy's linspace, not torch's: the two round differently and the result is truncated.
    return np.linspace(len(log_snr) - 1, 0, steps, endpoint=False).astype(np.int64)


def leading(log_snr: np.ndarray, steps: int) -> np.ndarray:
    """Even, from one interval short of N down to 0: for comparisons. It leaves out N - 1, so that the network is told
    of a little signal where there is pure noise, the flaw that Lin et al. 2024 (section 3.3) found in it."""
    return np.linspace(0, len(log_snr), steps, endpoint=False).astype(np.int64)[::-1].copy()


def linspace(log_snr: np.ndarray, steps: int) -> np.ndarray:
    """Even, with both ends N - 1 and 0."""
    return np.linspace(len(log_snr) - 1, 0, steps).round().astype(np.int64)


def karras(log_snr: np.ndarray, steps: int) -> np.ndarray:
    """Even in s^(1/7), s = sqrt(1 - a^2) / a, with both ends N - 1 and 0 (Karras et al. 2022, eq. 5)."""
    return _even_in(np.exp(-log_snr / RHO), steps)


def uniform_log_snr(log_snr: np.ndarray, steps: int) -> np.ndarray:
    """Even in the log signal-to-noise ratio, with both ends N - 1 and 0."""
    return _even_in(-log_snr, steps)


SPACINGS: dict[str, Spacing] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "log_snr": uniform_log_snr,
}


def spacing_named(name: str) -> Spacing:
    """The spacing called ``name``. Raises ValueError that names the known ones, and the nearest."""
    if name in SPACINGS:
        return SPACINGS[name]
    near = difflib.get_close_matches(str(name), SPACINGS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"model.schedule spacing={name!r}: {hint}expected one of {', '.join(SPACINGS)}")


def _even_in(measure: np.ndarray, steps: int) -> np.ndarray:
    """The timesteps nearest to equal steps of ``measure``, (N,) and rising, from N - 1 to 0; none of them twice."""
    wanted = np.linspace(measure[-1], measure[0], steps)
    timesteps = np.interp(wanted, measure, np.arange(len(measure))).round().astype(np.int64)
    # Where the network has fewer integer timesteps than were asked for, the neighbours below are taken, ...
    order = np.arange(steps)
    timesteps = np.minimum.accumulate(timesteps + order) - order
    return np.maximum(timesteps, order[::-1])  # ... and at the clean end those above.
