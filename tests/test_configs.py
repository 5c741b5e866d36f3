"""Every YAML file of configs/ loads, is complete, and describes the published model to the last parameter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import cogvideox
from cogvideox.config import load_config
from cogvideox.planning.description import describe

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = {  # file -> parameters of the transformer, from the published checkpoints
    "cogvideox_2b": 1_693_783_872,
    "cogvideox_5b": 5_570_283_072,
    "cogvideox_5b_i2v": 5_625_087_552,
    "cogvideox1.5_5b": 5_570_676_352,
    "cogvideox1.5_5b_i2v": 5_571_594_880,
}
TINY = ["tiny_t2v", "tiny_i2v"]
OVERLAYS = {  # overlay -> a file that it is put after
    "sft": "cogvideox_2b",
    "lora": "cogvideox_5b",
    "sample": "cogvideox_5b",
    "vae": "cogvideox_2b",
    "i2v": "tiny_t2v",
}


def load(*names: str):
    return load_config([CONFIGS / f"{name}.yaml" for name in names])


def everything() -> list[list[str]]:
    combined = [[model, overlay] for overlay in OVERLAYS if overlay != "i2v" for model in [*MODELS, *TINY]]
    return [[name] for name in [*MODELS, *TINY, "tiny_vae"]] + combined + [["tiny_t2v", "i2v"]]


def transformers() -> list[list[str]]:
    return [names for names in everything() if not {"tiny_vae", "vae"} & set(names)]


def test_no_file_is_left_out_of_these_tests():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*MODELS, *TINY, "tiny_vae", *OVERLAYS}


@pytest.mark.parametrize("names", everything(), ids="+".join)
def test_every_config_loads_and_has_a_plan(names):
    config = load(*names)
    assert describe(config, world_size=2)


@pytest.mark.parametrize("names", transformers(), ids="+".join)
def test_every_config_builds_on_the_meta_device(names):
    config = load(*names)
    net = cogvideox.build_transformer(config, device="meta")
    assert all(p.is_meta for p in net.parameters())
    if names[0] in MODELS:
        assert sum(p.numel() for p in net.parameters()) == MODELS[names[0]]


@pytest.mark.parametrize("names", [["tiny_vae"], *([name] for name in MODELS)], ids="+".join)
def test_every_vae_builds_on_the_meta_device(names):
    vae = cogvideox.build_vae(load(*names), device="meta")
    count = sum(p.numel() for p in vae.parameters())
    assert names == ["tiny_vae"] or count == 215_583_907


def sat_keys(reference: Path, name: str) -> dict[str, list[int]]:
    """Keys of a published transformer, without those that hold nothing learned (CONVENTIONS.md section 2)."""
    keys = json.loads((reference / "keys" / name).read_text())["keys"]
    dead = [
        "transformer.position_embeddings.weight",
        "mixins.pos_embed.freqs_sin",
        "mixins.pos_embed.freqs_cos",
    ]
    if "2B" in name:
        dead.append("mixins.pos_embed.pos_embedding")
    prefix = "model.diffusion_model."
    return {k.removeprefix(prefix): v for k, v in keys.items() if k.removeprefix(prefix) not in dead}


@pytest.mark.parametrize(
    "name, published",
    [
        ("cogvideox_2b", "sat_CogVideoX-2B.json"),
        ("cogvideox_5b", "sat_CogVideoX-5B.json"),
        ("cogvideox_5b_i2v", "sat_CogVideoX-5B-I2V.json"),
        ("cogvideox1.5_5b", "sat_CogVideoX1.5-5B.json"),
        ("cogvideox1.5_5b_i2v", "sat_CogVideoX1.5-5B-I2V.json"),
    ],
)
def test_every_key_and_shape_is_the_published_one(reference, name, published):
    net = cogvideox.build_transformer(load(name), device="meta")
    ours = {key: list(p.shape) for key, p in net.named_parameters()}
    theirs = sat_keys(reference, published)
    assert ours.keys() == theirs.keys()
    assert {key: shape for key, shape in ours.items() if math.prod(shape) != math.prod(theirs[key])} == {}
    # CogVideoX 1.0 stores its patch embedding as a convolution; everything else has the same shape here.
    assert {key for key, shape in ours.items() if shape != theirs[key]} <= {"mixins.patch_embed.proj.weight"}


def test_every_vae_key_and_shape_is_the_published_one(reference):
    vae = cogvideox.build_vae(load("cogvideox_2b"), device="meta")
    theirs = json.loads((reference / "keys" / "sat_vae.json").read_text())["keys"]
    assert {key: list(p.shape) for key, p in vae.state_dict().items()} == theirs


def test_the_tiny_models_share_the_vae_of_tiny_vae():
    vae = load("tiny_vae").vae
    assert all(load(name).vae == vae for name in TINY)


def test_the_image_overlay_gives_the_tiny_image_model():
    assert load("tiny_t2v", "i2v").model == load("tiny_i2v").model


@pytest.mark.parametrize("names", [[*MODELS][:1] + ["sft"], ["tiny_t2v"], ["tiny_vae"]], ids="+".join)
def test_training_overlays_choose_zero_2(names):
    assert load(*names).deepspeed["zero_optimization"]["stage"] == 2
