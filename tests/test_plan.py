"""The closed forms of plan.py against published counts and built modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cogvideox
from cogvideox import plan
from cogvideox.config import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = {
    "CogVideoX-2B": "cogvideox_2b",
    "CogVideoX-5B": "cogvideox_5b",
    "CogVideoX-5B-I2V": "cogvideox_5b_i2v",
    "CogVideoX1.5-5B": "cogvideox1.5_5b",
    "CogVideoX1.5-5B-I2V": "cogvideox1.5_5b_i2v",
}
DEAD = 64 * 3072  # SAT's unused position_embeddings of the rope models
FIXED_TABLE = 17_776 * 1_920  # 2B's sincos table, which can be recomputed


def load(*names: str, overrides: tuple[str, ...] = ()):
    return load_config([CONFIGS / f"{name}.yaml" for name in names], overrides)


def keys(reference: Path, name: str) -> dict:
    return json.loads((reference / "keys" / f"{name}.json").read_text())


# --------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name, file", FILES.items())
def test_transformer_parameters_are_those_of_the_published_checkpoints(reference, name, file):
    published = keys(reference, f"sat_{name}")["n_parameters"] - (
        FIXED_TABLE if name.endswith("2B") else DEAD
    )
    assert plan.transformer_parameters(load(file).model.transformer) == published


def test_vae_and_t5_parameters_are_the_published_ones(reference):
    assert plan.vae_parameters(load("cogvideox_2b").vae) == keys(reference, "sat_vae")["n_parameters"]
    t5 = keys(reference, "t5_v1_1_xxl_encoder")["n_parameters"]
    assert plan.t5_encoder_parameters(plan.T5_V1_1_XXL) == t5


@pytest.mark.parametrize(
    "name, rank", [("CogVideoX-2B", 128), ("CogVideoX-5B", 128), ("CogVideoX-5B-I2V", 256)]
)
def test_lora_parameters_are_those_of_published_lora_checkpoints(reference, name, rank):
    config = load(FILES[name], "lora", overrides=(f"lora.rank={rank}",))
    adapted = keys(reference, f"sat_{name}-lora-r{rank}")["n_parameters"]
    assert plan.lora_parameters(config) == adapted - keys(reference, f"sat_{name}")["n_parameters"]


def test_lora_layers_can_be_chosen():
    every = "lora.layers=[query_key_value,dense,dense_h_to_4h,dense_4h_to_h]"
    config = load("tiny_t2v", "lora", overrides=("lora.rank=2", every, "lora.transformer_layers=[0,3]"))
    d, rank = 128, 2
    assert plan.lora_parameters(config) == 2 * rank * (3 * 2 * d + 2 * d + 5 * d + 5 * d)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.transformer.ofs_embed_dim=128", "model.transformer.patch_size=[2,2,2]"),
        (
            "model.transformer.position.params.learned_table=true",
            "data.num_frames=17",
            "model.transformer.num_frames=17",
        ),
        (
            "model.transformer.position=cogvideox.model.position.SincosPosition3D",
            "model.transformer.num_layers=2",
        ),
    ],
)
def test_the_transformer_formula_counts_what_is_built(overrides):
    config = load("tiny_t2v", overrides=overrides)
    net = cogvideox.build_transformer(config, device="meta")
    assert plan.transformer_parameters(config.model.transformer) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("overrides", [(), ("vae.num_res_blocks=2", "vae.channel_multipliers=[1,1,2,1]")])
def test_the_vae_formula_counts_what_is_built(overrides):
    config = load("tiny_vae", overrides=overrides)
    vae = cogvideox.build_vae(config, device="meta")
    assert plan.vae_parameters(config.vae) == sum(p.numel() for p in vae.parameters())


@pytest.mark.parametrize("gated", ["relu", "gated-gelu"])
def test_the_t5_formula_counts_what_transformers_builds(gated):
    import torch
    from transformers import T5Config, T5EncoderModel

    config = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 3, "num_heads": 5, "vocab_size": 99}
    config["feed_forward_proj"] = gated
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**config))
    assert plan.t5_encoder_parameters(config) == sum(p.numel() for p in encoder.parameters())
