"""x + gate branch, and its gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogvideox.kernels.forms import sums_like, tokens_like
from cogvideox.kernels.on_cuda.rows import ROWS, block_of, blocks_of, sum_of_blocks, with_rows


@triton.jit
def _forward(
    x, branch, gate, out,
    x_item, x_token, branch_item, branch_token, gate_item, gate_part,
    tokens, text_length,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    item, token = row // tokens, row % tokens
    part = tl.where(token < text_length, 1, 0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    own = tl.load(x + item * x_item + token * x_token + column, inside, 0.0).to(tl.float32)
    added = tl.load(branch + item * branch_item + token * branch_token + column, inside, 0.0).to(tl.float32)
    factor = tl.load(gate + item * gate_item + part * gate_part + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, own + factor * added, inside)


@triton.jit
def _backward(
    gradient, branch, gate, out, partial,
    gradient_item, gradient_token, branch_item, branch_token, gate_item, gate_part,
    tokens, text_length, text_blocks, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    block, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_text = block < text_blocks
    start = tl.where(is_text, block * rows, text_length + (block - text_blocks) * rows)
    stop = tl.minimum(start + rows, tl.where(is_text, text_length, tokens))
    part = tl.where(is_text, 1, 0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    factor = tl.load(gate + item * gate_item + part * gate_part + column, inside, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for token in range(start, stop):
        g = tl.load(gradient + item * gradient_item + token * gradient_token + column, inside, 0.0)
        g = g.to(tl.float32)
        tl.store(out + (item * tokens + token) * WIDTH + column, factor * g, inside)
        if SUMS:
            added = tl.load(branch + item * branch_item + token * branch_token + column, inside, 0.0)
            total += g * added.to(tl.float32)
    if SUMS:
        place = item * tl.num_programs(0) + block
        tl.store(partial + place * WIDTH + column, total, inside)


def forward(x: Tensor, branch: Tensor, gate: Tensor, text_length: int) -> Tensor:
    x, branch, gate, out = with_rows(x), with_rows(branch), with_rows(gate), tokens_like(x)
    batch, tokens, width = x.shape
    block, warps = block_of(width)
    with torch.cuda.device_of(x):
        _forward[(batch * tokens,)](
            x, branch, gate, out,
            *x.stride()[:2], *branch.stride()[:2], *pair_strides(gate),
            tokens, text_length,
            WIDTH=width, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


def backward(
    gradient: Tensor, branch: Tensor | None, gate: Tensor, text_length: int
) -> tuple[Tensor, Tensor]:
    gradient, gate, out = with_rows(gradient), with_rows(gate), tokens_like(gradient)
    batch, tokens, width = gradient.shape
    block, warps = block_of(width)
    has_sums = branch is not None
    branch = with_rows(branch) if has_sums else gradient
    rows = ROWS if has_sums else 1
    text_blocks, blocks = blocks_of(tokens, text_length, rows)
    partial = gradient.new_empty((batch, blocks if has_sums else 0, width), dtype=torch.float32)
    with torch.cuda.device_of(gradient):
        _backward[(blocks, batch)](
            gradient, branch, gate, out, partial,
            *gradient.stride()[:2], *branch.stride()[:2], *pair_strides(gate),
            tokens, text_length, text_blocks, rows,
            WIDTH=width, BLOCK=block, SUMS=has_sums, num_warps=warps,
        )  # fmt: skip
    sums = sum_of_blocks(partial, text_blocks, gate.shape[1]) if has_sums else sums_like(gradient, gate)
    return out, sums


def pair_strides(pair: Tensor) -> tuple[int, int]:
    """Of a pair of modulations (B or 1, 2, D): from item to item, which may share one, and from video to text."""
    return (pair.stride(0) if len(pair) > 1 else 0), pair.stride(1)
