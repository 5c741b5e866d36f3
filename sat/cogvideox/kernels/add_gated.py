"""The gated residual of the joint [text | video] sequence: x + gate branch, in 3 passes over the tokens.

``gate`` is a pair (B or 1, 2, D): [:, 0] for the video tokens, [:, 1] for the text tokens, as the adaLN weights have
them. B or 1: a batch may share its timestep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogvideox.kernels.forms import compiler_fuses, has_kernel, parts, sums_like, to_pair, tokens_like


def add_gated(x: Tensor, branch: Tensor, gate: Tensor, text_length: int) -> Tensor:
    """x + gate branch.  x, branch: (B, S, D), text first. Returns that shape."""
    if compiler_fuses(x):
        return add_gated_formula(x, branch, gate, text_length)
    return _operator(x, branch, gate, text_length)


def add_gated_formula(x: Tensor, branch: Tensor, gate: Tensor, text_length: int) -> Tensor:
    (x_video, x_text), (video, text) = parts(x, text_length), parts(branch, text_length)
    return torch.cat(
        (torch.addcmul(x_text, text, gate[:, 1:]), torch.addcmul(x_video, video, gate[:, :1])), dim=1
    )


def add_gated_plain(x: Tensor, branch: Tensor, gate: Tensor, text_length: int) -> Tensor:
    out = tokens_like(x)
    # Into the parts of one tensor: concatenated parts would be written twice.
    of_parts = zip(*(parts(t, text_length) for t in (out, x, branch)), strict=True)
    for index, (place, own, added) in enumerate(of_parts):
        if place.shape[1]:
            torch.addcmul(own, added, gate[:, index : index + 1], out=place)
    return out


def add_gated_backward_plain(
    gradient: Tensor, branch: Tensor | None, gate: Tensor, text_length: int
) -> tuple[Tensor, Tensor]:
    out, sums = tokens_like(gradient), sums_like(gradient, gate)
    of_parts = zip(parts(out, text_length), parts(gradient, text_length), strict=True)
    for index, (place, g) in enumerate(of_parts):
        torch.mul(g, gate[:, index : index + 1], out=place)
        if branch is not None:
            sums[:, index] = (g * parts(branch, text_length)[index]).sum(dim=1, dtype=sums.dtype)
    return out, sums


@torch.library.custom_op(
    "cogvideox::add_gated",
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor gate, int text_length) -> Tensor",
)
def _operator(x, branch, gate, text_length):
    if has_kernel(x):
        from cogvideox.kernels.on_cuda import add_gated as on_cuda

        return on_cuda.forward(x, branch, gate, text_length)
    return add_gated_plain(x, branch, gate, text_length)


@torch.library.custom_op(
    "cogvideox::add_gated_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor? branch, Tensor gate, int text_length) -> (Tensor, Tensor)",
)
def _backward_operator(gradient, branch, gate, text_length):
    """The gradient of the branch, and the sum over tokens of g branch, (B, 2, D): zeros where branch is None."""
    if has_kernel(gradient):
        from cogvideox.kernels.on_cuda import add_gated as on_cuda

        return on_cuda.backward(gradient, branch, gate, text_length)
    return add_gated_backward_plain(gradient, branch, gate, text_length)


@_operator.register_fake
def _(x, branch, gate, text_length):
    return tokens_like(x)


@_backward_operator.register_fake
def _(gradient, branch, gate, text_length):
    return tokens_like(gradient), sums_like(gradient, gate)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, branch, gate, ctx.text_length = inputs
    # Where adaLN is frozen, the branch is not kept.
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate)


def _backward(ctx: Any, gradient: Tensor) -> tuple:
    branch, gate = ctx.saved_tensors
    of_branch, sums = _backward_operator(gradient, branch, gate, ctx.text_length)
    return gradient, of_branch, None if branch is None else to_pair(sums, gate), None


_operator.register_autograd(_backward, setup_context=_keep)
