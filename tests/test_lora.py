"""LoRA against the recorded values, peft's formula, and its own promises."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_transformer_fixtures import ATOL, arguments_of, network_of
from torch import nn
from transformer_cases import full, inputs, randomise, tiny

from cogvideox.model.checkpointing import Checkpointing
from cogvideox.model.lora import (
    LoRALinear,
    attach_lora,
    freeze_base,
    inject_lora,
    lora_state_dict,
    merge_lora,
)
from cogvideox.model.transformer import PREFIX


def adapted(kind: str = "5b", **options):
    net = randomise(tiny(kind))
    inject_lora(net, **({"rank": 4} | options))
    return net


@pytest.fixture
def recorded(reference: Path):
    folder = reference / "fixtures" / "lora" / "t2v_sincos"
    rank = json.loads((folder / "config.json").read_text())["lora"]["r"]
    net = network_of(folder, load=False)
    inject_lora(net, rank)
    net.load_state_dict(load_file(folder / "weights.safetensors"))
    return net, load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors"), folder


def test_recorded_outputs(recorded) -> None:
    net, inputs, outputs, _ = recorded
    for run in [name for name in outputs if name.startswith("out_") and "merged" not in name]:
        with torch.no_grad():
            torch.testing.assert_close(net(**arguments_of(inputs, run)), outputs[run], atol=ATOL, rtol=0)


def test_recorded_gradients(recorded) -> None:
    net, inputs, outputs, folder = recorded
    (net(**arguments_of(inputs)) * inputs["probe"]).mean().backward()
    norms = json.loads((folder / "grad_norms.json").read_text())
    matrices = 0
    for name, parameter in net.named_parameters():
        matrices += "matrix_" in name
        if f"grad.{PREFIX}{name}" in outputs:
            torch.testing.assert_close(parameter.grad, outputs[f"grad.{PREFIX}{name}"], atol=ATOL, rtol=0)
        norm, total = norms[PREFIX + name]
        assert parameter.grad.norm().item() == pytest.approx(norm, abs=ATOL)
        assert parameter.grad.sum().item() == pytest.approx(total, abs=ATOL)
    assert matrices == 3 * 8


def test_recorded_merge(recorded) -> None:
    net, inputs, outputs, folder = recorded
    merge_lora(net)
    with torch.no_grad():
        torch.testing.assert_close(net(**arguments_of(inputs)), outputs["out_int_merged"], atol=ATOL, rtol=0)
    state = net.state_dict()
    for name, value in load_file(folder / "merged_attention_weights.safetensors").items():
        torch.testing.assert_close(state[name.removeprefix(PREFIX)], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_starts_as_the_identity(dtype: torch.dtype) -> None:
    net = randomise(tiny("5b")).to(dtype)
    arguments = inputs(net)
    expected = net(**arguments)
    inject_lora(net, rank=4)
    assert torch.equal(net(**arguments), expected)


def test_the_formula_is_pefts() -> None:
    """peft's Linear with the same matrices: W x + b + alpha / r B A x."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.Module()
    holder.dense = nn.Linear(12, 8)
    ours = LoRALinear(copy.deepcopy(holder.dense), rank=3, alpha=6.0)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["dense"]), holder)
    nn.init.normal_(ours.matrix_B[0])
    holder.dense.lora_A["default"].weight.data.copy_(ours.matrix_A[0])
    holder.dense.lora_B["default"].weight.data.copy_(ours.matrix_B[0])
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), holder.dense(x), atol=1e-6, rtol=0)


def test_given_updates_are_added_whatever_part_lacks_one() -> None:
    """Closed form: y = W x + b, and up @ down x in the rows of each part that has an update; ranks 3 and 1."""
    net = randomise(tiny("5b"))
    path = "transformer.layers.1.attention.query_key_value"
    generator = torch.Generator().manual_seed(0)
    q, v = (
        (torch.randn(rank, 48, generator=generator), torch.randn(48, rank, generator=generator))
        for rank in (3, 1)
    )
    x = torch.randn(2, 48, generator=generator)
    expected = net.get_submodule(path)(x).detach()
    for rows, (down, up) in ((slice(0, 48), q), (slice(96, 144), v)):
        expected[:, rows] += x @ down.mT @ up.mT
    before = torch.get_rng_state()
    attach_lora(net, {path: [q, None, v]})
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(net.get_submodule(path)(x), expected, atol=1e-4, rtol=1e-5)
    merge_lora(net)
    torch.testing.assert_close(net.get_submodule(path)(x), expected, atol=1e-4, rtol=1e-5)


def test_query_key_and_value_have_their_own_matrices() -> None:
    layer = LoRALinear(nn.Linear(10, 18), rank=2, alpha=1.0, parts=3)
    for matrix in layer.matrix_B:
        nn.init.normal_(matrix)
    x = torch.randn(4, 10)
    update = [x @ a.mT @ b.mT / 2 for a, b in zip(layer.matrix_A, layer.matrix_B, strict=True)]
    torch.testing.assert_close(layer(x), layer.original(x) + torch.cat(update, dim=-1), atol=1e-6, rtol=0)


def test_merging_is_exact() -> None:
    net = adapted(alpha=8.0).double()
    randomise(net)
    arguments = inputs(net, dtype=torch.float64)
    expected = net(**arguments)
    names = list(tiny("5b").state_dict())
    merge_lora(net)
    assert list(net.state_dict()) == names
    # In float64 only the order of the sums differs; rope and the timestep's sinusoid are float32 in both.
    torch.testing.assert_close(net(**arguments), expected, atol=1e-12, rtol=0)


def test_merging_into_bfloat16_rounds_once() -> None:
    layer = LoRALinear(nn.Linear(16, 12).bfloat16(), rank=2, parts=3)
    for matrix in layer.matrix_B:
        nn.init.normal_(matrix)
    update = (
        torch.cat([b.float() @ a.float() for a, b in zip(layer.matrix_A, layer.matrix_B, strict=True)]) / 2
    )
    expected = (layer.original.weight.float() + update).bfloat16()
    assert torch.equal(layer.merged().weight, expected)


def test_only_the_matrices_train_on_a_frozen_base() -> None:
    net = adapted()
    freeze_base(net)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == set(lora_state_dict(net)) and len(trainable) == 2 * 8
    net.bfloat16()
    net.transformer.checkpointing = Checkpointing(True)  # inputs without a gradient must not cut the graph
    net(**inputs(net)).square().mean().backward()
    ups = [p for name, p in net.named_parameters() if "matrix_B" in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ups)
    assert all(p.grad is None for name, p in net.named_parameters() if name not in trainable)


def test_keys_and_initial_values_are_sats() -> None:
    net = tiny("5b")
    inject_lora(net, rank=4, transformer_layers=[1], generator=torch.Generator().manual_seed(0))
    prefix = "transformer.layers.1.attention."
    shapes = {name: tuple(value.shape) for name, value in lora_state_dict(net).items()}
    qkv = {
        f"query_key_value.matrix_{m}.{i}": s for m, s in (("A", (4, 48)), ("B", (48, 4))) for i in range(3)
    }
    dense = {"dense.matrix_A.0": (4, 48), "dense.matrix_B.0": (48, 4)}
    assert shapes == {prefix + name: shape for name, shape in (qkv | dense).items()}
    assert prefix + "query_key_value.original.weight" in net.state_dict()
    a = net.state_dict()[prefix + "query_key_value.matrix_A.0"]
    # kaiming_uniform with a = sqrt 5 is U(-1/sqrt(in), 1/sqrt(in)).
    assert 0.9 < a.abs().max() * 48**0.5 <= 1.0
    again = tiny("5b")
    inject_lora(again, rank=4, transformer_layers=[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.state_dict()[prefix + "query_key_value.matrix_A.0"], a)


@pytest.mark.parametrize(
    ("model", "rank"),
    [("CogVideoX-2B-lora-r128", 128), ("CogVideoX-5B-lora-r128", 128), ("CogVideoX-5B-I2V-lora-r256", 256)],
)
def test_published_lora_checkpoints_have_our_keys(model: str, rank: int, reference: Path) -> None:
    published = json.loads((reference / "keys" / f"sat_{model}.json").read_text())["keys"]
    net = full({"2B": "2b", "5B": "5b", "I2V": "5b_i2v"}[model.split("-lora")[0].split("-")[-1]])
    inject_lora(net, rank)
    assert not [name for name, p in net.named_parameters() if not p.is_meta]
    result = net.load_state_dict(
        {key: torch.empty(shape, device="meta") for key, shape in published.items()}, assign=True
    )
    assert not result.missing_keys and not result.unexpected_keys


def test_other_layers_can_be_chosen() -> None:
    net = randomise(tiny("5b"))
    names = inject_lora(net, 2, layers=["dense_h_to_4h", "dense_4h_to_h"], transformer_layers=[0])
    assert names == ["transformer.layers.0.mlp.dense_h_to_4h", "transformer.layers.0.mlp.dense_4h_to_h"]
    randomise(net)
    expected = net(**inputs(net))
    merge_lora(net)
    torch.testing.assert_close(net(**inputs(net)), expected, atol=ATOL, rtol=0)


def test_an_adapted_network_is_one_graph() -> None:
    net = tiny("5b", num_layers=1)
    inject_lora(net, 4)
    assert torch._dynamo.explain(net)(**inputs(net)).graph_break_count == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank=0"),
        ({"alpha": 0}, "lora.alpha=0: expected a number other than 0"),
        ({"layers": ["query_key_values"]}, "'query_key_values'.*did you mean 'query_key_value'"),
        ({"layers": ["to_q"]}, "'to_q' matches nothing; the names end in .*attention.dense"),
        ({"transformer_layers": [1, 2]}, r"transformer_layers=\[2\]: the network has layers 0 to 1"),
        ({"layers": []}, "choose no layer"),
    ],
)
def test_a_wrong_choice_is_one_clear_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(**options)


def test_injecting_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="LoRA layers already"):
        inject_lora(adapted(), 4)
