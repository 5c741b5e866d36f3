"""Which frames of a given video are used, and whether a picture is one. Nothing is decoded, torch is not imported."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cogvideox.config import Config, ConfigError
from cogvideox.data.frames import largest_legal_count, select_frames
from cogvideox.data.reader import open_video

logger = logging.getLogger("cogvideox")


def first_frames(path: Path, config: Config) -> list[int]:
    """Indices of the first ``sample.num_frames`` frames at ``sample.fps``. ConfigError where there are fewer."""
    section, indices = config.sample, _all_frames(path, config)
    if len(indices) < section.num_frames:
        enough = largest_legal_count(len(indices), config.vae.temporal_compression)
        advice = f"use --frames {enough} or " if enough else ""
        raise ConfigError(
            f"{_too_short(path, len(indices), config, section.num_frames)}: {advice}a longer video"
        )
    return indices[: section.num_frames]


def last_frames(path: Path, config: Config, count: int) -> list[int]:
    """Indices of the last ``count`` frames at ``sample.fps``: what a continuation begins with."""
    indices = _all_frames(path, config)
    if len(indices) < count:
        raise ConfigError(
            f"{_too_short(path, len(indices), config, count)} to continue it: lower sample.overlap"
        )
    return indices[-count:]


def check_image(path: Path) -> None:
    """ConfigError for a file that is no picture. Reads its header."""
    try:
        with Image.open(path):
            pass
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"cannot read the image {path}: {error}") from error


def keep_indices(text: str, num_frames: int) -> list[int]:
    """The frames that ``sample.keep_frames`` names: "0-8,40-48" -> [0, ... 8, 40, ... 48], all below ``num_frames``."""
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise ConfigError(f"sample.keep_frames={text!r}: expected frames and ranges such as 0-8,40-48")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_frames:
            raise ConfigError(f"sample.keep_frames={text!r}: {part.strip()} is not within 0-{num_frames - 1}")
        chosen |= set(range(first, last + 1))
    return sorted(chosen)


def _all_frames(path: Path, config: Config) -> list[int]:
    video = open_video(path)
    selection = select_frames(video.timestamps, config.sample.fps, video.num_frames * 1000, frame_multiple=1)
    if selection.has_wrong_fps:
        logger.warning(
            "%s has %.3g frames per second, sample.fps=%g: frames repeat, the motion stutters",
            path, selection.fps, config.sample.fps,
        )  # fmt: skip
    return selection.indices


def _too_short(path: Path, found: int, config: Config, needed: int) -> str:
    return f"{path} has {found} frames at sample.fps={config.sample.fps:g}, {needed} are needed"
