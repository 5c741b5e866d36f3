"""The system: where network, VAE, conditions and diffusion meet."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stand_ins import sat_folder, sparse_safetensors
from transformer_cases import full

import cogvideox
from cogvideox.config import ConfigError
from cogvideox.dist import RandomStreams
from cogvideox.model.lora import LoRALinear, inject_lora
from cogvideox.model.patch_embed import pad_front
from cogvideox.system import VAESystem, VideoDiffusion
from cogvideox.weights import load
from cogvideox.weights.vae_keys import sat_to_diffusers as vae_to_diffusers

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = ["model.transformer.num_layers=2", "sample.steps=3", "model.conditions.0.params.config.num_layers=1"]
PROMPTS = ["a red circle moving right", "a blue square moving up"]


def make_system(*overrides: str, base: str = "tiny_t2v.yaml", randomise: bool = True) -> VideoDiffusion:
    config = cogvideox.load_config([CONFIGS / base], [*SMALL, *overrides])
    torch.manual_seed(0)
    system = VideoDiffusion(config)
    if randomise:  # adaLN starts at zero, which would hide the conditions
        for parameter in system.model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return system


def make_batch(num_frames: int = 9, size: int = 32) -> dict:
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (2, num_frames, 3, size, size), generator=generator, dtype=torch.uint8)
    return {"video": video, "caption": PROMPTS, "key": ["a", "b"]}


def streams(step: int = 0) -> RandomStreams:
    return RandomStreams.at(3, step)


def test_state_dict_has_the_published_names_and_nothing_frozen() -> None:
    names = make_system().state_dict().keys()
    assert "model.diffusion_model.transformer.layers.0.attention.query_key_value.weight" in names
    assert "conditioner.embedders.0.transformer.encoder.block.0.layer.0.SelfAttention.q.weight" in names
    assert all(
        n.startswith(("model.diffusion_model.", "conditioner.embedders.0.transformer.")) for n in names
    )


def test_loss_is_the_error_of_the_velocity_at_the_drawn_noise_and_timestep() -> None:
    system, batch = make_system("model.conditions.0.params.dropout=0.0"), make_batch()
    seen = {}
    predict = system.predict

    def record(x, t, condition):
        seen.update(x=x, t=t, v=predict(x, t, condition))
        return seen["v"]

    system.predict = record
    loss, _ = system(batch, streams())
    # x_t and the network's v give x0 and noise back (Salimans & Ho 2022): with the true v they must be the data's.
    alpha = system.schedule.table[seen["t"]].view(-1, 1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    x0 = system.encode_batch(batch, streams().local)
    noise = (seen["x"] - alpha * x0) / sigma
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    true_v = alpha * noise - sigma * x0
    torch.testing.assert_close(loss, (seen["v"] - true_v).square().mean(), atol=1e-5, rtol=1e-5)


def test_the_same_streams_give_the_same_loss_and_other_streams_another() -> None:
    system, batch = make_system(), make_batch()
    first, again, other = (system(batch, streams(s))[0].item() for s in (0, 0, 1))
    assert first == again != other


def test_loss_depends_on_the_caption() -> None:
    system = make_system("model.conditions.0.params.dropout=0.0")
    batch = make_batch()
    changed = {**batch, "caption": PROMPTS[::-1]}
    assert system(batch, streams())[0] != system(changed, streams())[0]


def test_image_to_video_loss_depends_on_the_image_itself() -> None:
    # CogVideo#558: an official training script used the image's shape only.
    system = make_system(base="tiny_i2v.yaml")
    latents = torch.randn(2, 3, system.config.vae.z_channels, 8, 8)
    system.encode_batch = lambda batch, generator: latents
    batch = make_batch()
    changed = {**batch, "video": batch["video"].clone()}
    changed["video"][:, 0] = 255 - changed["video"][:, 0]
    assert system(batch, streams())[0] != system(changed, streams())[0]


def test_gradients_reach_network_and_trained_text_encoder_but_not_the_vae() -> None:
    system = make_system("model.conditions.0.params.dropout=0.0")
    system(make_batch(), streams())[0].backward()
    assert all(p.grad is not None for p in system.transformer.parameters())
    encoder = system.conditioner.embedders[0].transformer
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    assert all(p.grad is None for p in system.vae.parameters())


def test_lora_leaves_only_its_matrices_trainable_and_freezes_the_text_encoder() -> None:
    system = make_system("lora.rank=4", randomise=False)
    system.load_weights()
    system.prepare_training(torch.device("cpu"))
    trainable = [n for n, p in system.named_parameters() if p.requires_grad]
    assert trainable and all(".matrix_A." in n or ".matrix_B." in n for n in trainable)
    assert not any(n.startswith("conditioner") for n in system.state_dict())


# ------------------------------------------------------------------------------------------------- weights, LoRA


def save_transformer(system: VideoDiffusion, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    state = {f"model.diffusion_model.{k}": v.to(dtype) for k, v in system.transformer.state_dict().items()}
    return sat_folder(folder, state)


def trained_lora(seed: int = 0) -> VideoDiffusion:
    """A system whose network has LoRA of rank 4 at SAT's scale, 1 / 4, with an effect that is seen."""
    system = make_system()
    inject_lora(system.transformer, rank=4)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in system.transformer.named_parameters():
        if ".matrix_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return system


def output_of(system: VideoDiffusion) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 3, 8, 8, 8, generator=generator)
    tokens = torch.randn(1, 32, 64, generator=generator)
    with torch.no_grad():
        return system.eval().transformer(x, torch.tensor([500]), tokens)


def loaded(*overrides: str) -> VideoDiffusion:
    system = make_system(*overrides, randomise=False)
    system.load_weights()
    return system


@pytest.mark.parametrize("merge", ["true", "false"])
def test_a_full_sat_checkpoint_with_lora_computes_what_it_was_trained_to(merge: str, tmp_path: Path) -> None:
    trained = trained_lora()
    path = save_transformer(trained, tmp_path / "w")
    for lora in ([], [f"load.lora={path}"]):  # named twice, it counts once
        system = loaded(f"load.transformer={path}", *lora, f"sample.merge_lora={merge}")
        assert any(isinstance(m, LoRALinear) for m in system.transformer.modules()) == (merge == "false")
        torch.testing.assert_close(output_of(system), output_of(trained), atol=1e-5, rtol=0)
    # For full fine-tuning the LoRA becomes a part of the weights that train.
    system.prepare_training(torch.device("cpu"))
    assert system.state_dict().keys() == make_system().state_dict().keys()
    torch.testing.assert_close(output_of(system), output_of(trained), atol=1e-5, rtol=0)


def test_a_full_sat_checkpoint_with_lora_goes_on_in_the_section_lora(tmp_path: Path) -> None:
    trained = trained_lora()
    path = save_transformer(trained, tmp_path / "w")
    system = loaded(f"load.transformer={path}", "lora.rank=4")
    expected, own = trained.transformer.state_dict(), system.transformer.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[k], expected[k]) for k in own)
    with pytest.raises(
        ValueError,
        match="its LoRA has rank 4, your config lora.rank=8 for transformer.layers.0.*: use lora.rank=4",
    ):
        loaded(f"load.transformer={path}", "lora.rank=8")


def test_a_further_lora_adds_to_that_of_the_checkpoint(tmp_path: Path) -> None:
    first, second = trained_lora(0), trained_lora(1)
    base = save_transformer(first, tmp_path / "first")
    other = save_transformer(second, tmp_path / "second")
    half = [f"load.transformer={base}", f"load.lora=[{{path: {other}, strength: 0.5}}]"]
    system, plain = loaded(*half), make_system()
    weight = "transformer.layers.0.attention.dense"

    def update(of: VideoDiffusion) -> torch.Tensor:
        layer = of.transformer.get_submodule(weight)
        return (layer.matrix_B[0] @ layer.matrix_A[0] / 4).detach()

    expected = plain.transformer.get_submodule(weight).weight + update(first) + 0.5 * update(second)
    torch.testing.assert_close(system.transformer.get_submodule(weight).weight, expected, atol=1e-5, rtol=0)
    # In training the further one starts the adapters, and the checkpoint's own belongs to the frozen base.
    system = loaded(*half, "lora.rank=4")
    layer = system.transformer.get_submodule(weight)
    expected = plain.transformer.get_submodule(weight).weight + update(first)
    torch.testing.assert_close(layer.original.weight, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(update(system), 0.5 * update(second), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("3", r"load\.lora=3: expected a path or"),
        ("[a, 3]", r"load\.lora\.1=3: expected a path or"),
        ("[{path: a, strength: much}]", r"load\.lora\.0: strength='much': expected a number"),
        ("[{path: a, strength: .nan}]", r"load\.lora\.0=.*expected a path and a finite strength"),
        ("[{path: a, strenght: 1}]", r"load\.lora\.0: unknown key strenght: did you mean strength"),
        ("[{strength: 1}]", r"load\.lora\.0: path is missing"),
        ("[{path: a, alpha: 0}]", r"load\.lora\.0\.alpha=0\.0: expected a number other than 0"),
        ("['']", r"load\.lora\.0=''.*expected a path"),
    ],
)
def test_a_wrong_entry_of_load_lora_is_one_clear_error(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_system(f"load.lora={value}")


def test_several_loras_cannot_start_one_set_of_adapters() -> None:
    with pytest.raises(ConfigError, match=r"load\.lora names 2 LoRAs, but the section lora has one set"):
        make_system("load.lora=[a, b]", "lora.rank=4")
    assert [
        (s.path, s.strength)
        for s in make_system("load.lora=[a, {path: b, strength: 1e-1}]").config.load.loras
    ] == [
        ("a", 1.0),
        ("b", 0.1),
    ]


def published(monkeypatch: pytest.MonkeyPatch, **facts) -> None:
    """Weights of the tiny network pass for those of a published model."""
    check = load.check_transformer
    monkeypatch.setattr(
        load, "check_transformer", lambda *a, **k: dataclasses.replace(check(*a, **k), **facts)
    )


def test_constants_of_the_weights_are_checked_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_transformer(make_system(), tmp_path / "w")
    weights = f"load.transformer={path}"
    published(monkeypatch, variant="CogVideoX-2B", latent_scale=1.15258426, snr_shift=3.0)
    right = ["vae.scale_factor=1.15258426", "model.schedule.params.snr_shift=3"]
    loaded(weights, *right)
    system = make_system(weights, right[0], randomise=False)
    for parameter in system.transformer.parameters():
        parameter.data.fill_(7.0)
    with pytest.raises(
        ValueError, match=r"snr_shift=1\.0.*CogVideoX-2B.*set model\.schedule\.params\.snr_shift=3\.0"
    ):
        system.load_weights()
    assert all((parameter == 7.0).all() for parameter in system.transformer.parameters())
    with pytest.raises(ValueError, match=r"scale_factor=1\.55258426.*set vae\.scale_factor=1\.15258426"):
        loaded(weights, "vae.scale_factor=1.55258426", right[1])
    with caplog.at_level(logging.WARNING, "cogvideox"):
        loaded(weights, "vae.scale_factor=1.55258426", right[1], "load.force_constants=true")
    assert "trained with 1.15258426; kept, as load.force_constants=true" in caplog.text


def test_the_scale_in_a_vae_folder_is_checked(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    state = vae_to_diffusers(make_system().vae.state_dict())
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"scaling_factor": 0.7}))
    with pytest.raises(
        ValueError, match=r"vae\.scale_factor=1\.0, but .*trained with 0\.7: set vae\.scale_factor=0\.7"
    ):
        loaded(f"load.vae={folder}")
    loaded(f"load.vae={folder}", "vae.scale_factor=0.7")


def test_a_run_that_trained_a_vae_says_nothing_of_its_scale(tmp_path: Path) -> None:
    """Its configuration has one, which its training never used; the demo measures the scale afterwards."""
    folder = tmp_path / "run" / "checkpoints" / "7"
    folder.mkdir(parents=True)
    state = {f"first_stage_model.{name}": t for name, t in make_system().vae.state_dict().items()}
    torch.save({"module": state}, folder / "mp_rank_00_model_states.pt")
    (folder / "state.json").write_text('{"step": 7}')
    (folder / "config.yaml").write_text("vae: {scale_factor: 1.0}")
    (folder.parent / "latest").write_text("7")
    loaded(f"load.vae={tmp_path / 'run'}", "vae.scale_factor=0.4321")


def test_another_model_is_named_before_its_constants(tmp_path: Path) -> None:
    shapes = {k: tuple(v.shape) for k, v in full("2b").state_dict().items()}
    with pytest.raises(ValueError, match="this is CogVideoX-2B .*; your config is an unpublished"):
        loaded(f"load.transformer={sparse_safetensors(tmp_path / '2b.safetensors', shapes)}")


def test_sampling_takes_the_precision_of_the_weights_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_transformer(make_system(), tmp_path / "w", torch.bfloat16)
    system = loaded(f"load.transformer={path}", "sample.precision=null")
    system.prepare_sampling(torch.device("cpu"))
    assert {p.dtype for p in system.transformer.parameters()} == {torch.bfloat16}
    assert system.config.sample.precision == "bf16"  # what the sidecars of the videos will say
    assert loaded("sample.precision=null").config.sample.precision == "fp32"
    with pytest.raises(ValueError, match=r"sample\.precision=fp16, but .*trained in bf16"):
        loaded(f"load.transformer={path}", "sample.precision=fp16")
    published(monkeypatch, published_dtype="float16")
    system = loaded(f"load.transformer={path}", "sample.precision=null")
    with pytest.raises(ValueError, match=r"sample\.precision=fp16 needs a GPU"):
        system.prepare_sampling(torch.device("cpu"))
    system.config.load.force_fp16 = True
    system.prepare_sampling(torch.device("cpu"))


def test_the_text_encoder_of_a_pipeline_folder_is_found_and_a_file_alone_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    section = cogvideox.load_config([CONFIGS / "tiny_t2v.yaml"], SMALL).model.conditions[0].params["config"]
    torch.manual_seed(4)
    encoder = T5EncoderModel(T5Config(**section)).eval()
    encoder.save_pretrained(tmp_path / "text_encoder")
    pretrained = ["model.conditions.0.params.config=null", "model.conditions.0.params.trainable=false"]
    system = loaded(*pretrained, f"load.text_encoder={tmp_path}")
    condition = system.conditioner.embedders[0]
    expected = encoder(condition.tokenize(PROMPTS)).last_hidden_state
    torch.testing.assert_close(condition.encode(PROMPTS), expected, atol=1e-5, rtol=0)
    file = tmp_path / "text_encoder" / "model.safetensors"
    with pytest.raises(ValueError, match=r"model\.safetensors is no folder: expected config\.json, weights"):
        loaded(*pretrained, f"load.text_encoder={file}").check_prompts(PROMPTS)


def test_temporal_patch_pads_in_front_by_repeating_the_first_latent() -> None:
    latents = torch.arange(3.0).view(1, 3, 1, 1, 1)
    assert pad_front(latents, 2).flatten().tolist() == [0, 0, 1, 2]
    assert pad_front(latents, 1) is latents


V15 = ["model.transformer.patch_size=[2, 2, 2]", "model.transformer.ofs_embed_dim=128"]


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_temporal_patch_trains_and_samples_any_latent_count(frames: int) -> None:
    system = make_system(*V15)
    assert torch.isfinite(system(make_batch(frames), streams())[0])
    video = system.sample(PROMPTS, num_frames=frames)
    assert video.shape == (2, frames, 3, 32, 32)


def test_a_sample_is_the_same_alone_and_in_a_batch() -> None:
    system = make_system().eval()
    together = system.sample(PROMPTS, seeds=[5, 6])
    alone = system.sample(PROMPTS[1:], seeds=[6])
    # Products of other batch sizes round differently.
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)


def test_seed_prompt_negative_prompt_and_size_all_count() -> None:
    system = make_system().eval()
    base = system.sample(PROMPTS[:1], seeds=[1])
    assert torch.equal(base, system.sample(PROMPTS[:1], seeds=[1]))
    assert not torch.equal(base, system.sample(PROMPTS[:1], seeds=[2]))
    assert not torch.equal(base, system.sample(PROMPTS[1:], seeds=[1]))
    assert not torch.equal(base, system.sample(PROMPTS[:1], seeds=[1], negative_prompt="a star"))
    assert system.sample(PROMPTS[:1], height=16, width=48, num_frames=5).shape == (1, 5, 3, 16, 48)


def test_a_stream_reports_each_stage_and_ends_with_the_same_video() -> None:
    system = make_system().eval()
    reports = list(system.sample_stream(PROMPTS[:1], seeds=[1]))
    assert torch.equal(reports.pop()["video"], system.sample(PROMPTS[:1], seeds=[1]))
    steps = [(r["stage"], r["step"], r["steps"]) for r in reports]
    assert steps == [
        *(("encode", i, 1) for i in range(2)),
        *(("denoise", i, 3) for i in range(4)),
        *(("decode", i, 9) for i in (0, 9)),
    ]
    assert [r["seconds_left"] is None for r in reports] == [r["step"] == 0 for r in reports]
    assert all(r["seconds_left"] == 0 for r in reports if r["step"] == r["steps"])


def test_a_stream_that_is_closed_ends_its_work() -> None:
    system, calls, threads = make_system().eval(), [], threading.active_count()
    predict = system.predict
    system.predict = lambda *arguments: calls.append(1) or predict(*arguments)
    stream = system.sample_stream(PROMPTS[:1])
    while next(stream)["step"] < 1 or not calls:
        pass
    stream.close()
    assert len(calls) == 1 and threading.active_count() == threads


def test_an_error_in_a_stream_is_raised_where_it_is_read() -> None:
    with pytest.raises(ValueError, match="give video="):
        list(make_system().sample_stream(PROMPTS[:1], strength=0.5))


def test_a_video_starts_inverts_and_keeps_from_python_too() -> None:
    system = make_system("sample.steps=5").eval()
    video = make_batch()["video"][:1]
    base = system.sample(PROMPTS[:1], seeds=[1])
    ways = [{"strength": 0.5}, {}, {"keep_frames": range(5)}, {"invert": True}]
    ways.append({"invert": True, "source_prompts": PROMPTS[1:]})
    results = [system.sample(PROMPTS[:1], seeds=[1], video=video, **way) for way in ways]
    for i, result in enumerate(results):
        assert not any(torch.equal(result, other) for other in [base, *results[:i]])
    assert torch.equal(results[1], system.sample(PROMPTS[:1], seeds=[1], video=video, strength=0.8))
    with pytest.raises(ValueError, match=r"strength=1\.2: expected a number from 0"):
        system.sample(PROMPTS[:1], video=video, strength=1.2)
    with pytest.raises(ValueError, match=r"video is \(1, 5, 3, 32, 32\): expected \(B, 9, 3, 32, 32\)"):
        system.sample(PROMPTS[:1], video=video[:, :5], strength=0.5)


def test_each_unconditional_branch_is_another_video() -> None:
    """zeros, as published; empty_prompt, as diffusers; a negative prompt takes the place of either."""
    system = make_system().eval()
    videos = []
    for unconditional in ("zeros", "empty_prompt"):
        system.config.sample.unconditional = unconditional
        videos += [system.sample(PROMPTS[:1], seeds=[1], negative_prompt=n) for n in (None, "a star")]
    zeros, negative, empty, same_negative = videos
    assert torch.equal(negative, same_negative)
    assert (
        not torch.equal(zeros, empty)
        and not torch.equal(zeros, negative)
        and not torch.equal(empty, negative)
    )


def test_image_to_video_sample_follows_its_image() -> None:
    system = make_system(base="tiny_i2v.yaml").eval()
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    first = system.sample(PROMPTS[:1], seeds=[1], images=images)
    assert torch.equal(first, system.sample(PROMPTS[:1], seeds=[1], images=images))
    assert not torch.equal(first, system.sample(PROMPTS[:1], seeds=[1], images=255 - images))


def test_non_finite_weights_never_give_a_black_video() -> None:
    system = make_system().eval()
    system.transformer.time_embed[0].weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1 of 3"):
        system.sample(PROMPTS[:1])


def test_a_prompt_that_is_cut_is_reported_with_the_words_that_it_loses(caplog) -> None:
    system = make_system("model.conditions.0.params.on_long=cut")
    with caplog.at_level(logging.WARNING, "cogvideox"):
        for _ in range(2):  # each time, not only the first
            caplog.clear()
            system.check_prompts(["a short one", "a red circle moving to the right and up"])
            assert (
                "the prompt 'a red circle moving to the right and up' is too long; lost: 'right and up'"
                in caplog.text
            )


def test_a_prompt_that_does_not_fit_says_how_many_tokens_do() -> None:
    system = make_system()
    with pytest.raises(ValueError, match=r"33 fit|32 fit"):
        system.check_prompts(["a very long prompt that has more bytes than fit into the encoder"])


def test_vae_system_trains_under_the_published_names() -> None:
    system = VAESystem(cogvideox.load_config([CONFIGS / "tiny_vae.yaml"]))
    loss, metrics = system(make_batch(5), streams())
    loss.backward()
    assert torch.isfinite(loss) and "psnr" in metrics
    assert all(n.startswith("first_stage_model.") for n in system.state_dict())
