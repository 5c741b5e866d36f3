"""The product of a frozen linear layer and its low-rank updates as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def adapted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float,
) -> Tensor:
    """x W^T + b + scale * cat_i(x A_i^T B_i^T), where W and b do not train.

    x: (..., in);  downs: A_i (r, in);  ups: B_i (out / parts, r).  Returns (..., out).
    All parts share one product that reads x, and every update is added inside a product: no update is ever a tensor of
    its own, none are joined. Kept for the backward pass: x and the (..., parts * r) small products.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _AdaptedProduct.apply(rows, weight, bias, scale, *downs, *ups).view(*x.shape[:-1], len(weight))


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *matrices: Tensor
    ) -> Tensor:
        downs, ups = _halves(matrices)
        low = x @ torch.cat(downs).T  # (N, parts * r)
        update = x.new_empty(len(x), len(weight))
        start = 0
        for part, up in zip(low.chunk(len(ups), dim=1), ups, strict=True):
            stop = start + len(up)
            place = update[:, start:stop]
            if bias is None:
                torch.mm(part, up.T, out=place).mul_(scale)
            else:
                torch.addmm(bias[start:stop], part, up.T, alpha=scale, out=place)
            start = stop
        ctx.weight, ctx.scale = weight, scale
        ctx.save_for_backward(x, low, *matrices)
        # Not in place: the checkpointing of products keeps the result of this operation.
        return torch.addmm(update, x, weight.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, *matrices = ctx.saved_tensors
        downs, ups = _halves(matrices)
        low_gradient = torch.empty_like(low)  # of low / scale
        parts = gradient.split([len(up) for up in ups], dim=1)
        of_ups = []
        for part, up, at, place in zip(
            parts, ups, low.chunk(len(ups), dim=1), low_gradient.chunk(len(ups), dim=1), strict=True
        ):
            torch.mm(part, up, out=place)
            of_ups.append((part.T @ at).mul_(ctx.scale))
        of_downs = (low_gradient.T @ x).mul_(ctx.scale).chunk(len(downs))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ ctx.weight
            torch.addmm(of_x, low_gradient, torch.cat(downs), alpha=ctx.scale, out=of_x)
        return of_x, None, None, None, *of_downs, *of_ups


def _halves(matrices: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    count = len(matrices) // 2
    return matrices[:count], matrices[count:]
