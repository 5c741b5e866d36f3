"""Loading fills a network exactly, from every format, or refuses in one sentence and changes nothing."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_ins import sat_folder, sparse_safetensors
from transformer_cases import full, tiny

from cogvideox.model.lora import inject_lora
from cogvideox.vae.autoencoder import CausalVAE
from cogvideox.weights.identify import identify
from cogvideox.weights.load import (
    check_constant,
    check_precision,
    load_text_encoder,
    load_transformer,
    load_vae,
    own_precision,
)
from cogvideox.weights.transformer_keys import sat_to_diffusers
from cogvideox.weights.vae_keys import sat_to_diffusers as vae_to_diffusers

PREFIX = "model.diffusion_model."
DEAD = {
    f"{PREFIX}transformer.position_embeddings.weight": torch.ones(64, 48),
    f"{PREFIX}mixins.pos_embed.freqs_sin": torch.ones(5, 16),
    f"{PREFIX}mixins.pos_embed.freqs_cos": torch.ones(5, 16),
}


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def prefixed(state: dict[str, torch.Tensor], prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    return {prefix + name: value.clone() for name, value in state.items()}


def assert_equal(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = module.state_dict()
    assert own.keys() == state.keys()
    different = [name for name in own if not torch.equal(own[name], state[name].to(own[name].dtype))]
    assert not different


def tiny_vae(**changes) -> CausalVAE:
    return CausalVAE(**{"channels": 8, "channel_multipliers": [1, 2, 1], "num_res_blocks": 1, "z_channels": 4,
                        "norm_groups": 4} | changes)  # fmt: skip


@pytest.mark.parametrize("kind", ["2b", "5b", "5b_i2v", "1.5", "1.5_i2v"])
@pytest.mark.parametrize("format", ["sat", "diffusers", "shards", "bare pt", "old pt"])
def test_each_format_fills_each_kind_exactly(kind: str, format: str, tmp_path: Path) -> None:
    source, net = randomised(tiny(kind), 1), tiny(kind)
    state = source.state_dict()
    dead = DEAD if kind != "2b" else {f"{PREFIX}mixins.pos_embed.pos_embedding": torch.ones(1, 77, 48)}
    if format == "sat":
        path = sat_folder(tmp_path / "w", prefixed(state) | dead)
    elif format in ("diffusers", "shards"):
        path = tmp_path / "transformer"
        path.mkdir()
        (path / "config.json").write_text("{}")
        theirs = {
            k: v.contiguous() for k, v in sat_to_diffusers(state, learned_position=kind == "5b_i2v").items()
        }
        if format == "diffusers":
            save_file(theirs, path / "diffusion_pytorch_model.safetensors")
        else:
            # A block's q, k and v may lie in different shards.
            parts = {f"s{i}.safetensors": dict(list(theirs.items())[i::3]) for i in range(3)}
            for file, part in parts.items():
                save_file(part, path / file)
            index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
            (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    else:
        path = tmp_path / "w.pt"
        torch.save(state, path, _use_new_zipfile_serialization=format == "bare pt")
    report = load_transformer(net, path)
    assert_equal(net, state)
    assert (report.loaded, report.missing, report.unexpected) == (len(state), [], [])
    assert len(report.skipped_optional) == (len(dead) if format == "sat" else 0)


def test_the_published_fixture_loads_and_is_cast(reference: Path) -> None:
    """Weights written by the published code; the network's dtype wins."""
    from test_transformer_fixtures import network_of

    path = reference / "fixtures" / "transformer" / "i2v_rope" / "weights.safetensors"
    net = network_of(path.parent, load=False).to(torch.bfloat16)
    report = load_transformer(net, path)
    key = "transformer.layers.0.attention.dense.weight"
    stored = next(value for name, value in load_file(path).items() if name.endswith(key))
    assert torch.equal(net.state_dict()[key], stored.to(torch.bfloat16)) and report.dtype == "float32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_fill_a_float32_network(dtype: torch.dtype, tmp_path: Path) -> None:
    state = randomised(tiny("2b")).to(dtype).state_dict()
    net = tiny("2b")
    report = load_transformer(net, sat_folder(tmp_path / "w", prefixed(state)))
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[name].float()) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "kind, mine", [("5b", "1.5"), ("1.5", "5b"), ("2b", "5b"), ("5b_i2v", "5b"), ("1.5_i2v", "1.5")]
)
def test_another_published_model_is_refused_by_name_before_loading(
    kind: str, mine: str, tmp_path: Path
) -> None:
    """At full size, with the network on the meta device: reading data would fail loudly."""
    shapes = {k: tuple(v.shape) for k, v in full(kind).state_dict().items()}
    path = sparse_safetensors(tmp_path / "w.safetensors", shapes)
    info = identify(path)
    with pytest.raises(ValueError, match="this is CogVideoX.*your config is CogVideoX") as error:
        load_transformer(full(mine), path)
    message = str(error.value)
    assert f"this is {info.variant} ({info.num_layers} layers x {info.hidden_size}, patch" in message
    assert message.endswith(f"use {info.config}") and "\n" not in message


def test_another_geometry_names_the_keys_to_set(tmp_path: Path) -> None:
    path = sparse_safetensors(
        tmp_path / "w.safetensors", {k: tuple(v.shape) for k, v in tiny("2b").state_dict().items()}
    )
    with pytest.raises(ValueError, match=r"set model\.transformer\.num_layers=2, .*num_attention_heads=3$"):
        load_transformer(tiny("2b", num_layers=3, num_attention_heads=2), path)


def test_missing_and_unknown_keys_are_listed_by_module_and_nothing_changes(tmp_path: Path) -> None:
    state = randomised(tiny("5b")).state_dict()
    for layer in range(2):
        del state[f"transformer.layers.{layer}.attention.dense.bias"]
    state |= {"mixins.adapter.weight": torch.ones(1)}
    save_file(state, tmp_path / "w.safetensors")
    net = randomised(tiny("5b"), 7)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_transformer(net, tmp_path / "w.safetensors")
    assert "missing in the file: 2 in transformer.layers.N.attention.dense, first" in str(error.value)
    assert "unknown to the network: 1 in mixins.adapter, first mixins.adapter.weight" in str(error.value)
    assert_equal(net, before)


def test_a_diffusers_block_without_its_key_matrix_is_refused(tmp_path: Path) -> None:
    theirs = sat_to_diffusers(tiny("5b").state_dict())
    del theirs["transformer_blocks.1.attn1.to_k.weight"]
    save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors.*transformer_blocks\.1\.attn1\.to_k\.weight"):
        load_transformer(tiny("5b"), tmp_path / "w.safetensors")


def run_folder(
    run: Path, state: dict[str, torch.Tensor], ema: dict[str, torch.Tensor], ranks: int = 2
) -> Path:
    sat_folder(
        run / "checkpoints", state, tag="40", ds_version="0.19.8", dp_world_size=ranks, global_steps=40
    )
    for rank in range(ranks):
        part = dict(list(ema.items())[rank::ranks])
        save_file(part, run / "checkpoints" / "40" / f"ema_rank_{rank:02d}.safetensors")
    return run


def test_a_run_folder_gives_its_averaged_or_its_last_weights(tmp_path: Path) -> None:
    last = {k: v.bfloat16() for k, v in randomised(tiny("2b"), 1).state_dict().items()}
    averaged = randomised(tiny("2b"), 2).state_dict()
    run = run_folder(tmp_path / "run", prefixed(last), prefixed(averaged))
    info = identify(run)
    assert (info.layout, info.has_ema, info.step) == ("DeepSpeed run folder", True, 40)
    for path in (run, run / "checkpoints", run / "checkpoints" / "40"):
        net = tiny("2b")
        assert load_transformer(net, path).used_ema
        assert_equal(net, averaged)
    assert not load_transformer(net, run, ema=False).used_ema
    assert_equal(net, last)
    (run / "checkpoints" / "40" / "ema_rank_01.safetensors").unlink()
    with pytest.raises(ValueError, match="averaged weights of 1 ranks, but 2 trained"):
        load_transformer(net, run)


def adapted(seed: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A network with LoRA, its base weights under plain names, and its matrices."""
    net = tiny("5b")
    inject_lora(net, rank=4)
    state = randomised(net, seed).state_dict()
    matrices = {k: v for k, v in state.items() if ".matrix_" in k}
    return net, {k.replace(".original.", "."): v for k, v in state.items() if k not in matrices}, matrices


def test_base_weights_reach_a_network_with_adapters_and_leave_these_alone(tmp_path: Path) -> None:
    _, base, _ = adapted(0)
    save_file(base, tmp_path / "base.safetensors")
    net, _, matrices = adapted(7)
    report = load_transformer(net, tmp_path / "base.safetensors")
    assert report.missing == list(matrices)
    own = {name.replace(".original.", "."): value for name, value in net.state_dict().items()}
    assert all(torch.equal(own[name], value) for name, value in (base | adapted(7)[2]).items())


def test_a_lora_alone_is_no_transformer(tmp_path: Path) -> None:
    matrices = adapted(0)[2]
    run = run_folder(tmp_path / "run", prefixed(matrices), prefixed(matrices), ranks=1)
    with pytest.raises(ValueError, match=f"rank 4.*without the base weights: set load.lora={run}"):
        load_transformer(tiny("5b"), run)


def test_a_full_sat_checkpoint_with_lora_is_never_loaded_without_it(tmp_path: Path) -> None:
    trained, base, _ = adapted(0)
    path = sat_folder(tmp_path / "w", prefixed(trained.state_dict()) | DEAD)
    net = tiny("5b")
    with pytest.raises(ValueError, match=r"with LoRA \(rank 4\), which would be lost"):
        load_transformer(net, path)
    load_transformer(net, path, base_only=True)
    assert_equal(net, base)


@pytest.mark.parametrize("wrapper", ["module", "state_dict", "model"])
def test_weights_are_found_beside_whatever_a_checkpoint_keeps(wrapper: str, tmp_path: Path) -> None:
    state = randomised(tiny("2b")).state_dict()
    beside = {"np_rng_state": np.random.RandomState(0).get_state(), "best": np.float64(0.5), "epoch": 3}
    torch.save({wrapper: prefixed(state), **beside}, tmp_path / "w.pt")
    net = tiny("2b")
    load_transformer(net, tmp_path / "w.pt")
    assert_equal(net, state)


@pytest.mark.parametrize("format", ["sat", "diffusers", "run"])
def test_the_vae_loads_from_each_format(format: str, tmp_path: Path) -> None:
    state = randomised(tiny_vae(), 3).state_dict()
    path = tmp_path / "3d-vae.pt"
    if format == "sat":
        torch.save(
            {"state_dict": {**state, "loss.logvar": torch.ones(()), "loss.d.weight": torch.ones(2)}}, path
        )
    elif format == "diffusers":
        path = tmp_path / "w.safetensors"
        save_file(vae_to_diffusers(state), path)
    else:
        ours = prefixed(state, "first_stage_model.")
        path = run_folder(tmp_path / "run", ours, ours)
    vae = tiny_vae()
    report = load_vae(vae, path)
    assert_equal(vae, state)
    assert report.skipped_optional == (["loss.logvar", "loss.d.weight"] if format == "sat" else [])
    with pytest.raises(ValueError, match=r"set vae\.z_channels=4$"):
        load_vae(tiny_vae(z_channels=6), path)
    with pytest.raises(
        ValueError, match="expected the weights of a transformer, this is unknown CogVideoX-type VAE"
    ):
        load_transformer(tiny("2b"), path)


def test_a_trained_text_encoder_loads_from_its_run(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=20, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    state = randomised(T5EncoderModel(config), 5).state_dict()
    network = randomised(tiny("2b")).state_dict()
    both = prefixed(network) | prefixed(state, "conditioner.embedders.0.transformer.")
    run = run_folder(tmp_path / "run", both, {})
    assert "t5" in identify(run).others
    encoder = T5EncoderModel(config)
    load_text_encoder(encoder, run)
    assert_equal(encoder, state)
    net = tiny("2b")
    load_transformer(net, run)
    assert_equal(net, network)
    # transformers' own file holds the tied embedding once; a full T5 has a decoder that is of no use here.
    single = {k: v.clone() for k, v in state.items() if k != "encoder.embed_tokens.weight"}
    save_file(single | {"decoder.final_layer_norm.weight": torch.ones(12)}, tmp_path / "model.safetensors")
    encoder = T5EncoderModel(config)
    assert load_text_encoder(encoder, tmp_path / "model.safetensors").unexpected == [
        "decoder.final_layer_norm.weight"
    ]
    assert_equal(encoder, state)


class RunsCode:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def test_a_pickle_that_would_run_code_is_refused_by_the_name_of_what_it_runs(tmp_path: Path) -> None:
    proof = tmp_path / "it_ran"
    path = sat_folder(tmp_path / "w", prefixed(tiny("2b").state_dict()), extra=RunsCode(proof))
    with pytest.raises(ValueError, match=r"refused: its pickle asks for posix\.system"):
        load_transformer(tiny("2b"), path)
    assert not proof.exists()


def test_values_come_from_mapped_memory(tmp_path: Path) -> None:
    """A tensor of 50 MB, of which one element is used: read whole, it would show in the anonymous memory."""
    from cogvideox.weights.reader import WeightsReader

    for path in (
        sparse_safetensors(tmp_path / "w.safetensors", {"a": (12_500_000,)}, torch.float32),
        sat_folder(tmp_path / "w", {"a": torch.zeros(12_500_000)}),
    ):
        reader = WeightsReader(path, "transformer", ema=False)
        before = anonymous_bytes()
        assert reader.tensor("a")[-1] == 0
        assert anonymous_bytes() - before < 20e6


def anonymous_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc (Linux) to measure memory")
    return (
        int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("RssAnon")))
        * 1024
    )


def test_fp16_is_refused_for_weights_born_in_bf16(tmp_path: Path) -> None:
    shapes = {k: tuple(v.shape) for k, v in full("5b").state_dict().items()}
    # Stored in fp32 by someone: what counts is how it was trained.
    info = identify(sparse_safetensors(tmp_path / "w.safetensors", shapes, torch.float32))
    with pytest.raises(ValueError, match=r"train\.precision=fp16.*CogVideoX-5B.*set train\.precision=bf16"):
        check_precision(info, "fp16", "train.precision")
    check_precision(info, "fp16", "train.precision", force=True)
    check_precision(info, "bf16", "train.precision")
    small = {k: tuple(v.shape) for k, v in full("2b").state_dict().items()}
    check_precision(
        identify(sparse_safetensors(tmp_path / "2b.safetensors", small)), "fp16", "train.precision"
    )


def test_the_own_precision_is_the_published_one_whatever_the_file_holds(tmp_path: Path) -> None:
    for kind, expected in (("2b", "fp16"), ("5b", "bf16")):
        shapes = {k: tuple(v.shape) for k, v in full(kind).state_dict().items()}
        info = identify(sparse_safetensors(tmp_path / f"{kind}.safetensors", shapes, torch.float32))
        assert own_precision(info, "sample.precision") == expected
    shapes = {k: tuple(v.shape) for k, v in tiny("5b").state_dict().items()}  # published nowhere: as the file
    info = identify(sparse_safetensors(tmp_path / "tiny.safetensors", shapes, torch.float32))
    assert own_precision(info, "sample.precision") == "fp32"


def test_constants_that_are_not_those_of_the_weights_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A README of 2B has a misprint: 1.55258426 for 1.15258426."""
    shapes = {k: tuple(v.shape) for k, v in full("2b").state_dict().items()}
    info = identify(sparse_safetensors(tmp_path / "2b.safetensors", shapes))
    with pytest.raises(ValueError) as error:
        check_constant(info, "vae.scale_factor", 1.55258426, info.latent_scale)
    assert "vae.scale_factor=1.55258426, but" in str(error.value)
    assert "is CogVideoX-2B, which was trained with 1.15258426: set vae.scale_factor=1.15258426" in str(
        error.value
    )
    check_constant(info, "vae.scale_factor", 1.15258426, info.latent_scale)
    check_constant(info, "vae.scale_factor", 1.55258426, None)  # the weights do not say
    check_constant(info, "vae.scale_factor", 1.55258426, info.latent_scale, force=True)
    assert "trained with 1.15258426; kept, as load.force_constants=true" in caplog.text


def test_the_report_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = sat_folder(tmp_path / "w", prefixed(randomised(tiny("5b")).state_dict()) | DEAD)
    with caplog.at_level(logging.INFO, "cogvideox"):
        load_transformer(tiny("5b"), path)
    assert "52 tensors loaded (float32); 3 skipped optional, as allowed" in caplog.text
