"""Which videos a folder holds and where their captions are, in any of the layouts in use.

Recognised by themselves, in this order:

    metadata       metadata.csv, .json or .jsonl with a column for the file and one for the caption
    prompts        prompts.txt (or prompt.txt, captions.txt) and videos.txt, one line per clip
    labels         videos/NAME.mp4 and labels/NAME.txt, also deeper in the folder (SwissArmyTransformer's layout)
    same_stem      NAME.mp4 with NAME.txt beside it, at any depth

Two that fit at once are an error: they may disagree about the captions.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
VIDEO_COLUMNS = ("file_name", "file_path", "video", "video_path", "media_path", "path")
CAPTION_COLUMNS = ("caption", "text", "prompt")
_METADATA_FILES = ("metadata.csv", "metadata.json", "metadata.jsonl")
_PROMPT_FILES = ("prompts.txt", "prompt.txt", "captions.txt")


@dataclass(frozen=True)
class Clip:
    """One video file and its caption; None where the layout has none for it."""

    key: str
    path: Path
    caption: str | None


def videos_under(root: Path) -> list[Path]:
    """The video files of a folder at any depth, by name."""
    return sorted(
        p for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and not p.name.startswith(".")
    )


def _read_caption(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None


def label_path(video: Path, root: Path) -> Path | None:
    """``.../labels/x.txt`` of ``.../videos/x.mp4``; None for a video that is not in a folder ``videos``.

    Only the last folder of that name is exchanged, and only within root (root itself included): the published code
    replaces the word everywhere in the path, so that /mnt/videos/set/videos/x.mp4 loses its caption.
    """
    parts = list(video.with_suffix(".txt").parts)
    first = len(root.parts) - 1
    places = [i for i in range(first, len(parts) - 1) if parts[i] == "videos"]
    if not places:
        return None
    parts[places[-1]] = "labels"
    return Path(*parts)


def _clips_from_labels(root: Path) -> list[Clip] | None:
    pairs = [(video, label_path(video, root)) for video in videos_under(root)]
    if not any(label is not None and label.is_file() for _, label in pairs):
        return None
    # A video outside any `videos` folder has no place for a caption: it is listed as missing one.
    return [_clip(video, root, _read_caption(label) if label else None) for video, label in pairs]


def _clips_from_same_stem(root: Path) -> list[Clip] | None:
    videos = videos_under(root)
    if not any(video.with_suffix(".txt").is_file() for video in videos):
        return None
    return [_clip(video, root, _read_caption(video.with_suffix(".txt"))) for video in videos]


def _clips_from_prompts(root: Path) -> list[Clip] | None:
    prompt_files = [root / name for name in _PROMPT_FILES if (root / name).is_file()]
    if not prompt_files or not (root / "videos.txt").is_file():
        return None
    if len(prompt_files) > 1:
        raise ValueError(f"{root}: both {prompt_files[0].name} and {prompt_files[1].name} exist; remove one")
    prompts, videos = (
        path.read_text(encoding="utf-8").rstrip().splitlines()
        for path in (prompt_files[0], root / "videos.txt")
    )
    if len(prompts) != len(videos):
        raise ValueError(
            f"{root}: {prompt_files[0].name} has {len(prompts)} lines, videos.txt has {len(videos)}; line i of one "
            "belongs to line i of the other"
        )
    return [_clip(root / v.strip(), root, p.strip() or None) for p, v in zip(prompts, videos, strict=True)]


def _clips_from_metadata(
    root: Path, video_column: str | None, caption_column: str | None
) -> list[Clip] | None:
    files = [root] if root.is_file() else [root / name for name in _METADATA_FILES if (root / name).is_file()]
    if not files:
        return None
    if len(files) > 1:
        raise ValueError(
            f"{root}: both {files[0].name} and {files[1].name} exist; give the file itself as data.path"
        )
    file = files[0]
    rows = _read_rows(file)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    video_column = _column(file, columns, video_column, VIDEO_COLUMNS, "video_column")
    caption_column = _column(file, columns, caption_column, CAPTION_COLUMNS, "caption_column")
    clips = []
    for i, row in enumerate(rows):
        name, caption = row.get(video_column), row.get(caption_column)
        if not name:
            raise ValueError(f"{file}: row {i + 1} has no {video_column}")
        clips.append(
            _clip(file.parent / name, file.parent, str(caption).strip() or None if caption else None)
        )
    return clips


def _read_rows(file: Path) -> list[dict]:
    text = file.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    try:
        if file.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True)))
        rows = (
            json.loads(text)
            if file.suffix == ".json"
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except (json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not valid {file.suffix[1:]} ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: expected a list of objects, one per clip")
    return rows


def _column(file: Path, columns: list[str], chosen: str | None, known: Sequence[str], option: str) -> str:
    if chosen is not None:
        if chosen not in columns:
            raise ValueError(f"{file}: no column {chosen!r} ({option}); it has {', '.join(columns)}")
        return chosen
    found = [name for name in known if name in columns]
    if len(found) != 1:
        what = f"{' and '.join(found)} both" if found else f"none of {', '.join(known)}"
        raise ValueError(f"{file}: has {what} among its columns ({', '.join(columns)}); set {option}")
    return found[0]


def _clip(path: Path, root: Path, caption: str | None) -> Clip:
    key = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    return Clip(key, path, caption)


def find_clips(
    root: str | Path,
    layout: str | None = None,
    video_column: str | None = None,
    caption_column: str | None = None,
) -> tuple[str, list[Clip]]:
    """(layout, clips) of a folder, or of a metadata file given by its own path. Nothing is opened.

    layout: None recognises it; a name chooses where two fit.
    """
    root = Path(root)
    readers: dict[str, Callable[[], list[Clip] | None]] = {
        "metadata": lambda: _clips_from_metadata(root, video_column, caption_column),
        "prompts": lambda: _clips_from_prompts(root),
        "labels": lambda: _clips_from_labels(root),
        "same_stem": lambda: _clips_from_same_stem(root),
    }
    if layout is not None and layout not in readers:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(readers)}")
    if not root.exists():
        raise ValueError(f"data.path={root}: no such folder")
    if root.is_file():
        if root.suffix not in (".csv", ".json", ".jsonl"):
            raise ValueError(f"data.path={root}: expected a folder, or a metadata file (.csv, .json, .jsonl)")
        layout = "metadata"
    names = list(readers) if layout is None else [layout]
    found = {name: clips for name in names if (clips := readers[name]()) is not None}
    if len(found) > 1:
        raise ValueError(
            f"data.path={root}: fits the layouts {' and '.join(found)}, which may hold different captions; "
            f"choose one with layout, or remove the other's files"
        )
    if not found or not next(iter(found.values())):
        raise ValueError(_nothing_found(root, layout))
    return next(iter(found.items()))


def _nothing_found(root: Path, layout: str | None) -> str:
    videos = videos_under(root) if root.is_dir() else []
    contents = f"holds {len(videos)} videos but no captions for them" if videos else "holds no videos"
    return (
        f"data.path={root}: {contents}{'' if layout is None else f' in the layout {layout}'}. Looked for "
        f"{', '.join(_METADATA_FILES)}; {' or '.join(_PROMPT_FILES)} with videos.txt; videos/ with labels/; "
        f"NAME.txt beside NAME{{{','.join(VIDEO_SUFFIXES)}}}"
    )
