"""Eight-bit weights: exact where they can be, within the error of their steps elsewhere, and measured on request."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from transformer_cases import full, inputs, randomise, tiny

from cogvideox.model.lora import inject_lora
from cogvideox.model.quantize import EightBitLinear, check_method, quantize


def linear(inputs: int = 64, outputs: int = 32, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def test_int8_is_within_half_a_step_of_every_weight() -> None:
    original = linear()
    layer = EightBitLinear(original, "int8")
    step = original.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((layer.dequantised() - original.weight).abs() <= 0.5001 * step).all()
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().max() == 127


def test_fp8_is_within_half_a_unit_in_the_last_place() -> None:
    """Three bits of mantissa: 2^-4 of the value; below 2^-6 of the scale's unit steps of 2^-9 (subnormal)."""
    original = linear()
    layer = EightBitLinear(original, "fp8")
    error = (layer.dequantised() - original.weight).abs()
    bound = torch.maximum(original.weight.abs() * 2**-4, layer.scale[:, None] * 2**-10)
    assert (error <= 1.001 * bound).all()
    assert layer.weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("method", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_that_of_the_dequantised_weight(method: str, dtype: torch.dtype) -> None:
    layer = EightBitLinear(linear().to(dtype), method)
    x = 30 * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x, layer.dequantised(), layer.bias.float())
    found = layer(x.to(dtype))
    assert found.dtype == dtype
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.float(), expected, atol=rounding * 30, rtol=rounding)


def test_a_channel_of_zeros_and_a_missing_bias_are_kept() -> None:
    original = linear(bias=False)
    original.weight[3] = 0
    for method in ("int8", "fp8"):
        layer = EightBitLinear(original, method)
        y = layer(torch.ones(1, 64))
        assert y[0, 3] == 0 and torch.isfinite(y).all() and layer.bias is None


@pytest.mark.parametrize(("method", "most"), [("int8", 0.02), ("fp8", 0.08)])
def test_the_report_is_the_difference_of_one_forward(method: str, most: float) -> None:
    net = randomise(tiny("5b")).requires_grad_(False)
    arguments = inputs(net)
    before = net(**arguments)
    report = quantize(net, method, arguments)
    after = net(**arguments)
    expected = ((after - before).norm() / before.norm()).item()
    assert report.relative_error == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < most
    assert f"relative error of one forward {expected:.2e}" in str(report)


def test_the_layers_shrink_and_the_rest_keeps_its_precision() -> None:
    net = full("5b", dtype=torch.bfloat16, num_layers=2)
    kept = {n: p.dtype for n, p in net.named_parameters() if "transformer.layers" not in n}
    report = quantize(net, "int8")
    assert report.layers == 8 and report.relative_error is None
    assert report.bytes_after / report.bytes_before == pytest.approx(0.5, abs=0.01)
    # Two layers of 12 D^2 weights, one byte each.
    assert report.bytes_after == pytest.approx(2 * 12 * 3072**2, rel=0.01)
    assert {n: p.dtype for n, p in net.named_parameters() if "transformer.layers" not in n} == kept
    norms = [n for n, p in net.named_parameters() if n.startswith("transformer.layers")]
    assert norms and all("layernorm" in n for n in norms)


def test_lora_beside_the_weights_stays_in_full() -> None:
    net = randomise(tiny("5b")).requires_grad_(False)
    inject_lora(net, rank=2, layers=("query_key_value", "dense"), transformer_layers=[1])
    randomise(net)
    matrices = {n: p.clone() for n, p in net.named_parameters() if "matrix_" in n}
    report = quantize(net, "int8", inputs(net))
    assert isinstance(net.transformer.layers[1].attention.dense.original, EightBitLinear)
    assert report.layers == 8 and report.relative_error < 0.03
    assert all(torch.equal(dict(net.named_parameters())[n], m) for n, m in matrices.items())


def test_unknown_methods_missing_libraries_and_a_second_time_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = randomise(tiny("2b"))
    with pytest.raises(ValueError, match="sample.quantize='int4': expected null or one of int8, fp8"):
        quantize(net, "int4")
    quantize(net, "int8")
    with pytest.raises(ValueError, match="no linear layers left"):
        quantize(net, "fp8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchao_int8 needs torchao, .* or sample.quantize=int8"):
        check_method("torchao_int8")


@pytest.mark.parametrize("method", ["torchao_int8", "torchao_fp8"])
def test_torchao_is_close_to_our_own(method: str) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed (pip install torchao runs this test)")
    net = randomise(tiny("5b", hidden_size=64, num_attention_heads=4)).requires_grad_(False)
    arguments = inputs(net)
    assert quantize(net, method, arguments).relative_error < 0.08
