"""The closed forms of plan.py against published counts, built modules, and counted operations."""

from __future__ import annotations

import json
import subprocess
import sys
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


# -------------------------------------------------------------------------------------------------------- memory


def memory(*names: str, world_size: int = 1, overrides: tuple[str, ...] = ()) -> dict[str, float]:
    return plan.training_memory(load(*names, overrides=overrides), world_size)


def test_full_fine_tuning_takes_16_bytes_per_parameter_on_one_gpu():
    kinds = ("weights", "gradients", "fp32 masters", "optimizer states")
    states = memory("cogvideox_2b", "sft")
    assert sum(states[kind] for kind in kinds) == 16 * 1_693_783_872
    averaged = memory("cogvideox_2b", "sft", overrides=("train.ema_decay=0.999",))
    assert averaged["averaged weights (EMA)"] == 4 * 1_693_783_872


def test_zero_stages_divide_states_then_gradients_then_weights():
    one = memory("cogvideox_2b", "sft")
    for stage, divided in (
        (0, ()),
        (1, ("fp32 masters", "optimizer states")),
        (2, ("fp32 masters", "optimizer states", "gradients")),
        (3, ("fp32 masters", "optimizer states", "gradients", "weights")),
    ):
        overrides = (f"deepspeed.zero_optimization.stage={stage}",)
        eight = memory("cogvideox_2b", "sft", world_size=8, overrides=overrides)
        for kind in ("weights", "gradients", "fp32 masters", "optimizer states"):
            assert eight[kind] == one[kind] / (8 if kind in divided else 1), (stage, kind)


def test_lora_keeps_states_of_the_adapters_only():
    states = memory("cogvideox_5b", "lora")
    adapters = 132_120_576
    assert states["weights"] == 2 * (5_570_283_072 + adapters)
    assert states["optimizer states"] == 8 * adapters


def test_a_trainable_text_encoder_is_trained_except_by_lora():
    whole, adapted = load("tiny_t2v"), load("tiny_t2v", "lora")
    encoder = plan.text_encoder(whole).parameters
    assert plan.trained_parameters(whole) == plan.network_parameters(whole) + encoder
    assert plan.trained_parameters(adapted) == plan.lora_parameters(adapted)
    assert plan.training_memory(adapted, 1)["text encoder, frozen"] == 4 * encoder


def test_cached_latents_need_no_encoding_in_the_step():
    encoding = "VAE encoding, for a moment (estimate)"
    assert encoding in memory("cogvideox_2b", "sft")
    cached = memory("cogvideox_2b", "sft", overrides=("data.latent_cache=cache", "data.text_cache=cache"))
    assert not {encoding, "VAE, frozen", "text encoder, frozen"} & cached.keys()
    # An image condition encodes a noised frame in every step.
    with_image = ("data.latent_cache=cache", "data.text_cache=cache")
    assert "VAE, frozen" in memory("cogvideox_5b_i2v", "sft", overrides=with_image)


def test_checkpointed_activations_are_the_reference_estimate():
    # 4.6 GB of layer inputs and 2.4 GB of one layer (2.0 and 1.5 for 2B, whose own figure includes the MLP in fp32).
    assert memory("cogvideox_5b", "lora")["activations (estimate)"] / 1e9 == pytest.approx(
        4.6 + 2.4, rel=0.02
    )


# ---------------------------------------------------------------------------------------------------------- text


def test_the_description_names_what_a_user_looks_for():
    text = plan.describe(load("cogvideox_5b", "lora"), world_size=8)
    for expected in (
        "5,570,283,072",
        "132,120,576",
        "17,776 tokens",
        "332.2 TFLOP",
        "ZeRO-2 on 8 ranks",
        "GiB",
    ):
        assert expected in text
    assert all("estimate" in line for line in text.splitlines() if "activations" in line)


def test_the_plan_of_sampling_is_given_where_nothing_is_trained():
    text = plan.describe(load("cogvideox_2b"))
    assert "50 steps with guidance" in text and "optimizer" not in text
    assert "20 steps with guidance" in plan.describe(load("tiny_t2v"), sampling=True)


def test_the_plan_needs_no_torch():
    program = (
        "import sys, cogvideox\nfrom cogvideox.plan import describe\n"
        "describe(cogvideox.load_config([sys.argv[1]]))\nprint('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, CONFIGS / "tiny_t2v.yaml"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
