"""Timestep bands: equal parts of [0, N), under the names that losses are logged by, such as ``0000-0249``."""

from __future__ import annotations

from torch import Tensor


def band_names(num_timesteps: int, bands: int) -> list[str]:
    """``["0000-0249", ...]``, from clean to noisy: the first and the last timestep of each band.

    Band k holds the timesteps with k N / bands <= t < (k + 1) N / bands, so bands that do not divide N differ by one.
    """
    check_bands(num_timesteps, bands)
    firsts = [-(-k * num_timesteps // bands) for k in range(bands + 1)]  # rounded up
    width = max(4, len(str(num_timesteps - 1)))
    return [
        f"{first:0{width}d}-{after - 1:0{width}d}"
        for first, after in zip(firsts[:-1], firsts[1:], strict=True)
    ]


def band_of(t: Tensor, num_timesteps: int, bands: int) -> Tensor:
    """The band of each timestep: t (...) int64 in [0, num_timesteps) -> (...) int64 in [0, bands), on t's device."""
    check_bands(num_timesteps, bands)
    return t * bands // num_timesteps


def check_bands(num_timesteps: int, bands: int) -> None:
    """ValueError for a number of bands that leaves one without a timestep."""
    if not 1 <= bands <= num_timesteps:
        raise ValueError(
            f"train.timestep_bands={bands}: expected 1 to {num_timesteps}, the timesteps of model.schedule"
        )
