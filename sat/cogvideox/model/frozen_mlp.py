"""The MLP with frozen weights, whose hidden layer lives a few rows at a time, in the forward and in the backward pass.

The hidden layer is 4 D wide: whole, it, its GELU and the gradients of both are 12 of the 20 or so tensors of tokens x D
that live at the peak of a LoRA step. The backward pass needs it, and no token sees another, so it is made again there
from x, piece by piece.

In a block that is computed again that costs nothing: its forward pass is repeated only up to the last tensor that was
saved in it, which is x here. The first product is then done again in the backward pass, as it would be anyway, and the
second one, a third of a block's linear work, is not done a second time at all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox.kernels.gelu import gelu_gradient, linear_gelu

PIECES, FEWEST_ROWS = 8, 256
"""Products of fewer rows than that are slower than one of all."""


def frozen_mlp(x: Tensor, first: nn.Linear, last: nn.Linear) -> Tensor:
    """last(GELU(first(x))).  x: (..., D). Returns that shape. Saved for the backward pass: x."""
    rows = _Hold.apply(x.reshape(-1, x.shape[-1]))
    return _InPieces.apply(rows, rows.grad_fn, first, last).view(x.shape)


class _Hold(torch.autograd.Function):
    """Saves its input before the products begin: a function's own tensors are saved when it has been computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _InPieces(torch.autograd.Function):
    """x: (N, D);  held: of ``_Hold``, which has x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Any, first: nn.Linear, last: nn.Linear) -> Tensor:
        ctx.held, ctx.layers = held, (first, last)
        out = torch.empty_like(x)
        for rows, place in zip(_pieces(x.detach()), _pieces(out), strict=True):
            torch.addmm(last.bias, linear_gelu(first, rows), last.weight.T, out=place)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), (first, last) = ctx.held.saved_tensors, ctx.layers
        out = torch.empty_like(x)
        for rows, g, place in zip(_pieces(x), _pieces(gradient), _pieces(out), strict=True):
            hidden = F.linear(rows, first.weight, first.bias)
            torch.mm(gelu_gradient(g @ last.weight, hidden), first.weight, out=place)
        return out, None, None, None


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(FEWEST_ROWS, -(-len(x) // PIECES)))
