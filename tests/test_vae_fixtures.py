"""The VAE against numbers and key lists of the published code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvideox.vae.autoencoder import CausalVAE, posterior_mode, sample_posterior, split_moments
from cogvideox.weights.vae_keys import diffusers_to_sat, sat_to_diffusers

ATOL = 1e-5  # float32 against float32 in another order of summation; outputs reach 5


@pytest.fixture(scope="module")
def folder(reference) -> Path:
    return reference / "fixtures" / "vae"


@pytest.fixture(scope="module")
def inputs(folder) -> dict[str, torch.Tensor]:
    return {name: x.transpose(1, 2) for name, x in load_file(folder / "inputs.safetensors").items()}


@pytest.fixture(scope="module")
def outputs(folder) -> dict[str, torch.Tensor]:
    return {name: x.transpose(1, 2) for name, x in load_file(folder / "outputs.safetensors").items()}


@pytest.fixture(scope="module")
def vae(folder) -> CausalVAE:
    published = json.loads((folder / "config.json").read_text())["vae_config"]["params"]["encoder_config"][
        "params"
    ]
    vae = CausalVAE(
        in_channels=published["in_channels"],
        channels=published["ch"],
        channel_multipliers=published["ch_mult"],
        num_res_blocks=published["num_res_blocks"],
        z_channels=published["z_channels"],
    )
    vae.load_state_dict({name: x.float() for name, x in load_file(folder / "weights.safetensors").items()})
    return vae.requires_grad_(False)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13])
def test_one_pass_encode_gives_the_published_moments(vae, inputs, outputs, num_frames):
    close(vae.encode(inputs["x13"][:, :num_frames]), outputs[f"moments_{num_frames}"])


@pytest.mark.parametrize("num_frames", [9, 13])
def test_encode_in_batches_of_eight_is_one_pass_up_to_13_frames(vae, inputs, outputs, num_frames):
    close(vae.encode(inputs["x13"][:, :num_frames], frames_per_pass=8), outputs[f"moments_{num_frames}"])


def test_posterior_has_the_published_mean_log_variance_and_sample(vae, inputs, outputs):
    mean, logvar = split_moments(outputs["moments_9"])
    close(mean, outputs["posterior_mean_9"])
    close(posterior_mode(outputs["moments_9"]), outputs["posterior_mean_9"])
    close(logvar, outputs["posterior_logvar_9"])
    noise = inputs["posterior_noise_9"]
    close(sample_posterior(outputs["moments_9"], noise=noise), outputs["posterior_sample_9"])


@pytest.mark.parametrize("num_latents", [1, 5])
def test_one_pass_decode_gives_the_published_video(vae, inputs, outputs, num_latents):
    close(vae.decode(inputs["z5"][:, :num_latents], chunked=False), outputs[f"decode_T{num_latents}"])


@pytest.mark.parametrize("num_latents", [2, 4])
def test_one_pass_decode_of_an_even_count_applies_the_first_frame_rule(vae, inputs, outputs, num_latents):
    video = vae.decode(inputs["z5"][:, :num_latents], chunked=False)
    close(video, outputs[f"decode_T{num_latents}_firstframe_special"])


@pytest.mark.parametrize("name,latents", [("z5", slice(0, 3)), ("z5", slice(0, 5)), ("z14", slice(1, 14))])
def test_chunked_decode_gives_the_published_video(vae, inputs, outputs, name, latents):
    video = vae.decode(inputs[name][:, latents])
    close(video, outputs[f"chunked_T{latents.stop - latents.start}"])


def test_full_size_vae_has_the_published_keys_and_shapes(reference):
    with torch.device("meta"):
        vae = CausalVAE(channels=128, channel_multipliers=[1, 2, 2, 4], num_res_blocks=3, z_channels=16)
    published = json.loads((reference / "keys" / "sat_vae.json").read_text())["keys"]
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == published


def test_key_table_maps_the_published_lists_onto_each_other(reference):
    sat = json.loads((reference / "keys" / "sat_vae.json").read_text())["keys"]
    diffusers = json.loads((reference / "keys" / "diffusers_vae.json").read_text())["keys"]
    assert sat_to_diffusers(sat) == diffusers
    assert diffusers_to_sat(diffusers) == sat
