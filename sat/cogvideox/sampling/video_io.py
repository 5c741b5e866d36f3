"""Writing videos (mp4, H.264) and contact sheets (png). A file appears under its name only when it is complete."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

logger = logging.getLogger(__name__)

# libx264 is in every PyAV wheel; builds without GPL code have one of the others. MPEG-4 is always there.
_ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "mpeg4")


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` (same suffix), renamed to it at the end, removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_uint8(video: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, rounded and clamped; uint8 as it is. Any shape.

    ValueError where a pixel is not finite: a black video would hide it.
    """
    if video.dtype == torch.uint8:
        return video
    if not video.is_floating_point():
        raise ValueError(f"video of type {video.dtype}: expected uint8 (0..255) or float (-1..1)")
    if not bool(torch.isfinite(video).all()):
        raise ValueError("the video has pixels that are NaN or infinite")
    return ((video.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _choose_encoder() -> str:
    import av

    encoder = next(name for name in _ENCODERS if _can_encode(av, name))
    if encoder != _ENCODERS[0]:
        logger.warning("this PyAV has no %s: videos are written by %s", _ENCODERS[0], encoder)
    return encoder


def _can_encode(av, name: str) -> bool:
    try:
        return bool(av.Codec(name, "w"))
    except ValueError:  # av's UnknownCodecError
        return False


def write_video(
    path: str | Path, video: Tensor | np.ndarray | Iterable[Tensor], fps: float, crf: int = 17
) -> None:
    """Write an mp4 that every player shows (H.264, yuv420p, index in front).

    video: (F, 3, H, W), uint8 0..255 or float -1..1, or an iterator of such chunks along F, which are encoded as they
    come (a decoder's stream is never held whole). H and W must be even, as yuv420p halves the colour planes.
    crf: 0 is the best, 51 the worst.
    Errors leave no file, and an older file of that name as it was.
    """
    import av

    if not fps > 0:
        raise ValueError(f"fps={fps}: expected a number above 0")
    path = Path(path)
    chunks = [video] if isinstance(video, Tensor | np.ndarray) else video
    encoder = _choose_encoder()
    with (
        _complete_or_absent(path) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(10_000))
        stream.pix_fmt = "yuv420p"
        # x264's macroblock tree gives other bytes from run to run for some sizes (48x64, 480x720: 1 in 5 files).
        stream.options = {"crf": str(crf), "mbtree": "0"} if encoder == "libx264" else {}
        size = None
        for chunk in chunks:
            chunk = to_uint8(torch.as_tensor(chunk))
            found = _check_chunk(chunk, size)
            if size is None:
                size = stream.height, stream.width = found
            for picture in chunk.permute(0, 2, 3, 1).contiguous().cpu().numpy():
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
        if size is None:
            raise ValueError(f"{path}: the video has no frames")
        for packet in stream.encode():
            container.mux(packet)


def _check_chunk(chunk: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of a chunk of frames, after checks that name what is wrong."""
    if chunk.ndim != 4 or chunk.shape[1] != 3 or chunk.shape[0] == 0:
        raise ValueError(f"video of shape {tuple(chunk.shape)}: expected (frames, 3, height, width)")
    found = (chunk.shape[2], chunk.shape[3])
    if size is not None and found != size:
        raise ValueError(f"a chunk of {found[0]}x{found[1]} after chunks of {size[0]}x{size[1]}")
    if found[0] % 2 or found[1] % 2:
        raise ValueError(
            f"video of {found[0]}x{found[1]} (height x width): H.264 in yuv420p needs even numbers"
        )
    return found


def write_contact_sheet(
    path: str | Path,
    rows: Sequence[tuple[str, Tensor | np.ndarray]],
    columns: int = 9,
    cell_height: int = 80,
    label_width: int = 220,
) -> None:
    """A png with a row per video: its label, then up to ``columns`` frames spread evenly from the first to the last.

    rows: (label, (F, 3, H, W) uint8 0..255 or float -1..1); sizes may differ between rows.
    Every frame is scaled to ``cell_height`` pixels, small ones by nearest neighbour so that their pixels can be seen.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    gap = 4
    strips = [_strip(to_uint8(torch.as_tensor(video)), columns, cell_height, gap) for _, video in rows]
    width = label_width + max(strip.width for strip in strips) + gap
    sheet = Image.new("RGB", (width, len(rows) * (cell_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    characters = max(8, int(label_width / (draw.textlength("abcdefghij", font=font) / 10)) - 2)
    for i, ((label, _), strip) in enumerate(zip(rows, strips, strict=True)):
        top = gap + i * (cell_height + gap)
        lines = textwrap.wrap(label, characters, max_lines=max(1, cell_height // 16), placeholder=" ...")
        draw.multiline_text((gap * 2, top + 2), "\n".join(lines), fill="black", font=font, spacing=3)
        sheet.paste(strip, (label_width, top))
    path = Path(path)
    with _complete_or_absent(path) as partial:
        sheet.save(partial, format="PNG")


def _strip(video: Tensor, columns: int, cell_height: int, gap: int) -> Image.Image:
    """Frames of a uint8 (F, 3, H, W) side by side."""
    chosen = np.unique(np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int))
    height, width = video.shape[-2:]
    cell_width = max(1, round(width * cell_height / height))
    strip = Image.new("RGB", (len(chosen) * (cell_width + gap) - gap, cell_height), "white")
    filter_ = Image.Resampling.NEAREST if height < cell_height else Image.Resampling.LANCZOS
    for column, index in enumerate(chosen):
        picture = Image.fromarray(video[index].permute(1, 2, 0).contiguous().cpu().numpy())
        strip.paste(picture.resize((cell_width, cell_height), filter_), (column * (cell_width + gap), 0))
    return strip
