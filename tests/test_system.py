"""The system: where network, VAE, conditions and diffusion meet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cogvideox
from cogvideox.dist import RandomStreams
from cogvideox.system import VAESystem, VideoDiffusion, pad_front

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
