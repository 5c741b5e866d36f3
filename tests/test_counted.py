"""Counts at the published sizes: the gates that are the same on every machine, and the counter behind them.

A gate's number stands in scripts/benchmark/gates.py. ``today`` there is what holds until its limit is reached.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cogvideox import flops
from cogvideox.plan import lora_parameters
from scripts.benchmark import counted, counting
from scripts.benchmark.counted import (
    DIFFUSERS,
    OURS,
    at_depth,
    continued,
    forward_case,
    forward_numbers,
    forward_pass,
    inference_config,
    training_case,
    training_config,
    training_numbers,
    training_pass,
    vae_case,
    vae_numbers,
)
from scripts.benchmark.counting import Counts
from scripts.benchmark.counting import counting as count
from scripts.benchmark.full_size import fused_attention, network
from scripts.benchmark.gates import COUNTED_GATES, Gate
from scripts.benchmark.results import Row

# Each is used by several tests and takes about a second.
forward_numbers, training_numbers, vae_numbers = map(
    functools.cache, (forward_numbers, training_numbers, vae_numbers)
)
VAE_CASES = [("decode", None), ("encode", 8), ("encode", None)]


# --------------------------------------------------------------------------------------------------------- the gates


@functools.cache
def our_rows() -> list[Row]:
    numbers = {forward_case(model): forward_numbers(model, OURS) for model in ("2B", "5B")}
    numbers |= {
        training_case(*case): training_numbers(*case, OURS)
        for case in (
            ("5B", "full", "none"),
            ("5B", "LoRA", "none"),
            ("5B", "LoRA", "full"),
            ("2B", "full", "full"),
        )
    }
    numbers |= {vae_case("5B", *case): vae_numbers("5B", OURS, *case) for case in VAE_CASES}
    return [Row("counted", case, OURS, counted=values) for case, values in numbers.items()]


@pytest.mark.parametrize("gate", COUNTED_GATES, ids=lambda gate: gate.what)
def test_counted_gate(gate: Gate) -> None:
    status, value = gate.status(our_rows())
    assert value is not None, f"no row decides the gate {gate.what!r}"
    assert gate.holds(value), f"{gate.what}: {value:.2f} {gate.unit}, {status}; {gate}"


# --------------------------------------------------- operations: ours, diffusers', in closed form, as published


@pytest.mark.parametrize(("model", "teraflops"), [("2B", 119.996), ("5B", 332.2), ("1.5-5B", 1479.2)])
def test_a_forward_pass_does_the_published_work_and_no_more(model: str, teraflops: float) -> None:
    ours, theirs = forward_numbers(model, OURS), forward_numbers(model, DIFFUSERS)
    assert ours["TFLOP per clip"] == theirs["TFLOP per clip"]
    assert ours["TFLOP per clip"] == pytest.approx(teraflops, rel=5e-5)  # the figures have four to six digits
    config = inference_config(model)
    t, clip = config.model.transformer, flops.clip_of(config, config.sample)
    assert ours["TFLOP per clip"] * 1e12 == pytest.approx(
        flops.forward_flops(t, clip).forward + once_per_clip(t), rel=1e-12
    )


def once_per_clip(t) -> int:
    """The time embedding's two layers and the final modulation, which the closed form of tokens leaves out."""
    d, e = t.hidden_size, t.time_embed_dim
    return 2 * (d + e) * e + 2 * e * 2 * d


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(
    ("model", "method"), [("2B", "full"), ("2B", "LoRA"), ("5B", "full"), ("5B", "LoRA")]
)
def test_a_training_step_does_the_work_of_the_closed_form(model: str, method: str, policy: str) -> None:
    config = training_config(model, method, policy)
    t, clip = config.model.transformer, flops.clip_of(config, config.data)
    adapters = lora_parameters(config) if config.lora else 0
    whole, _ = continued(config, lambda part: training_pass(part, OURS))
    planned = flops.step_flops(config, clip, adapters)
    d, e, s, n = t.hidden_size, t.time_embed_dim, clip.tokens, clip.video_tokens
    # No gradient of the network's inputs is taken: patches, text features, the sinusoid of the timestep.
    inputs = 2 * n * 4 * t.in_channels * d + 2 * clip.text_tokens * t.text_hidden_size * d
    if method == "full":
        assert whole.flops == planned + 3 * once_per_clip(t) - inputs - 2 * d * e
    else:
        # None below the first adapters either: the first layer's qkv, the embeddings, the modulations.
        first = 6 * s * d * d + 3 * 2 * s * d * config.lora.rank
        modulations = t.num_layers * 2 * e * 12 * d
        assert whole.flops == planned + once_per_clip(t) - inputs - first - modulations
    known = counted.KNOWN_COUNTS[training_case(model, method, policy)]["diffusers"]["TFLOP"]
    if method == "LoRA" and policy == "full":  # the MLP's second product is not computed again
        known -= t.num_layers * 8 * s * d * d / 1e12
    # Known to whole TFLOP, and with other counts of the first layer.
    assert whole.flops / 1e12 == pytest.approx(known, rel=3e-3)


def test_the_vae_of_diffusers_counts_what_is_published() -> None:
    decode, encode = (vae_numbers("5B", DIFFUSERS, *case) for case in VAE_CASES[:2])
    # All figures have three or four digits.
    assert decode["TFLOP"] == pytest.approx(315.0, rel=2e-4) and encode["TFLOP"] == pytest.approx(
        149.0, rel=5e-4
    )
    assert decode["live GB"] == pytest.approx(15.82, rel=1e-3) and encode["live GB"] == pytest.approx(
        6.59, rel=1e-3
    )
    assert decode["moved GB"] == pytest.approx(1304, rel=2e-3) and encode["moved GB"] == pytest.approx(
        403, rel=2e-3
    )


def test_ours_does_the_vae_s_work_in_half_of_the_memory_of_diffusers() -> None:
    for case, times in zip(VAE_CASES[:2], (0.5, 0.75), strict=True):
        ours, theirs = (vae_numbers("5B", who, *case) for who in (OURS, DIFFUSERS))
        assert ours["live GB"] <= times * theirs["live GB"] and ours["TFLOP"] <= theirs["TFLOP"]


# ------------------------------------------------------------------------------------------- traffic and kept tensors


@pytest.mark.parametrize(("model", "passes", "gigabytes"), [("2B", 61.0, 1.64), ("5B", 118.7, 2.82)])
def test_a_layer_of_diffusers_moves_and_holds_what_was_counted_before(model, passes, gigabytes) -> None:
    """The passes are of another counter, which reads the tokens once for q, k and v: three products are two more."""
    theirs, ours = forward_numbers(model, DIFFUSERS), forward_numbers(model, OURS)
    assert theirs["passes per layer"] == pytest.approx(passes + 2.0, abs=0.1)
    assert theirs["live GB"] == pytest.approx(gigabytes, abs=0.005)  # known to three digits
    assert ours["passes per layer"] < theirs["passes per layer"] and ours["live GB"] < theirs["live GB"]


@pytest.mark.parametrize(("method", "units"), [("full", 22.2), ("LoRA", 13.3)])
def test_a_layer_of_diffusers_keeps_what_was_counted_before_and_its_input(method: str, units: float) -> None:
    theirs = training_numbers("5B", method, "none", DIFFUSERS)["units kept per layer"]
    assert theirs == pytest.approx(units + 1.0, abs=0.06)  # the known figures have three digits


# ------------------------------------------------------------------------------------------------- the counter itself


@pytest.mark.parametrize(("method", "policy"), [("full", "none"), ("LoRA", "full")])
def test_layers_are_alike_so_that_few_of_them_tell_of_all(method: str, policy: str) -> None:
    config = at_depth(training_config("2B", method, policy), 11)
    whole, _ = continued(config, lambda part: training_pass(part, OURS))
    assert whole == training_pass(config, OURS)


def test_a_guidance_pair_is_counted_to_the_byte_from_few_layers() -> None:
    config = at_depth(inference_config("5B"), 11)
    whole, _ = continued(config, lambda part: forward_pass(part, OURS, 2))
    assert whole == forward_pass(config, OURS, 2)


def test_operations_are_those_of_torch_s_own_counter() -> None:
    config = at_depth(training_config("2B", "LoRA", "none"), 2)
    net = network(config, "meta")
    with fused_attention(), FlopCounterMode(display=False) as theirs:
        counted.loss_of(config, net, "meta").backward()
    assert training_pass(config, OURS).flops == theirs.get_total_flops()


S, D, HEADS = 96, 16, 4
KERNELS = {
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0],
    "cuDNN": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0],
    "efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[
        0
    ],
    "flash for CPUs": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
    "math": lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0],
    "by hand": lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v,
    "torch's choice": F.scaled_dot_product_attention,
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_counts_the_same_in_every_kernel(kernel: str) -> None:
    query, key, value = torch.empty(3, 1, HEADS, S, D, device="meta")
    with count() as counter:
        out = KERNELS[kernel](query, key, value)
    assert out.shape == query.shape
    assert counter.counts().flops == 4 * S * S * HEADS * D


def test_a_product_with_an_activation_at_its_end_counts() -> None:
    bias, x, weight = (torch.empty(size, device="meta") for size in ((7,), (5, 3), (3, 7)))
    with count() as counter:
        torch._addmm_activation(bias, x, weight, use_gelu=True)
    assert counter.counts().flops == 2 * 5 * 3 * 7


@pytest.fixture(scope="module")
def own_product():
    """An operator of our own that hides a product."""
    library = torch.library.Library("cogvideox_test", "DEF")
    library.define("product(Tensor a, Tensor b) -> Tensor")
    library.impl("product", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")
    yield torch.ops.cogvideox_test.product
    library._destroy()


def test_an_operator_that_no_counter_can_look_into_is_refused(own_product) -> None:
    x = torch.empty(8, 8, device="meta")
    with pytest.raises(ValueError, match="cogvideox_test::product may hide products"), count():
        own_product(x, x)


def test_an_operator_that_says_its_products_is_counted(own_product, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(a, b, out_shape=None, **_):
        return 2 * a[0] * a[1] * b[1]

    a, b = torch.empty(8, 3, device="meta"), torch.empty(3, 5, device="meta")
    monkeypatch.setitem(counting.OWN_OPERATORS, "cogvideox_test::product", product)
    with count() as counter:
        own_product(a, b)
    assert counter.counts() == Counts(2 * 8 * 3 * 5, 4 * 40, 0, 4 * (24 + 15 + 40), 4 * (24 + 15 + 40))
    monkeypatch.setitem(counting.OWN_OPERATORS, "cogvideox_test::product", None)
    with count() as counter:
        own_product(a, b)
    assert counter.counts().flops == 0


def test_attention_with_a_mask_is_not_taken_for_full_attention() -> None:
    q = torch.empty(1, 1, 4, 64, device="meta")
    with pytest.raises(AssertionError, match="attend over everything"), fused_attention():
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    mask: Tensor = torch.ones(4, 4, dtype=torch.bool, device="meta")
    with pytest.raises(AssertionError, match="attend over everything"), fused_attention():
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
