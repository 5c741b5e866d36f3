"""Reading videos: both decoders give the frames that were asked for; damage is one clear error."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cogvideox.data import reader as reader_module
from cogvideox.data.reader import VideoError, open_video, verify_video
from cogvideox.data.transforms import cover_size, crop, resize_to_cover


def coded_frames(n: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame k shows the 8 bits of k as a 2 x 4 grid of black and white blocks."""
    bits = (np.arange(n)[:, None] >> np.arange(8)) & 1
    blocks = bits.reshape(n, 2, 4).repeat(height // 2, 1).repeat(width // 4, 2)
    return np.repeat((blocks * 255).astype(np.uint8)[..., None], 3, axis=3)


def decode_numbers(frames: np.ndarray) -> list[int]:
    height, width = frames.shape[1:3]
    centres = frames[:, height // 4 :: height // 2, width // 8 :: width // 4, 0].reshape(len(frames), 8) > 127
    return (centres << np.arange(8)).sum(axis=1).tolist()


def write(
    path: Path, frames: np.ndarray, rate=8, times=None, options=None, codec="libx264", container=None
) -> Path:
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", options or {}
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for k, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[k] * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def coded(tmp_path_factory) -> Path:
    """100 frames with B-frames and a key frame every 30."""
    options = {"g": "30", "bf": "3", "crf": "18"}
    return write(tmp_path_factory.mktemp("video") / "coded.mp4", coded_frames(100), options=options)


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_frames_are_the_ones_asked_for(coded, decoder):
    if decoder == "decord":
        pytest.importorskip("decord")
    video = open_video(coded, decoder)
    wanted = [99, 0, 31, 31, 64, 5, 30, 29]
    assert decode_numbers(video.get_frames(wanted)) == wanted
    assert video.decoder == decoder
    assert video.size == (48, 64) and video.num_frames == 100 and video.average_fps == pytest.approx(8)


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_reference_videos_decode_to_their_frame_numbers(reference, decoder):
    if decoder == "decord":
        pytest.importorskip("decord")
    for path in sorted((reference / "fixtures" / "dataset" / "videos").glob("*.mp4")):
        video = open_video(path, decoder)
        wanted = np.linspace(0, video.num_frames - 1, 6).astype(int).tolist()
        assert decode_numbers(video.get_frames(wanted)) == wanted, path.name


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_time_stamps_of_a_varying_rate_are_kept(tmp_path, suffix):
    times = np.concatenate([np.arange(20) / 20, 1 + np.arange(20) / 5])
    path = write(tmp_path / f"vfr{suffix}", coded_frames(40), rate=20, times=times, options={"bf": "2"})
    video = open_video(path)
    np.testing.assert_allclose(video.timestamps, times, atol=1e-3)  # the file stores milliseconds
    assert decode_numbers(open_video(path, "pyav").get_frames([0, 25, 39])) == [0, 25, 39]


def test_frames_cut_off_by_an_edit_list_are_not_counted(tmp_path):
    """Five leading frames with negative time, as cutting without re-encoding leaves them; decord would show them."""
    source = write(tmp_path / "source.mp4", coded_frames(60), options={"bf": "0"})
    path = tmp_path / "cut.mp4"
    with (
        av.open(str(source)) as inp,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as out,
    ):
        stream = inp.streams.video[0]
        if not hasattr(out, "add_stream_from_template"):
            pytest.skip("this PyAV cannot copy a stream")
        copy = out.add_stream_from_template(stream)
        for packet in inp.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - 5 * packet.duration, packet.dts - 5 * packet.duration
                packet.stream = copy
                out.mux(packet)
    video = open_video(path)
    assert video.num_frames == 55
    assert decode_numbers(video.get_frames([0, 1, 54])) == [5, 6, 59]


def test_header_and_packets_agree_about_the_times(coded, monkeypatch):
    from_header = open_video(coded).timestamps
    monkeypatch.setattr(reader_module, "_constant_rate_from_header", lambda stream, path: None)
    from_packets = open_video(coded)
    np.testing.assert_allclose(from_packets.timestamps, from_header, atol=1e-9)
    assert decode_numbers(from_packets.get_frames([0, 50, 99])) == [0, 50, 99]


def test_decord_takes_over_where_pyav_fails_and_the_log_says_why(coded, monkeypatch, caplog):
    pytest.importorskip("decord")
    caplog.set_level("INFO")

    def broken(self, left, short_cuts):
        yield 7, np.zeros((48, 64, 3), np.uint8)  # it fails after the first picture
        raise VideoError(f"{coded}: damaged")

    monkeypatch.setattr(reader_module.VideoReader, "_decode", broken)
    video = open_video(coded)
    assert decode_numbers(video.get_frames([7, 9])) == [7, 9] and video.decoder == "decord"
    assert f"{coded}: decoded by decord, because pyav: damaged" in caplog.text
    with pytest.raises(VideoError, match=r"coded.mp4: pyav: damaged$"):
        open_video(coded, "pyav").get_frames([7])


def test_where_no_decoder_can_the_error_says_why_of_each(coded, monkeypatch):
    class Broken:
        DECORDError = RuntimeError

        @staticmethod
        def VideoReader(*args, **kwargs):
            raise RuntimeError("cannot seek\nstack trace")

    def lost(self, left, short_cuts):
        yield from ()

    monkeypatch.setattr(reader_module.VideoReader, "_decode", lost)
    monkeypatch.setattr(reader_module, "_decord", lambda: Broken)
    with pytest.raises(
        VideoError, match=r"pyav: frames \[7\] of 100 cannot be decoded; decord: cannot seek$"
    ):
        open_video(coded).get_frames([7])
    monkeypatch.setattr(reader_module, "_decord", lambda: None)
    with pytest.raises(VideoError, match="decord: not installed$"):
        open_video(coded).get_frames([7])


def test_a_turned_phone_video_is_shown_upright_by_both_decoders(tmp_path):
    path = tmp_path / "turned.mp4"
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 255
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a display matrix")
        stream.set_display_rotation(90)
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    upright = open_video(path, "pyav").get_frames([1])
    assert upright.shape == (1, 64, 32, 3)
    assert upright[0, 48, 8].min() > 200 and upright[0, 8, 8].max() < 50
    if reader_module._decord() is not None:
        assert (
            np.abs(open_video(path, "decord").get_frames([1]).astype(int) - upright).max() <= 3
        )  # colour rounding


def test_damage_is_one_error_that_names_file_and_reason(tmp_path, coded):
    data = coded.read_bytes()
    front = write(tmp_path / "f.mp4", coded_frames(100), container={"movflags": "faststart"}).read_bytes()
    for name, content, reason in [
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"hello " * 1000, "damaged or not a video"),
        ("no_index.mp4", data[: len(data) // 2], "damaged or not a video"),  # mp4's index stands last
        ("cut.mp4", front[: len(front) * 6 // 10], "truncated"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(VideoError, match=f"{name}: .*{reason}"):
            open_video(path)
    with pytest.raises(VideoError, match="gone.mp4: no such file"):
        open_video(tmp_path / "gone.mp4")
    assert issubclass(VideoError, ValueError)


def test_truncation_is_seen_without_the_sample_table(tmp_path, monkeypatch):
    """Where there is no sample table, the packets tell."""
    monkeypatch.setattr(reader_module, "_constant_rate_from_header", lambda stream, path: None)
    front = write(tmp_path / "f.mp4", coded_frames(100), container={"movflags": "faststart"}).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(front[: len(front) * 6 // 10])
    with pytest.raises(VideoError, match=r"cut.mp4: truncated"):
        open_video(tmp_path / "cut.mp4")


def test_strict_decoding_finds_damage_inside_a_frame(tmp_path, coded):
    assert verify_video(coded) == 100
    data = bytearray(coded.read_bytes())
    start = data.find(b"mdat") + 2000
    data[start : start + 400] = np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8).tobytes()
    (tmp_path / "hurt.mp4").write_bytes(data)
    open_video(tmp_path / "hurt.mp4")  # headers are whole
    with pytest.raises(VideoError, match=r"hurt.mp4: "):
        verify_video(tmp_path / "hurt.mp4")


def test_resize_covers_and_keeps_the_aspect_ratio():
    assert cover_size((1080, 1920), (480, 720)) == (480, 853)
    assert cover_size((1920, 1080), (480, 720)) == (1280, 720)
    assert cover_size((480, 720), (480, 720)) == (480, 720)


def test_resize_is_pil_bicubic_with_antialiasing():
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (2, 3, 90, 160), dtype=torch.uint8, generator=generator)
    ours = resize_to_cover(video, (30, 40))
    assert ours.dtype == torch.uint8 and ours.shape == (2, 3, 30, 53)
    theirs = Image.fromarray(video[1].permute(1, 2, 0).numpy()).resize((53, 30), Image.Resampling.BICUBIC)
    assert (
        np.abs(ours[1].permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs)).max() <= 1
    )  # fixed-point rounding


def test_crops_are_central_or_drawn_from_the_generator():
    video = torch.arange(10 * 12).reshape(1, 1, 10, 12)
    assert crop(video, (4, 6))[0, 0, 0, 0] == 3 * 12 + 3
    draws = [
        crop(video, (4, 6), "random", torch.Generator().manual_seed(s))[0, 0, 0, 0].item() for s in range(20)
    ]
    assert len(set(draws)) > 5
    again = [
        crop(video, (4, 6), "random", torch.Generator().manual_seed(s))[0, 0, 0, 0].item() for s in range(20)
    ]
    assert draws == again
    with pytest.raises(ValueError, match="generator"):
        crop(video, (4, 6), "random")
