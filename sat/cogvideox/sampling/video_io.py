"""Writing videos (mp4 in H.264, gif, png frames) and contact sheets. A file appears only when it is complete.

The writers are context managers that give ``write(chunk)``, chunk (f, 3, H, W) uint8: several of them can be fed from
one decoder's stream, which is never held whole.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont
from torch import Tensor

from cogvideox.sampling.complete import complete_or_absent

logger = logging.getLogger(__name__)

# libx264 is in every PyAV wheel; builds without GPL code have one of the others. MPEG-4 is always there.
_ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "mpeg4")


Write = Callable[[Tensor], None]


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
    chunks = [video] if isinstance(video, Tensor | np.ndarray) else video
    with mp4_writer(path, fps, crf) as write:
        for chunk in chunks:
            write(to_uint8(torch.as_tensor(chunk)))


@contextmanager
def mp4_writer(path: str | Path, fps: float, crf: int = 17) -> Iterator[Write]:
    """Each chunk is encoded as it comes; see ``write_video``."""
    import av

    _check_rate(fps)
    path = Path(path)
    encoder = _choose_encoder()
    with (
        complete_or_absent(path) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(10_000))
        stream.pix_fmt = "yuv420p"
        # x264's macroblock tree gives other bytes from run to run for some sizes (48x64, 480x720: 1 in 5 files).
        stream.options = {"crf": str(crf), "mbtree": "0"} if encoder == "libx264" else {}
        size = None

        def write(chunk: Tensor) -> None:
            nonlocal size
            found = _check_chunk(chunk, size, even=True)
            if size is None:
                size = stream.height, stream.width = found
            for picture in _pictures(chunk):
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)

        yield write
        _check_not_empty(path, size)
        for packet in stream.encode():
            container.mux(packet)


@contextmanager
def gif_writer(path: str | Path, fps: float) -> Iterator[Write]:
    """An endless gif, 256 colours per frame. Pillow's own ``save_all`` holds every frame until the end; this does not.

    A gif counts hundredths of a second: frames last so many that the k-th begins at k / fps, rounded.
    """
    _check_rate(fps)
    path, size, count = Path(path), None, 0
    with complete_or_absent(path) as partial, open(partial, "wb") as file:

        def write(chunk: Tensor) -> None:
            nonlocal size, count
            size = _check_chunk(chunk, size)
            for picture in _pictures(chunk):
                colours = Image.fromarray(picture).quantize(256)
                # Dithered to its own colours: without it, skies and walls show bands.
                image = Image.fromarray(picture).quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
                if count == 0:
                    header, _ = GifImagePlugin.getheader(image.copy(), info={"loop": 0})
                    file.write(b"".join(header))
                hundredths = round((count + 1) * 100 / fps) - round(count * 100 / fps)
                data = GifImagePlugin.getdata(image, duration=hundredths * 10, include_color_table=True)
                file.write(b"".join(data))
                count += 1

        yield write
        _check_not_empty(path, size)
        file.write(b";")


@contextmanager
def frames_writer(folder: str | Path) -> Iterator[Write]:
    """``0000.png``, ``0001.png``, ... in ``folder``, which appears when all are there."""
    folder, size, count = Path(folder), None, 0
    with complete_or_absent(folder) as partial:
        partial.mkdir()

        def write(chunk: Tensor) -> None:
            nonlocal size, count
            size = _check_chunk(chunk, size)
            for picture in _pictures(chunk):
                Image.fromarray(picture).save(partial / f"{count:04d}.png")
                count += 1

        yield write
        _check_not_empty(folder, size)


@contextmanager
def sheet_writer(path: str | Path, label: str, cell_height: int = 120) -> Iterator[Write]:
    """A contact sheet of one video. Only small pictures of its frames are held."""
    small, size = [], None

    def write(chunk: Tensor) -> None:
        nonlocal size
        size = _check_chunk(chunk, size)
        for picture in _pictures(chunk):
            cell = _cell(Image.fromarray(picture), min(cell_height, size[0]))
            small.append(torch.from_numpy(np.array(cell)).permute(2, 0, 1))

    yield write
    _check_not_empty(path, size)
    write_contact_sheet(path, [(label, torch.stack(small))], cell_height=cell_height)


def join_sheets(path: str | Path, sheets: Sequence[Path]) -> None:
    """The contact sheets of several videos, one below the other, as one png."""
    images = [Image.open(sheet).convert("RGB") for sheet in sheets]
    joined = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        joined.paste(image, (0, top))
        top += image.height
    with complete_or_absent(Path(path)) as partial:
        joined.save(partial, format="PNG")


def _pictures(chunk: Tensor) -> np.ndarray:
    """(f, 3, H, W) uint8 -> (f, H, W, 3)."""
    return chunk.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _check_rate(fps: float) -> None:
    if not fps > 0:
        raise ValueError(f"fps={fps}: expected a number above 0")


def _check_not_empty(path: str | Path, size: tuple[int, int] | None) -> None:
    if size is None:
        raise ValueError(f"{path}: the video has no frames")


def _check_chunk(chunk: Tensor, size: tuple[int, int] | None, even: bool = False) -> tuple[int, int]:
    """(height, width) of a chunk of frames, after checks that name what is wrong."""
    if chunk.ndim != 4 or chunk.shape[1] != 3 or chunk.shape[0] == 0:
        raise ValueError(f"video of shape {tuple(chunk.shape)}: expected (frames, 3, height, width)")
    found = (chunk.shape[2], chunk.shape[3])
    if size is not None and found != size:
        raise ValueError(f"a chunk of {found[0]}x{found[1]} after chunks of {size[0]}x{size[1]}")
    if even and (found[0] % 2 or found[1] % 2):
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
    headings: Sequence[str] = (),
) -> None:
    """A png with a row per video: its label, then up to ``columns`` frames spread evenly from the first to the last.

    rows: (label, (F, 3, H, W) uint8 0..255 or float -1..1); sizes may differ between rows.
    Every frame is scaled to ``cell_height`` pixels, small ones by nearest neighbour so that their pixels can be seen.
    headings: above as many parts of equal width of the first row, which one frame parts from the next.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    gap = 4
    strips = [_strip(to_uint8(torch.as_tensor(video)), columns, cell_height, gap) for _, video in rows]
    width = label_width + max(strip.width for strip in strips) + gap
    heading_height = 22 if headings else 0
    sheet = Image.new("RGB", (width, heading_height + len(rows) * (cell_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    if headings:
        frame = round(cell_height * rows[0][1].shape[3] / rows[0][1].shape[2])
        part = (strips[0].width + frame + 2 * gap) / len(headings)
        for i, heading in enumerate(headings):
            draw.text((label_width + i * part, gap), heading, fill="black", font=font)
    characters = max(8, int(label_width / (draw.textlength("abcdefghij", font=font) / 10)) - 2)
    for i, ((label, _), strip) in enumerate(zip(rows, strips, strict=True)):
        top = heading_height + gap + i * (cell_height + gap)
        lines = textwrap.wrap(label, characters, max_lines=max(1, cell_height // 16), placeholder=" ...")
        draw.multiline_text((gap * 2, top + 2), "\n".join(lines), fill="black", font=font, spacing=3)
        sheet.paste(strip, (label_width, top))
    path = Path(path)
    with complete_or_absent(path) as partial:
        sheet.save(partial, format="PNG")


def _strip(video: Tensor, columns: int, cell_height: int, gap: int) -> Image.Image:
    """Frames of a uint8 (F, 3, H, W) side by side."""
    chosen = np.unique(np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int))
    cells = [_cell(Image.fromarray(picture), cell_height) for picture in _pictures(video[chosen])]
    width = sum(cell.width + gap for cell in cells) - gap
    strip = Image.new("RGB", (width, cell_height), "white")
    for column, cell in enumerate(cells):
        strip.paste(cell, (column * (cell.width + gap), 0))
    return strip


def _cell(picture: Image.Image, height: int) -> Image.Image:
    """``picture`` in a height; small ones by nearest neighbour, so that their pixels can be seen."""
    width = max(1, round(picture.width * height / picture.height))
    filter_ = Image.Resampling.NEAREST if picture.height < height else Image.Resampling.LANCZOS
    return picture.resize((width, height), filter_)
