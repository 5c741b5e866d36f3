"""How training timesteps are drawn: stratified over all ranks, evenly or with more of some, or independently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """The random streams of one training step (``cogvideox.dist.RandomStreams``)."""

    local: torch.Generator  # differs on every rank
    shared: torch.Generator  # the same draws on every rank
    rank: int
    world_size: int


class StratifiedTimesteps:
    """One timestep from each of K = world_size * batch_size equal strata of [0, N) per step, dealt out at random.

    The global batch covers the noise levels evenly, which lowers the variance of the loss (Kingma et al. 2021,
    VDM, appendix I.1), while each single timestep is uniform on 0 ... N - 1 whatever K is.
    """

    # Upstream v1.0 gives each rank its own interval of [0, 1000) for good, so that a rank's data never meets the
    # other noise levels, and falls back to plain draws for most world sizes. Here the strata are dealt anew each step.

    quantile: Callable[[Tensor], Tensor] | None = None
    # The inverse distribution function of t / N, float64 in [0, 1] -> [0, 1], in classes that are not uniform.

    def sample(self, batch_size: int, rng: Streams, num_timesteps: int) -> Tensor:
        """Timesteps of this rank's items: (batch_size,) int64 in [0, num_timesteps), on the device of ``rng.local``.

        Every rank must call with the same ``batch_size``: ``rng.shared`` deals the strata without communication.
        """
        strata = rng.world_size * batch_size
        dealt = torch.randperm(strata, generator=rng.shared, device=rng.shared.device)
        own = dealt[rng.rank * batch_size : (rng.rank + 1) * batch_size].to(rng.local.device)
        offset = torch.rand(batch_size, generator=rng.local, device=own.device, dtype=torch.float64)
        return timestep_in_stratum(own, offset, strata, num_timesteps, self.quantile)


class LogitNormalTimesteps(StratifiedTimesteps):
    """t / N = sigmoid(mean + std z), z normal  (Esser et al. 2024, SD3, section 3.1): more of the middle.

    mean > 0 moves them towards noise. Stratified as the uniform ones: equal shares of probability.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        if not std > 0:
            raise ValueError(f"model.timesteps.params.std={std}: expected a positive number")
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class ModeTimesteps(StratifiedTimesteps):
    """t / N = 1 - u - scale (cos^2(pi u / 2) - 1 + u)  (SD3, section 3.1).

    scale: -1 to 2 / (pi - 2), where it is monotone; > 0 has more of the middle, < 0 more of the ends, 0 is uniform.
    """

    def __init__(self, scale: float = 1.29):
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"model.timesteps.params.scale={scale}: expected a number from -1 to {2 / (math.pi - 2):.3f}"
            )
        self.scale = scale

    def quantile(self, u: Tensor) -> Tensor:
        u = 1 - u
        return 1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


class UniformTimesteps:
    """Independent timesteps, uniform on 0 ... N - 1."""

    def sample(self, batch_size: int, rng: Streams, num_timesteps: int) -> Tensor:
        """(batch_size,) int64 in [0, num_timesteps), on the device of ``rng.local``."""
        return torch.randint(num_timesteps, (batch_size,), generator=rng.local, device=rng.local.device)


def timestep_in_stratum(
    stratum: Tensor,
    offset: Tensor,
    strata: int,
    num_timesteps: int,
    quantile: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The integer timestep at the real position (stratum + offset) / strata of [0, N), or its quantile.

    stratum: (B,) int64 in [0, strata);  offset: (B,) float64 in [0, 1).  Strata whose borders fall between integers
    share the integer there in proportion, so uniform strata and offsets give uniform timesteps exactly.
    """
    position = (stratum + offset) * num_timesteps / strata
    if quantile is not None:
        position = num_timesteps * quantile((position / num_timesteps).clamp(max=1.0))
    return position.long().clamp_(max=num_timesteps - 1)  # an offset just below 1 may round up to N
