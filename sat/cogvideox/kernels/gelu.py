"""GELU in its tanh form (Hendrycks & Gimpel 2016, section 2).

GELU(x) = 0.5 x (1 + tanh u),  u = sqrt(2 / pi) (x + 0.044715 x^3)

linear_gelu      GELU(linear(x)): in the product's epilogue where CUDA can, so that the hidden layer, the largest
                 tensor of the network, is written once and not read and written again
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import mm_flop, register_flop_formula

from cogvideox.kernels.forms import compiler_fuses, tokens_like, wide

_CUBIC = 0.044715
_TWICE = 2 * math.sqrt(2 / math.pi)
_BLOCK = 1 << 16
"""Elements whose intermediates stay in a core's cache: 256 KiB in float32."""


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """GELU(linear(x)).  linear: ``nn.Linear``, or what stands for one;  x: (..., in). Returns (..., out)."""
    if x.device.type == "cpu":
        hidden = linear(x)
        return F.gelu(hidden, approximate="tanh") if compiler_fuses(x) else _operator(hidden)
    # The gradient needs what goes into the GELU; an adapter's or an eight-bit product is more than one product.
    if torch.is_grad_enabled() or not _is_one_product(linear):
        return F.gelu(linear(x), approximate="tanh")
    # CUDA's epilogue is the tanh form. (A CPU's would be the other one, erf.)
    rows = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


@register_flop_formula(torch.ops.aten._addmm_activation)
def _flops(bias: Any, rows: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """For torch's own counter, which would find none in it."""
    return mm_flop(rows, weight)


def _is_one_product(linear: nn.Module) -> bool:
    """And nobody looks at what it gives.  (torchao's weights are no plain parameters.)"""
    if not isinstance(linear, nn.Linear) or type(linear.weight) is not nn.Parameter or linear.bias is None:
        return False
    return not (linear._forward_hooks or linear._forward_pre_hooks)


def _plain(x: Tensor) -> Tensor:
    """As x sigmoid(2 u), the same function: torch's vectorised tanh costs 3.5 times its exp (CPU)."""
    out = tokens_like(x)
    blocks = zip(*(t.contiguous().view(-1).split(_BLOCK) for t in (x, out)), strict=True)
    for block, place in blocks:
        value = block.to(wide(x))
        result = place if place.dtype == value.dtype else torch.empty_like(value)
        _sigmoid(value, out=result).mul_(value)
        if result is not place:
            place.copy_(result)
    return out


def _backward_plain(gradient: Tensor, x: Tensor) -> Tensor:
    """s + 2 u' x s (1 - s), with s = sigmoid(2 u) and u' = du / dx."""
    out = tokens_like(x)
    blocks = zip(*(t.contiguous().view(-1).split(_BLOCK) for t in (x, gradient, out)), strict=True)
    for block, g, place in blocks:
        value = block.to(wide(x))
        gate = _sigmoid(value, out=torch.empty_like(value))
        slope = torch.addcmul(value.new_full((1,), _TWICE), value, value, value=3 * _TWICE * _CUBIC)
        slope.mul_(value).mul_(gate)
        slope.addcmul_(slope, gate, value=-1).add_(gate)
        torch.mul(slope, g, out=place) if place.dtype == slope.dtype else place.copy_(slope.mul_(g))
    return out


def _sigmoid(x: Tensor, out: Tensor) -> Tensor:
    """sigmoid(2 u) = (1 + tanh u) / 2, into ``out``."""
    return torch.addcmul(x.new_full((1,), _TWICE), x, x, value=_TWICE * _CUBIC, out=out).mul_(x).sigmoid_()


@torch.library.custom_op("cogvideox::gelu", mutates_args=(), schema="(Tensor x) -> Tensor")
def _operator(x):
    return _plain(x)


@torch.library.custom_op(
    "cogvideox::gelu_backward", mutates_args=(), schema="(Tensor gradient, Tensor x) -> Tensor"
)
def _backward_operator(gradient, x):
    return _backward_plain(gradient, x)


@_operator.register_fake
def _(x):
    return tokens_like(x)


@_backward_operator.register_fake
def _(gradient, x):
    return tokens_like(x)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    return _backward_operator(gradient, *ctx.saved_tensors)


_operator.register_autograd(_backward, setup_context=_keep)
