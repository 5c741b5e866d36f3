"""Activation checkpointing: blocks that compute again in the backward pass what they did not keep (Chen et al. 2016).

Which, and what they keep, is a ``Recompute`` (recompute.py). ``products`` and ``selective`` decide operation by
operation, with torch's selective checkpointing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogvideox.recompute import Budget, Recompute, read_recompute

logger = logging.getLogger("cogvideox")

ATTENTION = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)
"""Every fused kernel that ``scaled_dot_product_attention`` may choose. The unfused one is made of matrix products."""

KEPT = {
    "selective": ATTENTION,
    # A linear layer with a bias is one addmm. The two products of a LoRA have none, so that they are computed again:
    # 2 % of the work at rank 128, where keeping their sum and its parts would take as much as keeping everything.
    "products": ATTENTION | {torch.ops.aten.addmm.default},
}
"""The operations whose outputs are kept."""


class Checkpointing:
    """Runs the blocks of a trunk under one policy.  value: what ``read_recompute`` takes, except a budget."""

    def __init__(self, value: Any = False):
        policy = read_recompute(value)
        if isinstance(policy, Budget):
            raise ValueError(
                f"model.transformer.checkpoint_activations={value!r}: a budget is chosen for a run, from its whole "
                "configuration (cogvideox.build_transformer does); a network alone takes none, products, selective, "
                "full, or a whole number"
            )
        self.policy: Recompute = policy
        self._was_looked_at = False

    def run(
        self, what: str, block: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kw_args: Any
    ) -> Tensor:
        """``block(hidden_states, *args, **kw_args)``; without gradients nothing is kept anyway.

        what: the block keeps, a key of ``recompute.KEPT`` (``policy.of_block``).
        """
        if what == "none" or not torch.is_grad_enabled():
            return block(hidden_states, *args, **kw_args)
        if what == "full":
            return checkpoint(block, hidden_states, *args, use_reentrant=False, **kw_args)
        seen = self._note_attention if not self._was_looked_at and not torch.compiler.is_compiling() else None
        contexts = partial(create_selective_checkpoint_contexts, partial(_keep, KEPT[what], seen))
        out = checkpoint(block, hidden_states, *args, use_reentrant=False, context_fn=contexts, **kw_args)
        if seen and not self._was_looked_at:
            self._was_looked_at = True
            logger.warning(
                "model.transformer.checkpoint_activations=%s: attention ran in none of torch's fused kernels, so its "
                "outputs are not kept and attention is computed twice",
                self.policy,
            )
        return out

    def _note_attention(self) -> None:
        self._was_looked_at = True


def _keep(
    kept: frozenset, seen: Callable[[], None] | None, context: Any, operation: Any, *args: Any, **kw_args: Any
) -> CheckpointPolicy:
    if operation not in kept:
        return CheckpointPolicy.PREFER_RECOMPUTE
    if seen is not None and operation in ATTENTION:
        seen()
    return CheckpointPolicy.MUST_SAVE
