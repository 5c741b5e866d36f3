"""Decoding only what is needed: the pictures stay those of decoding everything, and the work is counted.

The reference is PyAV's plain loop over all frames of a file: no seeking, no skipping.
"""

from __future__ import annotations

import itertools
import weakref
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_reader import write

from cogvideox.data import reader as reader_module
from cogvideox.data.reader import VideoError, open_video
from cogvideox.data.transforms import crop, resize_to_cover
from cogvideox.data.video_folder import VideoFolder

NUM_FRAMES, SIZE = 80, (48, 64)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """A random pattern that moves by half a block a frame: each refers to its neighbours, no two are alike."""
    pattern = np.random.default_rng(0).integers(0, 256, (24, 60, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([pattern[k : k + SIZE[0], 4 * k : 4 * k + SIZE[1]] for k in range(NUM_FRAMES)])


def plainly_decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


GROUPS = {
    "closed.mp4": dict(options={"g": "20", "bf": "3"}),
    "open.mp4": dict(options={"g": "20", "bf": "3", "x264-params": "open-gop=1"}),
    "open.mkv": dict(options={"g": "20", "bf": "3", "x264-params": "open-gop=1"}),
    "pyramid.mp4": dict(options={"g": "250", "bf": "5", "x264-params": "b-pyramid=normal:b-adapt=0"}),
    "one key frame.mp4": dict(options={"g": "1000", "bf": "5", "x264-params": "b-pyramid=none:b-adapt=0"}),
    "only key frames.mp4": dict(options={"g": "1"}),
    "refresh.mp4": dict(options={"g": "20", "x264-params": "intra-refresh=1"}),
    "interlaced.mp4": dict(options={"g": "20", "flags": "+ildct+ilme", "x264-params": "tff=1"}),
    "fragments.mp4": dict(options={"g": "20"}, container={"movflags": "frag_keyframe+empty_moov"}),
    "ntsc.mp4": dict(options={"g": "20", "bf": "3"}, rate=Fraction(30000, 1001)),
    "no times.avi": dict(options={"g": "20", "bf": "3"}),
    "hevc.mp4": dict(codec="libx265", options={"x265-params": "log-level=none:keyint=20:open-gop=1"}),
    "layers.mp4": dict(
        codec="libx265", options={"x265-params": "log-level=none:keyint=20:temporal-layers=3"}
    ),
    "vp9.webm": dict(codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.mp4": dict(codec="mpeg4", options={"g": "20", "bf": "2"}),
}


@pytest.mark.parametrize("name", GROUPS)
def test_short_cuts_change_no_byte(tmp_path, pictures, name):
    settings = {"rate": 24, **GROUPS[name]}
    if settings.get("codec", "libx264") not in av.codecs_available:
        pytest.skip(f"this PyAV has no {settings['codec']}")
    if settings.get("codec") == "libvpx-vp9":
        # decord brings a libvpx of its own, and a process that has loaded it cannot encode with PyAV's.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            path = apart.submit(write, tmp_path / name, pictures, **settings).result()
    else:
        path = write(tmp_path / name, pictures, **settings)
    expected = plainly_decoded(path)
    assert len(expected) == NUM_FRAMES and len({picture.tobytes() for picture in expected}) == NUM_FRAMES
    video = open_video(path, "pyav")
    dense = [list(range(first, NUM_FRAMES, stride)) for first, stride in ((0, 3), (7, 3), (19, 1), (41, 2))]
    sparse = [[0, 79], [18, 21, 58, 61], *([index] for index in (1, 18, 19, 20, 39, 60, 78))]
    for wanted in dense + sparse:
        for index, picture in zip(wanted, video.get_frames(wanted), strict=True):
            assert np.array_equal(picture, expected[index]), (wanted, index)


def count_decoded(monkeypatch) -> list:
    """Every frame that a decoder returns from now on, by its time."""
    decoded, stamp = [], reader_module._stamp

    def counted(of):
        if isinstance(of, av.VideoFrame):
            decoded.append(of.pts)
        return stamp(of)

    monkeypatch.setattr(reader_module, "_stamp", counted)
    return decoded


def test_pictures_that_none_other_needs_are_not_decoded(tmp_path, pictures, monkeypatch):
    path = write(tmp_path / "b.mp4", pictures, rate=24, **GROUPS["one key frame.mp4"])
    with av.open(str(path)) as container:
        is_b = [frame.pict_type == av.video.frame.PictureType.B for frame in container.decode(video=0)]
    assert sum(is_b) > 60  # five of six
    wanted = range(0, 79, 3)
    needed = sum(index in wanted or not is_b[index] for index in range(wanted[-1] + 1))
    decoded = count_decoded(monkeypatch)
    open_video(path, "pyav").get_frames(wanted)
    assert needed <= len(decoded) <= needed + 2  # up to the reference behind the last wanted picture
    assert len(decoded) < 45  # of 79


def test_groups_of_pictures_without_a_wanted_one_are_passed_over(tmp_path, pictures, monkeypatch):
    decoded = count_decoded(monkeypatch)
    intra = write(tmp_path / "intra.mp4", pictures, **GROUPS["only key frames.mp4"])
    open_video(intra, "pyav").get_frames([3, 40, 43, 79])
    assert len(decoded) == 4
    decoded.clear()
    closed = write(tmp_path / "closed.mp4", pictures, **GROUPS["closed.mp4"])
    open_video(closed, "pyav").get_frames([1, 61])  # of the groups 0-19 and 60-79
    assert len(decoded) <= 2 * 8  # each with the pictures that are out of order around it


def test_only_wanted_pictures_become_rgb_and_two_at_most_are_held(tmp_path, pictures, monkeypatch):
    path = write(tmp_path / "a.mp4", pictures, rate=24)
    (tmp_path / "a.txt").write_text("a pattern")
    alive, most, converted, as_shown = weakref.WeakSet(), 0, 0, reader_module._as_shown

    class Picture(np.ndarray):
        """An array that can be told from others."""

        __hash__ = object.__hash__

    def counted(frame, reformatter):
        nonlocal converted, most
        picture = as_shown(frame, reformatter).copy().view(Picture)
        converted += 1
        alive.add(picture)
        most = max(most, len(alive))
        return picture

    monkeypatch.setattr(reader_module, "_as_shown", counted)
    item = VideoFolder(tmp_path, 25, 32, 32, fps=8)[0]
    assert item["video"].shape == (25, 3, 32, 32) and item["video"].is_contiguous()
    assert converted == 25  # of the 73 that the clip spans
    assert most <= 2  # the one that is being resized is let go of when the next has come
    assert path.is_file()


def test_an_mp4_is_not_decoded_to_find_out_what_its_table_says(tmp_path, pictures, monkeypatch):
    probed, open_container = [], reader_module._open_container

    def spy(path, probe=True):
        probed.append(probe)
        return open_container(path, probe)

    monkeypatch.setattr(reader_module, "_open_container", spy)
    open_video(write(tmp_path / "a.mp4", pictures, **GROUPS["closed.mp4"])).get_frames([0])
    assert probed == [False, False]
    probed.clear()
    open_video(write(tmp_path / "a.mkv", pictures, **GROUPS["closed.mp4"])).get_frames([0])
    assert probed == [False, True, True]  # no table: its packets are read, and the decoder may look first


@pytest.mark.parametrize("kind", ["center", "random"])
def test_frame_by_frame_is_the_same_as_the_whole_clip_at_once(tmp_path, pictures, kind):
    path = write(tmp_path / "a.mp4", pictures, rate=6)  # slower than asked: frames repeat
    (tmp_path / "a.txt").write_text("a pattern")
    dataset = VideoFolder(tmp_path, 49, 24, 24, fps=8, crop=kind, seed=5)
    item = dataset.item(0, epoch=2)["video"]
    indices = dataset._select(dataset.clips[0])[1].indices
    assert len(set(indices)) < len(indices) == 49
    whole = torch.from_numpy(open_video(path).get_frames(indices)).permute(0, 3, 1, 2)
    whole = resize_to_cover(whole, (24, 24))  # 24 x 32
    lefts = range(9) if kind == "random" else [4]
    matches = [left for left in lefts if torch.equal(item, whole[..., left : left + 24])]
    assert len(matches) == 1  # one place for all frames
    assert kind == "random" or torch.equal(item, crop(whole, (24, 24)))


def test_a_file_whose_pictures_change_their_size_is_a_bad_clip(tmp_path, pictures, monkeypatch):
    write(tmp_path / "a.mp4", pictures, rate=8)
    (tmp_path / "a.txt").write_text("a pattern")
    sizes = itertools.chain([(48, 64)], itertools.repeat((64, 48)))
    monkeypatch.setattr(
        reader_module, "_as_shown", lambda frame, reformatter: np.zeros((*next(sizes), 3), np.uint8)
    )
    with pytest.raises(VideoError, match=r"change from \(48, 64\) to \(64, 48\)"):
        VideoFolder(tmp_path, 9, 32, 32, fps=8)[0]


# ------------------------------------------------------------------------------------------------------- colours

BT601, BT709, BT2020 = 5, 1, 9
LIMITED, FULL = 1, 2
LUMA = {BT601: (0.299, 0.114), BT709: (0.2126, 0.0722), BT2020: (0.2627, 0.0593), None: (0.299, 0.114)}


def rgb_of(yuv: tuple[int, int, int], matrix: int | None, is_full: bool) -> np.ndarray:
    """ITU-R BT.601, BT.709, BT.2020: levels of 0 to 255. Without a tag it is BT.601, limited, as FFmpeg has it."""
    kr, kb = LUMA[matrix]
    y, u, v = yuv
    y, u, v = (
        (y / 255, (u - 128) / 255, (v - 128) / 255)
        if is_full
        else ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    )
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return np.clip(255 * np.array([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue]), 0, 255)


def write_flat(
    path: Path, yuv: tuple[int, int, int], format: str, matrix: int | None, colour_range: int, size
) -> Path:
    """Four frames of one colour, lossless, with tags."""
    wide = 4 if "10" in format else 1  # a level of ten bits
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        (stream.height, stream.width), stream.pix_fmt, stream.options = size, format, {"qp": "0"}
        stream.codec_context.color_range = colour_range
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        for _ in range(4):
            frame = av.VideoFrame(size[1], size[0], format)
            for plane, level in zip(frame.planes, yuv, strict=True):
                sample = (wide * level).to_bytes(2 if wide > 1 else 1, "little")
                plane.update(sample * (plane.buffer_size // len(sample)))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("format", "matrix", "colour_range", "size"),
    [
        ("yuv420p", None, LIMITED, (48, 64)),
        ("yuv420p", BT601, LIMITED, (48, 64)),
        ("yuv420p", BT709, LIMITED, (48, 64)),
        ("yuv420p", BT2020, LIMITED, (48, 64)),
        ("yuvj420p", BT601, FULL, (48, 64)),
        ("yuv420p", BT709, FULL, (48, 64)),
        ("yuv422p", BT709, LIMITED, (48, 64)),
        ("yuv444p", BT601, LIMITED, (49, 65)),  # odd: with less chroma H.264 has no such size
        ("yuv420p10le", BT709, LIMITED, (48, 64)),
        ("yuv420p10le", BT601, FULL, (48, 64)),
    ],
)
def test_colours_follow_the_tags_in_both_decoders(tmp_path, format, matrix, colour_range, size):
    yuv = (125, 95, 180)
    path = write_flat(tmp_path / "flat.mp4", yuv, format, matrix, colour_range, size)
    expected = rgb_of(yuv, matrix, colour_range == FULL)
    decoders = ["pyav"] if reader_module._decord() is None else ["pyav", "decord"]
    seen = [open_video(path, decoder).get_frames([2])[0] for decoder in decoders]
    for picture in seen:
        assert picture.shape == (*size, 3)
        # swscale's fast conversion works with tables of about seven bits: it is up to 2.6 levels low.
        assert np.abs(picture - expected).max() < 3
    assert np.array_equal(seen[0], seen[-1])  # both are FFmpeg's
