"""Bytes that operations move, counted, not measured: what a forward pass costs besides its arithmetic.

    with Traffic() as traffic, torch.device("meta"):
        net(x, timesteps, context)
    traffic.bytes / (tokens * width * 2)      # in tensor passes: reads and writes of one bf16 tensor of all tokens

An operation moves what it reads and what it writes, each tensor once. A broadcast tensor counts with its own size; a
view moves nothing; what is changed in place is read and written. An operator of our own (``torch.library``) is one
kernel, so it counts as one operation whatever it computes inside. Weights count as what they are: read once.

On a GPU matrix products and attention are bound by arithmetic and hide their traffic, everything between them is bound
by memory: ``between`` is the part of ``bytes`` that a better arrangement can save.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "convolution", "convolution_backward")
_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
_TORCH = ("aten", "prim", "prims")
_NOTHING_MOVES = ("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "detach")


class Traffic(TorchDispatchMode):
    """A context that counts.  by_operation: name -> bytes.  calls: name -> how often.

    foreign: "library::name" of the operators that are not torch's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.foreign: set[str] = set()

    @property
    def bytes(self) -> int:
        return self.by_operation.total()

    @property
    def between(self) -> int:
        """Without matrix products, convolutions and attention."""
        return sum(moved for name, moved in self.by_operation.items() if not is_product(name))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace not in _TORCH:
            self.foreign.add(f"{func.namespace}::{name}")
        if not func.is_view and name not in _NOTHING_MOVES:
            self.by_operation[name] += moved_bytes(args, kwargs) + moved_bytes(result)
            self.calls[name] += 1
        return result


def is_product(name: str) -> bool:
    return name in PRODUCTS or is_attention(name)


def is_attention(name: str) -> bool:
    return name.startswith(_ATTENTION)


def moved_bytes(*trees: Any) -> int:
    """Of the tensors in nested arguments: each view once, without the repeats of broadcast dimensions."""
    found: dict[tuple, Tensor] = {}
    for leaf in tree_leaves(trees):
        if isinstance(leaf, Tensor):
            place = leaf.untyped_storage()._cdata, leaf.storage_offset(), leaf.shape, leaf.stride()
            found[place] = leaf
    return sum(_elements(tensor) * tensor.element_size() for tensor in found.values())


def _elements(tensor: Tensor) -> int:
    """Of a dimension with stride 0 there is one row, shown many times."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count
