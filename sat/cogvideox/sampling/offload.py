"""Weights that wait in host memory: whole models of which one is on the device, and layers that pass through it.

Both work by forward hooks, and on a CPU by the same code: "the device" is then a second copy in the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; what a GPU reads at once starts there


class HostWeights:
    """The parameters and buffers of a module, in one block of host memory (pinned where the device is a GPU).

    They are not copied back: what runs here only reads its weights. ``place(block)`` lets the module use a copy of the
    block that lies on the device, ``park()`` the host's again.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self._layout: list[tuple[int, Tensor]] = []
        self.nbytes = 0
        for tensor in (*module.parameters(), *module.buffers()):
            self._layout.append((self.nbytes, tensor))
            self.nbytes += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        self.block = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for tensor, view in self._views(self.block):
            view.copy_(tensor.detach())
        self.park()

    def place(self, block: Tensor) -> None:
        """block: uint8 with at least ``nbytes`` bytes, filled from ``self.block``."""
        for tensor, view in self._views(block):
            tensor.data = view

    def park(self) -> None:
        self.place(self.block)

    def _views(self, block: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [
            (tensor, block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            for start, tensor in self._layout
        ]


class WholeOffload:
    """Modules that are on the device between ``load()`` and ``park()``."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device):
        self.device, self.resident = device, False
        # Module by module: a second copy of all of them never exists in host memory.
        self._hosts = [HostWeights(module, device) for module in modules]

    def load(self) -> None:
        if not self.resident:
            for host in self._hosts:
                host.place(host.block.to(self.device, non_blocking=True, copy=True))
            self.resident = True

    def park(self) -> None:
        if self.resident:
            for host in self._hosts:
                host.park()
            self.resident = False


class LayerOffload:
    """Layers that run one after the other, of which ``slots`` at a time are on the device.

    While a layer computes, the next one is copied into the slot of the one before, on a stream of its own where the
    device is a GPU; after the last layer comes the first again, for the next forward pass. Slots are allocated once:
    with a fresh allocation per layer, copies that run ahead of the computation would pile up.

    peak_resident: the most layers that were on the device at once.
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device, slots: int = 2):
        if slots < 2:
            raise ValueError(
                f"offload of layers with {slots} slots: expected at least 2, one computes while one is filled"
            )
        self.layers, self.device = list(layers), device
        self._hosts = [HostWeights(layer, device) for layer in self.layers]
        self._largest = max(host.nbytes for host in self._hosts)
        self._num_slots = min(slots, len(self.layers))
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._filled = [torch.cuda.Event() if cuda else None for _ in range(self._num_slots)]
        self._used = [torch.cuda.Event() if cuda else None for _ in range(self._num_slots)]
        self._slots: list[Tensor] = []
        self._in_slot: list[int | None] = [None] * self._num_slots
        self._next_slot, self._computing, self.peak_resident = 0, set(), 0
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda *_, i=index: self._before(i))
            layer.register_forward_hook(lambda *_, i=index: self._after(i), always_call=True)

    @property
    def device_bytes(self) -> int:
        """What the slots take now."""
        return sum(slot.nbytes for slot in self._slots)

    def free(self) -> None:
        """Give the slots back; the next forward pass allocates them again."""
        if self._stream is not None:
            self._stream.synchronize()  # a copy of the layer that comes next may be on its way
        self._slots, self._in_slot = [], [None] * self._num_slots

    def _before(self, index: int) -> None:
        slot = self._in_slot.index(index) if index in self._in_slot else self._fill(index)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._filled[slot])
        self._hosts[index].place(self._slots[slot])
        self._computing.add(slot)
        following = (index + 1) % len(self.layers)
        if following not in self._in_slot:
            self._fill(following)

    def _after(self, index: int) -> None:
        self._hosts[index].park()
        if index in self._in_slot:  # not where filling it failed
            slot = self._in_slot.index(index)
            if self._stream is not None:
                self._used[slot].record(torch.cuda.current_stream(self.device))
            self._computing.discard(slot)

    def _fill(self, index: int) -> int:
        """Copy a layer into the next slot that does not compute."""
        if not self._slots:
            self._allocate()
        while self._next_slot in self._computing:
            self._next_slot = (self._next_slot + 1) % self._num_slots
        slot = self._next_slot
        self._next_slot = (slot + 1) % self._num_slots
        self._in_slot[slot] = index
        self.peak_resident = max(self.peak_resident, sum(i is not None for i in self._in_slot))
        block = self._hosts[index].block
        if self._stream is None:
            self._slots[slot][: len(block)].copy_(block)
            return slot
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[slot])
            self._slots[slot][: len(block)].copy_(block, non_blocking=True)
            self._filled[slot].record(self._stream)
        return slot

    def _allocate(self) -> None:
        new = partial(torch.empty, self._largest, dtype=torch.uint8, device=self.device)
        self._slots = [new() for _ in range(self._num_slots)]
        if self._stream is not None:  # the memory may still be in use by what was queued before
            self._stream.wait_stream(torch.cuda.current_stream(self.device))


class Turns:
    """Models that take turns on the device: text encoder, transformer, VAE.

    ``add`` says how a stage comes and goes, and at which modules' calls it comes. ``evicts`` names the stages that must
    be gone while it is there.
    """

    def __init__(self) -> None:
        self._stages: dict[str, tuple[Callable[[], None], Callable[[], None], tuple[str, ...]]] = {}
        self.resident: set[str] = set()

    def add(
        self,
        name: str,
        load: Callable[[], None],
        park: Callable[[], None],
        *,
        at: Sequence[nn.Module],
        evicts: Sequence[str],
    ) -> None:
        self._stages[name] = (load, park, tuple(evicts))
        for module in at:
            module.register_forward_pre_hook(lambda *_: self.enter(name))

    def enter(self, name: str) -> None:
        load, _, evicts = self._stages[name]
        for other in self.resident & set(evicts):
            self._stages[other][1]()
            self.resident.discard(other)
        load()
        self.resident.add(name)


def move_rest(module: nn.Module, apart: Iterable[nn.Module], device: torch.device) -> None:
    """Move what ``module`` holds outside of the modules ``apart``."""
    kept = {id(t) for part in apart for t in (*part.parameters(), *part.buffers())}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in kept:
            tensor.data = tensor.data.to(device)


def repeated_layers(module: nn.Module) -> nn.ModuleList:
    """The longest chain of layers of a model, by weight: the blocks of a T5, the layers of a transformer."""
    chains = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not chains:
        raise ValueError(f"{type(module).__name__} has no chain of layers to offload one by one")
    return max(chains, key=lambda chain: sum(p.nbytes for p in chain.parameters()))
