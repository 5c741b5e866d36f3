"""LoRAs from files onto a network: what diffusers computes with them, merged or not; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_low_rank import peft_adapters, some_lora
from transformer_cases import diffusers_twin, full, inputs, randomise, run_twin, tiny

from cogvideox.convert.lora import write_lora
from cogvideox.model.lora import attach_lora, inject_lora, lora_scales, lora_state_dict, merge_lora
from cogvideox.weights.geometry import shapes_of
from cogvideox.weights.lora.apply import (
    adapter_matrices,
    add_to_network,
    applied,
    check_fit,
    read_loras,
    start_adapters,
)
from cogvideox.weights.lora.file import LoraFile, read_lora
from cogvideox.weights.lora.low_rank import LowRank
from cogvideox.weights.transformer_keys import sat_to_diffusers

ATTENTION = [f"transformer_blocks.{i}.attn1.to_{part}" for i in range(2) for part in ("q", "k", "v", "out.0")]
MLP = ["transformer_blocks.1.ff.net.0.proj", "transformer_blocks.0.ff.net.2"]


def base():
    net = randomise(tiny("5b"))
    return net, sat_to_diffusers(net.state_dict())


def file_of(modules, path: str = "some.safetensors") -> LoraFile:
    return LoraFile(Path(path), modules, "diffusers", None, "differing by module")


def test_loras_of_different_formats_ranks_and_targets_add_up_as_in_diffusers(tmp_path: Path) -> None:
    net, theirs = base()
    loras = {
        "a": some_lora(theirs, ATTENTION, 1),
        "b": some_lora(theirs, [ATTENTION[0], ATTENTION[2], *MLP], 2, rank=5),  # no key matrix
    }
    paths = [write_lora(lora, tmp_path / f"{name}.safetensors", to, alpha_mode="metadata")
             for (name, lora), to in zip(loras.items(), ("diffusers", "kohya"), strict=True)]  # fmt: skip
    strengths = [0.7, -1.3]
    twin, arguments = diffusers_twin(net), inputs(net)
    peft_adapters(twin, loras)
    twin.set_adapters(list(loras), strengths)

    files = read_loras([(p, s, None) for p, s in zip(paths, strengths, strict=True)], net, ema=True)
    total, reports = applied(files, "merged")
    assert [report.loaded for report in reports] == [16, 8]
    assert "kohya LoRA, rank 5" in str(reports[1]) and "strength -1.3; merged" in str(reports[1])
    beside, _ = base()
    attach_lora(beside, adapter_matrices(total))
    add_to_network(net, total)
    with torch.no_grad():
        expected = run_twin(net, twin, arguments)
        # float32; the sums are taken in another order.
        torch.testing.assert_close(net(**arguments), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(beside(**arguments), expected, atol=1e-5, rtol=0)
        assert (expected - base()[0](**arguments)).abs().max() > 0.05


def test_strength_0_leaves_the_network_as_it_is(tmp_path: Path) -> None:
    net, theirs = base()
    total, reports = applied([(file_of(some_lora(theirs, ATTENTION, 1)), 0.0)], "merged")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    add_to_network(net, total)
    attach_lora(net, adapter_matrices(total))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert "strength 0" in str(reports[0])


def test_alpha_can_be_given_where_the_file_has_none(tmp_path: Path) -> None:
    net, theirs = base()
    lora = some_lora(theirs, ATTENTION, 1)
    inject_lora(net, 3, 3.0)
    start_adapters(net, file_of(lora), 1.0, lora_scales(net))
    save_file(lora_state_dict(net), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="alpha is missing"):
        read_loras([(tmp_path / "bare.safetensors", 1.0, None)], net, ema=True)
    ((file, _),) = read_loras([(tmp_path / "bare.safetensors", 1.0, 6.0)], net, ema=True)
    assert {part.scale for part in file.modules.values()} == {2.0}


def test_adapters_start_with_the_update_of_the_file_whatever_their_own_scale(tmp_path: Path) -> None:
    """diffusers has alpha = rank, SAT alpha = 1: what the one trained must not shrink by the rank in the other."""
    net, theirs = base()
    lora = some_lora(theirs, ATTENTION, 1, rank=4)
    merged, _ = base()
    add_to_network(merged, lora)
    inject_lora(net, rank=4, alpha=1.0)
    file = read_lora(write_lora(lora, tmp_path / "a.safetensors", "diffusers", alpha_mode="metadata"))
    report = start_adapters(net, file, 1.0, lora_scales(net))
    assert report.loaded == 16 and "B times 1, for" not in str(report)  # 0.25 and 0.25: as they are
    arguments = inputs(net)
    with torch.no_grad():
        torch.testing.assert_close(net(**arguments), merged(**arguments), atol=1e-5, rtol=0)
        again, _ = base()
        inject_lora(again, rank=4, alpha=8.0)
        report = start_adapters(again, file, 1.0, lora_scales(again))
        torch.testing.assert_close(again(**arguments), merged(**arguments), atol=1e-5, rtol=0)
    assert "B times 0.125, for the network's own alpha / rank = 2" in str(report)


def test_a_run_continues_from_its_own_matrices_bit_for_bit(tmp_path: Path) -> None:
    trained = randomise(tiny("5b"))
    inject_lora(trained, rank=3, alpha=2.0)
    randomise(trained, seed=5)
    save_file(lora_state_dict(trained), tmp_path / "lora.safetensors")
    (tmp_path / "config.yaml").write_text("lora: {rank: 3, alpha: 2.0}\n")
    net = randomise(tiny("5b"))
    inject_lora(net, rank=3, alpha=2.0)
    report = start_adapters(net, read_lora(tmp_path), 1.0, lora_scales(net))
    own = lora_state_dict(net)
    assert own.keys() == lora_state_dict(trained).keys()
    assert all(torch.equal(value, own[name]) for name, value in lora_state_dict(trained).items())
    assert "alpha 2 from" in str(report) and "B times" not in str(report)


def refusal(lora, *, rank: int = 3, **options) -> str:
    net = tiny("5b")
    inject_lora(net, rank, **options)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError) as error:
        start_adapters(net, file_of(lora), 1.0, lora_scales(net))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_adapters_that_the_file_does_not_fit_are_refused_with_what_to_set() -> None:
    _, theirs = base()
    lora = some_lora(theirs, ATTENTION, 1)
    assert (
        "its LoRA has rank 3, your config lora.rank=8 for transformer.layers.0.attention.query_key_value: use "
        "lora.rank=3, or merge it" in refusal(lora, rank=8)
    )
    assert (
        "it updates query_key_value, dense in layers 0-1; your section lora adapts dense in layers 0-1: set"
        in (refusal(lora, layers=["dense"]))
    )
    assert "your section lora adapts query_key_value, dense in layers 0-0" in refusal(
        lora, transformer_layers=[0]
    )
    partial = {m: p for m, p in lora.items() if "to_k" not in m}
    assert "no update for a part of transformer.layers.0.attention.query_key_value" in refusal(partial)
    mixed = some_lora(theirs, ATTENTION, 1) | some_lora(theirs, ATTENTION[3:4], 1, rank=5)
    assert (
        "rank 3, 5, your config lora.rank=3 for transformer.layers.0.attention.dense: use the lora.rank_pattern"
        in (refusal(mixed))
    )
    outside = lora | some_lora(theirs, ["proj_out"], 1)
    assert "it updates query_key_value, dense, mixins.final_layer.linear in layers 0-1" in refusal(outside)


OUTSIDE = ["proj_out", "time_embedding.linear_1", "patch_embed.text_proj", "norm_out.linear"]
MODULATIONS = [f"transformer_blocks.{i}.norm{j}.linear" for i in range(2) for j in (1, 2)]


@pytest.mark.parametrize("modules", [OUTSIDE, MODULATIONS[1:]])
def test_what_lies_outside_the_layers_is_kept_beside_as_it_is_merged(modules: list[str]) -> None:
    """norm1 and norm2 are interleaved in SAT's one weight, and one of the four has no update here."""
    net, theirs = base()
    lora = some_lora(theirs, modules, 1)
    check_fit(file_of(lora), shapes_of(net.state_dict()))
    beside, arguments = base()[0], inputs(net)
    attach_lora(beside, adapter_matrices(lora))
    add_to_network(net, lora)
    with torch.no_grad():
        torch.testing.assert_close(beside(**arguments), net(**arguments), atol=1e-5, rtol=0)
        assert (net(**arguments) - base()[0](**arguments)).abs().max() > 0.01
    merge_lora(beside)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(beside.state_dict()[name], value, atol=1e-6, rtol=0)


def lora_of(kind: str, rank: int = 128) -> LoraFile:
    """The matrices of every published LoRA, without data."""
    width, layers = (1920, 30) if kind == "2b" else (3072, 42)
    part = LowRank(torch.empty(rank, width, device="meta"), torch.empty(width, rank, device="meta"))
    return file_of({f"transformer_blocks.{i}.attn1.to_q": part for i in range(layers)})


def test_a_lora_for_another_size_is_refused_in_words() -> None:
    with pytest.raises(ValueError) as error:
        check_fit(lora_of("5b"), shapes_of(full("2b").state_dict()))
    message = str(error.value)
    assert "this is a LoRA for 42 layers x 3072 (rank 128, CogVideoX-5B or" in message
    assert "; your network has 30 x 1920: " in message and "\n" not in message
    with pytest.raises(ValueError, match="30 layers x 1920 .*CogVideoX-2B.*your network has 42 x 3072"):
        check_fit(lora_of("2b"), shapes_of(full("5b").state_dict()))
    check_fit(lora_of("5b"), shapes_of(full("5b").state_dict()))


def test_a_module_that_the_network_lacks_or_has_in_another_shape_is_named() -> None:
    net, theirs = base()
    shapes = shapes_of(net.state_dict())
    ofs = LowRank(torch.zeros(2, 20), torch.zeros(20, 2))
    with pytest.raises(ValueError, match=r"ofs_embedding\.linear_1: the network has no ofs_embed\.0\.weight"):
        check_fit(file_of(some_lora(theirs, ATTENTION, 1) | {"ofs_embedding.linear_1": ofs}), shapes)
    newer = sat_to_diffusers(randomise(tiny("1.5")).state_dict())
    with pytest.raises(
        ValueError, match=r"proj_out: its update is \(32, 48\), the weight of the network \(16, 48\)"
    ):
        check_fit(file_of(some_lora(newer, ["proj_out"], 1)), shapes)
    with pytest.raises(ValueError, match=r"patch_embed\.proj: its weight \(48, 4, 2, 2\) is a convolution's"):
        check_fit(file_of(some_lora(newer, ["patch_embed.proj"], 1)), shapes)


def test_a_file_without_a_lora_is_refused(tmp_path: Path) -> None:
    net, theirs = base()
    save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors.*no LoRA in it"):
        read_loras([(tmp_path / "w.safetensors", 1.0, None)], net, ema=True)
