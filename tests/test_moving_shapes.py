"""The demo's clips: captions are true, and the detector measures them on pixels, on nothing else."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations as pairs

import pytest
import torch
from torch.nn import functional as F

from cogvideox.data import moving_shapes as shapes
from cogvideox.data.moving_shapes import Combination, Detection, detect, draw_clip, make_dataset
from cogvideox.data.video_folder import VideoFolder
from cogvideox.sampling.video_io import write_video

ALL = [
    Combination(colour, shape, direction)
    for colour in (*shapes.COLOURS, *shapes.NEW_COLOURS)
    for shape in (*shapes.SHAPES, *shapes.NEW_SHAPES)
    for direction in shapes.DIRECTIONS
]


@pytest.fixture(scope="module")
def true_clips(tmp_path_factory) -> list[tuple[Combination, torch.Tensor]]:
    """Every combination, as training reads it: drawn, through H.264, decoded."""
    folder = tmp_path_factory.mktemp("shapes")
    make_dataset(folder, ALL, 1, seed=1, write_video=write_video)
    dataset = VideoFolder(folder, num_frames=9, height=32, width=32, fps=8)
    assert len(dataset) == len(ALL)
    named = {combo.caption: combo for combo in ALL}
    items = (dataset[i] for i in range(len(dataset)))
    return [(named[item["caption"]], item["video"]) for item in items]


def accuracy(clips) -> dict[str, float]:
    right = Counter()
    for combo, video in clips:
        found = detect(video)
        right.update(name for name in combo._fields if getattr(found, name) == getattr(combo, name))
    return {name: right[name] / len(clips) for name in Combination._fields}


def test_true_clips_are_recognised_after_compression(true_clips):
    assert min(accuracy(true_clips).values()) >= 0.98


def blurred(video: torch.Tensor, sigma: float) -> torch.Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-4, 5.0) / sigma) ** 2)
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    frames = F.pad(video.float().reshape(-1, 1, *video.shape[-2:]), (4, 4, 4, 4), mode="replicate")
    return F.conv2d(frames, kernel).reshape(video.shape).round().to(torch.uint8)


def test_blur_and_noise_cost_little(true_clips):
    generator = torch.Generator().manual_seed(0)
    some = true_clips[::2]
    assert min(accuracy([(combo, blurred(video, 1.0)) for combo, video in some]).values()) >= 0.95
    noisy = [
        (c, (v + 12 * torch.randn(v.shape, generator=generator)).clamp(0, 255).to(torch.uint8))
        for c, v in some
    ]
    assert min(accuracy(noisy).values()) >= 0.95


def test_float_range_and_uint8_are_measured_alike(true_clips):
    for _, video in true_clips[:4]:
        found, again = detect(video), detect(video.float() / 127.5 - 1)
        assert (found.colour, found.shape, found.direction) == (again.colour, again.shape, again.direction)


@pytest.mark.parametrize("name", ["noise", "coarse noise", "grey", "black", "one colour", "grey shape"])
def test_nothing_is_seen_where_nothing_is(name):
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        match name:
            case "noise":
                video = torch.randn(9, 3, 32, 32, generator=generator)
            case "coarse noise":
                video = F.interpolate(torch.randn(9, 3, 8, 8, generator=generator), 32, mode="bicubic")
            case "grey":
                video = torch.zeros(9, 3, 32, 32)
            case "black":
                video = -torch.ones(9, 3, 32, 32)
            case "one colour":
                video = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(9, 3, 32, 32)
            case "grey shape":
                video = (
                    draw_clip("red", "circle", "left", 9, 32, generator).float().mean(1, keepdim=True) / 127.5
                    - 1
                )
                video = video.expand(9, 3, 32, 32)
        found = detect(video)
        assert (found.colour, found.shape, found.direction) == (shapes.NONE,) * 3


def test_a_still_or_diagonal_shape_has_no_direction():
    generator = torch.Generator().manual_seed(0)
    clip = draw_clip("blue", "square", "left", 9, 32, generator)
    still = detect(clip[:1].expand(9, -1, -1, -1))
    assert (still.colour, still.shape, still.direction) == ("blue", "square", shapes.NONE)
    diagonal = torch.stack([frame.roll(-k, 1) for k, frame in enumerate(clip)])
    assert detect(diagonal).direction == shapes.NONE
    assert detect(clip.flip(0)).direction == "right"  # played backwards
    assert detect(clip.transpose(2, 3)).direction == "up"


def test_two_shapes_at_once_are_no_shape():
    generator = torch.Generator().manual_seed(3)
    left, right = (draw_clip("red", s, "up", 9, 32, generator) for s in ("square", "triangle"))
    assert detect(torch.cat([left, right], dim=3)) == Detection()


@pytest.mark.parametrize(("frames", "size"), [(9, 32), (13, 64), (5, 48)])
def test_shapes_stay_inside_the_picture_at_every_size(frames, size):
    for seed, combo in enumerate(ALL):
        clip = draw_clip(*combo, frames, size, torch.Generator().manual_seed(seed))
        assert clip.shape == (frames, 3, size, size) and clip.dtype == torch.uint8
        border = torch.cat(
            [clip[..., 0, :], clip[..., -1, :], clip[..., :, 0], clip[..., :, -1]], dim=-1
        ).int()
        assert (border.amax(1) - border.amin(1)).max() == 0  # grey: background only


def test_a_picture_too_small_for_the_motion_is_an_error():
    with pytest.raises(ValueError, match="size=16"):
        for seed in range(20):
            draw_clip("red", "star", "left", 9, 16, torch.Generator().manual_seed(seed))


def test_a_clip_depends_on_its_generator_alone():
    first, again, other = (
        draw_clip("red", "circle", "left", 9, 32, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_held_out_combinations_are_new_only_as_a_whole():
    trained, held_out = shapes.combinations()
    assert len(trained) == 36 and len(held_out) == 12 and not set(trained) & set(held_out)
    for a, b in pairs(range(3), 2):
        assert {(c[a], c[b]) for c in held_out} <= {(c[a], c[b]) for c in trained}
    for field in range(3):
        counts, held = Counter(c[field] for c in trained), Counter(c[field] for c in held_out)
        assert len(set(counts.values())) == 1 and len(set(held.values())) == 1  # evenly
    assert not {c.colour for c in trained} & set(shapes.NEW_COLOURS)
    assert not {c.shape for c in trained} & set(shapes.NEW_SHAPES)


def test_the_manifest_tells_what_was_made(tmp_path):
    trained, held_out = shapes.combinations()
    paths = make_dataset(tmp_path, trained[:2], 2, seed=4, write_video=write_video, held_out=held_out)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [tuple(c.values()) for c in manifest["combinations"]] == trained[:2] and len(
        manifest["held_out"]
    ) == 12
    assert len(paths) == 4
    once = paths[1].read_bytes()
    make_dataset(
        tmp_path, trained[:1], 2, seed=4, write_video=write_video
    )  # a smaller set has the same clips
    assert paths[1].read_bytes() == once
