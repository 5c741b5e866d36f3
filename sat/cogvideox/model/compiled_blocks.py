"""One transformer layer compiled, and used for all of them.

The layers are the same code on other weights. What differs comes in as arguments (``ExpertAdaLN.of_layer``), so that no
guard of the compiled graph is a layer's own, and 42 layers cost what one does: seconds, not minutes. A mixin that reads
``layer_id`` makes such a guard; the layers are then compiled one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.execution import check_compile
from cogvideox.model.checkpointing import Checkpointing

RunLayer = Callable[..., Tensor]

MOST_GRAPHS = 64
"""Of one process, beside each other: sizes and batches of clips, with and without gradients, policies of recomputation,
and every layer where a mixin tells them apart."""


def run_layer(
    checkpointing: Checkpointing,
    what: str,
    layer: nn.Module,
    hidden_states: Tensor,
    mask: Tensor | None,
    kw_args: dict[str, Any],
) -> Tensor:
    """One layer of the trunk: hidden_states (B, S, D) -> (B, S, D).  what: it keeps for the backward pass."""
    # Recomputation is inside, where the compiler sees it: policies that decide by operation see none from outside.
    return checkpointing.run(what, layer, hidden_states, mask, **kw_args)


def layer_runner(compile: str, **options: Any) -> RunLayer:
    """``run_layer`` as ``model.transformer.compile`` says.  options: of ``torch.compile``."""
    check_compile(compile)
    return run_layer if compile == "none" else _compiled(**options)


@functools.cache
def _compiled(**options: Any) -> RunLayer:
    """One for all networks of a process that have the same options."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    return torch.compile(run_layer, fullgraph=True, **options)
