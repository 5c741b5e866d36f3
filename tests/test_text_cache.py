"""The text cache: each caption once, by the encoder that it names, and a machine without T5 that trains from it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from cache_case import SAMPLE, Materials, entries
from transformers import T5Config, T5EncoderModel

import train_video
from cogvideox import dist
from cogvideox.command_line import run_door
from cogvideox.conditioning import text as text_module
from cogvideox.conditioning.features import TextFeatures
from cogvideox.config import ConfigError
from cogvideox.system_cache import Caches, captions_of, run_ranks, sampling_prompts
from cogvideox.system_text import load_text_weights, text_condition_alone

CAPTIONS = ["a red circle moving right", "a blue square moving up"]


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Materials:
    dist.init(model_parallel=False)
    return Materials(tmp_path_factory.mktemp("materials"))


def caches_of(materials: Materials, root: Path, *overrides: str) -> Caches:
    return Caches(materials.config(f"data.text_cache={root}", *overrides), run_ranks())


@pytest.fixture
def encoder_is_built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    built, build = [], text_module.TextCondition._build

    def counted(self):
        built.append(1)
        return build(self)

    monkeypatch.setattr(text_module.TextCondition, "_build", counted)
    return built


def test_entries_are_the_encoders_own_output_bit_by_bit(materials, tmp_path):
    caches = caches_of(materials, tmp_path)
    assert caches.fill_text([*CAPTIONS, CAPTIONS[0]], [""]) == {}
    assert len(entries(tmp_path, "text")) == 3  # each caption once, and the empty prompt
    direct = T5EncoderModel.from_pretrained(materials.t5).eval()
    ids = torch.tensor([[*(byte + 3 for byte in caption.encode()), 1] for caption in CAPTIONS[:1]])
    ids = torch.nn.functional.pad(ids, (0, 32 - ids.shape[1]))  # ByT5: bytes + 3, end 1, padding 0
    with torch.no_grad():
        assert torch.equal(caches.text.encode(CAPTIONS[:1]), direct(input_ids=ids).last_hidden_state)


def test_a_second_start_builds_no_encoder(materials, tmp_path, encoder_is_built):
    assert caches_of(materials, tmp_path).fill_text(CAPTIONS) == {} and encoder_is_built == [1]
    again = caches_of(materials, tmp_path)
    assert again.fill_text(CAPTIONS) == {} and encoder_is_built == [1]
    more = caches_of(materials, tmp_path)
    assert more.fill_text([*CAPTIONS, "new"]) == {} and encoder_is_built == [1, 1]
    assert len(entries(tmp_path, "text")) == 3


def test_another_t5_another_length_and_another_dtype_are_other_folders_and_are_told(
    materials, tmp_path, caplog
):
    first = caches_of(materials, tmp_path)
    first.fill_text(CAPTIONS)
    torch.manual_seed(8)
    config = T5Config.from_pretrained(materials.t5)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    lengths = ["model.transformer.text_length=40", "model.conditions.0.params.max_length=40"]
    logging.getLogger("cogvideox").propagate = True
    for change, differs in (
        ([f"load.text_encoder={tmp_path}/t5"], "weights"),
        (lengths, "max_length 32, not 40"),
        (["model.conditions.0.params.dtype=bf16"], "dtype fp32, not bf16"),
    ):
        caplog.clear()
        other = caches_of(materials, tmp_path, *change)
        assert other.text.entries.folder != first.text.entries.folder
        with caplog.at_level(logging.INFO, logger="cogvideox"):
            other.fill_text(CAPTIONS)
        assert "2 of 2 captions are missing" in caplog.text and differs in caplog.text
        assert "they stay, unused" in caplog.text
    assert len(entries(tmp_path, "text")) == 8


def test_a_damaged_entry_is_encoded_anew_where_it_is_cut_and_named_where_it_lies(materials, tmp_path):
    caches = caches_of(materials, tmp_path, "data.cache_in_memory_gib=0")
    caches.fill_text(CAPTIONS)
    path = caches.text.path(CAPTIONS[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    again = caches_of(materials, tmp_path)
    assert again.text.missing(CAPTIONS, run_ranks()) == [CAPTIONS[1]]
    again.fill_text(CAPTIONS)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")  # NaN
    with pytest.raises(ValueError, match="is damaged: the features of 'a blue square moving up'"):
        caches.text.read(CAPTIONS[1])


def test_captions_that_do_not_fit_are_listed_before_the_encoder_is_read(
    materials, tmp_path, encoder_is_built, capsys
):
    long = "many words " * 9
    caches = caches_of(materials, tmp_path)
    failed = caches.fill_text([*CAPTIONS, long, " "])
    assert failed.keys() == {long, " "} and "32 fit" in failed[long] and "is empty" in failed[" "]
    assert not encoder_is_built and not entries(tmp_path, "text")
    assert caches.fill_text([*CAPTIONS, long], skip=True).keys() == {long}
    assert len(entries(tmp_path, "text")) == 2

    data = tmp_path / "data"
    shutil.copytree(SAMPLE, data)
    (data / "labels" / "red_triangle_up_000.txt").write_text(long)
    arguments = materials.arguments(f"data.text_cache={tmp_path}/x", f"run.dir={tmp_path}/run", data=data)
    assert run_door(train_video.main, arguments) == 2
    assert "data.text_cache: 1 captions cannot be encoded" in capsys.readouterr().err


def test_a_machine_without_t5_trains_from_the_one_encoder_of_the_folder(
    materials, tmp_path, encoder_is_built
):
    raw = materials.train(tmp_path / "raw", "train.steps=2")
    filled = caches_of(materials, tmp_path / "cache")
    sets = [train_video.open_data(filled.config, filled.config.data.path)]
    filled.fill_text(captions_of(sets))
    encoder_is_built.clear()
    without = ["load.text_encoder=null", f"data.text_cache={tmp_path}/cache"]
    assert materials.train(tmp_path / "run", "train.steps=2", *without) == raw and not encoder_is_built

    with pytest.raises(ValueError, match=r"lacks 1 captions \('new' \.\.\.\).*set load\.text_encoder"):
        caches_of(materials, tmp_path / "cache", *without).fill_text(["new"])
    with pytest.raises(ConfigError, match="holds features of 0 text encoders with max_length=32, fp32"):
        caches_of(materials, tmp_path / "empty", "load.text_encoder=null").fill_text(CAPTIONS)


def test_a_folder_of_the_cache_is_a_folder_of_text_features(materials, tmp_path):
    caches = caches_of(materials, tmp_path)
    caches.fill_text(CAPTIONS)
    features = TextFeatures(caches.text.entries.folder, 32, 64)
    assert set(features.prompts) == set(CAPTIONS)
    assert torch.equal(features.encode(CAPTIONS), caches.text.encode(CAPTIONS))


def test_a_condition_looks_into_the_cache_first_and_encodes_only_what_is_not_there(
    materials, tmp_path, encoder_is_built
):
    caches = caches_of(materials, tmp_path)
    caches.fill_text(CAPTIONS)
    encoder_is_built.clear()
    text = text_condition_alone(caches.config)
    text.cached = caches.text
    drop = torch.tensor([False, True])
    tokens = text({"caption": CAPTIONS}, drop)["tokens"]
    assert (
        not encoder_is_built and torch.equal(tokens[0], caches.text.read(CAPTIONS[0])) and not tokens[1].any()
    )
    beside = text({"caption": ["?", "?"], "text_features": caches.text.encode(CAPTIONS)}, drop)["tokens"]
    assert torch.equal(beside, tokens)
    load_text_weights(text, caches.config)
    assert text.encode(["new"]).shape == (1, 32, 64) and encoder_is_built == [1]


def test_what_guidance_compares_with_is_cached_beside_the_prompts(materials):
    def prompts(*overrides: str) -> list[str]:
        return sampling_prompts(materials.config(*overrides), ["p"])

    assert prompts() == ["p"]
    assert prompts("sample.negative_prompt=n") == ["p", "n"]
    assert prompts("sample.unconditional=empty_prompt") == ["p", ""]
    assert sampling_prompts(materials.config("sample.unconditional=empty_prompt"), []) == []


def test_the_folder_says_who_made_it(materials, tmp_path):
    caches = caches_of(materials, tmp_path)
    caches.fill_text(CAPTIONS)
    record = json.loads((caches.text.entries.folder / "maker.json").read_text())
    assert record["maker"].keys() == {"config", "dtype", "weights", "tokenizer", "max_length"}
    assert record["note"] == {"load.text_encoder": str(materials.t5)}
