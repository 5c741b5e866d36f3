"""Layer norm and rotation of all query and key heads, in one pass over both: 2 units read, 2 written.

    norm_rotate      q' = R LN(q), k' = R LN(k), in float32 inside, R the rotary embedding; either step may be missing

Queries and keys come as views of the q|k|v product, (B, heads, S, head_dim) with contiguous heads, and leave as such
views of (B, S, heads, head_dim): as fused attention reads them, and as it writes its own result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox.kernels.forms import compiler_fuses, has_kernel, wide

Norms = tuple[nn.LayerNorm, nn.LayerNorm]
Rope = tuple[Tensor, Tensor]


def norm_rotate(
    query: Tensor, key: Tensor, norms: Norms | None = None, rope: Rope | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys normed, then rotated.  query, key: (B, heads, S, d). Returns two of that shape and dtype.

    norms: of queries and of keys, over d.  rope: cos and sin, (S, d / 2) float32, of neighbouring pairs of channels.
    """
    if compiler_fuses(query):
        norm_q, norm_k = norms or (None, None)
        return norm_rotate_formula(query, norm_q, rope), norm_rotate_formula(key, norm_k, rope)
    parameters, eps = [None] * 4, 0.0
    if norms is not None:
        parameters = [p for norm in norms for p in (norm.weight, norm.bias)]
        eps = norms[0].eps
        assert norms[1].eps == eps, "one epsilon for queries and keys"
    return _operator(query, key, *parameters, eps, *(rope or (None, None)))


def norm_rotate_formula(x: Tensor, norm: nn.LayerNorm | None, rope: Rope | None) -> Tensor:
    y = x.to(wide(x))
    if norm is not None:
        y = F.layer_norm(y, norm.normalized_shape, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps)
    return (y if rope is None else rotate_pairs(y, *rope)).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels: (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), in float32.

    x: (B, heads, S, head_dim); cos, sin: (S, head_dim / 2). Returns x's dtype.
    """
    # The float32 tables promote bfloat16 inside each product: no float32 copy of x is made or kept for the backward.
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.addcmul(x0 * cos, x1, sin, value=-1), torch.addcmul(x1 * cos, x0, sin)
    return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)


def _plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    rows = _rows(x)
    if weight is not None:
        rows = F.layer_norm(rows, rows.shape[-1:], weight.to(rows.dtype), bias.to(rows.dtype), eps)
    if cos is not None:
        _turn_(rows, cos, sin)
    return rows.to(x.dtype).transpose(1, 2)


def _backward_plain(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    g = _rows(gradient)
    if cos is not None:
        _turn_(g, cos, -sin)  # the transposed rotation
    d = x.shape[-1]
    of_norm = torch.zeros(2, d, dtype=g.dtype, device=g.device)
    if weight is not None:
        rows, weight = _rows(x), weight.to(g.dtype)
        _, mean, rstd = torch.native_layer_norm(rows, (d,), weight, weight, eps)
        g, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            g, rows, (d,), mean, rstd, weight, weight, [True, sums, sums]
        )
        if sums:
            of_norm = torch.stack((of_weight, of_bias))
    return g.to(x.dtype).transpose(1, 2), of_norm


def _rows(x: Tensor) -> Tensor:
    """A float32 copy in the order of the product, (B, S, heads, d): rows of x lie together there."""
    return x.transpose(1, 2).to(wide(x), memory_format=torch.contiguous_format, copy=True)


def _turn_(rows: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Pairs of channels are complex numbers, and torch multiplies them in one pass."""
    pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)))
    pairs.mul_(torch.complex(cos.to(rows.dtype), sin.to(rows.dtype))[:, None])


_SIDE = (
    "Tensor? weight_q, Tensor? bias_q, Tensor? weight_k, Tensor? bias_k, float eps, Tensor? cos, Tensor? sin"
)


@torch.library.custom_op(
    "cogvideox::norm_rotate",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, {_SIDE}) -> (Tensor, Tensor)",
)
def _operator(query, key, weight_q, bias_q, weight_k, bias_k, eps, cos, sin):
    if has_kernel(query):
        from cogvideox.kernels.on_cuda import norm_rotate as on_cuda

        return on_cuda.forward(query, key, weight_q, bias_q, weight_k, bias_k, eps, cos, sin)
    return _plain(query, weight_q, bias_q, eps, cos, sin), _plain(key, weight_k, bias_k, eps, cos, sin)


@torch.library.custom_op(
    "cogvideox::norm_rotate_backward",
    mutates_args=(),
    schema="(Tensor of_query, Tensor of_key, Tensor query, Tensor key, Tensor? weight_q, Tensor? weight_k, float eps, "
    "Tensor? cos, Tensor? sin, bool sums) -> (Tensor, Tensor, Tensor)",
)
def _backward_operator(of_query, of_key, query, key, weight_q, weight_k, eps, cos, sin, sums):
    """Gradients of query and key, and of weight_q, bias_q, weight_k, bias_k: (4, d), zeros where not asked for."""
    if has_kernel(query):
        from cogvideox.kernels.on_cuda import norm_rotate as on_cuda

        return on_cuda.backward(of_query, of_key, query, key, weight_q, weight_k, eps, cos, sin, sums)
    of_q, norm_q = _backward_plain(of_query, query, weight_q, eps, cos, sin, sums)
    of_k, norm_k = _backward_plain(of_key, key, weight_k, eps, cos, sin, sums)
    return of_q, of_k, torch.cat((norm_q, norm_k))


def heads_like(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return torch.empty((batch, tokens, heads, dim), dtype=x.dtype, device=x.device).transpose(1, 2)


@_operator.register_fake
def _(query, key, *_):
    return heads_like(query), heads_like(key)


@_backward_operator.register_fake
def _(of_query, of_key, query, key, *_):
    norms = torch.empty((4, query.shape[-1]), dtype=wide(query), device=query.device)
    return heads_like(query), heads_like(key), norms


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, weight_q, _, weight_k, _, ctx.eps, cos, sin = inputs
    ctx.sums = any(ctx.needs_input_grad[2:6])
    # The views of the product, not copies of them; a rotation alone needs neither.
    kept = (query, key) if weight_q is not None else (None, None)
    ctx.save_for_backward(*kept, weight_q, weight_k, cos, sin)


def _backward(ctx: Any, of_query: Tensor, of_key: Tensor) -> tuple:
    query, key, weight_q, weight_k, cos, sin = ctx.saved_tensors
    if weight_q is None:
        query, key = of_query, of_key  # for their shapes
    of_q, of_k, norms = _backward_operator(
        of_query, of_key, query, key, weight_q, weight_k, ctx.eps, cos, sin, ctx.sums
    )
    if not ctx.sums:
        return of_q, of_k, *[None] * 7
    wq, bq, wk, bk = norms.to(weight_q.dtype)
    return of_q, of_k, wq, bq, wk, bk, None, None, None


_operator.register_autograd(_backward, setup_context=_keep)
