"""All counts of one piece of code at once: operations, live memory, bytes moved.

    with counting() as counter, torch.device("meta"):
        vae.decode(torch.empty(1, 13, 16, 60, 90, dtype=torch.bfloat16))
    counter.counts()

FLOPs are those of products and attention by the formulas of torch's own counter, a multiply-add being two. Attention
counts 4 S^2 d (backward: 2.5 times that, with the scores that every fused kernel computes again) in whichever kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from cogvideox.live_memory import LiveMemory
from cogvideox.traffic import Traffic, is_attention
from scripts.benchmark.full_size import fused_attention

aten = torch.ops.aten

_FORWARD = flop_registry[aten._scaled_dot_product_flash_attention]
_BACKWARD = flop_registry[aten._scaled_dot_product_flash_attention_backward]
ALSO_COUNTED = {
    aten._addmm_activation: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _FORWARD,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _BACKWARD,
    aten._scaled_dot_product_fused_attention_overrideable: _FORWARD,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _BACKWARD,
}
"""Products that torch's counter leaves out: one with an activation at its end, and two more kernels of attention."""

_ELEMENTWISE = ("norm_modulate", "gate_norm_modulate", "add_gated", "norm_rotate", "gelu")
OWN_OPERATORS: dict[str, Callable[..., int] | None] = {
    f"cogvideox::{name}{end}": None for name in _ELEMENTWISE for end in ("", "_backward")
} | dict.fromkeys(("cogvideox::plane_moments", "cogvideox::scaled_silu"))
"""Operators of our own ("cogvideox::name"), each one kernel into which no counter looks -> its FLOPs from the shapes of
its arguments, as in torch's registry; None: no products. An operator that is not here is refused."""


class Operations(TorchDispatchMode):
    """A context that counts FLOPs, as torch's ``FlopCounterMode``, which also follows the modules and with its hooks
    keeps tensors alive: beside it no memory can be counted.  flops: all.  attention: those of attention among them."""

    def __init__(self) -> None:
        super().__init__()
        own = {_operator(name): shape_wrapper(flops) for name, flops in OWN_OPERATORS.items() if flops}
        self._formulas = flop_registry | ALSO_COUNTED | own
        self.flops = 0
        self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := self._formulas.get(func.overloadpacket):
            found = formula(*args, **kwargs, out_val=result)
            self.flops += found
            if is_attention(func.overloadpacket.__name__):
                self.attention += found
        return result


@dataclass(frozen=True)
class Counts:
    """flops: of products and attention.  peak: bytes of live tensors at most, beside what existed before.
    kept: bytes that live after a forward pass.  moved, between: bytes that all operations read and write, and that
    those without products and attention do.
    """

    flops: float
    peak: float
    kept: float
    moved: float
    between: float


@dataclass
class Counter:
    """``note_kept()`` says that the forward pass is over; ``counts()`` is what was counted so far."""

    operations: Operations
    memory: LiveMemory
    traffic: Traffic
    kept: int = 0

    def note_kept(self) -> None:
        self.kept = self.memory.live_bytes

    def counts(self) -> Counts:
        traffic = self.traffic
        return Counts(
            self.operations.flops, self.memory.peak_bytes, self.kept, traffic.bytes, traffic.between
        )


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """A context that counts. ValueError at its end where an operator ran that OWN_OPERATORS does not know."""
    with fused_attention(), Operations() as operations, LiveMemory() as memory, Traffic() as traffic:
        yield Counter(operations, memory, traffic)
    if unknown := sorted(traffic.foreign - OWN_OPERATORS.keys()):
        raise ValueError(
            f"the operator {unknown[0]} may hide products from the count of operations: say in OWN_OPERATORS of "
            "scripts/benchmark/counting.py how many it has, or None"
        )


def _operator(name: str) -> Any:
    library, _, operator = name.partition("::")
    return getattr(getattr(torch.ops, library), operator)
