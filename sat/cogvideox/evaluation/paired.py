"""Differences between two measurements of the same clips, and how certain they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """mean: of ``after - before`` over the clips.  standard_error: of that mean; None for a single clip."""

    mean: float
    standard_error: float | None

    @property
    def is_worse(self) -> bool:
        """Whether the second is higher by more than two standard errors (about 2.3 % by chance, one-sided)."""
        return self.standard_error is not None and self.mean > 2 * self.standard_error


def paired_difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """The mean of d_i = after_i - before_i and its standard error s_d / sqrt(n), s_d with n - 1.

    before, after: (clips,), the same clips with the same noise, each its mean over the timesteps. The clip is the
    independent unit. Counting its timesteps as samples of their own would take what they share, the clip's content, for
    independent (too small an error), and how much timesteps differ for uncertainty, although they are fixed (too large
    a one). How hard a clip is, and its noise, are in both terms and cancel: the paired error is the smaller one.
    """
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(
            f"pairs of losses were expected, found {before.shape} and {after.shape}: another set of clips"
        )
    d = after - before
    return Difference(math.fsum(d) / len(d), standard_error(d))


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of independent values (n,): s / sqrt(n) with s from n - 1. None for fewer than two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def unpaired_error(before: np.ndarray, after: np.ndarray) -> float | None:
    """What the error of the difference would be were the two sets of clips unrelated: for comparison."""
    errors = standard_error(before), standard_error(after)
    return None if None in errors else math.hypot(*errors)
