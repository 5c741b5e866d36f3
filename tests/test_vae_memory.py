"""What a VAE of the published size costs at 49 x 480 x 720 in bfloat16: counted on the meta device, exact, fast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from vae_cases import TINY, build, close, random

from cogvideox.live_memory import LiveMemory
from cogvideox.vae.autoencoder import CausalVAE
from cogvideox.vae.norms import SpatialNorm
from cogvideox.vae.causal_conv import CausalConv3d

PUBLISHED = dict(channels=128, channel_multipliers=[1, 2, 2, 4], num_res_blocks=3, z_channels=16)
TILES = dict(tile_latent_height=30, tile_latent_width=45)


def published(**options) -> CausalVAE:
    with torch.device("meta"):
        return CausalVAE(**PUBLISHED, encode_frames_per_pass=8, **options).to(torch.bfloat16)


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


LATENTS, VIDEO = (1, 13, 16, 60, 90), (1, 49, 3, 480, 720)


def peak_gb(run: Callable[[torch.Tensor], object], *shape: int) -> float:
    """Largest sum of live tensors, beside weights and input, in 10^9 bytes."""
    x = empty(*shape)
    with torch.no_grad(), LiveMemory() as memory:
        run(x)
    assert memory.live_bytes == 0
    return memory.peak_bytes / 1e9


def consume(chunks) -> None:
    for _ in chunks:
        pass


# What is left at the peak of a decode: 2.8 GB of convolution caches, a chunk at 256 channels (1.4), its shortcut (0.7)
# and output (0.7): about 5.7. diffusers: 15.8 to decode and 6.6 to encode, 4.0 to decode in tiles.


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    return published()


@pytest.fixture(scope="module")
def tiled() -> CausalVAE:
    return published(**TILES)


def test_a_full_size_decode_needs_6_gb(vae):
    assert peak_gb(vae.decode, *LATENTS) <= 6.0


def test_a_full_size_encode_in_batches_of_eight_needs_4_gb(vae):
    assert peak_gb(vae.encode, *VIDEO) <= 4.0


def test_a_full_size_encode_in_one_pass_needs_14_gb(vae):
    assert peak_gb(lambda video: vae.encode(video, frames_per_pass=49), *VIDEO) <= 14.0


def test_tiles_decode_in_1_6_gb(tiled):
    assert peak_gb(tiled.decode, *LATENTS) <= 1.6


def test_tiles_encode_in_1_gb(tiled):
    assert peak_gb(tiled.encode, *VIDEO) <= 1.0


def test_a_sliced_batch_of_two_needs_the_memory_of_one_and_the_pixels_of_both(vae):
    one = peak_gb(vae.decode, *LATENTS)
    two = peak_gb(published(slice_batch=True).decode, 2, *LATENTS[1:])
    pixels = 49 * 3 * 480 * 720 * 2 / 1e9
    assert two <= one + 2 * pixels


def test_a_decode_of_any_length_streams_in_the_same_memory(vae):
    short, long = (peak_gb(lambda z: consume(vae.decode_stream(z)), 1, t, 16, 60, 90) for t in (7, 15))
    assert short == long < 6.0


def test_a_decode_costs_297_tflop_and_an_encode_149(vae):
    """315.0 as published (each multiply-add two): less 2.1 in the norms, 3.5 for frames that are doubled after the
    convolution, and 13.2 for 3x3 on doubled pixels as four 2x2."""
    for run, at_most in (
        (lambda: vae.decode(empty(*LATENTS)), 297e12),
        (lambda: vae.encode(empty(*VIDEO)), 149.1e12),
    ):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            run()
        assert 0.95 * at_most < counter.get_total_flops() <= at_most


# --- the savings are exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height,width", [(1, 1), (2, 3), (5, 4)])
def test_four_small_convolutions_are_the_one_of_the_doubled_image(height, width):
    x, weight, bias = random(2, 3, height, width), random(4, 3, 3, 3, seed=2), random(4, seed=3)
    doubled = torch.nn.functional.interpolate(x, scale_factor=2.0)
    expected = torch.nn.functional.conv2d(doubled, weight, bias, padding=1)
    close(convolve_doubled(x, doubling_kernels(weight), bias), expected)


@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_spatial_norm_reads_its_fields_at_each_place(groups, scale):
    norm = SpatialNorm(12, 5, groups).requires_grad_(False)
    norm.norm_layer.weight.copy_(random(12, seed=3)), norm.norm_layer.bias.copy_(random(12, seed=4))
    x, z = random(2, 12, 3, 2 * scale, 3 * scale), random(2, 5, 3, 2, 3, seed=2)
    enlarged = torch.nn.functional.interpolate(z, scale_factor=(1, scale, scale))
    expected = norm.norm_layer(x) * norm.conv_y(enlarged) + norm.conv_b(enlarged)
    close(norm(x, z), expected)
    activated = norm.activate_in_place(x, z)
    assert activated is x
    close(activated, torch.nn.functional.silu(expected))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7])
def test_a_convolution_in_pieces_is_that_of_past_and_present_together(num_frames):
    conv = CausalConv3d(3, 4).requires_grad_(False)
    past, x = random(1, 3, 2, 4, 5), random(1, 3, num_frames, 4, 5, seed=2)
    cache = {conv: past}
    close(torch.cat(conv.pieces(x, cache), dim=2), conv.conv(torch.cat([past, x], dim=2)))
    assert torch.equal(cache[conv], torch.cat([past, x], dim=2)[:, :, -2:])


def test_a_pass_with_gradients_gives_the_same_numbers_as_one_without():
    vae = build(**TINY)
    video, z = random(1, 9, 3, 8, 12).tanh(), random(1, 5, 4, 2, 3)
    for run in (lambda: vae.encode(video), lambda: vae.decode(z), lambda: vae.decode(z, chunked=False)):
        with torch.no_grad():
            without = run()
        assert run().requires_grad
        close(without, run())


def test_a_pass_overwrites_neither_its_input_nor_the_parameters():
    vae = build(**TINY).requires_grad_(False)
    video, z = random(1, 9, 3, 8, 12).tanh(), random(1, 5, 4, 2, 3)
    before = [video.clone(), z.clone(), *(p.clone() for p in vae.parameters())]
    vae.encode(video), vae.decode(z), vae.decode(z, chunked=False)
    assert all(torch.equal(a, b) for a, b in zip(before, [video, z, *vae.parameters()], strict=True))


def test_training_only_the_last_layer_gets_its_gradient():
    """Nothing before that layer needs a graph, and yet the pass is one that is differentiated."""
    vae = build(**TINY).requires_grad_(False)
    z, probe = random(1, 3, 4, 2, 3), random(1, 9, 3, 8, 12, seed=2)
    weight = vae.decoder.up[0].block[0].norm1.norm_layer.weight.requires_grad_()
    (vae.decode(z) * probe).sum().backward()
    alone = weight.grad.clone()
    vae.requires_grad_(True).zero_grad()
    (vae.decode(z) * probe).sum().backward()
    torch.testing.assert_close(alone, weight.grad)
