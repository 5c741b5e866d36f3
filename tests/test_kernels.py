"""The element-wise operators of a layer: plain forms against formulas, their gradients, and torch's own check."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox.kernels import add_gated as gates
from cogvideox.kernels import gelu as gelus
from cogvideox.kernels import norm_modulate as norms
from cogvideox.kernels import norm_rotate as rotations

TEXT = 3
WIDTHS = (48, 33)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer_norm(width: int, seed: int, dtype: torch.dtype = torch.float64, eps: float = 1e-5) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=eps, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * randn(width, seed=seed))
        norm.bias.copy_(0.2 * randn(width, seed=seed + 1))
    return norm


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def same_gradients(function, formula, inputs: list[Tensor], atol: float = 1e-10) -> None:
    """Values and all gradients of a function that sums nothing, weighted so that no symmetry hides an error."""

    def run(f):
        outputs = f(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((out * randn(*out.shape, seed=90 + i)).sum() for i, out in enumerate(outputs))
        return outputs, torch.autograd.grad(loss, inputs)

    for found, expected in zip(run(function), run(formula), strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_and_modulation_are_the_formula_with_its_gradients(width: int, shared: bool) -> None:
    rows = 1 if shared else 2
    inputs = leaves(
        randn(2, 11, width), randn(2, 11, width, seed=1), *(randn(rows, 2, width, seed=s) for s in (2, 3, 4))
    )
    norm = layer_norm(width, 5)
    inputs += [norm.weight, norm.bias]

    same_gradients(
        lambda x, b, gate, shift, scale, *_: norms.gate_norm_modulate(x, b, gate, norm, shift, scale, TEXT),
        lambda x, b, gate, shift, scale, *_: (
            y := gates.add_gated_formula(x, b, gate, TEXT),
            norms.norm_modulate_formula(y, norm, shift, scale, TEXT),
        ),
        inputs,
    )
    x, _, _, shift, scale, *parameters = inputs
    same_gradients(
        lambda x, shift, scale, *_: norms.norm_modulate(x, norm, shift, scale, TEXT),
        lambda x, shift, scale, *_: norms.norm_modulate_formula(x, norm, shift, scale, TEXT),
        [x, shift, scale, *parameters],
    )


@pytest.mark.parametrize("text", [0, TEXT, 11])
def test_a_gated_residual_is_the_formula_with_its_gradients(text: int) -> None:
    """Also without text, and without video."""
    inputs = leaves(randn(2, 11, 33), randn(2, 11, 33, seed=1), randn(2, 2, 33, seed=2))
    same_gradients(
        lambda x, branch, gate: gates.add_gated(x, branch, gate, text),
        lambda x, branch, gate: gates.add_gated_formula(x, branch, gate, text),
        inputs,
    )


def heads(dim: int, tokens: int = 11) -> tuple[Tensor, Tensor]:
    """Queries and keys as the network has them: views of one product."""
    product = randn(2, tokens, 3, 4, dim)
    query, key, _ = product.unbind(2)
    return query.transpose(1, 2), key.transpose(1, 2)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [16, 24])
def test_norm_and_rotation_are_the_formula_with_its_gradients(dim: int, normed: bool, rotated: bool) -> None:
    angle = randn(11, dim // 2, seed=3)
    rope = (angle.cos(), angle.sin()) if rotated else None
    pair = (layer_norm(dim, 5), layer_norm(dim, 7)) if normed else None
    parameters = [p for norm in pair or () for p in norm.parameters()]
    same_gradients(
        lambda q, k, *_: rotations.norm_rotate(q, k, pair, rope),
        lambda q, k, *_: tuple(
            rotations.norm_rotate_formula(x, norm, rope)
            for x, norm in zip((q, k), pair or (None, None), strict=True)
        ),
        [*leaves(*heads(dim)), *parameters],
    )


def test_a_rotation_is_the_product_of_complex_numbers_and_text_rows_keep_their_bits() -> None:
    query, key = (x.float() for x in heads(16))
    angle = randn(11, 8, seed=3, dtype=torch.float32)
    angle[:TEXT] = 0
    turned, _ = rotations.norm_rotate(query, key, None, (angle.cos(), angle.sin()))
    assert torch.equal(turned[:, :, :TEXT], query[:, :, :TEXT])
    numbers = torch.view_as_complex(query.double().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(numbers * torch.exp(1j * angle.double())).flatten(-2)
    torch.testing.assert_close(turned.double(), expected, atol=1e-6, rtol=0)  # float32's rounding


def test_queries_and_keys_leave_in_the_order_that_attention_reads_and_are_not_overwritten() -> None:
    query, key = heads(16)
    before = query.clone()
    for x in rotations.norm_rotate(query, key, (layer_norm(16, 1), layer_norm(16, 3)), None):
        assert x.transpose(1, 2).is_contiguous()
    assert torch.equal(query, before)


@pytest.mark.parametrize("size", [(7, 5), (3, 50_001)])
def test_gelu_is_torch_s_tanh_form_with_its_gradient(size: tuple[int, int]) -> None:
    """One block and several with a rest."""
    linear = nn.Linear(size[0], size[1], dtype=torch.float64)
    x = randn(4, size[0]).requires_grad_()
    same_gradients(
        lambda x, *_: gelus.linear_gelu(linear, x),
        lambda x, *_: F.gelu(linear(x), approximate="tanh"),
        [x, *linear.parameters()],
    )


def test_gelu_keeps_the_ends_of_the_number_line() -> None:
    x = torch.tensor([-1e30, -1e4, -20.0, 0.0, 20.0, 1e4, 1e12, float("nan")], dtype=torch.float32)
    found = gelus._operator(x)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 20.0, 1e4, 1e12, float("nan")])
    torch.testing.assert_close(found, expected, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_at_the_end(dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in heads(16))
    pair = layer_norm(16, 1, torch.float32), layer_norm(16, 3, torch.float32)
    angle = randn(11, 8, seed=3, dtype=torch.float32)
    rope = angle.cos(), angle.sin()
    exact = rotations.norm_rotate(query.float(), key.float(), pair, rope)
    for low, high in zip(rotations.norm_rotate(query, key, pair, rope), exact, strict=True):
        assert torch.equal(low, high.to(dtype))
    hidden = randn(5, 40, seed=2, dtype=dtype)
    assert torch.equal(gelus._operator(hidden), gelus._operator(hidden.float()).to(dtype))


def test_torch_finds_the_operators_whole() -> None:
    """opcheck: schema, no hidden aliasing, shapes without values, autograd registration, and tracing."""
    x, branch = randn(2, 7, 12), randn(2, 7, 12, seed=1)
    pairs = [randn(2, 2, 12, seed=s) for s in (2, 3, 4)]
    parameters = randn(12, seed=5), randn(12, seed=6)
    query, key = heads(16)
    tables = randn(11, 8, seed=7), randn(11, 8, seed=8)
    weights = [randn(16, seed=s) for s in range(4)]
    some, ones = leaves(x, branch), (randn(2, 7), randn(2, 7))
    cases = {
        norms._operator: (some[0], *parameters, 1e-5, *pairs[:2], TEXT),
        norms._gated_operator: (*some, pairs[0], *parameters, 1e-5, *pairs[1:], TEXT),
        gates._operator: (*some, pairs[0], TEXT),
        rotations._operator: (*leaves(query, key), *weights, 1e-6, *tables),
        gelus._operator: (some[0],),
        norms._backward_operator: (x, branch, *ones, parameters[0], pairs[0], TEXT, True),
        norms._gated_backward_operator: (
            *(x, branch, randn(2, 7, 12, seed=9), None),
            *(pairs[0], *ones, parameters[0], pairs[1], TEXT, False),
        ),
        gates._backward_operator: (x, branch, pairs[0], TEXT),
        rotations._backward_operator: (*heads(16), query, key, *weights[:2], 1e-6, *tables, True),
        gelus._backward_operator: (x, branch),
    }
    for operator, arguments in cases.items():
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("trained", ["everything", "the tokens alone"])
def test_what_is_kept_for_the_gradients_is_what_went_in(trained: str) -> None:
    """Norm: the tokens and two numbers each. Gate: the branch, where the gate trains. Rotation: the product's views."""
    everything = trained == "everything"
    x, branch, product = leaves(randn(2, 11, 24), randn(2, 11, 24, seed=1), randn(2, 11, 3, 4, 16))
    pairs = [randn(1, 2, 24, seed=s).requires_grad_(everything) for s in (2, 3, 4)]
    norm, pair = layer_norm(24, 5), (layer_norm(16, 6), layer_norm(16, 8))
    for module in (norm, *pair):
        module.requires_grad_(everything)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > 24 * 2 * 2:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    query, key, _ = (part.transpose(1, 2) for part in product.unbind(2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = norms.gate_norm_modulate(x, branch, pairs[0], norm, *pairs[1:], TEXT)
        rotations.norm_rotate(query, key, pair, None)
    wanted = {outputs[0], product} | ({branch} if everything else set())
    assert set(kept) == {t.untyped_storage().data_ptr() for t in wanted}
