"""Writing videos: what is read back is what was written, and nothing half-written stays."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cogvideox.data.reader import open_video
from cogvideox.sampling import video_io
from cogvideox.sampling.outputs import write_pixels
from cogvideox.sampling.prompts import Request
from cogvideox.sampling.targets import Target
from cogvideox.sampling.video_io import (
    frames_writer,
    gif_writer,
    mp4_writer,
    sheet_writer,
    to_uint8,
    write_contact_sheet,
    write_video,
)


def smooth(frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """(F, 3, H, W) float -1..1 that changes slowly in space and time: grey, so that 4:2:0 loses nothing."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    grey = torch.stack([torch.sin(x + y + 0.2 * t) for t in range(frames)]) * 0.8
    return grey[:, None].expand(-1, 3, -1, -1)


@pytest.mark.parametrize("fps", [8, 16, 23.976, 30])
def test_a_video_reads_back(tmp_path, fps):
    video = smooth(9)
    write_video(tmp_path / "deep" / "v.mp4", video, fps)
    for decoder in ("auto", "pyav"):
        reader = open_video(tmp_path / "deep" / "v.mp4", decoder)
        assert reader.num_frames == 9 and reader.average_fps == pytest.approx(fps, rel=1e-4)
        back = torch.from_numpy(reader.get_frames(range(9))).permute(0, 3, 1, 2) / 127.5 - 1
        assert (back - video).abs().mean() < 0.02  # quality 17 on a smooth picture
    with av.open(str(tmp_path / "deep" / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert abs(stream.average_rate - Fraction(fps).limit_denominator(10_000)) < Fraction(1, 1000)


def test_chunks_give_the_same_file_as_the_whole(tmp_path):
    video = to_uint8(smooth(9))
    write_video(tmp_path / "whole.mp4", video, 8)
    pulled = []
    chunks = (pulled.append(i) or video[a:b] for i, (a, b) in enumerate([(0, 1), (1, 5), (5, 9)]))
    write_video(tmp_path / "chunks.mp4", chunks, 8)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "chunks.mp4").read_bytes()
    assert pulled == [0, 1, 2]


def test_float_and_uint8_and_numpy_are_the_same_video(tmp_path):
    video = smooth(3)
    for name, value in [("f", video), ("u", to_uint8(video)), ("n", to_uint8(video).numpy())]:
        write_video(tmp_path / f"{name}.mp4", value, 8)
    assert len({(tmp_path / f"{name}.mp4").read_bytes() for name in "fun"}) == 1
    assert to_uint8(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (smooth(3) * float("nan"), "NaN"),
        (smooth(3, height=47), "47x64.*even"),
        (smooth(3)[:, :1], "expected .frames, 3, height, width"),
        (iter([]), "no frames"),
        (iter([smooth(2), smooth(2, height=32)]), "32x64 after chunks of 48x64"),
        (iter([smooth(2), smooth(2) / 0]), "NaN or infinite"),
        (smooth(2).long(), "torch.int64"),
    ],
)
def test_an_error_leaves_the_folder_as_it_was(tmp_path, video, reason):
    path = tmp_path / "v.mp4"
    path.write_text("older file")
    with pytest.raises(ValueError, match=reason):
        write_video(path, video, 8)
    assert path.read_text() == "older file" and list(tmp_path.iterdir()) == [path]


def test_a_wrong_rate_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "v.mp4", smooth(2), 0)


def test_without_x264_another_encoder_is_used_and_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(video_io, "_ENCODERS", ("no_such_encoder", "mpeg4"))
    write_video(tmp_path / "v.mp4", smooth(9), 8)
    assert open_video(tmp_path / "v.mp4").num_frames == 9
    assert "no_such_encoder" in caplog.text and "mpeg4" in caplog.text


def test_a_contact_sheet_shows_the_frames_in_order(tmp_path):
    greys = torch.arange(0, 250, 10, dtype=torch.uint8)  # 25 frames
    video = greys[:, None, None, None].expand(25, 3, 8, 8)
    write_contact_sheet(
        tmp_path / "s.png", [("one", video), ("two " * 40, video[:3])], 5, cell_height=40, label_width=100
    )
    sheet = np.asarray(Image.open(tmp_path / "s.png").convert("L"))
    centres = [100 + 20 + 44 * i for i in range(5)]
    assert sheet[4 + 20, centres].tolist() == [0, 60, 120, 180, 240]  # frames 0, 6, 12, 18, 24
    assert sheet[4 + 44 + 20, centres].tolist() == [0, 10, 20, 255, 255]
    assert (sheet[:, :100] < 128).any()  # labels
    with pytest.raises(ValueError, match="at least one row"):
        write_contact_sheet(tmp_path / "t.png", [])


@pytest.mark.parametrize("fps", [8, 16, 23.976, 30])
def test_a_gif_lasts_as_long_as_its_video_and_looks_like_it(tmp_path, fps):
    video = to_uint8(smooth(41))
    with gif_writer(tmp_path / "v.gif", fps) as write:
        for start in (0, 1, 9):
            write(video[start : {0: 1, 1: 9, 9: 41}[start]])
    with Image.open(tmp_path / "v.gif") as gif:  # read by Pillow's own reader
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (41, (64, 48), 0)
        milliseconds, worst = 0, 0.0
        for index in range(41):
            gif.seek(index)
            milliseconds += gif.info["duration"]
            frame = torch.from_numpy(np.array(gif.convert("RGB"))).permute(2, 0, 1).float()
            worst = max(worst, (frame - video[index].float()).abs().mean().item())
    assert abs(milliseconds - 41000 / fps) <= 5  # half of a hundredth of a second
    assert worst < 3  # 256 colours


def test_frames_are_the_pixels_themselves(tmp_path):
    video = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with frames_writer(tmp_path / "v") as write:
        write(video)
    names = sorted(path.name for path in (tmp_path / "v").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png"]
    back = np.stack([np.asarray(Image.open(tmp_path / "v" / name)) for name in names])
    assert (back == video.permute(0, 2, 3, 1).numpy()).all()
    with frames_writer(tmp_path / "v") as write:  # a shorter one takes its place whole
        write(video[:1])
    assert [path.name for path in (tmp_path / "v").iterdir()] == ["0000.png"]


@pytest.mark.parametrize(
    "writer",
    [
        mp4_writer,
        gif_writer,
        lambda path, fps: frames_writer(path),
        lambda path, fps: sheet_writer(path, "v"),
    ],
)
@pytest.mark.parametrize("fault", ["nothing written", "an error", "Ctrl-C", "another size"])
def test_every_writer_leaves_a_whole_file_or_none(tmp_path, writer, fault):
    error = {"an error": OSError, "Ctrl-C": KeyboardInterrupt}.get(fault, ValueError)
    with pytest.raises(error), writer(tmp_path / "v.out", 8) as write:
        if fault != "nothing written":
            write(to_uint8(smooth(2)))
        if fault == "another size":
            write(to_uint8(smooth(2, height=32)))
        if error is not ValueError:
            raise error
    assert list(tmp_path.iterdir()) == []


def test_all_outputs_hold_one_chunk_of_the_stream_at_a_time(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def decoder() -> Iterator[torch.Tensor]:
        nonlocal most
        for start in range(0, 40, 4):
            chunk = torch.full((4, 3, 32, 32), start / 40)
            alive.append(weakref.ref(chunk))
            most = max(most, sum(reference() is not None for reference in alive))
            yield chunk
            del chunk

    target = Target(Request(0, "a dot", 0), tmp_path, "v", ("mp4", "gif", "frames", "sheet"))
    write_pixels(target, decoder(), 8)
    assert len(alive) == 10 and most <= 2  # the new one, and the loop's hold on the one before
    assert len(list((tmp_path / "v").iterdir())) == 40
