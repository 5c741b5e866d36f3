"""Layer norm and modulation of the joint [text | video] sequence, with or without the gated residual before them.

    norm_modulate          h = LN(x) (1 + scale) + shift                               2 passes over the tokens
    gate_norm_modulate     x' = x + gate branch,  h = LN(x') (1 + scale) + shift       4

``shift``, ``scale`` and ``gate`` are pairs (B or 1, 2, D): [:, 0] for the video tokens, [:, 1] for the text tokens, as
the adaLN weights have them. B or 1: a batch may share its timestep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox.kernels.add_gated import add_gated_backward_plain, add_gated_formula, add_gated_plain
from cogvideox.kernels.forms import (
    compiler_fuses,
    has_kernel,
    norm_parameter,
    parts,
    sums_like,
    to_pair,
    tokens_like,
    wide,
)


def norm_modulate(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor, text_length: int) -> Tensor:
    """LN(x) (1 + scale) + shift.  x: (B, S, D), text first. Returns that shape."""
    if compiler_fuses(x):
        return norm_modulate_formula(x, norm, shift, scale, text_length)
    return _operator(x, norm.weight, norm.bias, norm.eps, shift, scale, text_length)[0]


def gate_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    norm: nn.LayerNorm,
    shift: Tensor,
    scale: Tensor,
    text_length: int,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate branch, and LN(x') (1 + scale) + shift.  x, branch: (B, S, D), text first. Returns both."""
    if compiler_fuses(x):
        x = add_gated_formula(x, branch, gate, text_length)
        return x, norm_modulate_formula(x, norm, shift, scale, text_length)
    parameters = norm.weight, norm.bias, norm.eps
    x, h, _, _ = _gated_operator(x, branch, gate, *parameters, shift, scale, text_length)
    return x, h


def norm_modulate_formula(
    x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor, text_length: int
) -> Tensor:
    normed = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    video, text = parts(normed, text_length)
    text = torch.addcmul(shift[:, 1:], text, 1 + scale[:, 1:])
    return torch.cat((text, torch.addcmul(shift[:, :1], video, 1 + scale[:, :1])), dim=1)


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor, scale: Tensor, text_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = norm_parameter(weight, x), norm_parameter(bias, x)
    out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    for index, tokens in enumerate(parts(out, text_length)):
        if tokens.shape[1]:
            pair = slice(index, index + 1)
            torch.addcmul(shift[:, pair], tokens, 1 + scale[:, pair], out=tokens)
    return out, mean.squeeze(-1), rstd.squeeze(-1)


def _backward_plain(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    scale: Tensor,
    text_length: int,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # The norm of one part of one item, modulated, is a layer norm whose weight is weight (1 + scale).
    out, total, along = tokens_like(x), sums_like(x, scale), sums_like(x, scale)
    given = (parts(t, text_length) for t in (out, gradient, x, mean[..., None], rstd[..., None]))
    for index, tensors in enumerate(zip(*given, strict=True)):
        if not tensors[0].shape[1]:
            continue
        factor = weight.to(wide(x)) * (1 + scale[:, index].to(wide(x)))
        factor = norm_parameter(factor, x).expand(len(x), -1)
        for item, (place, *own) in enumerate(zip(*tensors, strict=True)):
            g, tokens, own_mean, own_rstd = (t.contiguous() for t in own)
            of_x, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                g, tokens, x.shape[-1:], own_mean, own_rstd, factor[item], factor[item], [True, sums, sums]
            )
            place.copy_(of_x)
            if sums:
                total[item, index], along[item, index] = of_bias, of_weight
    return out, total, along


_NORM = "Tensor weight, Tensor bias, float eps, Tensor shift, Tensor scale, int text_length"


@torch.library.custom_op(
    "cogvideox::norm_modulate",
    mutates_args=(),
    schema=f"(Tensor x, {_NORM}) -> (Tensor, Tensor, Tensor)",
)
def _operator(x, weight, bias, eps, shift, scale, text_length):
    """h, and the mean and 1 / deviation of every token of x: (B, S), float32 or wider."""
    if has_kernel(x):
        from cogvideox.kernels.on_cuda import norm_modulate as on_cuda

        return on_cuda.forward(x, None, None, weight, bias, eps, shift, scale, text_length)[1:]
    return _plain(x, weight, bias, eps, shift, scale, text_length)


@torch.library.custom_op(
    "cogvideox::gate_norm_modulate",
    mutates_args=(),
    schema=f"(Tensor x, Tensor branch, Tensor gate, {_NORM}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _gated_operator(x, branch, gate, weight, bias, eps, shift, scale, text_length):
    """x', h, and the mean and 1 / deviation of every token of x'."""
    if has_kernel(x):
        from cogvideox.kernels.on_cuda import norm_modulate as on_cuda

        return on_cuda.forward(x, branch, gate, weight, bias, eps, shift, scale, text_length)
    x = add_gated_plain(x, branch, gate, text_length)
    return x, *_plain(x, weight, bias, eps, shift, scale, text_length)


_BACKWARD = "Tensor mean, Tensor rstd, Tensor weight, Tensor scale, int text_length, bool sums"


@torch.library.custom_op(
    "cogvideox::norm_modulate_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor x, {_BACKWARD}) -> (Tensor, Tensor, Tensor)",
)
def _backward_operator(gradient, x, mean, rstd, weight, scale, text_length, sums):
    """The gradient of x, and sums over tokens of g and of g (x - mean) rstd: (B, 2, D), zeros where not asked for."""
    if has_kernel(x):
        from cogvideox.kernels.on_cuda import norm_modulate as on_cuda

        of_x, _, total, along, _ = on_cuda.backward(
            None, gradient, x, None, None, mean, rstd, weight, scale, text_length, sums
        )
        return of_x, total, along
    return _backward_plain(gradient, x, mean, rstd, weight, scale, text_length, sums)


@torch.library.custom_op(
    "cogvideox::gate_norm_modulate_backward",
    mutates_args=(),
    schema="(Tensor outer, Tensor gradient, Tensor x, Tensor? branch, Tensor gate, "
    f"{_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gated_backward_operator(outer, gradient, x, branch, gate, mean, rstd, weight, scale, text_length, sums):
    """Gradients of x and of branch, the two sums of the norm, and that of g branch (zeros where branch is None).

    outer: the gradient of x' that does not come through the norm.
    """
    if has_kernel(x):
        from cogvideox.kernels.on_cuda import norm_modulate as on_cuda

        return on_cuda.backward(
            outer, gradient, x, branch, gate, mean, rstd, weight, scale, text_length, sums
        )
    of_x, total, along = _backward_plain(gradient, x, mean, rstd, weight, scale, text_length, sums)
    of_x.add_(outer)
    of_branch, of_gate = add_gated_backward_plain(of_x, branch, gate, text_length)
    return of_x, of_branch, total, along, of_gate


def _statistics_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(x.shape[:2], dtype=wide(x), device=x.device) for _ in range(2))


@_operator.register_fake
def _(x, weight, bias, eps, shift, scale, text_length):
    return tokens_like(x), *_statistics_like(x)


@_gated_operator.register_fake
def _(x, branch, gate, weight, bias, eps, shift, scale, text_length):
    return tokens_like(x), tokens_like(x), *_statistics_like(x)


@_backward_operator.register_fake
def _(gradient, x, mean, rstd, weight, scale, text_length, sums):
    return tokens_like(x), sums_like(x, scale), sums_like(x, scale)


@_gated_backward_operator.register_fake
def _(outer, gradient, x, branch, gate, mean, rstd, weight, scale, text_length, sums):
    return tokens_like(x), tokens_like(x), sums_like(x, scale), sums_like(x, scale), sums_like(x, gate)


# --- gradients ------------------------------------------------------------------------------------------------------


def _of_modulation(
    weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, total: Tensor, along: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, bias, shift and scale, from sums over tokens of g and of g (x - mean) rstd."""
    factor = 1 + scale.to(total.dtype)
    of_weight, of_bias = (factor * along).sum(dim=(0, 1)), (factor * total).sum(dim=(0, 1))
    of_scale = weight.to(total.dtype) * along + bias.to(total.dtype) * total
    return (
        of_weight.to(weight.dtype),
        of_bias.to(bias.dtype),
        to_pair(total, shift),
        to_pair(of_scale, scale),
    )


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, _, shift, scale, ctx.text_length = inputs
    _, mean, rstd = output
    ctx.sums = any(ctx.needs_input_grad[i] for i in (1, 2, 4, 5))
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, shift, scale)


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple:
    x, mean, rstd, weight, bias, shift, scale = ctx.saved_tensors
    of_x, *both = _backward_operator(gradient, x, mean, rstd, weight, scale, ctx.text_length, ctx.sums)
    of_weight, of_bias, of_shift, of_scale = (
        _of_modulation(weight, bias, shift, scale, *both) if ctx.sums else [None] * 4
    )
    return of_x, of_weight, of_bias, None, of_shift, of_scale, None


def _keep_gated(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, branch, gate, weight, bias, _, shift, scale, ctx.text_length = inputs
    x, _, mean, rstd = output
    ctx.sums = any(ctx.needs_input_grad[i] for i in (3, 4, 6, 7))
    branch = branch if ctx.needs_input_grad[2] else None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, branch, gate, mean, rstd, weight, bias, shift, scale)


def _backward_gated(ctx: Any, outer: Tensor, gradient: Tensor, *_: Any) -> tuple:
    x, branch, gate, mean, rstd, weight, bias, shift, scale = ctx.saved_tensors
    of_x, of_branch, total, along, of_gate = _gated_backward_operator(
        outer, gradient, x, branch, gate, mean, rstd, weight, scale, ctx.text_length, ctx.sums
    )
    of_weight, of_bias, of_shift, of_scale = (
        _of_modulation(weight, bias, shift, scale, total, along) if ctx.sums else [None] * 4
    )
    of_gate = None if branch is None else to_pair(of_gate, gate)
    return of_x, of_branch, of_gate, of_weight, of_bias, None, of_shift, of_scale, None


_operator.register_autograd(_backward, setup_context=_keep)
_gated_operator.register_autograd(_backward_gated, setup_context=_keep_gated)
