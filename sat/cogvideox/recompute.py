"""What the transformer's blocks keep for the backward pass: the values of ``model.transformer.checkpoint_activations``.

What a block does not keep it computes again when its gradients are taken, from its input, which it always keeps.
torch is not imported, so that the configuration and the plan can read it; model/checkpointing.py does it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

KEPT = {
    "none": "everything is kept, nothing is computed again",
    "products": "outputs of linear layers and of attention are kept; norms, modulation, rotation and GELU again",
    "selective": "outputs of attention are kept, the rest again",
    "full": "all again, from each block's input",
}
"""From fastest to smallest."""


@dataclass(frozen=True)
class Recompute:
    """``what``: a key of ``KEPT``.  every: only blocks 0, n, 2n, ... are computed again, the others keep everything."""

    what: str
    every: int = 1

    def of_block(self, index: int) -> str:
        """What block ``index`` keeps."""
        return self.what if index % self.every == 0 else "none"

    def counts(self, num_layers: int) -> dict[str, int]:
        """How many blocks keep what."""
        again = -(-num_layers // self.every)
        return {self.what: again} if again == num_layers else {self.what: again, "none": num_layers - again}

    def __str__(self) -> str:
        return self.what if self.every == 1 else f"{self.what} in 1 of {self.every} blocks"


@dataclass(frozen=True)
class Budget:
    """The fastest policy whose planned peak fits into ``bytes``; ``planning.choices`` finds it."""

    bytes: float


def read_recompute(value: Any) -> Recompute | Budget:
    """What ``model.transformer.checkpoint_activations`` means; true and false are those of the published files.

    Raises ValueError naming the key for anything else.
    """
    if isinstance(value, Recompute | Budget):
        return value
    if isinstance(value, bool) or value is None:
        return Recompute("full" if value else "none")
    if isinstance(value, int) and value >= 1:
        return Recompute("full", value)
    if isinstance(value, str):
        if value in KEPT:
            return Recompute(value)
        size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*GiB\s*", value)
        if size and float(size[1]):
            return Budget(float(size[1]) * 2**30)
    raise ValueError(
        f"model.transformer.checkpoint_activations={value!r}: expected false or none, true or full, products, "
        "selective, a whole number n of at least 1 (every n-th block is computed again), or a memory budget such as "
        "'24 GiB'"
    )
