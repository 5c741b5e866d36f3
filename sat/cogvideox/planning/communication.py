"""What the ranks of a training run send each other in a step, and how long that takes: closed forms.

Volumes are bytes that one rank sends, for ring algorithms over N ranks (Thakur et al. 2005): reduce-scatter and
all-gather of V bytes (N - 1) / N V each, an all-reduce both.  Stages are those of ZeRO (Rajbhandari et al. 2020) as
DeepSpeed 0.19 does them: ZeRO-1 and 2 all-reduce buckets of gradients (``use_multi_rank_bucket_allreduce``) and gather
the updated weights, which is 3 V where a reduce-scatter would make it 2 V.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogvideox.gpus import GPU
from cogvideox.planning.states import Method

NETWORK_GB_S = 50.0
"""One network card of 400 Gb/s, in each direction."""

EFFICIENCY = 0.8
"""Of the links' rate that large collectives reach (estimate; NCCL's tests give 75 to 90 % of the sheet's)."""


UNHIDDEN = 0.1
"""Part of the communication behind computation that is waited for anyway (estimate): first and last bucket."""


@dataclass(frozen=True)
class Cluster:
    """gpus_per_node: ranks of a machine.  cards_per_node: network cards; None: one per GPU."""

    gpu: GPU
    gpus_per_node: int = 8
    cards_per_node: int | None = None
    network_gb_s: float = NETWORK_GB_S

    def bus_bytes_per_second(self, ranks: int) -> float:
        """Rate of one rank in a ring over ``ranks``.

        A ring that leaves the machine crosses each card of it once, and NCCL lays one ring through each card: together
        they move what the cards can, but never more than the links inside.
        """
        if ranks <= self.gpus_per_node:
            return EFFICIENCY * self.gpu.link_gb_s * 1e9
        cards = self.gpus_per_node if self.cards_per_node is None else self.cards_per_node
        return EFFICIENCY * min(self.gpu.link_gb_s, cards * self.network_gb_s) * 1e9


def step_volumes(m: Method) -> dict[str, float]:
    """Bytes that a rank sends per optimizer step, by collective."""
    share = (m.ranks - 1) / m.ranks
    trained = m.trained * m.size
    if m.stage == 3:
        # The weights for the forward pass and again for the backward, trained or not; each in every micro-step.
        weights = trained + m.frozen * m.size
        return {
            "all-gather of weights": 2 * m.accumulation * share * weights,
            "reduce-scatter of gradients": m.accumulation * share * trained,
        }
    # ZeRO-2 reduces in every micro-step, to keep only its part; the others once.
    times = m.accumulation if m.stage == 2 else 1
    volumes = {"all-reduce of gradients": 2 * times * share * trained}
    if m.stage:
        volumes["all-gather of weights"] = share * trained
    return volumes


def seconds(m: Method, cluster: Cluster) -> dict[str, float]:
    """The collectives of ``step_volumes`` one after the other, nothing hidden behind computation."""
    rate = cluster.bus_bytes_per_second(m.ranks)
    return {name: volume / rate for name, volume in step_volumes(m).items()}


def exposed_seconds(m: Method, cluster: Cluster, forward: float, backward: float) -> float:
    """What of them a step waits for. forward, backward: seconds of computation in one optimizer step.

    Gradients are reduced behind the backward pass (``overlap_comm``), ZeRO-3's weights gathered behind both passes; the
    updated weights of ZeRO-1 and 2 are gathered when nothing else runs.
    """
    times = seconds(m, cluster)
    gathered = 0.0 if m.stage == 3 else times.pop("all-gather of weights", 0.0)
    behind = sum(times.values())
    room = (forward + backward if m.stage == 3 else backward) if m.overlaps else 0.0
    return gathered + max(behind - room, UNHIDDEN * behind)
