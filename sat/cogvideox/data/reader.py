"""Reading video files: frame times from the container, pixels by decord, or by PyAV where decord cannot.

Opening a file decodes nothing. The frame times come from PyAV, so that they are exact and so that a damaged file is
refused before training starts; decord then decodes only the frames asked for. decord is used first because it seeks
fastest; it has no wheel for arm64 and fails on some files, and there PyAV decodes, with a line in the log.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

logger = logging.getLogger(__name__)

DECODERS = ("auto", "decord", "pyav")


class VideoError(ValueError):
    """A video file that cannot be used. The message names the file and the reason."""


@functools.cache
def _pyav() -> ModuleType:
    import av

    # FFmpeg prints its own complaints to stderr; every one that matters also arrives as an exception.
    av.logging.set_level(av.logging.FATAL)
    return av


@functools.cache
def _decord() -> ModuleType | None:
    try:
        import decord
    except (ImportError, OSError) as error:  # OSError: a wheel whose shared library does not load
        logger.info("decord is not available (%s): PyAV decodes all videos", error)
        return None
    decord.logging.set_level(decord.logging.FATAL)
    return decord


@contextmanager
def _open_container(path: Path) -> Iterator:
    """A PyAV container with at least one video stream; FFmpeg's errors become ``VideoError``."""
    av = _pyav()
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes)")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: holds no video stream")
            yield container
    except av.FFmpegError as error:
        raise VideoError(f"{path}: damaged or not a video ({error.strerror})") from error


def _stamps_from_packets(container, path: Path) -> np.ndarray:
    """Presentation times of all frames, in units of the stream's time base, ascending: exact for every format."""
    stream = container.streams.video[0]
    stamps = []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise VideoError(f"{path}: truncated, readable up to frame {len(stamps)}")
        stamp = packet.dts if packet.pts is None else packet.pts  # AVI stores no pts
        if stamp is not None and not packet.is_discard:  # discarded: cut off by an edit list, never shown
            stamps.append(stamp)
    if not stamps:
        raise VideoError(f"{path}: holds no frames")
    return np.sort(np.asarray(stamps, dtype=np.int64))


def _constant_rate_from_header(stream, path: Path) -> np.ndarray | None:
    """Seconds of each frame, from the sample table of an mp4 alone; None where the header cannot be trusted.

    The rate is constant where the average rate equals the base rate, the finest rate that the time stamps show.
    """
    entries = getattr(stream, "index_entries", None)  # newer PyAV only
    if not entries or len(entries) != stream.frames or not stream.average_rate:
        return None
    # Discarded entries: frames that an edit list cuts off (decord counts and shows them).
    if stream.average_rate != stream.base_rate or any(entry.is_discard for entry in entries):
        return None
    last = entries[len(entries) - 1]
    if last.pos + last.size > path.stat().st_size:
        raise VideoError(f"{path}: truncated, {path.stat().st_size} bytes of at least {last.pos + last.size}")
    return np.arange(len(entries)) / float(stream.average_rate)


class VideoReader:
    """One open video. Hold it only as long as frames are read from it.

    ``timestamps``: (num_frames,) float64, seconds from the first frame, ascending.  ``decoder``: "decord" or "pyav".
    """

    def __init__(self, path: str | Path, decoder: str = "auto"):
        assert decoder in DECODERS, decoder
        self.path = Path(path)
        with _open_container(self.path) as container:
            stream = container.streams.video[0]
            timestamps = _constant_rate_from_header(stream, self.path)
            if timestamps is None:
                stamps = _stamps_from_packets(container, self.path)
                # Divided last, so that each time is the float nearest to the exact fraction.
                timestamps = (stamps - stamps[0]) * stream.time_base.numerator / stream.time_base.denominator
            self._header_rate = float(stream.average_rate or 0)
        self.timestamps: np.ndarray = timestamps
        self._wanted_decoder = decoder
        self.decoder: str | None = None  # known after the first frames are read

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    @property
    def average_fps(self) -> float:
        """Frames per second of the whole file; of a single frame, what the header says (0 where it says nothing)."""
        span = float(self.timestamps[-1])
        return (self.num_frames - 1) / span if span > 0 else self._header_rate

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) as shown, rotation of the phone applied. Decodes the first frame."""
        return self.get_frames([0]).shape[1:3]

    def get_frames(self, indices: Sequence[int]) -> np.ndarray:
        """(len(indices), H, W, 3) uint8 RGB. Indices may repeat and come in any order."""
        indices = [int(i) for i in indices]
        assert indices and min(indices) >= 0 and max(indices) < self.num_frames, (indices, self.num_frames)
        if self._wanted_decoder != "pyav":
            frames, reason = self._decode_by_decord(indices)
            if frames is not None:
                self.decoder = "decord"
                return frames
            if self._wanted_decoder == "decord":
                raise VideoError(f"{self.path}: decord cannot decode it ({reason})")
            logger.info("%s: decoded by PyAV, because decord %s", self.path, reason)
        self.decoder = "pyav"
        return self._decode_by_pyav(indices)

    def _decode_by_decord(self, indices: list[int]) -> tuple[np.ndarray | None, str]:
        """The frames, or None and the reason."""
        decord = _decord()
        if decord is None:
            return None, "is not installed"
        try:
            # One thread: parallelism comes from the loader's workers, and idle threads survive a fork badly.
            reader = decord.VideoReader(str(self.path), num_threads=1)
            if len(reader) != self.num_frames:
                return None, f"counts {len(reader)} frames instead of {self.num_frames}"
            return reader.get_batch(indices).asnumpy(), ""
        except (RuntimeError, decord.DECORDError) as error:
            return None, f"fails: {str(error).splitlines()[0]}"

    def _decode_by_pyav(self, indices: list[int]) -> np.ndarray:
        with _open_container(self.path) as container:
            stamps = _stamps_from_packets(container, self.path)
        if len(stamps) != self.num_frames:
            raise VideoError(
                f"{self.path}: the header lists {self.num_frames} frames, the file has {len(stamps)}"
            )
        wanted = {int(stamps[i]) for i in indices}
        frames = self._collect(wanted, seek_to=min(wanted))
        if len(frames) < len(wanted):  # the index of key frames was wrong: read from the start
            frames = self._collect(wanted, seek_to=None)
        if len(frames) < len(wanted):
            missing = [i for i in sorted(set(indices)) if int(stamps[i]) not in frames]
            raise VideoError(f"{self.path}: frames {missing[:8]} of {self.num_frames} cannot be decoded")
        return np.stack([frames[int(stamps[i])] for i in indices])

    def _collect(self, wanted: set[int], seek_to: int | None) -> dict[int, np.ndarray]:
        frames: dict[int, np.ndarray] = {}
        with _open_container(self.path) as container:
            stream = container.streams.video[0]
            if seek_to is not None:
                container.seek(seek_to, stream=stream, backward=True)
            for frame in container.decode(stream):
                stamp = frame.dts if frame.pts is None else frame.pts
                if stamp in wanted:
                    if frame.is_corrupt:
                        raise VideoError(f"{self.path}: the picture at {float(frame.time):.3f} s is damaged")
                    frames[stamp] = _as_shown(frame)
                    if len(frames) == len(wanted):
                        break
        return frames


def _as_shown(frame) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as the file's display matrix says (decord does the same)."""
    quarter_turns = round(getattr(frame, "rotation", 0) / 90)  # counter-clockwise; PyAV >= 14
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns))


def open_video(path: str | Path, decoder: str = "auto") -> VideoReader:
    """Open a video without decoding it.

    decoder: "auto" (decord, else PyAV), "decord" or "pyav".  Raises ``VideoError`` for a file that is missing, empty,
    truncated or not a video.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder={decoder!r}: expected one of {', '.join(DECODERS)}")
    return VideoReader(path, decoder)


def verify_video(path: str | Path) -> int:
    """Decode every frame strictly and return their number; ``VideoError`` at the first damaged one.

    FFmpeg's decoders, decord's too, by default paint over damage inside a frame and report nothing. This does not.
    """
    path = Path(path)
    with _open_container(path) as container:
        expected = len(_stamps_from_packets(container, path))
    with _open_container(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        decoded = sum(1 for _ in container.decode(stream))
    if decoded != expected:
        raise VideoError(f"{path}: {decoded} of {expected} frames can be decoded")
    return decoded
