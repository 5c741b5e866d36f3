"""Bytes of weights, masters, gradients and optimizer states on one GPU, as DeepSpeed's ZeRO holds them.

The figures follow DeepSpeed 0.19's code and are counted on the real engine (tests/test_planned_states.py).
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP_ELEMENTS = 200_000_000
"""The engine's (``engine.param_groups``): ZeRO-1 and 2 update one group at a time, with its gradient in fp32."""

BUCKET_ELEMENTS = 100_000_000
"""The engine's largest bucket for the reduction of gradients."""

GATHERED_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps up to so many gathered weights (DeepSpeed's ``stage3_max_live_parameters``)."""


@dataclass(frozen=True)
class Method:
    """How a run updates its weights.

    trained, frozen: parameters.  size: bytes of a weight.  states: bytes of optimizer state per trained
    parameter (AdamW 8).  temporaries: bytes per parameter that the optimizer needs while it updates (torch's AdamW 8,
    counted one tensor at a time; fused 0).  shadow: bytes of averaged weights per trained parameter (EMA 4).
    """

    trained: int
    frozen: int
    size: int
    states: float
    temporaries: float
    stage: int
    ranks: int = 1
    offload: bool = False
    accumulation: int = 1
    bucket: int = BUCKET_ELEMENTS
    overlaps: bool = True
    shadow: int = 0

    def on_gpu(self, elements: float, from_stage: int) -> float:
        """A rank's share of ``elements`` that ZeRO divides from ``from_stage`` on."""
        return elements / (self.ranks if self.stage >= from_stage else 1)


def resident(m: Method) -> dict[str, float]:
    """What lives all the time."""
    kept = 0.0 if m.offload else 1.0
    return {
        "weights": m.on_gpu(m.trained + m.frozen, 3) * m.size,
        # ZeRO keeps its own fp32 copy of what it updates, in fp32 runs too.
        "fp32 masters": kept * m.on_gpu(m.trained, 1) * 4 if m.stage or m.size < 4 else 0.0,
        "optimizer states": kept * m.on_gpu(m.trained, 1) * m.states,
        "averaged weights (EMA)": m.trained * m.shadow / m.ranks,
    }


def on_host(m: Method) -> float:
    """Host memory of a rank with the optimizer offloaded: masters, states, fp32 gradients and a copy of the weights."""
    return m.on_gpu(m.trained, 1) * (4 + m.states + 4 + m.size) if m.offload else 0.0


def gradients(m: Method) -> float:
    """All gradients of this rank, after a backward pass."""
    if m.offload and m.stage >= 2:
        return 0.0  # each goes to the host when it is reduced
    return m.on_gpu(m.trained, 2) * m.size


def buckets(m: Method) -> float:
    """Buffers of the communication in a backward pass, and under ZeRO-3 the weights that are gathered."""
    bucket = min(m.trained, m.bucket) * m.size
    if m.stage == 0:
        # DeepSpeed's stage 0 flattens up to 500 million gradients at a time to all-reduce them.
        return min(m.trained, 500_000_000) * m.size if m.ranks > 1 else 0.0
    if m.stage == 3:
        gathered = min(m.trained + m.frozen, GATHERED_ELEMENTS)
        return bucket + gathered * m.size
    # Two where one is filled while the other is reduced, and a flat copy of it at the all-reduce.
    return bucket * ((2 if m.overlaps else 1) + (1 if m.ranks > 1 else 0))


def update(m: Method) -> float:
    """Beside ``gradients``, at the peak of the optimizer's step: fp32 gradients of one group and its temporaries."""
    if m.offload:
        return 0.0
    if m.stage == 0:
        # All parameters at once: every gradient in fp32, where it is not already.
        return m.trained * (4 if m.size < 4 else 0) + min(m.trained, GROUP_ELEMENTS) * m.temporaries
    group = m.on_gpu(min(m.trained, GROUP_ELEMENTS), 1)
    flat = 0 if m.stage == 3 else m.size
    return group * (4 + max(flat, m.temporaries))
