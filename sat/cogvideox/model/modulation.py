"""The adaLN modulations of a whole sampling run, computed once.

They depend on the timestep alone, and a sampling run knows all of its timesteps before it starts. The table of 50
steps takes 0.07 GB (2B) or 0.16 GB (5B); the linear layers that make it take 0.71 or 1.59 GB and are not read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cogvideox.model.adaln import ExpertAdaLN
from cogvideox.model.final_layer import FinalLayer

if TYPE_CHECKING:
    from cogvideox.model.transformer import ExpertTransformer


@dataclass(frozen=True)
class Modulations:
    """What every adaLN layer adds and multiplies at ``n`` timesteps.

    timesteps: n numbers;  ofs: the one ``ofs`` they were computed with;  layers: (layers, n, 12 D);  final: (n, 2 D).
    """

    timesteps: tuple[float, ...]
    ofs: float | None
    layers: Tensor
    final: Tensor

    def at(
        self, timesteps: Tensor, ofs: Tensor | float | None, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The mixins' arguments for timesteps (B,): ``modulations`` (layers, B or 1, 12 D), ``final_modulation``.

        timesteps, ofs: read here, which waits for their device, unless that is the CPU.
        ValueError for a timestep or an ``ofs`` that is not in the table.
        """
        wanted = dict.fromkeys(timesteps.reshape(-1).tolist())
        if unknown := [t for t in wanted if t not in self.timesteps]:
            raise ValueError(
                f"timestep {unknown[0]:g} is none of the {len(self.timesteps)} whose modulations were precomputed: "
                "precompute_modulations needs every timestep of the run"
            )
        if _one_number(ofs) != self.ofs:
            raise ValueError(
                f"ofs={_one_number(ofs)}, but the modulations were precomputed with ofs={self.ofs}"
            )
        if len(wanted) == 1:  # a sampler's batch shares its timestep: one row serves all
            rows = [self.timesteps.index(next(iter(wanted)))]
        else:
            rows = [self.timesteps.index(t) for t in timesteps.reshape(-1).tolist()]
        layers = self.layers[:, rows[0] : rows[0] + 1] if len(rows) == 1 else self.layers[:, rows]
        final = self.final[rows[0] : rows[0] + 1] if len(rows) == 1 else self.final[rows]
        return {"modulations": layers.to(device), "final_modulation": final.to(device)}

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes + self.final.nbytes


def has_modulations(net: ExpertTransformer) -> bool:
    """Whether its modulations can be computed ahead: its adaLN and its final layer are those of this project."""
    adaln, final = net.mixins["adaln_layer"], net.mixins["final_layer"]
    return isinstance(adaln, ExpertAdaLN) and isinstance(final, FinalLayer)


@torch.no_grad()
def precompute_modulations(
    net: ExpertTransformer, timesteps: Tensor | Sequence[float], ofs: Tensor | float | None = None
) -> Modulations:
    """Modulations of ``timesteps`` (n,), one after the other, so that they are those of a batch of one bit for bit.

    ofs: one number for all, where the network has that input. The linear layers are called one by one, each for all
    timesteps: where their weights are streamed to the device, once per run.
    """
    adaln, final = net.mixins["adaln_layer"], net.mixins["final_layer"]
    if not has_modulations(net):
        raise ValueError(
            f"modulations of {type(adaln).__name__} and {type(final).__name__} cannot be precomputed: "
            "model.transformer.adaln and final_layer must be ExpertAdaLN and FinalLayer"
        )
    ofs = _one_number(ofs)
    known = torch.as_tensor(timesteps).reshape(-1)
    embeddings = [net.embed_time(t[None], ofs) for t in known]

    def table(linear: torch.nn.Module) -> Tensor:
        return torch.cat([linear(emb) for emb in embeddings])

    layers = torch.stack([table(linear) for linear in adaln.adaLN_modulations])
    values = tuple(float(t) for t in known.tolist())
    return Modulations(values, ofs, layers, table(final.adaLN_modulation))


def _one_number(ofs: Tensor | float | None) -> float | None:
    if ofs is None:
        return None
    values = set(torch.as_tensor(ofs, dtype=torch.float32).reshape(-1).tolist())
    if len(values) != 1:
        raise ValueError(
            f"ofs has the values {sorted(values)}: precomputed modulations hold one for the whole batch"
        )
    return values.pop()
