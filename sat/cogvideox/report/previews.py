"""The previews on a page: the sheet over training time, and the videos themselves, as many as a page may hold."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from cogvideox.page import Html, data_url, note, picture, section
from cogvideox.report.run_folder import RunFolder
from cogvideox.sampling import sidecar
from cogvideox.sampling.preview_sheet import preview_steps, spread
from cogvideox.sampling.targets import in_order

MAX_STEPS, MAX_MIB = 5, 12
# Of all videos of a page together. In the page they take a third more.


def preview_section(run: RunFolder) -> str:
    """HTML; empty where the run has none."""
    steps = preview_steps(run.path)
    if not steps:
        return ""
    parts: list[object] = []
    sheet = run.path / "previews.png"
    if sheet.is_file():
        caption = "Frames of each prompt, from the base model (left) to the newest step (right)."
        parts.append(
            Html(f"<figure>{picture(sheet, caption, 'sheet')}<figcaption>{caption}</figcaption></figure>")
        )
    chosen = fitting(run.path, steps)
    if len(chosen) < len(steps):
        which = f" ({', '.join(map(str, chosen))})" if chosen else ""
        parts.append(
            note(
                f"Videos of {len(chosen)} of {len(steps)} steps{which}: the others are left out for the size of this "
                f"page, and are in previews/ of the run folder."
            )
        )
    return section(
        "Previews", *parts, *(_prompt(run, name, chosen) for name in video_names(run.path, chosen))
    )


def fitting(run_dir: Path, steps: list[int]) -> list[int]:
    """Steps whose videos fit: the first, some, and the last; the last alone, or none, where they are large."""
    for count in range(min(MAX_STEPS, len(steps)), 0, -1):
        chosen = spread(steps, count) if count > 1 else steps[-1:]
        if sum(_size(run_dir / "previews" / str(step)) for step in chosen) <= MAX_MIB * 2**20:
            return chosen
    return []


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.mp4"))


def video_names(run_dir: Path, steps: Sequence[int]) -> list[str]:
    folders = [run_dir / "previews" / str(step) for step in steps]
    found = {path.stem: path for folder in folders for path in folder.glob("*.mp4")}
    return [path.stem for path in in_order(found.values())]


def _prompt(run: RunFolder, name: str, steps: Sequence[int]) -> Html:
    folders = {step: run.path / "previews" / str(step) for step in steps}
    figures = "".join(
        video_figure(folder / f"{name}.mp4", "base model" if step == 0 else f"step {step}")
        for step, folder in folders.items()
    )
    title = escape(title_of(folders[steps[-1]] / f"{name}.json", name))
    return Html(f'<article class="prompt"><h3>{title}</h3><div class="videos">{figures}</div></article>')


def video_figure(path: Path, caption: str) -> str:
    """A video that plays by itself, with what it shows; empty where there is none."""
    if not path.is_file():
        return ""
    record = sidecar.read_if_any(path.with_suffix(".json")) or {}
    kind = "small" if (record.get("height") or 999) <= 128 else ""
    return (
        f'<figure><video class="{kind}" src="{data_url(path)}" autoplay loop muted playsinline></video>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def title_of(path: Path, name: str) -> str:
    """The prompt and the seed of a sidecar, or the name where there is none."""
    record = sidecar.read_if_any(path)
    return name if record is None else f"{record['prompt']} (seed {record['seed']})"
