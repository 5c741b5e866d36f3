"""The Triton kernels on a CPU: tests that ``test_triton_kernels.py`` runs in a process where Triton interprets them.

The reference is the formula in float64 and its gradients by autograd.
"""

from __future__ import annotations

import pytest
import torch
from test_kernels import heads, layer_norm, leaves, randn
from torch import Tensor, nn

from cogvideox.kernels import add_gated as gates
from cogvideox.kernels import norm_modulate as norms
from cogvideox.kernels import norm_rotate as rotations

# Relative to the largest value. float32: sums of 3072 terms. bfloat16: 2^-9 per rounding, of the result and of x'
# before its norm, whose error a modulation multiplies by up to 3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


@pytest.fixture(autouse=True)
def _kernels_for_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gates, norms, rotations):
        monkeypatch.setattr(module, "has_kernel", lambda x: True)


def compare(function, formula, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """``function`` on inputs of ``dtype`` and ``formula`` on the same numbers in float64: values and gradients."""

    def run(f, given):
        given = leaves(*given)
        outputs = f(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seeds = [randn(*out.shape, seed=90 + i, dtype=dtype).to(out.dtype) for i, out in enumerate(outputs)]
        return outputs, torch.autograd.grad(outputs, given, seeds)

    low = [t.detach().to(dtype) for t in inputs]
    results = zip(run(function, low), run(formula, [t.double() for t in low]), strict=True)
    for found, expected in results:
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            atol = TOLERANCE[dtype] * max(1.0, b.abs().max().item())
            torch.testing.assert_close(a.double(), b, atol=atol, rtol=0)


def norm_of(weight: Tensor, bias: Tensor, eps: float = 1e-5) -> nn.LayerNorm:
    """A layer norm that uses exactly these tensors, so that gradients reach them."""
    norm = nn.LayerNorm(len(weight), eps=eps, device="meta")
    del norm.weight, norm.bias
    norm.weight, norm.bias = weight, bias
    return norm


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(48, torch.float32), (48, torch.bfloat16), (1920, torch.float32), (3072, torch.bfloat16)],
)
def test_gate_norm_and_modulation(width: int, dtype: torch.dtype) -> None:
    """41 text and 3 video tokens: more than one block of rows and a rest; inputs are slices of larger tensors."""
    text, rows = 41, 1 if width == 1920 else 2
    x = randn(2, 46, width)[:, 2:]
    modulation = 0.5 * randn(rows, 12 * width, seed=2)
    gate, shift, scale = modulation.unflatten(-1, (2, 6, width)).unbind(2)[:3]
    given = layer_norm(width, 5)
    inputs = [x, randn(2, 44, width, seed=1), gate, shift, scale, given.weight, given.bias]

    def both(x, branch, gate, shift, scale, weight, bias):
        return norms.gate_norm_modulate(x, branch, gate, norm_of(weight, bias), shift, scale, text)

    def formula(x, branch, gate, shift, scale, weight, bias):
        moved = gates.add_gated_formula(x, branch, gate, text)
        return moved, norms.norm_modulate_formula(moved, norm_of(weight, bias), shift, scale, text)

    compare(both, formula, inputs, dtype)
    compare(
        lambda x, shift, scale, w, b: norms.norm_modulate(x, norm_of(w, b), shift, scale, text),
        lambda x, shift, scale, w, b: norms.norm_modulate_formula(x, norm_of(w, b), shift, scale, text),
        [x, *inputs[3:]],
        dtype,
    )
    compare(
        lambda *given: gates.add_gated(*given, text),
        lambda *given: gates.add_gated_formula(*given, text),
        inputs[:3],
        dtype,
    )


def test_video_alone_and_frozen_parameters() -> None:
    """The final layer's pair has one part; a frozen network asks for the gradients of the tokens alone."""
    shift, scale = (randn(1, 1, 48, seed=s, dtype=torch.float32) for s in (2, 3))
    norm = layer_norm(48, 5, torch.float32).requires_grad_(False)
    exact = layer_norm(48, 5).requires_grad_(False)
    compare(
        lambda x: norms.norm_modulate(x, norm, shift, scale, 0),
        lambda x: norms.norm_modulate_formula(x, exact, shift.double(), scale.double(), 0),
        [randn(2, 5, 48)],
        torch.float32,
    )
    gate = torch.cat((shift, scale), dim=1)
    compare(
        lambda x, branch: norms.gate_norm_modulate(x, branch, gate, norm, gate, gate, 2),
        lambda x, branch: (
            y := gates.add_gated_formula(x, branch, gate.double(), 2),
            norms.norm_modulate_formula(y, exact, gate.double(), gate.double(), 2),
        ),
        [randn(2, 5, 48), randn(2, 5, 48, seed=1)],
        torch.float32,
    )
    compare(
        lambda x, branch: gates.add_gated(x, branch, gate, 2),
        lambda x, branch: gates.add_gated_formula(x, branch, gate.double(), 2),
        [randn(2, 5, 48), randn(2, 5, 48, seed=1)],
        torch.float32,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("dim", "normed", "rotated"), [(64, 1, 1), (64, 1, 0), (48, 0, 1), (48, 1, 1), (16, 1, 1)]
)
def test_norm_and_rotation_of_heads(dim: int, normed: int, rotated: int, dtype: torch.dtype) -> None:
    """88 heads: more than one block and a rest."""
    angle = randn(11, dim // 2, seed=3)
    rope = (angle.cos(), angle.sin()) if rotated else None
    parameters = [*layer_norm(dim, 5).parameters(), *layer_norm(dim, 7).parameters()] if normed else []

    def both(query, key, *given):
        pair = (norm_of(*given[:2]), norm_of(*given[2:])) if normed else None
        tables = rope and tuple(table.float() for table in rope)
        return rotations.norm_rotate(query, key, pair, tables)

    def formula(query, key, *given):
        pair = (norm_of(*given[:2]), norm_of(*given[2:])) if normed else (None, None)
        tables = rope and tuple(table.float().double() for table in rope)
        return tuple(
            rotations.norm_rotate_formula(x, norm, tables) for x, norm in zip((query, key), pair, strict=True)
        )

    compare(both, formula, [*heads(dim), *parameters], dtype)


def test_programs_that_take_several_blocks_sum_over_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogvideox.kernels.on_cuda import norm_rotate as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    test_norm_and_rotation_of_heads(16, 1, 1, torch.float32)
