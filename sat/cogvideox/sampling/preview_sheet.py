"""``RUN/previews.png``: how the previews changed while the run trained. A row per prompt, a column per step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cogvideox.data.reader import open_video
from cogvideox.sampling import sidecar
from cogvideox.sampling.targets import in_order
from cogvideox.sampling.video_io import write_contact_sheet

COLUMNS, FRAMES = 5, 3
_CELL_HEIGHT = 72


def preview_steps(run_dir: Path, up_to: int | None = None) -> list[int]:
    """The steps that have previews, ascending. up_to: without those of later ones, which are an abandoned branch's."""
    folder = run_dir / "previews"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(name) for name in names if name.isdigit() and any((folder / name).glob("*.mp4")))
    return [step for step in steps if up_to is None or step <= up_to]


def spread(steps: list[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly, the first and the last among them."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def write_preview_sheet(run_dir: Path, up_to: int | None = None) -> Path | None:
    """Draw it from the videos in ``RUN/previews``; None where there are none.

    At most ``COLUMNS`` steps, the first and the last among them. What a step lacks stays white.
    Raises ValueError (``VideoError``) or OSError where a video cannot be read.
    """
    steps = spread(preview_steps(run_dir, up_to), COLUMNS)
    if not steps:
        return None
    folders = [run_dir / "previews" / str(step) for step in steps]
    names = in_order({path.stem: path for folder in folders for path in folder.glob("*.mp4")}.values())
    rows = []
    for name in (path.stem for path in names):
        strips = [_frames(folder / f"{name}.mp4") for folder in folders]
        shown = next(strip for strip in strips if strip is not None)
        blank = torch.full_like(shown, 255)
        cells = [part for strip in strips for part in (blank[:1], blank if strip is None else strip)]
        rows.append((_label(folders, name), torch.cat(cells[1:])))
    path = run_dir / "previews.png"
    headings = ["base model" if step == 0 else f"step {step}" for step in steps]
    write_contact_sheet(
        path, rows, columns=max(len(video) for _, video in rows), cell_height=_CELL_HEIGHT, headings=headings
    )
    return path


def _frames(path: Path) -> Tensor | None:
    """(FRAMES, 3, H, W) uint8 from the first to the last; a short video repeats some."""
    if not path.is_file():
        return None
    video = open_video(path)
    chosen = torch.linspace(0, video.num_frames - 1, FRAMES).round().int().tolist()
    return torch.from_numpy(video.get_frames(chosen)).permute(0, 3, 1, 2)


def _label(folders: list[Path], name: str) -> str:
    records = (sidecar.read_if_any(folder / f"{name}.json") for folder in folders)
    record = next((record for record in records if record is not None), None)
    return name if record is None else f"{record['prompt']} (seed {record['seed']})"
