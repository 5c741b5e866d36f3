"""How often a video shows what its prompt says: colour, shape and direction, measured on the pixels of the mp4 file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogvideox.data.moving_shapes import Combination, detect
from cogvideox.data.reader import open_video

ATTRIBUTES = Combination._fields

# What the demo aims for (a fraction of the videos); the other sets have no aim.
AIMS = {
    "seen": {"colour": 0.9, "shape": 0.7, "direction": 0.85},
    "held_out": {"colour": 0.75, "direction": 0.75},
}


@dataclass(frozen=True)
class Verdict:
    """One video against its prompt. ``found`` has the detector's "none" where it could not say."""

    video: Path
    wanted: Combination
    found: Combination

    @property
    def right(self) -> dict[str, bool]:
        return {name: getattr(self.wanted, name) == getattr(self.found, name) for name in ATTRIBUTES}

    @property
    def all_right(self) -> bool:
        return self.wanted == self.found


def read_clip(path: Path) -> Tensor:
    """The whole video, (F, 3, H, W) uint8."""
    reader = open_video(path)
    return torch.as_tensor(reader.get_frames(range(reader.num_frames))).permute(0, 3, 1, 2)


def judge(video: Path, wanted: Combination) -> Verdict:
    seen = detect(read_clip(video))
    return Verdict(video, wanted, Combination(seen.colour, seen.shape, seen.direction))


def score(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """``n`` and the fraction of right colours, shapes, directions, and videos where ``all`` three are right."""
    if not verdicts:
        raise ValueError("no videos to score")
    n = len(verdicts)
    fractions = {name: sum(v.right[name] for v in verdicts) / n for name in ATTRIBUTES}
    return {"n": n, **fractions, "all": sum(v.all_right for v in verdicts) / n}


def sampled_videos(folder: Path, wanted: Sequence[Combination]) -> list[Path]:
    """The videos that ``sample_video.py`` wrote for a prompt file with one caption of ``wanted`` per line.

    Raises ValueError where a video is missing or was made for another prompt.
    """
    videos = []
    for index, combination in enumerate(wanted):
        sidecars = list(folder.glob(f"{index:04d}-*.json"))
        if len(sidecars) != 1:
            raise ValueError(f"{folder}: {len(sidecars)} sampled videos for prompt {index}, expected 1")
        sidecar = json.loads(sidecars[0].read_text())
        if sidecar["prompt"] != combination.caption:
            raise ValueError(
                f"{sidecars[0]}: made for {sidecar['prompt']!r}, expected {combination.caption!r}"
            )
        videos.append(sidecars[0].with_suffix(".mp4"))
    return videos


def missed_aims(scores: dict[str, dict[str, float]]) -> list[str]:
    """A line for every aim that is not reached; empty where all are."""
    return [
        f"{name.replace('_', '-')} {attribute}: {scores[name][attribute]:.2f}, aim {aim:.2f}"
        for name, aims in AIMS.items()
        for attribute, aim in aims.items()
        if name in scores and scores[name][attribute] < aim
    ]
