"""Layer norm and rotation of queries and keys, and their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogvideox.kernels.on_cuda.rows import with_rows

ROWS = 32
"""Heads of a program at a time."""
PROGRAMS = 1024
"""Programs of a backward pass that sums over all heads: several for each multiprocessor of a large GPU."""


@triton.jit
def _turn(x, cos, sin, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Neighbouring columns of x (ROWS, BLOCK) are pairs; cos and sin: (ROWS, BLOCK / 2)."""
    first, second = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(turned, (ROWS, BLOCK))


@triton.jit
def _normed(x, inside, eps, DIM: tl.constexpr):
    """(x - mean) / deviation of every row, and 1 / deviation (ROWS, 1)."""
    centred = tl.where(inside, x - tl.sum(x, 1, keep_dims=True) / DIM, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / DIM + eps)
    return centred * rstd, rstd


@triton.jit
def _tables(cos, sin, token, exists, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin of each row's token: (ROWS, BLOCK / 2) float32."""
    pair = tl.arange(0, BLOCK // 2)[None, :]
    place, inside = token * (DIM // 2) + pair, exists & (pair < DIM // 2)
    return tl.load(cos + place, inside, 0.0).to(tl.float32), tl.load(sin + place, inside, 0.0).to(tl.float32)


@triton.jit
def _forward_one(
    x, place, to, out, inside, column, weight, bias, eps, c, s,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    if NORM:
        value, _ = _normed(value, inside, eps, DIM)
        w = tl.load(weight + column, column < DIM, 0.0).to(tl.float32)
        value = value * w + tl.load(bias + column, column < DIM, 0.0).to(tl.float32)
    if ROTATE:
        value = _turn(value, c, s, ROWS, BLOCK)
    tl.store(out + to, value, inside)


@triton.jit
def _forward(
    query, key, weight_q, bias_q, weight_k, bias_k, cos, sin, out_q, out_k,
    q_item, q_head, q_token, k_item, k_head, k_token,
    count, heads, tokens, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    # Rows are heads in the order of the product, (item, token, head): neighbours lie side by side.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    head, token, item = row % heads, row // heads % tokens, row // heads // tokens
    column = tl.arange(0, BLOCK)[None, :]
    exists = row < count
    inside = exists & (column < DIM)
    c, s = 0.0, 0.0
    if ROTATE:
        c, s = _tables(cos, sin, token, exists, DIM, BLOCK)
    to = row * DIM + column
    place = item * q_item + head * q_head + token * q_token + column
    _forward_one(
        query, place, to, out_q, inside, column, weight_q, bias_q, eps, c, s, DIM, BLOCK, ROWS, NORM, ROTATE
    )
    place = item * k_item + head * k_head + token * k_token + column
    _forward_one(
        key, place, to, out_k, inside, column, weight_k, bias_k, eps, c, s, DIM, BLOCK, ROWS, NORM, ROTATE
    )


@triton.jit
def _backward_one(
    gradient, from_, x, place, to, out, inside, column, weight, eps, c, s,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of x; returns the parts of those of weight and bias: (ROWS, BLOCK)."""
    g = tl.load(gradient + from_, inside, 0.0).to(tl.float32)
    if ROTATE:
        g = _turn(g, c, -s, ROWS, BLOCK)  # the transposed rotation
    along = g
    result = g
    if NORM:
        normed, rstd = _normed(tl.load(x + place, inside, 0.0).to(tl.float32), inside, eps, DIM)
        along = g * normed
        inner = g * tl.load(weight + column, column < DIM, 0.0).to(tl.float32)
        mean = tl.sum(inner, 1, keep_dims=True) / DIM
        result = (inner - mean - normed * (tl.sum(inner * normed, 1, keep_dims=True) / DIM)) * rstd
    tl.store(out + to, result, inside)
    return along, g


@triton.jit
def _backward(
    of_query, of_key, query, key, weight_q, weight_k, cos, sin, out_q, out_k, partial,
    gq_item, gq_head, gq_token, gk_item, gk_head, gk_token, q_item, q_head, q_token, k_item, k_head, k_token,
    count, heads, tokens, tiles, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    along_q = tl.zeros((ROWS, BLOCK), tl.float32)
    total_q = tl.zeros((ROWS, BLOCK), tl.float32)
    along_k = tl.zeros((ROWS, BLOCK), tl.float32)
    total_k = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        head, token, item = row % heads, row // heads % tokens, row // heads // tokens
        exists = row < count
        inside = exists & (column < DIM)
        c, s = 0.0, 0.0
        if ROTATE:
            c, s = _tables(cos, sin, token, exists, DIM, BLOCK)
        to = row * DIM + column
        along, total = _backward_one(
            of_query, item * gq_item + head * gq_head + token * gq_token + column,
            query, item * q_item + head * q_head + token * q_token + column,
            to, out_q, inside, column, weight_q, eps, c, s, DIM, BLOCK, ROWS, NORM, ROTATE,
        )  # fmt: skip
        if SUMS:
            along_q += along
            total_q += total
        along, total = _backward_one(
            of_key, item * gk_item + head * gk_head + token * gk_token + column,
            key, item * k_item + head * k_head + token * k_token + column,
            to, out_k, inside, column, weight_k, eps, c, s, DIM, BLOCK, ROWS, NORM, ROTATE,
        )  # fmt: skip
        if SUMS:
            along_k += along
            total_k += total
    if SUMS:
        lane = tl.arange(0, BLOCK)
        place = partial + tl.program_id(0) * (4 * DIM) + lane
        tl.store(place, tl.sum(along_q, 0), lane < DIM)
        tl.store(place + DIM, tl.sum(total_q, 0), lane < DIM)
        tl.store(place + 2 * DIM, tl.sum(along_k, 0), lane < DIM)
        tl.store(place + 3 * DIM, tl.sum(total_k, 0), lane < DIM)


def forward(
    query: Tensor,
    key: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    query, key = with_rows(query), with_rows(key)
    out_q, out_k = _heads_like(query), _heads_like(key)
    batch, heads, tokens, dim = query.shape
    count = batch * heads * tokens
    norm = (weight_q, bias_q, weight_k, bias_k) if weight_q is not None else (query,) * 4
    with torch.cuda.device_of(query):
        _forward[(triton.cdiv(count, ROWS),)](
            query, key, *norm, *_tables_of(query, cos, sin), out_q, out_k,
            *query.stride()[:3], *key.stride()[:3],
            count, heads, tokens, eps,
            DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=ROWS,
            NORM=weight_q is not None, ROTATE=cos is not None,
        )  # fmt: skip
    return out_q.transpose(1, 2), out_k.transpose(1, 2)


def backward(
    of_query: Tensor,
    of_key: Tensor,
    query: Tensor,
    key: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query and key, and of weight and bias of both norms: (4, d)."""
    of_query, of_key, query, key = (with_rows(x) for x in (of_query, of_key, query, key))
    out_q, out_k = _heads_like(query), _heads_like(key)
    batch, heads, tokens, dim = query.shape
    count = batch * heads * tokens
    tiles = triton.cdiv(count, ROWS)
    programs = min(tiles, PROGRAMS) if sums else tiles
    partial = query.new_zeros((programs if sums else 1, 4, dim), dtype=torch.float32)
    norm = (weight_q, weight_k) if weight_q is not None else (query, key)
    with torch.cuda.device_of(query):
        _backward[(programs,)](
            of_query, of_key, query, key, *norm, *_tables_of(query, cos, sin), out_q, out_k, partial,
            *of_query.stride()[:3], *of_key.stride()[:3], *query.stride()[:3], *key.stride()[:3],
            count, heads, tokens, tiles, eps,
            DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=ROWS,
            NORM=weight_q is not None, ROTATE=cos is not None, SUMS=sums,
        )  # fmt: skip
    return out_q.transpose(1, 2), out_k.transpose(1, 2), partial.sum(dim=0)


def _heads_like(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return torch.empty((batch, tokens, heads, dim), dtype=x.dtype, device=x.device)


def _tables_of(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    return (x, x) if cos is None else (cos.contiguous(), sin.contiguous())
