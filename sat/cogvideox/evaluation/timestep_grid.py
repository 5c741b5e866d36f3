"""The timesteps at which a clip's loss is looked at, and how they are averaged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cogvideox.diffusion.bands import band_names, band_of


@dataclass(frozen=True)
class TimestepGrid:
    """``count`` + 1 fixed timesteps that stand for all N = num_timesteps, in ``bands`` equal bands.

    The timesteps 0 ... N - 2 are cut into ``count`` equal parts, and the middle of each stands for its part; N - 1,
    where zero terminal SNR leaves pure noise, stands for itself. A mean weighs each timestep by what it stands for, so
    that it estimates the mean over a uniform timestep, which is what training minimises.

    What the v-loss means along the way, with x_t = a x0 + s noise and s^2 = 1 - a^2: an error e of the predicted
    velocity is an error s e of the clip and a e of the noise (Salimans & Ho 2022, appendix D). Near t = 0 the loss is
    the error of the noise, most of which is hidden under the clip's own detail; in the middle both count; at N - 1 the
    velocity is -x0, and the loss is the squared distance of the clips to what the caption (or the first frame) alone
    says of them. Their variance given the caption is its floor. Nothing is divided by a or s: the last timestep is as
    finite as the others, and each sampling run begins with it.
    """

    num_timesteps: int
    count: int
    bands: int

    def __post_init__(self) -> None:
        if not self.bands <= self.count < self.num_timesteps:
            raise ValueError(
                f"train.validation_timesteps={self.count}: expected at least train.timestep_bands={self.bands} and "
                f"fewer than the {self.num_timesteps} timesteps of model.schedule"
            )

    @property
    def timesteps(self) -> torch.Tensor:
        """(count + 1,) int64, rising; the last one is N - 1."""
        middles = [(first + after - 1) // 2 for first, after in self._parts()]
        return torch.tensor([*middles, self.num_timesteps - 1])

    @property
    def weights(self) -> np.ndarray:
        """(count + 1,) float64, the share of all timesteps that each stands for; they add up to 1."""
        sizes = [after - first for first, after in self._parts()]
        return np.array([*sizes, 1]) / self.num_timesteps

    def mean(self, losses: np.ndarray) -> np.ndarray:
        """(clips, count + 1) -> (clips,): each clip's mean over the timesteps."""
        return losses @ self.weights

    def by_band(self, losses: np.ndarray) -> dict[str, np.ndarray]:
        """Band -> (clips,), each clip's mean over the timesteps there; and, under its own name, N - 1 alone."""
        band = band_of(self.timesteps, self.num_timesteps, self.bands).numpy()
        names = band_names(self.num_timesteps, self.bands)
        means = {
            name: losses[:, band == k] @ (self.weights[band == k] / self.weights[band == k].sum())
            for k, name in enumerate(names)
        }
        last = f"{self.num_timesteps - 1:0{len(names[0].split('-')[0])}d}"
        return means | {last: losses[:, -1]}

    def _parts(self) -> list[tuple[int, int]]:
        total = self.num_timesteps - 1
        borders = [-(-k * total // self.count) for k in range(self.count + 1)]
        return list(zip(borders[:-1], borders[1:], strict=True))
