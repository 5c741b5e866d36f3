"""Tiles in space and slices of a batch: diffusers' numbers, chunks in time, the memory's price, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from vae_cases import TINY, build, close, diffusers_twin, random

from cogvideox.vae.autoencoder import CausalVAE
from cogvideox.vae.tiling import Tiling, blend, difference
from cogvideox.vae.training import VAETraining

TILES = dict(tile_latent_height=6, tile_latent_width=5)


@pytest.fixture(scope="module")
def whole() -> CausalVAE:
    return build(**TINY).requires_grad_(False)


@pytest.fixture(scope="module")
def tiled() -> CausalVAE:
    return build(**TINY, **TILES).requires_grad_(False)


@pytest.fixture(scope="module")
def in_double(tiled) -> CausalVAE:
    return copy.deepcopy(tiled).double()


@pytest.fixture(scope="module")
def twin(whole):
    twin = diffusers_twin(whole).double()
    twin.enable_tiling(tile_sample_min_height=6 * 4, tile_sample_min_width=5 * 4)
    return twin


# Frames that end within, at and just behind a tile; one that fits in height only; one that is not tiled at all.
SIZES = [(13, 11), (10, 8), (11, 9), (6, 7), (7, 5), (6, 5)]


def exact(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """In float64 both do the same arithmetic to its last digits; values reach 25."""
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("height,width", SIZES)
def test_tiled_decode_matches_diffusers(in_double, twin, height, width):
    z = random(2, 3, 4, height, width).double()
    exact(in_double.decode(z), twin._decode(z.transpose(1, 2)).sample.transpose(1, 2))


@pytest.mark.parametrize("height,width", SIZES)
def test_tiled_encode_matches_diffusers(in_double, twin, height, width):
    video = random(1, 9, 3, 4 * height, 4 * width).tanh().double()
    exact(in_double.encode(video, frames_per_pass=8), twin._encode(video.transpose(1, 2)).transpose(1, 2))


def test_tiles_of_several_chunks_match_diffusers(in_double, twin):
    z = random(1, 7, 4, 7, 6).double()
    exact(in_double.decode(z), twin._decode(z.transpose(1, 2)).sample.transpose(1, 2))
    video = random(1, 17, 3, 28, 24).tanh().double()
    exact(in_double.encode(video, frames_per_pass=8), twin._encode(video.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("size,starts", [(30, [0]), (31, [0, 25]), (60, [0, 25, 50])])
def test_tiles_start_where_those_of_diffusers_start(size, starts):
    """The constants for 480x720 themselves: 30 of 60 latents, 1/6 of overlap; 45 of 90, 1/5."""
    seen = []
    tiling = Tiling(30, 45)
    if tiling.cuts(size, 45):
        list(
            tiling.run(lambda x: [seen.append(int(x[0, 0, 0, 0, 0])) or x], rows(size), cell_in=1, cell_out=1)
        )
    assert (seen or [0]) == starts


def rows(size: int) -> torch.Tensor:
    return torch.arange(size).float().view(1, 1, 1, size, 1).repeat(1, 1, 1, 1, 36)


@pytest.mark.parametrize("tiling", [Tiling(6, 5), Tiling(None, 10), Tiling(12, None)])
@pytest.mark.parametrize("cell_in,cell_out", [(1, 4), (4, 1), (1, 1)])
def test_tiles_of_something_that_looks_at_single_places_change_nothing(tiling, cell_in, cell_out):
    def resize(x):
        return [torch.nn.functional.interpolate(x[:, 0], scale_factor=cell_out / cell_in)[:, None] + 1]

    x = random(2, 1, 3, 14 * cell_in, 23 * cell_in).double()
    (result,) = tiling.run(resize, x, cell_in=cell_in, cell_out=cell_out)
    torch.testing.assert_close(result, resize(x)[0])


def test_seams_are_linear_ramps():
    left, right = torch.zeros(1, 8), torch.ones(1, 8)
    joined = blend([[left, right]], overlap=(0, 4), keep=(1, 4))
    assert joined.tolist() == [[0, 0, 0, 0, 0, 0.25, 0.5, 0.75]]


def test_the_stream_has_the_published_chunks(tiled, whole):
    z = random(1, 6, 4, 7, 6)
    chunks = list(tiled.decode_stream(z))
    assert [chunk.shape for chunk in chunks] == [chunk.shape for chunk in whole.decode_stream(z)]
    assert torch.equal(torch.cat(chunks, dim=1), tiled.decode(z))


def test_a_frame_within_one_tile_is_not_tiled(tiled, whole):
    z = random(1, 3, 4, 6, 5)
    assert torch.equal(tiled.decode(z), whole.decode(z))


def test_off_by_default():
    assert CausalVAE(**TINY).tiling == Tiling(None, None) and not CausalVAE(**TINY).slice_batch
    assert not Tiling(None, None).cuts(10**6, 10**6)


def test_one_axis_alone_can_be_tiled(whole):
    z = random(1, 3, 4, 8, 8)
    wide = build(**TINY, tile_latent_width=5).requires_grad_(False).decode(z)
    assert wide.shape == whole.decode(z).shape and not torch.equal(wide, whole.decode(z))


def test_the_difference_to_whole_frames_is_reported(tiled, whole):
    z = random(1, 5, 4, 8, 7)
    a, b = whole.decode(z).clamp(-1, 1), tiled.decode(z).clamp(-1, 1)
    report = tiled.tiling_difference(z)
    assert report["max"] == pytest.approx((a - b).abs().max().item())
    assert report["rms"] == pytest.approx((a - b).square().mean().sqrt().item(), rel=1e-5)
    assert report["psnr_db"] == pytest.approx(20 * math.log10(2 / report["rms"])) and report["max"] > 0
    assert whole.tiling_difference(z) == {"max": 0, "rms": 0, "psnr_db": math.inf}


def test_chunks_of_different_number_cannot_be_compared():
    with pytest.raises(ValueError, match="zip"):
        difference([torch.zeros(1)], [])


# --- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, TILES], ids=["whole", "tiled"])
def test_a_sliced_batch_is_each_clip_alone(options):
    vae = build(**TINY, **options, slice_batch=True).requires_grad_(False)
    z, video = random(3, 5, 4, 7, 5), random(3, 9, 3, 28, 20).tanh()
    assert torch.equal(vae.decode(z), torch.cat([vae.decode(clip[None]) for clip in z]))
    assert torch.equal(vae.encode(video), torch.cat([vae.encode(clip[None]) for clip in video]))
    assert [chunk.shape[:2] for chunk in vae.decode_stream(z)] == [(3, 9), (3, 8)]


def test_slicing_a_batch_changes_no_number(whole):
    vae = build(**TINY, slice_batch=True).requires_grad_(False)
    z, video = random(2, 5, 4, 2, 3), random(2, 9, 3, 8, 8).tanh()
    close(vae.decode(z), whole.decode(z))
    close(vae.encode(video), whole.encode(video))


def test_slices_decode_one_clip_at_a_time():
    vae = build(**TINY, slice_batch=True).requires_grad_(False)
    sizes = []
    vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    vae.decode(random(3, 3, 4, 2, 2))
    assert sizes == [1, 1, 1]


# --- the user's mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(tile_latent_height=32), "tile_latent_height=32.*multiple of 6.*30 or 36"),
        (dict(tile_latent_height=4), "tile_latent_height=4.*nearest is 6"),
        (dict(tile_latent_height=0), "tile_latent_height=0"),
        (dict(tile_latent_height=-6), "tile_latent_height=-6"),
        (dict(tile_latent_width=46), "tile_latent_width=46.*multiple of 5.*45 or 50"),
    ],
)
def test_tiles_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CausalVAE(**TINY, **options)


def test_a_vae_is_not_trained_on_tiles():
    with pytest.raises(ValueError, match="tile_latent_height=6.*whole frames"):
        VAETraining(CausalVAE(**TINY, tile_latent_height=6))
