"""What a VAE of the published size costs at 49 x 480 x 720 in bfloat16: counted on the meta device, exact, fast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from vae_cases import TINY, build, close, diffusers_twin, random

from cogvideox.live_memory import LiveMemory
from cogvideox.traffic import Traffic
from cogvideox.vae import norms
from cogvideox.vae.autoencoder import CausalVAE
from cogvideox.vae.blocks import ResBlock, double_frames
from cogvideox.vae.causal_conv import CausalConv3d
from cogvideox.vae.convolution import convolve
from cogvideox.vae.folded import DoublingConv2d
from cogvideox.vae.norms import SpatialNorm, activated

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


def test_a_full_size_encode_in_batches_of_eight_needs_4_2_gb(vae):
    assert peak_gb(vae.encode, *VIDEO) <= 4.2


def test_a_full_size_encode_in_one_pass_needs_14_gb(vae):
    assert peak_gb(lambda video: vae.encode(video, frames_per_pass=49), *VIDEO) <= 14.0


def test_tiles_decode_in_1_6_gb(tiled):
    assert peak_gb(tiled.decode, *LATENTS) <= 1.6


def test_tiles_encode_in_1_1_gb(tiled):
    assert peak_gb(tiled.encode, *VIDEO) <= 1.1


def test_a_sliced_batch_of_two_needs_the_memory_of_one_and_the_pixels_of_both(vae):
    one = peak_gb(vae.decode, *LATENTS)
    two = peak_gb(published(slice_batch=True).decode, 2, *LATENTS[1:])
    pixels = 49 * 3 * 480 * 720 * 2 / 1e9
    assert two <= one + 2 * pixels


def test_a_decode_of_any_length_streams_in_the_same_memory(vae):
    short, long = (peak_gb(lambda z: consume(vae.decode_stream(z)), 1, t, 16, 60, 90) for t in (7, 15))
    assert short == long < 6.0


def flops(run: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    return counter.get_total_flops()


def test_a_decode_costs_284_tflop_and_an_encode_144_5(vae):
    """315.0 and 149.0 as published (each multiply-add two). Of a decode: less 2.1 in the norms, 3.5 for frames doubled
    after the convolution of an upsampling, 13.1 for its 3x3 on doubled pixels as four 2x2, 6.3 for the pairs of equal
    frames in the first convolution after it, 6.5 for the copies of the first frame; of an encode 4.7 for those."""
    assert 283e12 < flops(lambda: vae.decode(empty(*LATENTS))) <= 284e12
    assert 144e12 < flops(lambda: vae.encode(empty(*VIDEO))) <= 144.5e12


def test_a_single_frame_costs_a_third_of_its_published_products(vae):
    """All frames before it are the frame itself, so the three taps in time are one."""
    theirs = flops(lambda: diffusers_twin(vae)._encode(empty(1, 3, 1, 480, 720)))
    ours = flops(lambda: vae.encode(empty(1, 1, 3, 480, 720)))
    assert 2.8 < theirs / ours <= 3  # the convolutions that halve height and width are 2D


def traffic_gb(run: Callable[[], object]) -> float:
    with torch.no_grad(), Traffic() as traffic:
        run()
    return traffic.bytes / 1e9


def test_a_decode_moves_650_gb_and_an_encode_370(vae):
    """On CUDA, where norm, modulation and SiLU are two kernels; diffusers 1303 and 402."""
    assert 620 < traffic_gb(lambda: vae.decode(empty(*LATENTS))) <= 650
    assert 350 < traffic_gb(lambda: vae.encode(empty(*VIDEO))) <= 370


def test_torchs_plain_operations_need_no_more_memory_than_the_kernels(vae, monkeypatch):
    """And move 940 and 430 GB as the counter counts: what is overwritten is read too (without: 866, 392)."""
    monkeypatch.setattr(norms, "is_fused", lambda x: False)
    assert peak_gb(vae.decode, *LATENTS) <= 6.0 and peak_gb(vae.encode, *VIDEO) <= 4.2
    assert traffic_gb(lambda: vae.decode(empty(*LATENTS))) <= 940
    assert traffic_gb(lambda: vae.encode(empty(*VIDEO))) <= 430


# --- the savings are exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height,width", [(1, 1), (2, 3), (5, 4)])
def test_four_small_convolutions_are_the_one_of_the_doubled_image(height, width):
    conv = DoublingConv2d(3, 4).requires_grad_(False)
    x = random(2, 3, height, width)
    doubled = torch.nn.functional.interpolate(x, scale_factor=2.0)
    expected = torch.nn.functional.conv2d(doubled, conv.weight, conv.bias, padding=1)
    close(conv(x), expected)
    close(conv(x, torch.empty_like(expected)), expected)


def spatial_norm(channels: int, groups: int) -> SpatialNorm:
    norm = SpatialNorm(channels, 5, groups).requires_grad_(False)
    (
        norm.norm_layer.weight.copy_(random(channels, seed=3)),
        norm.norm_layer.bias.copy_(random(channels, seed=4)),
    )
    return norm


@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_spatial_norm_reads_its_fields_at_each_place(groups, scale):
    norm = spatial_norm(12, groups)
    x, z = random(2, 12, 3, 2 * scale, 3 * scale), random(2, 5, 3, 2, 3, seed=2)
    past = random(2, 12, 2, 2 * scale, 3 * scale, seed=5)
    enlarged = torch.nn.functional.interpolate(z, scale_factor=(1, scale, scale))
    expected = norm.norm_layer(x) * norm.conv_y(enlarged) + norm.conv_b(enlarged)
    close(norm(x, z), expected)
    expected = torch.nn.functional.silu(expected)
    close(activated(norm, [x], z), expected)
    close(activated(norm, [x], z, past), torch.cat([past, expected], dim=2))
    overwritten = activated(norm, [x], z, in_place=True)
    assert overwritten is x
    close(overwritten, expected)


def test_a_plain_norm_is_written_behind_the_past():
    norm = torch.nn.GroupNorm(3, 6).requires_grad_(False)
    x, past = random(2, 6, 3, 4, 5), random(2, 6, 2, 4, 5, seed=2)
    expected = torch.cat([past, torch.nn.functional.silu(norm(x))], dim=2)
    close(activated(norm, [x], None, past), expected)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_statistics_of_frames_shown_once_and_twice_are_those_of_the_doubled_clip(num_frames):
    norm = spatial_norm(12, 4)
    # The first frame far from the others, so that its weight matters.
    x, z = random(2, 12, num_frames, 4, 6), random(2, 5, num_frames, 2, 3, seed=2)
    x[:, :, 0] += 3
    expected = torch.nn.functional.silu(norm(double_frames(x, True), double_frames(z, True)))
    close(double_frames(activated(norm, [x], z, others_twice=True), True), expected)


def plain(conv: CausalConv3d, x: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
    """By torch's convolution alone, with everything that stands before `x` in front of it."""
    past = x[:, :, :1].expand(-1, -1, 2, -1, -1) if past is None else past
    weight, bias = conv.conv.weight, conv.conv.bias
    return torch.nn.functional.conv3d(torch.cat([past, x], dim=2), weight, bias, padding=(0, 1, 1))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7])
@pytest.mark.parametrize("starts_clip", [True, False])
def test_a_convolution_in_pieces_is_that_of_past_and_present_together(num_frames, starts_clip):
    conv = CausalConv3d(3, 4).requires_grad_(False)
    past = None if starts_clip else random(1, 3, 2, 4, 5)
    x = random(1, 3, num_frames, 4, 5, seed=2)
    cache = {} if starts_clip else {conv: past}
    close(conv(x, cache), plain(conv, x, past))
    before = x[:, :, :1].expand(-1, -1, 2, -1, -1) if starts_clip else past
    assert torch.equal(cache[conv], torch.cat([before, x], dim=2)[:, :, -2:])
    if not starts_clip:
        (behind,) = conv.pieces_behind(torch.cat([past, x], dim=2), 2, cache)
        close(behind, plain(conv, x, past))


@pytest.mark.parametrize("num_frames", [1, 2, 4])
@pytest.mark.parametrize("starts_clip", [True, False])
def test_a_convolution_of_pairs_of_equal_frames_is_that_of_all_of_them(num_frames, starts_clip):
    conv = CausalConv3d(3, 4).requires_grad_(False)
    before, x = random(2, 3, 1, 4, 5), random(2, 3, num_frames, 4, 5, seed=2)
    cache: dict = {}
    found = conv.doubled(x if starts_clip else torch.cat([before, x], dim=2), cache, starts_clip)
    past = None if starts_clip else before.expand(-1, -1, 2, -1, -1)
    doubled = double_frames(x, starts_clip)
    close(found, plain(conv, doubled, past))
    close(conv(double_frames(x, False), cache), plain(conv, double_frames(x, False), x[:, :, [-1, -1]]))


@pytest.mark.parametrize("width", [6, 12])
@pytest.mark.parametrize("starts_clip", [True, False])
def test_a_block_of_doubled_frames_is_the_block_on_each_frame_twice(width, starts_clip):
    block = ResBlock(6, width, 3, 5).requires_grad_(False)
    before, x, z = random(1, 6, 3, 4, 6, seed=3), random(1, 6, 3, 4, 6), random(1, 5, 3, 2, 3, seed=2)
    caches: list[dict] = [{}, {}]
    if not starts_clip:
        for cache in caches:
            block(double_frames(before, True), double_frames(z, True), cache)
    expected = block(double_frames(x, starts_clip), double_frames(z, starts_clip), caches[0])
    close(block([x.clone()], z, caches[1], starts_clip), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 1, 1), (2, 2)])
def test_the_chosen_convolution_is_torchs(dtype, kernel):
    x = random(1, 3, *([4] if len(kernel) == 3 else []), 6, 6).to(dtype)
    weight, bias = random(5, 3, *kernel, seed=2).to(dtype), random(5, seed=3).to(dtype)
    padding = (0, 1, 1) if len(kernel) == 3 else (1, 1)
    reference = {3: torch.nn.functional.conv3d, 2: torch.nn.functional.conv2d}[len(kernel)]
    with torch.no_grad():
        found = convolve(x, weight, bias, padding)
    assert found.dtype == dtype
    exact = reference(x.double(), weight.double(), bias.double(), padding=padding)
    # bfloat16: one rounding, 2^-9 relative.
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(found.double(), exact, atol=10 * tolerance, rtol=tolerance)


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
