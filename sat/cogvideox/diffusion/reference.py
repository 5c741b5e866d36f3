"""The trajectory of an inverted clip, run beside the edit of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cogvideox.diffusion.stepping import Callback

Network = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


class ReferenceTrajectory:
    """Records the states of an inversion, then gives each to the network beside the edit's state at its timestep.

    timesteps: at which the edit has a reference; at others, and with none at all, the network is called as it is.
    condition: of the recorded clip, {"tokens": (B, L, D), "concat": (B, T, C, H, W)}.
    attention: entered as ``attention(items)`` around a call whose first ``items`` batch items are the reference.

    States wait in host memory: B latents per timestep. The network keeps nothing from one call to the next.
    """

    def __init__(
        self,
        timesteps: Sequence[int],
        condition: Mapping[str, Tensor],
        attention: Callable[[int], AbstractContextManager[None]],
    ):
        self.timesteps, self.condition, self.attention = frozenset(timesteps), condition, attention
        self.states: dict[int, Tensor] = {}

    def recording(self, callback: Callback | None) -> Callback:
        """The ``callback`` of ``inversion.ddim_invert`` that records, and calls ``callback`` where there is one."""

        def record(step: dict[str, Any]) -> None:
            if step["t"] in self.timesteps:
                self.states[step["t"]] = _on_host(step["x"])
            if callback is not None:
                callback(step)

        return record

    def beside(self, network: Network) -> Network:
        """``network(x, t, condition) -> v`` for the edit: x (B or 2 B, T, C, H, W), one timestep for all of t, which
        lies on the CPU as ``GuidedDenoiser`` gives it."""
        if not self.timesteps:
            return network

        def predict(x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
            state = self.states.get(int(t[0]))
            if state is None:
                return network(x, t, condition)
            items = len(state)
            joined = {key: torch.cat([self.condition[key], value]) for key, value in condition.items()}
            state = state.to(x, non_blocking=True)
            with self.attention(items):
                return network(torch.cat([state, x]), torch.cat([t[:items], t]), joined)[items:]

        return predict


def _on_host(x: Tensor) -> Tensor:
    """``x`` in host memory; of a GPU's the copy is queued there behind the work at hand, as every use of it will be."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
