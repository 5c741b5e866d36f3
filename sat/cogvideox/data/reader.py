"""Reading video files: frame times from the container, pixels by PyAV, or by decord where PyAV cannot.

Opening a file decodes nothing. The frame times come from the container, so that they are exact and so that a damaged
file is refused before training starts. PyAV then decodes what the wanted frames need, and hands them over one by one.
It comes first because it is exact: decord (0.6) gives wrong pictures without a word where it skips a group of pictures
that the next one refers to (open groups, which x265 makes by default). Where both are right they are equal to the
byte, and PyAV needs two thirds of the time.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

logger = logging.getLogger(__name__)

ORDER = ("pyav", "decord")
DECODERS = ("auto", *ORDER)
DECODE_RULES = {"auto": "by PyAV", "pyav": "by PyAV", "decord": "by decord"}
"""How each choice decodes, for digests of the result: it matters where decord is wrong."""


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
        logger.info("decord is not available (%s)", error)
        return None
    decord.logging.set_level(decord.logging.FATAL)
    return decord


@contextmanager
def _open_container(path: Path, probe: bool = True) -> Iterator:
    """A PyAV container with at least one video stream; FFmpeg's errors become ``VideoError``.

    probe: whether FFmpeg may decode the first pictures to find out what the headers do not say. It costs as much as
    decoding a key frame (47 ms at 720p), and an mp4 says everything: also how far pictures stand out of order.
    """
    av = _pyav()
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes)")
    try:
        # The option goes to the decoders that probe, not to the one that frames are read with.
        with av.open(str(path), options={} if probe else {"skip_frame": "all"}) as container:
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
        stamp = _stamp(packet)
        if stamp is not None and not packet.is_discard:  # discarded: cut off by an edit list, never shown
            stamps.append(stamp)
    if not stamps:
        raise VideoError(f"{path}: holds no frames")
    return np.sort(np.asarray(stamps, dtype=np.int64))


def _constant_rate_from_header(stream, path: Path) -> np.ndarray | None:
    """Seconds of each frame, from the sample table of an mp4 alone; None where there is none to be trusted.

    The rate is constant where the average rate equals the base rate, the finest rate that the time stamps show.
    """
    entries = stream.index_entries
    if not entries or len(entries) != stream.frames or not stream.average_rate:
        return None
    if "mp4" not in stream.container.format.name.split(
        ","
    ):  # AVI has a table too, but without the order of display
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
        with _open_container(self.path, probe=False) as container:
            stream = container.streams.video[0]
            timestamps = _constant_rate_from_header(stream, self.path)
            self._header_rate = float(stream.average_rate or 0)
            self._time_base, start = stream.time_base, stream.start_time or 0
            # AVI stores no time of display: pictures count as they leave the decoder.
            self._is_counted = container.format.name == "avi"
        self._header_is_enough = timestamps is not None
        if timestamps is None:
            with _open_container(self.path) as container:
                stamps = _stamps_from_packets(container, self.path)
            # Divided last, so that each time is the float nearest to the exact fraction.
            timestamps = (stamps - stamps[0]) * self._time_base.numerator / self._time_base.denominator
            self._stamps, self._stamp_error = stamps.astype(np.float64), 0.0
        else:
            self._stamps = start + timestamps / float(self._time_base)
            # Rounded to the time base by the one who wrote the file, in a way of his own.
            self._stamp_error = 0.25 / self._header_rate / float(self._time_base)
        self.timestamps: np.ndarray = timestamps
        self._decoders = ORDER if decoder == "auto" else (decoder,)
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
        pictures = dict(self.frames(indices))
        return np.stack([pictures[int(index)] for index in indices])

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(index, (H, W, 3) uint8 RGB) of each of the frames once, in ascending order; only one is in memory.

        Where one decoder fails on the way the other begins anew: then an index comes again, and the last one counts.
        """
        wanted = sorted({int(index) for index in indices})
        assert wanted and wanted[0] >= 0 and wanted[-1] < self.num_frames, (wanted, self.num_frames)
        by = {"pyav": self._by_pyav, "decord": self._by_decord}
        failures = []
        for decoder in self._decoders:
            self.decoder = decoder
            try:
                if failures:
                    logger.info("%s: decoded by %s, because %s", self.path, decoder, failures[-1])
                yield from by[decoder](wanted)
                return
            except VideoError as error:
                failures.append(f"{decoder}: {str(error).removeprefix(f'{self.path}: ')}")
        raise VideoError(f"{self.path}: {'; '.join(failures)}")

    def _by_decord(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        decord = _decord()
        if decord is None:
            raise VideoError("not installed")
        try:
            # One thread: parallelism comes from the loader's workers, and idle threads survive a fork badly.
            reader = decord.VideoReader(str(self.path), num_threads=1)
            if len(reader) != self.num_frames:
                raise VideoError(f"counts {len(reader)} frames instead of {self.num_frames}")
            for index in wanted:
                yield index, reader[index].asnumpy()
        except (RuntimeError, decord.DECORDError) as error:
            raise VideoError(str(error).splitlines()[0]) from error

    def _by_pyav(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        left = dict.fromkeys(wanted)
        # Again from the start, without any short cut, where the file's index of key frames is wrong.
        for short_cuts in (True, False):
            if left:
                yield from self._decode(left, short_cuts)
        if left:
            raise VideoError(f"frames {list(left)[:8]} of {self.num_frames} cannot be decoded")

    def _decode(self, left: dict[int, None], short_cuts: bool) -> Iterator[tuple[int, np.ndarray]]:
        """The frames of ``left``, which are taken out of it. Short cuts leave out what no wanted frame needs."""
        with _open_container(self.path, probe=not self._header_is_enough) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            context.thread_count = 1  # parallelism comes from the loader's workers
            short_cuts = short_cuts and not self._is_counted
            # In H.264 alone each picture says whether another one needs it; HEVC says it of a temporal layer.
            skips = short_cuts and context.name == "h264"
            keys = _KeyFrames(container, stream) if short_cuts else None
            target = next(iter(left))
            if keys and target > 0:
                keys.jump(self._stamps[target])
            reformatter = _pyav().video.reformatter.VideoReformatter()  # one: it keeps its tables
            numbers = itertools.count()
            for packet in container.demux(stream):
                if keys and not keys.starts(packet):
                    continue
                if skips:
                    is_wanted = self._index_at(_stamp(packet)) in left
                    context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
                for frame in packet.decode():
                    stamp = _stamp(frame)
                    index = next(numbers) if self._is_counted else self._index_at(stamp)
                    if index not in left or (keys and (frame.is_corrupt or not keys.is_whole(stamp))):
                        continue
                    if frame.is_corrupt:
                        raise VideoError(f"the picture at {float(frame.time):.3f} s is damaged")
                    del left[index]
                    yield index, _as_shown(frame, reformatter)
                if not left:
                    return
                if keys and next(iter(left)) != target:
                    target = next(iter(left))
                    keys.jump(self._stamps[target])

    def _index_at(self, stamp: int | None) -> int | None:
        """The frame that is shown at this time, in units of the time base; None where none is."""
        if stamp is None:
            return None
        index = int(np.searchsorted(self._stamps, stamp - self._stamp_error))
        found = index < self.num_frames and self._stamps[index] <= stamp + self._stamp_error
        return index if found else None


class _KeyFrames:
    """Moves an open container to the key frame before a wanted picture, where that lies ahead."""

    def __init__(self, container, stream):
        self.container, self.stream = container, stream
        self._position = -math.inf  # the latest time of a packet so far
        self._whole_from = -math.inf
        self._target: float | None = None  # of a jump whose first packet has yet to come

    def jump(self, stamp: float) -> None:
        """Go on at the last key frame before this time, if that has not been passed."""
        entries = self.stream.index_entries  # empty where the file has no table
        place = entries.search_timestamp(round(stamp)) if entries else -1
        is_ahead = place >= 0 and entries[place].timestamp > self._position
        if is_ahead or self._position == -math.inf:
            self._target = stamp
            self.container.seek(round(stamp), stream=self.stream, backward=True)

    def starts(self, packet) -> bool:
        """Note a packet. False where it must not be decoded, because the jump went too far.

        A key frame is found by the time of its decoding. It may be shown after the wanted picture, which then needs the
        group of pictures before (an open group).
        """
        stamp = _stamp(packet)
        if stamp is None:
            return True
        if self._target is not None:
            if stamp > self._target and packet.dts is not None:
                self._target = math.inf  # once only
                self.container.seek(packet.dts - 1, stream=self.stream, backward=True)
                return False
            self._target, self._whole_from = None, stamp
        self._position = max(self._position, stamp)
        return True

    def is_whole(self, stamp: int) -> bool:
        """False for pictures that are shown before the key frame of the last jump, and may lack their references."""
        return stamp >= self._whole_from


def _stamp(of) -> int | None:
    """The time of a packet or frame in units of the time base. AVI stores no pts."""
    return of.dts if of.pts is None else of.pts


def _as_shown(frame, reformatter) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as the file's display matrix says (decord does the same)."""
    picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    quarter_turns = round(frame.rotation / 90)  # counter-clockwise
    return np.ascontiguousarray(np.rot90(picture, quarter_turns))


def open_video(path: str | Path, decoder: str = "auto") -> VideoReader:
    """Open a video without decoding it.

    decoder: "auto" (PyAV, else decord), "decord" or "pyav".  Raises ``VideoError`` for a file that is missing, empty,
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
