"""The SAT <-> diffusers key table against the published key lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformer_cases import KINDS, full, randomise, tiny

from cogvideox.weights.transformer_keys import SAT_PREFIX, diffusers_to_sat, is_sincos_table, sat_to_diffusers

MODELS = {
    "CogVideoX-2B": "2b",
    "CogVideoX-5B": "5b",
    "CogVideoX-5B-I2V": "5b_i2v",
    "CogVideoX1.5-5B": "1.5",
    "CogVideoX1.5-5B-I2V": "1.5_i2v",
}


def shapes(path: Path) -> dict[str, torch.Tensor]:
    return {
        key: torch.empty(shape, device="meta") for key, shape in json.loads(path.read_text())["keys"].items()
    }


def listing(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


@pytest.mark.parametrize("model", MODELS)
def test_published_key_lists_turn_into_each_other(model: str, reference: Path) -> None:
    sat = shapes(reference / "keys" / f"sat_{model}.json")
    diffusers = shapes(reference / "keys" / f"diffusers_{model}.json")
    kind = MODELS[model]
    assert listing(sat_to_diffusers(sat, learned_position=kind == "5b_i2v")) == listing(diffusers)
    own = listing(full(kind).state_dict())
    assert listing(diffusers_to_sat(diffusers)) == own
    assert listing(diffusers_to_sat(diffusers, prefix=SAT_PREFIX)) == {
        SAT_PREFIX + key: s for key, s in own.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_is_exact(kind: str) -> None:
    weights = randomise(tiny(kind)).state_dict()
    back = diffusers_to_sat(sat_to_diffusers(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_the_number_of_layers_comes_from_the_keys() -> None:
    weights = tiny("5b", num_layers=11).state_dict()
    assert any(key.startswith("transformer_blocks.10.") for key in sat_to_diffusers(weights))


def test_a_fixed_table_is_told_from_a_learned_one_by_its_values() -> None:
    net = tiny("2b")
    table = net.mixins["pos_embed"].table((3, 4, 6), 5)
    assert is_sincos_table(table) and is_sincos_table(table.bfloat16())
    assert not is_sincos_table(torch.zeros_like(table))
    assert not is_sincos_table(torch.randn(table.shape))
    key = "mixins.pos_embed.pos_embedding"
    assert "patch_embed.pos_embedding" not in sat_to_diffusers(net.state_dict() | {key: table})
    assert "patch_embed.pos_embedding" in sat_to_diffusers(net.state_dict() | {key: torch.randn(table.shape)})


def test_unknown_and_incomplete_state_dicts_are_errors() -> None:
    weights = tiny("5b").state_dict()
    with pytest.raises(ValueError, match="'x.y' is not a key .*SAT"):
        sat_to_diffusers(weights | {"x.y": torch.zeros(1)})
    with pytest.raises(ValueError, match="merge LoRA first"):
        sat_to_diffusers({"transformer.layers.0.attention.dense.matrix_A.0": torch.zeros(1)})
    theirs = sat_to_diffusers(weights)
    del theirs["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(ValueError, match="has no transformer_blocks.1.attn1.to_k.weight"):
        diffusers_to_sat(theirs)
