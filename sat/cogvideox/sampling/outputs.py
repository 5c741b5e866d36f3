"""The files of one video, written from one stream of pixels while it is decoded: all of them appear, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogvideox.sampling.complete import complete_or_absent
from cogvideox.sampling.targets import OUTPUTS, Target, in_order
from cogvideox.sampling.video_io import (
    frames_writer,
    gif_writer,
    join_sheets,
    mp4_writer,
    sheet_writer,
    to_uint8,
)
from cogvideox.weights import provenance


def write_pixels(
    target: Target,
    chunks: Iterable[Tensor],
    fps: float,
    observe: Callable[[Tensor], None] = lambda pixels: None,
) -> str:
    """Write the mp4, gif, frames and contact sheet that ``target`` asks for.

    chunks: (f, 3, H, W), uint8 or float -1..1, of which one is held at a time. Returns the SHA-256 of all uint8 pixels.
    observe: called with each chunk as uint8.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(_writer(target, kind, fps)) for kind in target.outputs if kind != "latents"
        ]
        for chunk in chunks:
            pixels = to_uint8(chunk).cpu().contiguous()
            digest.update(pixels.numpy().tobytes())
            for take in (*writers, observe):
                take(pixels)
    return digest.hexdigest()


def _writer(target: Target, kind: str, fps: float) -> Any:
    path = target.path(kind)
    if kind == "mp4":
        return mp4_writer(path, fps)
    if kind == "gif":
        return gif_writer(path, fps)
    if kind == "frames":
        return frames_writer(path)
    return sheet_writer(path, f"{target.request.prompt} (seed {target.request.seed})")


def write_latents(path: Path, segments: Sequence[Tensor], record: dict[str, Any]) -> None:
    """Scaled latents (T, C, h, w), float32, as ``latents``, or ``latents.0``, ``latents.1``, ... where a video has
    several segments; ``record`` goes into their provenance."""
    names = ["latents"] if len(segments) == 1 else [f"latents.{i}" for i in range(len(segments))]
    tensors = {name: s.float().cpu().contiguous() for name, s in zip(names, segments, strict=True)}
    with complete_or_absent(path) as partial:
        save_file(tensors, partial, metadata=provenance.stamp(**record))


def read_latents(path: Path) -> tuple[list[Tensor], dict[str, Any]]:
    """(segments (T, C, h, w), the record) of ``write_latents``. ValueError for another file."""
    try:
        with safe_open(path, "pt") as file:
            record = provenance.read(file.metadata() or {})
            if not record.keys() >= {"sample", "config"}:
                raise ValueError(f"--from-latents {path}: these are not latents that sample_video.py wrote")
            names = sorted(file.keys(), key=lambda name: int(name.partition(".")[2] or 0))
            return [file.get_tensor(name) for name in names], record
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--from-latents {path}: cannot be read ({error})") from error


def join_contact_sheets(folder: Path) -> Path:
    """``sheet.png`` of a folder: the contact sheets of all its videos, by name. Returns its path."""
    path = folder / "sheet.png"
    join_sheets(path, in_order(folder.glob(f"*{OUTPUTS['sheet']}")))
    return path
