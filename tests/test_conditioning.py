"""Text and image conditions, against the published code, transformers, and closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cogvideox.conditioning.conditioner import Conditioner
from cogvideox.conditioning.frames import FirstFrameCondition, add_image_noise, image_latent_multiplier
from cogvideox.conditioning.text import TextCondition

TINY = {
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 4,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 384,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}


def tiny_text(**changes) -> TextCondition:
    arguments = {"max_length": 12, "config": TINY, "tokenizer": "byt5"}
    return TextCondition(**{**arguments, **changes})


def streams(seed: int = 0) -> SimpleNamespace:
    return SimpleNamespace(local=torch.Generator().manual_seed(seed))


def kept(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool)


@pytest.fixture(scope="module")
def text() -> TextCondition:
    return tiny_text()


# ------------------------------------------------------------------------------------------------------------- text


def test_encoder_matches_the_published_one_without_a_mask(reference: Path) -> None:
    folder = reference / "fixtures/t5"
    ids, outputs = (
        load_file(folder / "inputs.safetensors")["input_ids"],
        load_file(folder / "outputs.safetensors"),
    )
    config = {
        "d_model": 32,
        "d_ff": 48,
        "d_kv": 8,
        "num_heads": 3,
        "num_layers": 2,
        "vocab_size": 100,
        "feed_forward_proj": "gated-gelu",
    }
    condition = TextCondition(max_length=20, config=config, tokenizer="byt5")
    weights = load_file(folder / "weights.safetensors")
    missing, unexpected = condition.transformer.load_state_dict(weights, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"} and not unexpected  # it is shared.weight
    tokens = condition.encode_ids(ids)
    torch.testing.assert_close(tokens, outputs["last_hidden_no_mask"], rtol=0, atol=1e-5)
    assert (tokens - outputs["last_hidden_with_mask_NOT_upstream"]).abs().max() > 1e-2


def test_tokens_are_those_of_a_direct_call_of_transformers(text: TextCondition) -> None:
    from transformers import ByT5Tokenizer

    captions = ["a red ball", "", "ünï"]
    ids = ByT5Tokenizer()(captions, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = text.transformer(input_ids=ids["input_ids"]).last_hidden_state
    assert torch.equal(text.encode(captions, allow_empty=True), expected)


def test_bytes_are_tokens_and_padding_is_zero(text: TextCondition) -> None:
    ids = text.tokenize(["ab"])
    assert ids.tolist() == [[ord("a") + 3, ord("b") + 3, 1] + [0] * 9]


def test_padding_changes_what_the_caption_becomes(text: TextCondition) -> None:
    """Because there is no mask: the same caption in another length is another embedding."""
    longer = tiny_text(max_length=20)
    assert (longer.encode(["abc"])[:, :4] - text.encode(["abc"])[:, :4]).abs().max() > 1e-4


def test_random_weights_depend_on_the_seed_of_the_condition_alone() -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = tiny_text()
    assert torch.equal(torch.random.get_rng_state(), before), "building must leave the global generator alone"
    torch.manual_seed(456)
    with torch.device("meta"):  # a frozen encoder is in no checkpoint: nothing would fill meta tensors
        second = tiny_text()
    assert torch.equal(first.encode(["abc"]), second.encode(["abc"]))
    assert not torch.equal(first.encode(["abc"]), tiny_text(init_seed=1).encode(["abc"]))


def test_a_frozen_encoder_is_outside_the_module_tree() -> None:
    condition = tiny_text()
    module = nn.ModuleList([condition]).bfloat16().train()  # what an engine does to a module
    assert not module.state_dict() and not list(module.parameters())
    assert not condition.transformer.training
    tokens = condition({"caption": ["abc"]}, kept(1))["tokens"]
    assert tokens.dtype == torch.float32 and not tokens.requires_grad


def test_a_trainable_encoder_has_gradients_and_the_key_names_of_sat() -> None:
    conditioner = Conditioner([tiny_text(trainable=True)])
    assert all(key.startswith("embedders.0.transformer.") for key in conditioner.state_dict())
    assert "embedders.0.transformer.shared.weight" in conditioner.state_dict()
    assert conditioner.embedders[0].transformer.training
    conditioner({"caption": ["abc", "de"]})["tokens"].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in conditioner.parameters())


def test_a_dropped_caption_is_zero_and_gives_no_gradient() -> None:
    condition = tiny_text(trainable=True)
    tokens = condition({"caption": ["abc", "de"]}, torch.tensor([False, True]))["tokens"]
    assert tokens[0].abs().min() > 0 and tokens[1].abs().max() == 0
    tokens[1].sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in condition.parameters())


def test_a_caption_that_is_too_long_says_how_many_tokens_fit(text: TextCondition) -> None:
    assert text.tokenize(["a" * 11]).shape == (1, 12)
    with pytest.raises(ValueError, match="18 tokens, 12 fit.*a red ball"):
        text.encode(["ok", "a red ball bouncing"[:17]])
    assert text.num_cut == 0


def test_the_error_names_the_words_that_would_be_cut(text: TextCondition) -> None:
    with pytest.raises(ValueError, match="these words would be cut: 'bouncing high'"):
        text.encode(["a red ball bouncing high"])
    assert text.cut_words(["ok", "a red ball bouncing high"]) == {1: "bouncing high"}
    assert text.cut_words(["unbreakable-word"]) == {0: "unbreakable-word"}


def test_cutting_keeps_the_end_token_and_is_counted() -> None:
    condition = tiny_text(on_long="cut")
    ids = condition.tokenize(["a" * 30, "ok", "b" * 12])
    assert condition.num_cut == 2
    assert ids[0].tolist() == [100] * 11 + [1] and ids[2].tolist() == [101] * 11 + [1]


@pytest.mark.parametrize("caption", ["", "  \n"])
def test_an_empty_caption_is_an_error_unless_it_is_allowed(text: TextCondition, caption: str) -> None:
    with pytest.raises(ValueError, match="position 1 is empty"):
        text({"caption": ["ok", caption]}, kept(2))
    assert text.encode([caption], allow_empty=True).shape == (1, 12, 16)
    assert tiny_text(allow_empty=True).encode([caption]).shape == (1, 12, 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_length": 0}, "max_length=0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"on_long": "crop"}, "on_long='crop'"),
        ({"dtype": "float32"}, "dtype='float32'.*fp32"),
        ({"tokenizer": None}, "tokenizer"),
        ({"model": "folder"}, "not both"),
        ({"config": None, "trainable": True}, "trainable=True"),
        ({"config": {**TINY, "num_layer": 2}}, "num_layer; did you mean num_layers"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_text(**wrong)


def test_one_string_instead_of_a_list_is_an_error(text: TextCondition) -> None:
    with pytest.raises(ValueError, match="expected a list of strings"):
        text.encode("a red ball")


def test_a_vocabulary_that_is_too_small_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocab_size=50"):
        tiny_text(config={**TINY, "vocab_size": 50}).encode(["abc"])


# ----------------------------------------------------------------------------------------------- pretrained folders


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAT's layout of T5-v1.1-XXL, tiny: config, weights and a sentencepiece model in one folder."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("weights") / "t5-v1_1-xxl"
    tiny_text(config={**TINY, "vocab_size": 32}, init_seed=5).transformer.save_pretrained(folder)
    lines = ["a red circle moving right", "a blue square moving left", "green triangle up and down"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=32,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder


def test_the_published_folder_layout_is_read(t5_folder: Path) -> None:
    import sentencepiece

    condition = TextCondition(max_length=30, model=str(t5_folder))
    assert condition.transformer is None and condition.hidden_size == 16  # nothing is loaded yet
    processor = sentencepiece.SentencePieceProcessor(str(t5_folder / "spiece.model"))
    for caption in ("a red circle moving left", "  a  ﬁne\tcafé "):  # white space and Unicode are normalised
        pieces = processor.encode(caption)
        assert condition.tokenize([caption])[0].tolist() == pieces + [1] + [0] * (29 - len(pieces))
    caption = "a red circle moving left"
    source = tiny_text(config={**TINY, "vocab_size": 32}, init_seed=5)
    ids = condition.tokenize([caption])
    torch.testing.assert_close(condition.encode([caption]), source.encode_ids(ids), rtol=0, atol=1e-6)
    condition.release()
    assert condition.transformer is None
    assert condition.encode([caption]).shape == (1, 30, 16)  # read again where it is needed


def test_the_folder_layout_of_diffusers_is_read(t5_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    for file in t5_folder.iterdir():
        place = "tokenizer" if file.name.startswith("spiece") else "text_encoder"
        (tmp_path / place / file.name).write_bytes(file.read_bytes())
    expected = TextCondition(max_length=30, model=str(t5_folder)).encode(["a blue circle"])
    for model in (tmp_path, tmp_path / "text_encoder"):
        assert torch.equal(TextCondition(max_length=30, model=str(model)).encode(["a blue circle"]), expected)


def test_the_dtype_of_the_weights_is_the_configured_one(t5_folder: Path) -> None:
    condition = TextCondition(max_length=30, model=str(t5_folder), dtype="bf16")
    assert condition.encode(["a red circle"]).dtype == torch.bfloat16


def test_a_pretrained_encoder_can_be_trained(t5_folder: Path) -> None:
    condition = TextCondition(max_length=30, model=str(t5_folder), trainable=True)
    condition.encode(["a red circle"]).sum().backward()
    assert condition.transformer.training and condition.transformer.shared.weight.grad is not None


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "holds no config.json"),
        ("spiece.model", "no tokenizer .spiece.model"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(
    t5_folder: Path, tmp_path: Path, missing: str, message: str
) -> None:
    for file in t5_folder.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=message):
        TextCondition(max_length=30, model=str(tmp_path)).encode(["a red circle"])


def test_weights_that_lack_a_tensor_are_an_error(t5_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack.*final_layer_norm"):
        TextCondition(max_length=30, model=str(tmp_path)).encode(["a red circle"])


def test_a_model_without_a_text_encoder_builds_and_says_so_when_it_is_used() -> None:
    condition = TextCondition(max_length=226)
    with pytest.raises(ValueError, match="load.text_encoder"):
        condition.load()
    with pytest.raises(ValueError, match="nowhere is no folder"):
        TextCondition(max_length=226, model="nowhere").load()


# ------------------------------------------------------------------------------------------------------ first frame


def toy_encode(pixels: torch.Tensor) -> torch.Tensor:
    """The encoder of the fixtures: 8 x 8 means, groups of four later frames, C = 4, scaled by 0.7."""
    b, f, c, h, w = pixels.shape
    pooled = pixels.reshape(b, f, c, h // 8, 8, w // 8, 8).mean((4, 6))
    frames = [pooled[:, :1]] + [pooled[:, j : j + 4].mean(1, keepdim=True) for j in range(1, f, 4)]
    latent = torch.cat(frames, dim=1)
    return 0.7 * torch.stack([(i + 1) / 4 * latent[:, :, i % 3] for i in range(4)], dim=2)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_image_condition_is_the_published_one(
    reference: Path, monkeypatch, repeat: bool, dropped: bool
) -> None:
    inputs = load_file(reference / "fixtures/i2v_cond/inputs.safetensors")
    outputs = load_file(reference / "fixtures/i2v_cond/outputs.safetensors")
    key = f"allcat{int(repeat)}.drop{int(dropped)}."
    draws = iter([(inputs["log_sigma"] + 3) / 0.5, inputs["image_noise"].transpose(1, 2)])
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: next(draws))
    condition = FirstFrameCondition(repeat=repeat)
    batch = {"video": inputs["mp4"]}
    drop = torch.full((2,), dropped)
    concat = condition(batch, drop, encode=toy_encode, rng=streams())["concat"]
    torch.testing.assert_close(concat, outputs[key + "concat_images"], rtol=0, atol=1e-5)
    torch.testing.assert_close(toy_encode(inputs["mp4"]), outputs[key + "z"], rtol=0, atol=1e-5)


def test_image_noise_is_log_normal_per_sample() -> None:
    seen = []
    condition = FirstFrameCondition()
    batch = {"video": torch.zeros(2000, 5, 3, 8, 8)}
    condition(batch, kept(2000), encode=lambda p: seen.append(p) or p[:, :, :, :1, :1], rng=streams())
    log_sigma = seen[0].flatten(1).std(1).log()
    # 192 values per sample: log of their deviation has error 0.05; 2,000 samples.
    assert log_sigma.mean().item() == pytest.approx(-3, abs=0.05)
    assert log_sigma.std().item() == pytest.approx(0.5, abs=0.05)


def test_the_image_is_clean_at_inference() -> None:
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    condition = FirstFrameCondition(dropout=1.0)
    concat = Conditioner([condition])({"image": image}, encode=toy_encode, num_latent_frames=6)["concat"]
    assert concat.shape == (2, 6, 4, 2, 3)
    assert torch.equal(concat[:, :1], toy_encode(image[:, None])) and concat[:, 1:].abs().max() == 0


def test_the_number_of_latent_frames_comes_from_the_clip_or_its_moments() -> None:
    condition, clip = FirstFrameCondition(), torch.zeros(1, 9, 3, 16, 24)
    assert condition({"video": clip}, kept(1), encode=toy_encode)["concat"].shape[1] == 3
    cached = {"moments": torch.zeros(1, 5, 8, 2, 3), "image": clip[:, 0]}
    assert condition(cached, kept(1), encode=toy_encode)["concat"].shape[1] == 5
    with pytest.raises(ValueError, match="num_latent_frames"):
        condition({"image": clip[:, 0]}, kept(1), encode=toy_encode)
    with pytest.raises(ValueError, match="there is no image"):
        condition({"caption": ["a"]}, kept(1), encode=toy_encode, num_latent_frames=3)


def test_uint8_pixels_are_brought_to_the_range_of_the_vae() -> None:
    seen = []
    image = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    FirstFrameCondition()(
        {"image": image}, kept(2), encode=lambda p: seen.append(p) or p, num_latent_frames=1
    )
    assert seen[0].shape == (2, 1, 3, 8, 8) and seen[0][0].unique() == -1 and seen[0][1].unique() == 1


def test_image_latent_conventions() -> None:
    z, image = 0.7, torch.ones(1, 3, 8, 8)
    for convention, expected in {"training": 0.7, "sat_sampling": 1.0, "diffusers": 1 / 0.7}.items():
        latent = FirstFrameCondition()(
            {"image": image},
            kept(1),
            encode=lambda p: z * p[:, :, :, :1, :1],
            num_latent_frames=2,
            image_latent_scale=convention,
            scale_factor=0.7,
        )["concat"]
        assert latent[0, 0, 0, 0, 0].item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="image_latent_scale='z'.*training, sat_sampling, diffusers"):
        image_latent_multiplier("z", 0.7)


def test_image_noise_of_sigma_zero_changes_nothing() -> None:
    image = torch.ones(2, 1, 3, 4, 4)
    noised = add_image_noise(image, torch.tensor([-math.inf, 0.0]), torch.full_like(image, 2.0))
    assert noised[0].unique() == 1 and noised[1].unique() == 3


@pytest.mark.parametrize("wrong", [{"noise_log_std": -1}, {"dropout": -0.1}, {"dropout_per": "clip"}])
def test_a_wrong_image_setting_is_an_error(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FirstFrameCondition(**wrong)


# ------------------------------------------------------------------------------------------------------ conditioner


class Style(nn.Module):
    """A condition of a user's own file: one token, and one channel, from a number per clip."""

    dropout = 0.25

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, batch: dict, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        value = batch["style"].masked_fill(drop, 0)
        return {
            "tokens": value.view(-1, 1, 1).expand(-1, 1, self.width),
            "concat": value.view(-1, 1, 1, 1, 1).expand(-1, 3, 1, 2, 3),
        }


class FakeText:
    """The embedder of the fixtures: emb[b] = full((4, 5), len(txt)) + arange(5). No module, only a callable."""

    dropout = 0.1

    def __call__(self, batch: dict, drop: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tokens": self.encode(batch["caption"], drop.device).masked_fill(drop[:, None, None], 0)}

    def encode(self, captions: list[str], device: torch.device, *, allow_empty: bool = False) -> torch.Tensor:
        return torch.stack([torch.full((4, 5), float(len(c))) + torch.arange(5) for c in captions])


def test_caption_dropout_and_unconditional_tokens_are_the_published_ones(reference: Path) -> None:
    inputs = load_file(reference / "fixtures/i2v_cond/inputs.safetensors")
    outputs = load_file(reference / "fixtures/i2v_cond/outputs.safetensors")
    cond, uncond = Conditioner([FakeText()]).for_sampling(["a", "abc"])
    assert torch.equal(cond["tokens"], outputs["cond.infer_c"])
    assert torch.equal(uncond["tokens"], outputs["cond.infer_uc"])
    drop = inputs["bernoulli_mask"] == 0  # upstream multiplies by Bernoulli(1 - rate)
    dropped = FakeText()({"caption": ["a", "abc"]}, drop)["tokens"]
    assert torch.equal(dropped, outputs["cond.train_with_bernoulli_mask"])


def test_conditions_are_joined_in_their_order(text: TextCondition) -> None:
    conditioner = Conditioner([text, FirstFrameCondition(), Style(16)])
    batch = {"caption": ["a", "bc"], "video": torch.ones(2, 9, 3, 16, 24), "style": torch.tensor([3.0, 4.0])}
    out = conditioner(batch, encode=toy_encode)
    assert out["tokens"].shape == (2, 13, 16) and out["concat"].shape == (2, 3, 5, 2, 3)
    assert torch.equal(out["tokens"][:, :12], text.encode(["a", "bc"]))
    assert out["tokens"][1, 12].unique() == 4 and out["concat"][0, 2, 4].unique() == 3


def test_each_condition_is_dropped_at_its_own_rate() -> None:
    conditioner = Conditioner([FakeText(), Style(5)])
    batch = {"caption": ["a"] * 4000, "style": torch.ones(4000)}
    tokens = conditioner(batch, rng=streams())["tokens"]
    text_dropped, style_dropped = tokens[:, 0, 0] == 0, tokens[:, 4, 0] == 0
    # 4,000 draws: 1 sigma is 0.005 and 0.007.
    assert text_dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert style_dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (text_dropped & style_dropped).float().mean().item() == pytest.approx(0.025, abs=0.01)


def test_image_dropout_is_per_sample_or_per_batch() -> None:
    batch = {"video": torch.ones(6, 1, 3, 8, 8)}
    shares = {}
    for per in ("sample", "batch"):
        conditioner = Conditioner([FirstFrameCondition(dropout=0.5, dropout_per=per)])
        outs = [conditioner(batch, rng=streams(i), encode=toy_encode)["concat"] for i in range(100)]
        dropped = torch.stack([out.flatten(1).abs().amax(1) == 0 for out in outs])  # (steps, batch)
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.15)
        shares[per] = dropped.float().mean(1).unique()
    assert shares["batch"].tolist() == [0, 1] and len(shares["sample"]) > 3


def test_the_same_streams_give_the_same_drops() -> None:
    conditioner, batch = Conditioner([FakeText()]), {"caption": ["a"] * 64}
    first, again, other = (conditioner(batch, rng=streams(s))["tokens"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_negative_prompt_is_encoded_and_used(text: TextCondition) -> None:
    conditioner = Conditioner([text])
    cond, uncond = conditioner.for_sampling(["a", "b"], negative_prompt="blur")
    assert torch.equal(uncond["tokens"], text.encode(["blur", "blur"]))
    assert torch.equal(cond["tokens"], text.encode(["a", "b"]))
    _, mixed = conditioner.for_sampling(["a", "b"], negative_prompt=["blur", None])
    assert torch.equal(mixed["tokens"][:1], text.encode(["blur"])) and mixed["tokens"][1].abs().max() == 0


def test_the_unconditional_branch_is_zeros_or_the_encoded_empty_prompt(text: TextCondition) -> None:
    conditioner = Conditioner([text])
    empty = text.encode([""], allow_empty=True)
    _, zeros = conditioner.for_sampling(["a", "b"])
    _, encoded = conditioner.for_sampling(["a", "b"], unconditional="empty_prompt")
    _, both = conditioner.for_sampling(["a", "b"], unconditional="empty_prompt", negative_prompt=[None, "x"])
    assert zeros["tokens"].shape == (2, 12, 16) and zeros["tokens"].abs().max() == 0
    assert torch.equal(encoded["tokens"], empty.expand(2, -1, -1))
    assert torch.equal(both["tokens"], torch.cat([empty, text.encode(["x"])]))
    with pytest.raises(ValueError, match="sample.unconditional='none'"):
        conditioner.for_sampling(["a"], unconditional="none")


def test_other_images_replace_the_channels_and_not_the_text(text: TextCondition) -> None:
    conditioner = Conditioner([text, FirstFrameCondition()])
    images = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    context = {"encode": lambda pixels: pixels, "num_latent_frames": 3}
    first, second = (conditioner.for_sampling(["a"], images=image, **context) for image in images)
    swapped = conditioner.with_images(first, images[1], **context)
    for branch, expected, before in zip(swapped, second, first, strict=True):
        assert torch.equal(branch["concat"], expected["concat"]) and branch["tokens"] is before["tokens"]
    with pytest.raises(ValueError, match="one image per prompt"):
        conditioner.with_images(first, images[:, 0], **context)
    with pytest.raises(ValueError, match="has no image condition"):
        Conditioner([text]).with_images(first, images[1], **context)


def test_the_image_stays_in_the_unconditional_branch(text: TextCondition) -> None:
    conditioner = Conditioner([text, FirstFrameCondition()])
    cond, uncond = conditioner.for_sampling(
        ["a"], images=torch.ones(1, 3, 16, 24), encode=toy_encode, num_latent_frames=3
    )
    assert torch.equal(cond["concat"], uncond["concat"]) and cond["concat"].abs().max() > 0


def test_what_cannot_be_used_is_an_error_and_not_ignored(text: TextCondition) -> None:
    with pytest.raises(ValueError, match="no image condition"):
        Conditioner([text]).for_sampling(["a"], images=torch.ones(1, 3, 16, 24))
    with pytest.raises(ValueError, match="there is no image"):
        Conditioner([text, FirstFrameCondition()]).for_sampling(["a"], encode=toy_encode, num_latent_frames=3)
    with pytest.raises(ValueError, match="no text condition"):
        Conditioner([FirstFrameCondition()]).for_sampling(
            ["a"], images=torch.ones(1, 3, 8, 8), negative_prompt="x", encode=toy_encode, num_latent_frames=1
        )
    like = Conditioner([text, Style(16)])({"caption": ["a"], "style": torch.ones(1)})
    with pytest.raises(ValueError, match="cannot be encoded"):
        Conditioner([text, Style(16)]).unconditional(like, negative_prompt="x")
    with pytest.raises(ValueError, match="3 negative prompts for 2"):
        Conditioner([text]).for_sampling(["a", "b"], negative_prompt=["x", "y", "z"])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"token": torch.zeros(1, 2, 3)}, "returns 'token'; expected tokens or concat"),
        ({"tokens": torch.zeros(1, 3)}, r"expected \(B, L, D\)"),
        ({"concat": torch.zeros(2, 1, 1, 1, 1)}, r"expected \(B, T, C, H, W\) with B=1"),
    ],
)
def test_a_condition_that_returns_something_else_is_an_error(output: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conditioner([lambda batch, drop: output])({"caption": ["a"]})


def test_a_condition_is_given_the_context_that_it_names() -> None:
    seen = {}

    def condition(batch: dict, drop: torch.Tensor, rng=None, num_latent_frames=0) -> dict[str, torch.Tensor]:
        seen.update(rng=rng, num_latent_frames=num_latent_frames, dropped=drop.sum().item())
        return {"tokens": torch.zeros(len(drop), 1, 1)}

    rng = streams()
    Conditioner([condition])({"caption": ["a"]}, rng, toy_encode, num_latent_frames=7)
    assert seen == {"rng": rng, "num_latent_frames": 7, "dropped": 0}  # without `dropout` it is never dropped
