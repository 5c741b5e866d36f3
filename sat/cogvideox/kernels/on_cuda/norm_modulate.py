"""Layer norm and modulation, with or without the gated residual before them, and their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogvideox.kernels.forms import sums_like, tokens_like
from cogvideox.kernels.on_cuda.add_gated import pair_strides
from cogvideox.kernels.on_cuda.rows import ROWS, block_of, blocks_of, sum_of_blocks, with_rows


@triton.jit
def _forward(
    x, branch, gate, weight, bias, shift, scale, moved, out, means, rstds,
    x_item, x_token, branch_item, branch_token, gate_item, gate_part,
    shift_item, shift_part, scale_item, scale_part,
    tokens, text_length, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    item, token = row // tokens, row % tokens
    part = tl.where(token < text_length, 1, 0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + item * x_item + token * x_token + column, inside, 0.0).to(tl.float32)
    if GATED:
        added = tl.load(branch + item * branch_item + token * branch_token + column, inside, 0.0)
        factor = tl.load(gate + item * gate_item + part * gate_part + column, inside, 0.0).to(tl.float32)
        # Rounded as it is stored: the norm is that of what the next layer, and the backward pass, read.
        sum_ = (value + factor * added.to(tl.float32)).to(moved.dtype.element_ty)
        tl.store(moved + row * WIDTH + column, sum_, inside)
        value = sum_.to(tl.float32)
    mean = tl.sum(value, 0) / WIDTH
    centred = tl.where(inside, value - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    b = tl.load(bias + column, inside, 0.0).to(tl.float32)
    by = tl.load(scale + item * scale_item + part * scale_part + column, inside, 0.0).to(tl.float32)
    to = tl.load(shift + item * shift_item + part * shift_part + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (centred * rstd * w + b) * (1.0 + by) + to, inside)


@triton.jit
def _backward(
    outer, gradient, x, branch, gate, means, rstds, weight, scale, of_x, of_branch, partial,
    outer_item, outer_token, gradient_item, gradient_token, x_item, x_token, branch_item, branch_token,
    gate_item, gate_part, scale_item, scale_part,
    tokens, text_length, text_blocks, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, NORM_SUMS: tl.constexpr, GATE_SUMS: tl.constexpr,
):  # fmt: skip
    block, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_text = block < text_blocks
    start = tl.where(is_text, block * rows, text_length + (block - text_blocks) * rows)
    stop = tl.minimum(start + rows, tl.where(is_text, text_length, tokens))
    part = tl.where(is_text, 1, 0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    by = tl.load(scale + item * scale_item + part * scale_part + column, inside, 0.0).to(tl.float32)
    factor = tl.load(weight + column, inside, 0.0).to(tl.float32) * (1.0 + by)
    if GATED:
        opening = tl.load(gate + item * gate_item + part * gate_part + column, inside, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    of_gate = tl.zeros((BLOCK,), tl.float32)
    for token in range(start, stop):
        row = item * tokens + token
        g = tl.load(gradient + item * gradient_item + token * gradient_token + column, inside, 0.0)
        g = g.to(tl.float32)
        value = tl.load(x + item * x_item + token * x_token + column, inside, 0.0).to(tl.float32)
        mean, rstd = tl.load(means + row), tl.load(rstds + row)
        normed = tl.where(inside, (value - mean) * rstd, 0.0)
        inner = g * factor
        result = inner - tl.sum(inner, 0) / WIDTH - normed * (tl.sum(inner * normed, 0) / WIDTH)
        result = result * rstd
        if NORM_SUMS:
            total += g
            along += g * normed
        if GATED:
            past = tl.load(outer + item * outer_item + token * outer_token + column, inside, 0.0)
            result += past.to(tl.float32)
            tl.store(of_branch + row * WIDTH + column, opening * result, inside)
        tl.store(of_x + row * WIDTH + column, result, inside)
        if GATE_SUMS:
            added = tl.load(branch + item * branch_item + token * branch_token + column, inside, 0.0)
            of_gate += result * added.to(tl.float32)
    count = tl.num_programs(1) * tl.num_programs(0)
    place = item * tl.num_programs(0) + block
    if NORM_SUMS:
        tl.store(partial + place * WIDTH + column, total, inside)
        tl.store(partial + (count + place) * WIDTH + column, along, inside)
    if GATE_SUMS:
        tl.store(partial + (2 * count + place) * WIDTH + column, of_gate, inside)


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor,
    scale: Tensor,
    text_length: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """x' (None without a branch), h, mean and 1 / deviation."""
    gated = branch is not None
    x, shift, scale, out = with_rows(x), with_rows(shift), with_rows(scale), tokens_like(x)
    moved = tokens_like(x) if gated else None
    branch, gate = (with_rows(branch), with_rows(gate)) if gated else (x, shift)
    batch, tokens, width = x.shape
    mean, rstd = (x.new_empty((batch, tokens), dtype=torch.float32) for _ in range(2))
    block, warps = block_of(width)
    with torch.cuda.device_of(x):
        _forward[(batch * tokens,)](
            x, branch, gate, weight, bias, shift, scale, moved if gated else out, out, mean, rstd,
            *x.stride()[:2], *branch.stride()[:2], *pair_strides(gate),
            *pair_strides(shift), *pair_strides(scale),
            tokens, text_length, eps,
            WIDTH=width, BLOCK=block, GATED=gated, num_warps=warps,
        )  # fmt: skip
    return moved, out, mean, rstd


def backward(
    outer: Tensor | None,
    gradient: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    scale: Tensor,
    text_length: int,
    sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of x and branch (None without a gate), the two sums of the norm and that of the gate."""
    gated, gate_sums = gate is not None, branch is not None
    gradient, x, scale = with_rows(gradient), with_rows(x), with_rows(scale)
    of_x, of_branch = tokens_like(x), tokens_like(x) if gated else None
    outer, gate = (with_rows(outer), with_rows(gate)) if gated else (gradient, scale)
    branch = with_rows(branch) if gate_sums else x
    batch, tokens, width = x.shape
    block, warps = block_of(width)
    rows = ROWS if sums or gate_sums else 1
    text_blocks, blocks = blocks_of(tokens, text_length, rows)
    partial = x.new_empty((3, batch, blocks if sums or gate_sums else 0, width), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward[(blocks, batch)](
            outer, gradient, x, branch, gate, mean, rstd, weight, scale,
            of_x, of_branch if gated else of_x, partial,
            *outer.stride()[:2], *gradient.stride()[:2], *x.stride()[:2], *branch.stride()[:2],
            *pair_strides(gate), *pair_strides(scale),
            tokens, text_length, text_blocks, rows,
            WIDTH=width, BLOCK=block, GATED=gated, NORM_SUMS=sums, GATE_SUMS=gate_sums, num_warps=warps,
        )  # fmt: skip
    parts = scale.shape[1]
    total, along, of_gate = (
        sum_of_blocks(partial[i], text_blocks, parts) if wanted else sums_like(x, scale)
        for i, wanted in enumerate((sums, sums, gate_sums))
    )
    return of_x, of_branch, total, along, of_gate
