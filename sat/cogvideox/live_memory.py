"""Live tensors counted, not measured: the peak of a piece of code in bytes, the same on every machine and every run.

    with LiveMemory() as memory, torch.device("meta"):
        vae.decode(torch.empty(1, 13, 16, 60, 90, dtype=torch.bfloat16))
    memory.peak_bytes

On the meta device a true full size costs nothing. Counted are the storages that operations inside the block create,
from their creation to the death of their last tensor; views share a storage and add nothing. Not counted: what existed
before the block (weights, inputs), and what kernels allocate for themselves (workspaces), with one exception: a
convolution copies an input that is not contiguous, so that copy is added while it runs.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """A context that counts the bytes of the tensors that live in it.

    device: count only tensors of this type of device ("cpu"); None: all.
    live_bytes: now.  peak_bytes: the most at any time, between operations or during one.
    peak_operation: the operation that reached the peak.
    at_peak: what lived then, (bytes, operation that made it), largest first; the transient copy of a convolution too.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_operation = ""
        self._at_peak: list[tuple[int, str]] = []
        self._live: dict[int, tuple[int, str]] = {}
        # By a running number: the address of a storage is used again after its death.
        self._seen: weakref.WeakSet = weakref.WeakSet()
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_of((args, kwargs)):
            self._seen.add(tensor.untyped_storage())
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        for tensor in tensors_of(result):
            self._add(tensor, name)
        self._note_peak(name, _copied_inputs(func, args))
        return result

    def _add(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen or self.device not in (None, storage.device.type):
            return
        self._seen.add(storage)
        self._made += 1
        self._live[self._made] = (storage.nbytes(), name)
        self.live_bytes += storage.nbytes()
        weakref.finalize(storage, self._free, self._made).atexit = False

    def _free(self, number: int) -> None:
        self.live_bytes -= self._live.pop(number)[0]

    def _note_peak(self, name: str, transient_bytes: int) -> None:
        total = self.live_bytes + transient_bytes
        if total <= self.peak_bytes:
            return
        self.peak_bytes, self.peak_operation = total, name
        copies = [(transient_bytes, f"contiguous input of {name}")] if transient_bytes else []
        self._at_peak = [*self._live.values(), *copies]

    @property
    def at_peak(self) -> list[tuple[int, str]]:
        return sorted(self._at_peak, reverse=True)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copied_inputs(func: Any, args: tuple) -> int:
    if func.overloadpacket is not torch.ops.aten.convolution:
        return 0
    return sum(t.numel() * t.element_size() for t in tensors_of(args) if not t.is_contiguous())
