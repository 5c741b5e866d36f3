"""The 3D causal VAE: parity with diffusers on random weights, causality, chunks and caches, bad shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from vae_cases import TINY, build, close, diffusers_twin, random

from cogvideox.vae import causal_conv
from cogvideox.vae.autoencoder import CausalVAE, sample_posterior, split_moments
from cogvideox.weights.vae_keys import diffusers_to_sat, sat_to_diffusers

FOUR_LEVELS = dict(
    channels=8, channel_multipliers=[1, 2, 1, 3], num_res_blocks=2, z_channels=3, norm_groups=8
)


def clip(num_frames: int, batch: int = 1, size: int = 8) -> torch.Tensor:
    return random(batch, num_frames, 3, size, size).tanh()


def latents(num_latents: int, batch: int = 1, channels: int = 4) -> torch.Tensor:
    return random(batch, num_latents, channels, 2, 3)


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    return build(**TINY).requires_grad_(False)


@pytest.fixture(scope="module")
def twin(vae):
    return diffusers_twin(vae)


# --- parity with diffusers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13])
def test_one_pass_encode_matches_diffusers(vae, twin, num_frames):
    video = clip(num_frames, batch=2)
    close(vae.encode(video), twin._encode(video.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13, 17, 21, 25])
def test_encode_in_batches_of_eight_matches_diffusers(vae, twin, num_frames):
    video = clip(num_frames)
    close(vae.encode(video, frames_per_pass=8), twin._encode(video.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("num_latents", [1, 3, 5, 7])
def test_decode_matches_diffusers_where_diffusers_works(vae, twin, num_latents):
    z = latents(num_latents, batch=2)
    close(vae.decode(z), twin._decode(z.transpose(1, 2)).sample.transpose(1, 2))


@pytest.mark.parametrize("temporal_compression", [2, 4, 8])
def test_other_geometries_match_diffusers(temporal_compression):
    config = FOUR_LEVELS | dict(temporal_compression=temporal_compression)
    vae = build(**config).requires_grad_(False)
    twin = diffusers_twin(vae)
    video = random(1, 1 + temporal_compression, 3, 16, 8)
    z = random(1, 3, 3, 2, 1)
    with torch.no_grad():
        close(vae.encode(video), twin._encode(video.transpose(1, 2)).transpose(1, 2))
        close(vae.decode(z), twin._decode(z.transpose(1, 2)).sample.transpose(1, 2))


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_gradients_match_diffusers(checkpoint_activations):
    vae = build(**TINY, checkpoint_activations=checkpoint_activations)
    twin = diffusers_twin(vae)
    video = clip(9)
    for model, forward in [
        (vae, lambda x: vae.decode(split_moments(vae.encode(x))[0], chunked=False)),
        (twin, lambda x: twin.decoder(twin.encoder(x.transpose(1, 2))[0][:, :4])[0].transpose(1, 2)),
    ]:
        (forward(video) * clip(9)).mean().backward()
        assert all(p.grad is not None for p in model.parameters())
    ours = {name: p.grad for name, p in vae.named_parameters()}
    theirs = diffusers_to_sat({name: p.grad for name, p in twin.named_parameters()})
    assert ours.keys() == theirs.keys()
    assert max(g.abs().max() for g in theirs.values()) > 1e-3
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_gradients_through_the_caches_match_finite_differences():
    vae = build(**TINY).double()
    z = latents(5).double().requires_grad_()
    probe, direction = random(1, 17, 3, 8, 12).double(), random(*z.shape, seed=2).double()
    loss = lambda z: (vae.decode(z) * probe).mean()  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(z), z)
    step = 1e-6
    with torch.no_grad():
        measured = (loss(z + step * direction) - loss(z - step * direction)) / (2 * step)
    # Central differences: error of order step^2 plus 1e-16 / step.
    torch.testing.assert_close((gradient * direction).sum(), measured, rtol=1e-6, atol=1e-9)


# --- causality -------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_norms(monkeypatch) -> None:
    """Group norm looks at all frames of its chunk; what remains must be causal frame by frame."""
    monkeypatch.setattr(nn.functional, "group_norm", lambda x, *_: x.clone())


def frames_seen(output: torch.Tensor, source: torch.Tensor) -> list[int]:
    """Frames (dimension 1) of `source` on which `output` depends."""
    (gradient,) = torch.autograd.grad(output.square().sum(), source, retain_graph=True)
    return gradient.abs().amax(dim=(0, 2, 3, 4)).nonzero().flatten().tolist()


def test_each_latent_depends_only_on_its_frame_group_and_earlier_ones(without_norms):
    vae = build(**TINY)
    video = clip(13).requires_grad_()
    moments = vae.encode(video)
    assert frames_seen(moments[:, 0], video) == [0]
    for t in range(4):
        assert max(frames_seen(moments[:, t], video)) == 4 * t


def test_each_decoded_frame_depends_only_on_its_latent_and_earlier_ones(without_norms):
    vae = build(**TINY)
    z = latents(4).requires_grad_()
    video = vae.decode(z, chunked=False)
    for frame in range(13):
        assert max(frames_seen(video[:, frame], z)) == (frame + 3) // 4


def test_decoded_chunks_never_depend_on_later_chunks():
    vae = build(**TINY)
    z = latents(7).requires_grad_()
    lasts = [max(frames_seen(chunk, z)) for chunk in vae.decode_stream(z)]
    assert lasts == [2, 4, 6]


def test_encoded_batches_never_depend_on_later_batches(vae):
    video = clip(17).requires_grad_()
    moments = vae.encode(video, frames_per_pass=8)
    assert max(frames_seen(moments[:, 2], video)) == 8
    assert max(frames_seen(moments[:, 4], video)) == 16


# --- chunks and caches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_latents", range(1, 10))
def test_every_latent_count_decodes_to_four_frames_per_latent_after_the_first(vae, num_latents):
    z = latents(num_latents)
    video = vae.decode(z)
    assert video.shape == (1, 4 * (num_latents - 1) + 1, 3, 8, 12)
    assert vae.decode(z, chunked=False).shape == video.shape
    assert vae.num_frames(num_latents) == video.shape[1] and vae.num_latents(video.shape[1]) == num_latents


@pytest.mark.parametrize("num_latents", range(1, 10))
def test_the_first_frames_are_the_same_whatever_follows(vae, num_latents):
    z = latents(9)
    whole_chunks = 0 if num_latents < 3 else (num_latents - 1) // 2 * 2 + 1
    frames = vae.num_frames(whole_chunks) if whole_chunks else 0
    assert torch.equal(vae.decode(z[:, :num_latents])[:, :frames], vae.decode(z)[:, :frames])


@pytest.mark.parametrize("num_latents", [1, 2, 3])
def test_a_clip_of_one_chunk_decodes_as_in_one_pass(vae, num_latents):
    z = latents(num_latents)
    assert torch.equal(vae.decode(z), vae.decode(z, chunked=False))


@pytest.mark.parametrize(
    "num_latents,lengths", [(1, [1]), (2, [5]), (4, [9, 4]), (5, [9, 8]), (8, [9, 8, 8, 4])]
)
def test_stream_is_the_chunked_decode_piece_by_piece(vae, num_latents, lengths):
    z = latents(num_latents)
    chunks = list(vae.decode_stream(z))
    assert [chunk.shape[1] for chunk in chunks] == lengths
    assert torch.equal(torch.cat(chunks, dim=1), vae.decode(z))


def test_without_norms_chunks_make_no_difference(without_norms):
    """All that chunks may change are the group statistics: the caches themselves are exact."""
    vae = build(**TINY).requires_grad_(False).double()
    z, video = latents(8).double(), clip(21).double()
    torch.testing.assert_close(vae.decode(z), vae.decode(z, chunked=False))
    for frames_per_pass in (4, 8, 12):
        torch.testing.assert_close(vae.encode(video, frames_per_pass=frames_per_pass), vae.encode(video))


@pytest.mark.parametrize("latents_per_pass,lengths", [(1, [5, 4, 4, 4]), (3, [13, 4]), (4, [17]), (9, [17])])
def test_chunk_size_is_an_option(latents_per_pass, lengths):
    vae = build(**TINY, decode_latents_per_pass=latents_per_pass).requires_grad_(False)
    assert [chunk.shape[1] for chunk in vae.decode_stream(latents(5))] == lengths


def test_configured_encode_batches_are_the_default_and_can_be_overridden(vae):
    batched = CausalVAE(**TINY, encode_frames_per_pass=8).requires_grad_(False)
    batched.load_state_dict(vae.state_dict())
    video = clip(17)
    assert torch.equal(batched.encode(video), vae.encode(video, frames_per_pass=8))
    assert torch.equal(batched.encode(video, frames_per_pass=17), vae.encode(video))


def test_interleaved_and_interrupted_streams_do_not_disturb_each_other(vae):
    a, b = latents(5), random(1, 5, 4, 2, 3, seed=7)
    expected = [vae.decode(a), vae.decode(b)]
    abandoned = vae.decode_stream(b)
    next(abandoned)
    pairs = list(zip(vae.decode_stream(a), vae.decode_stream(b), strict=True))
    assert torch.equal(torch.cat([pair[0] for pair in pairs], dim=1), expected[0])
    assert torch.equal(torch.cat([pair[1] for pair in pairs], dim=1), expected[1])


def test_an_exception_inside_a_decode_leaves_nothing_behind(vae):
    z = latents(5)
    expected = vae.decode(z)
    calls = itertools.count()

    def fail_in_second_chunk(*_):
        if next(calls) == 1:
            raise RuntimeError("out of memory")

    handle = vae.decoder.conv_out.register_forward_pre_hook(fail_in_second_chunk)
    with pytest.raises(RuntimeError, match="out of memory"):
        vae.decode(z)
    handle.remove()
    assert torch.equal(vae.decode(z), expected)


def test_cache_holds_two_frames_per_causal_convolution_and_no_more(vae):
    """Of a convolution after a doubling of time both are the same frame: one."""
    cache: causal_conv.ConvCache = {}
    z = latents(5).transpose(1, 2)
    after_doubling = {vae.decoder.up[i].block[0].conv1 for i in (0, 1)}
    for chunk in (z[:, :, :3], z[:, :, 3:]):
        vae.decoder(chunk, cache)
        convolutions = {m for m in vae.decoder.modules() if isinstance(m, causal_conv.CausalConv3d)}
        assert cache.keys() == {m for m in convolutions if m.conv.kernel_size == (3, 3, 3)}
        for convolution, frames in cache.items():
            assert frames.shape[2] == 2
            # Its own memory: a view would keep a whole chunk alive.
            stored = 1 if convolution in after_doubling else 2
            assert frames.untyped_storage().nbytes() == frames[:, :, :stored].numel() * frames.element_size()


def test_a_convolution_too_large_for_32_bit_indices_is_split_exactly(vae, monkeypatch):
    video, z = clip(9), latents(3)
    moments, decoded = vae.encode(video), vae.decode(z)
    monkeypatch.setattr(causal_conv, "MAX_CONV_ELEMENTS", 8 * 8 * 8 * 4)
    monkeypatch.setattr(causal_conv, "PIECE_ELEMENTS", 8 * 8 * 8 * 4)
    # Another split of the same sums: float32 rounding.
    close(vae.encode(video), moments)
    close(vae.decode(z), decoded)


# --- geometry, dtype, loading ----------------------------------------------------------------------------------------


def test_published_vae_has_215_583_907_parameters():
    with torch.device("meta"):
        vae = CausalVAE(channels=128, channel_multipliers=[1, 2, 2, 4], num_res_blocks=3, z_channels=16)
        assert vae.encode(torch.empty(1, 49, 3, 480, 720)).shape == (1, 13, 32, 60, 90)
        assert vae.decode(torch.empty(1, 13, 16, 60, 90)).shape == (1, 49, 3, 480, 720)
    assert sum(p.numel() for p in vae.parameters()) == 215_583_907


@pytest.mark.parametrize(
    "multipliers,temporal_compression,frames", [([1, 2], 1, 4), ([1, 2], 2, 7), ([1, 1, 1, 2], 8, 25)]
)
def test_other_compressions(multipliers, temporal_compression, frames):
    config = TINY | dict(channel_multipliers=multipliers, temporal_compression=temporal_compression)
    vae = build(**config).requires_grad_(False)
    moments = vae.encode(clip(frames, size=16))
    space = 16 // vae.spatial_compression
    assert moments.shape == (1, vae.num_latents(frames), 8, space, space)
    assert vae.decode(moments[:, :, :4]).shape == (1, frames, 3, 16, 16)


def test_bfloat16_is_float32_within_its_rounding(vae):
    video, z = clip(9), latents(5)
    exact_moments, exact_video = vae.encode(video), vae.decode(z)
    half = build(**TINY).requires_grad_(False).bfloat16()
    # bfloat16 has 8 bits; some twenty layers each add a rounding of 2^-9, relative to the size of the output.
    for ours, exact in [
        (half.encode(video.bfloat16()), exact_moments),
        (half.decode(z.bfloat16()), exact_video),
    ]:
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_posterior_draws_come_from_the_generator_and_have_the_right_spread():
    mean, std = 2.0, 0.5
    moments = torch.tensor([mean] * 4 + [2 * math.log(std)] * 4).view(1, 1, 8, 1, 1).expand(1, 2, 8, 32, 32)
    draw = lambda seed: sample_posterior(moments, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    z = draw(0)
    assert torch.equal(z, draw(0)) and not torch.equal(z, draw(1))
    # 8192 draws: standard errors 0.0055 and 0.0039.
    assert abs(z.mean() - mean) < 0.03 and abs(z.std() - std) < 0.02


def test_loading_ignores_the_training_loss_and_is_strict_about_the_rest(vae):
    published = vae.state_dict()
    fresh = CausalVAE(**TINY)
    fresh.load_state_dict(published | {"loss.discriminator.0.weight": torch.zeros(1)})
    assert all(torch.equal(fresh.state_dict()[key], published[key]) for key in published)
    with pytest.raises(RuntimeError, match="Unexpected key.*encoder.conv_inn"):
        fresh.load_state_dict(published | {"encoder.conv_inn.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key.*decoder.conv_out.conv.bias"):
        fresh.load_state_dict({k: v for k, v in published.items() if k != "decoder.conv_out.conv.bias"})


def test_keys_survive_the_round_trip_and_strangers_are_refused(vae):
    state = vae.state_dict()
    assert list(diffusers_to_sat(sat_to_diffusers(state))) == list(state)
    assert sat_to_diffusers(state | {"loss.logvar": torch.zeros(1)}).keys() == sat_to_diffusers(state).keys()
    with pytest.raises(ValueError, match="quant_conv.weight"):
        diffusers_to_sat(sat_to_diffusers(state) | {"quant_conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not the weights of a VAE"):
        sat_to_diffusers({"transformer.layers.0.weight": torch.zeros(1)})


# --- the user's mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape,message",
    [
        ((1, 10, 3, 8, 8), r"10 frames.*4k\+1.*9 or 13"),
        ((1, 4, 3, 8, 8), "4 frames.*1 or 5"),
        ((1, 0, 3, 8, 8), "0 frames.*1"),
        ((1, 5, 3, 30, 40), "30 x 40.*multiples of 4.*32 x 40"),
        ((1, 5, 4, 8, 8), r"\(1, 5, 4, 8, 8\).*\(B, F, 3, H, W\)"),
        ((5, 3, 8, 8), r"\(5, 3, 8, 8\)"),
    ],
)
def test_a_video_of_illegal_shape_is_refused(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


def test_a_uint8_video_is_refused(vae):
    with pytest.raises(ValueError, match="uint8"):
        vae.encode(torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("decode", ["decode", "decode_stream"])
@pytest.mark.parametrize("shape", [(1, 3, 5, 2, 2), (1, 0, 4, 2, 2), (3, 4, 2, 2)])
def test_latents_of_illegal_shape_are_refused_at_once(vae, decode, shape):
    with pytest.raises(ValueError, match="latents of shape"):
        getattr(vae, decode)(torch.zeros(shape))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(channels=10), "norm_groups=4 does not divide the width 10"),
        (dict(norm_groups=0), "norm_groups=0"),
        (dict(channel_multipliers=[1]), "at least 2 levels"),
        (dict(temporal_compression=3), "temporal_compression=3.*1, 2, 4"),
        (dict(temporal_compression=8), "temporal_compression=8.*1, 2, 4"),
        (dict(num_res_blocks=0), "num_res_blocks=0"),
        (dict(encode_frames_per_pass=6), "encode_frames_per_pass=6.*multiple of 4"),
        (dict(decode_latents_per_pass=0), "decode_latents_per_pass=0"),
    ],
)
def test_an_impossible_architecture_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CausalVAE(**(TINY | change))


def test_frames_per_pass_must_be_whole_latents(vae):
    with pytest.raises(ValueError, match="encode_frames_per_pass=6"):
        vae.encode(clip(13), frames_per_pass=6)
