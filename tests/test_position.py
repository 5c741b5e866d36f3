"""Position tables against diffusers and closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformer_cases import inputs, randomise, tiny

from cogvideox.kernels.norm_rotate import rotate_pairs
from cogvideox.model.position import (
    LearnedPosition3D,
    RotaryPosition3D,
    rotary_3d,
    sincos_3d,
    slice_learned_table,
)

GRIDS = [(3, 4, 6), (1, 5, 2), (7, 3, 3)]


@pytest.mark.parametrize("grid", GRIDS)
def test_sincos_matches_diffusers(grid: tuple[int, int, int]) -> None:
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    table = sincos_3d(grid, 48, (1.5, 1.875, 1.875))
    expected = get_3d_sincos_pos_embed(48, (grid[2], grid[1]), grid[0], 1.875, 1.5, output_type="pt").flatten(
        0, 1
    )
    torch.testing.assert_close(table, expected.float(), atol=1e-6, rtol=0)


def test_height_and_width_interpolate_apart() -> None:
    """Half the step in height only: every second row of the finer grid is the coarse table."""
    coarse = sincos_3d((2, 3, 5), 32, (1.0, 1.0, 1.0)).view(2, 3, 5, 32)
    fine = sincos_3d((2, 6, 5), 32, (1.0, 2.0, 1.0)).view(2, 6, 5, 32)
    assert torch.equal(fine[:, ::2], coarse)


@pytest.mark.parametrize("grid", GRIDS)
def test_rotation_matches_diffusers(grid: tuple[int, int, int]) -> None:
    from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed

    text, n = 5, grid[0] * grid[1] * grid[2]
    x = torch.randn(2, 3, text + n, 32, generator=torch.Generator().manual_seed(0))
    rope = get_3d_rotary_pos_embed(32, None, grid[1:], grid[0], grid_type="slice", max_size=grid[1:])
    rotated = rotate_pairs(x, *rotary_3d(grid, 32, 10_000.0, text))
    assert torch.equal(rotated[:, :, :text], x[:, :, :text])
    torch.testing.assert_close(
        rotated[:, :, text:], apply_rotary_emb(x[:, :, text:], rope), atol=1e-6, rtol=0
    )


def test_rotated_products_depend_on_distance_alone() -> None:
    """The property that rope is made for: q(p) k(p') depends on p - p' (Su et al. 2021, eq. 16)."""
    grid = (4, 5, 6)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 32, generator=generator).expand(1, 1, 120, 32) for _ in range(2))
    cos, sin = rotary_3d(grid, 32, 10_000.0, 0)
    scores = (rotate_pairs(q, cos, sin) @ rotate_pairs(k, cos, sin).mT)[0, 0].view(*grid, *grid)
    torch.testing.assert_close(scores[0, 1, 2, 1, 2, 5], scores[2, 3, 0, 3, 4, 3], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores[3, 4, 5, 3, 4, 5], scores[0, 0, 0, 0, 0, 0], atol=1e-4, rtol=0)


def test_bfloat16_queries_are_rotated_in_float32() -> None:
    x = torch.randn(1, 2, 60, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = rotary_3d((3, 4, 5), 32, 10_000.0, 0)
    rotated = rotate_pairs(x, *tables)
    assert rotated.dtype == torch.bfloat16
    # One rounding at the end and none before: the float32 result, rounded.
    assert torch.equal(rotated, rotate_pairs(x.float(), *tables).bfloat16())


def test_a_learned_table_is_sliced_on_its_grid() -> None:
    """Row values that spell their own (t, h, w) show which rows a smaller input takes."""
    t, h, w = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(5), indexing="ij")
    rows = torch.stack((t, h, w), dim=-1).view(1, 60, 3).float()
    table = torch.cat((torch.full((1, 2, 3), -1.0), rows), dim=1)
    part = slice_learned_table(table, (3, 4, 5), (2, 3, 2), 2)
    assert torch.equal(part[0, :2], torch.full((2, 3), -1.0))
    assert torch.equal(part[0, 2:].view(2, 3, 2, 3), rows.view(3, 4, 5, 3)[:2, :3, :2])
    with pytest.raises(ValueError, match="3x4x5 patches.*1x5x1.*latent_height"):
        slice_learned_table(table, (3, 4, 5), (1, 5, 1), 2)


def test_a_network_with_a_learned_table_runs_on_every_smaller_size() -> None:
    """A rope network whose tokens get the sliced rows by hand is the reference."""
    net, plain = randomise(tiny("5b_i2v")), tiny("5b_i2v", position=RotaryPosition3D)
    weights = net.state_dict()
    table = weights.pop("mixins.pos_embed.pos_embedding")
    plain.load_state_dict(weights)
    for size in [(1, 8, 12), (2, 6, 4), (3, 2, 10)]:
        arguments = inputs(net, *size)
        t, h, w = size[0], size[1] // 2, size[2] // 2
        video = table[0, 5:].view(3, 4, 6, 48)[:t, :h, :w].reshape(-1, 48)
        rows = torch.cat((table[0, :5], video))
        handle = plain.transformer.layers[0].register_forward_pre_hook(
            lambda m, a, rows=rows: (a[0] + rows, a[1])
        )
        with torch.no_grad():
            torch.testing.assert_close(net(**arguments), plain(**arguments), atol=1e-6, rtol=0)
        handle.remove()


def test_a_learned_table_alone_is_a_position_embedding_too() -> None:
    net = randomise(tiny("5b", position=LearnedPosition3D))
    assert net.mixins["pos_embed"].pos_embedding.shape == (1, 5 + 3 * 4 * 6, 48)
    assert net(**inputs(net, 2, 4, 6)).shape == (2, 2, 4, 4, 6)


@pytest.mark.parametrize("grid", [(3, 30, 45), (3, 48, 80), (2, 24, 30), (4, 45, 30), (1, 13, 57)])
def test_a_resized_grid_matches_diffusers(grid: tuple[int, int, int]) -> None:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    trained = (30, 45)
    region = get_resize_crop_region_for_grid(grid[1:], trained[1], trained[0])
    expected = get_3d_rotary_pos_embed(64, region, grid[1:], grid[0])
    tables = rotary_3d(grid, 64, 10_000.0, 0, trained=trained)
    for table, reference in zip(tables, expected, strict=True):
        # diffusers repeats each pair. Positions differ by one rounding of linspace, at most 45 * 2^-24.
        torch.testing.assert_close(table.repeat_interleave(2, dim=-1), reference.float(), atol=5e-6, rtol=0)


def test_resize_equals_slice_at_the_configured_size_and_at_no_other() -> None:
    nets = [
        randomise(tiny("5b", position=partial(RotaryPosition3D, other_sizes=name)))
        for name in ("slice", "resize")
    ]
    native, larger = inputs(nets[0]), inputs(nets[0], height=12, width=12)
    with torch.no_grad():
        assert torch.equal(nets[0](**native), nets[1](**native))
        assert not torch.allclose(nets[0](**larger), nets[1](**larger), atol=1e-3)


def test_an_unknown_rule_for_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="other_sizes='crop': expected slice .* or resize"):
        tiny("5b", position=partial(RotaryPosition3D, other_sizes="crop"))
