"""Linear layers in bf16 on CPUs with and without bf16 instructions."""

from __future__ import annotations

import pytest
import torch

from cogvideox.model import linear


@pytest.mark.parametrize("has_instructions", [False, True])
def test_a_bf16_product_is_the_exact_one_rounded_once(has_instructions: bool, monkeypatch) -> None:
    monkeypatch.setattr(linear, "has_bf16_products", lambda: has_instructions)
    torch.manual_seed(0)
    layer, x = linear.Linear(96, 40).bfloat16(), torch.randn(3, 7, 96).bfloat16()
    with torch.no_grad():
        y = layer(x)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    assert y.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; sums in float32 add nothing that is seen.
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_with_gradients_no_float32_copy_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(linear, "has_bf16_products", lambda: False)
    layer, x = linear.Linear(96, 40).bfloat16(), torch.randn(7, 96).bfloat16().requires_grad_()
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        layer(x)
    assert kept and set(kept) == {torch.bfloat16}


def test_other_dtypes_and_layers_without_bias_are_nn_linear(monkeypatch) -> None:
    monkeypatch.setattr(linear, "has_bf16_products", lambda: False)
    layer, x = linear.Linear(5, 4, bias=False), torch.randn(2, 5)
    with torch.no_grad():
        assert torch.equal(layer(x), x @ layer.weight.T)
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
