"""Which frames of a video make a training clip: by time, so that the wanted frame rate is the one that the model gets.

The rule: walk through the usable part of the video in steps of 1/fps seconds, take the frame nearest to each step, as
many as fit up to the maximum, rounded down to a count that the VAE accepts. Nothing is padded. (The published code uses
an integer stride, which delivers 10 fps where 8 are asked of a 30 fps file, and pads with copies of the last frame.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FPS_TOLERANCE = 0.05
"""A clip whose real frame rate is further than this from the wanted one (relative) is flagged."""

FRAME_RULE = "nearest in time, from the start"
"""What ``select_frames`` does, for digests of its results: another rule needs another text."""

_ROUNDING = 1e-6
# In frames. Times are floats; without it 7.4999999 instead of a tie at 7.5 would choose the other neighbour.

_JITTER = 0.05
# In frame periods. Containers round time stamps (Matroska: to 1 ms); a rate that varies less than this is constant.


@dataclass(frozen=True)
class FrameSelection:
    """``indices`` into the video, never decreasing; ``fps``: distinct frames per second that the model really sees."""

    indices: list[int]
    fps: float
    wanted_fps: float

    @property
    def has_wrong_fps(self) -> bool:
        """The clip is slower than asked (frames repeat) or its frames are unevenly spread: off by more than 5 %."""
        return len(self.indices) > 1 and abs(self.fps / self.wanted_fps - 1) > FPS_TOLERANCE


def largest_legal_count(num_frames: int, frame_multiple: int = 4) -> int:
    """The largest ``frame_multiple * k + 1`` that is <= num_frames; 0 for none.

    4k+1 is what the VAE needs (each latent frame after the first holds four); CogVideoX 1.5, whose transformer joins
    pairs of latents, was trained on 16k+1 (81, 161).
    """
    return 0 if num_frames < 1 else (num_frames - 1) // frame_multiple * frame_multiple + 1


def check_frame_count(num_frames: int, frame_multiple: int = 4, key: str = "num_frames") -> None:
    """ValueError that names the nearest legal counts, unless num_frames = frame_multiple * k + 1."""
    below = largest_legal_count(num_frames, frame_multiple)
    if num_frames < 1 or below != num_frames:
        choices = f"{below} or {below + frame_multiple}" if below else "1"
        raise ValueError(
            f"{key}={num_frames}: the model needs {frame_multiple}k+1 frames; the nearest legal numbers: {choices}"
        )


def select_frames(
    timestamps: np.ndarray, fps: float, max_frames: int, skip: int = 0, frame_multiple: int = 4
) -> FrameSelection:
    """Choose frames of a video at ``fps`` frames per second.

    timestamps: (n,) seconds, ascending.  skip: frames of the video left out at the start and at the end.
    Returns at most max_frames indices, always frame_multiple * k + 1 of them, or none where nothing is left.

    Ties (a step exactly between two frames): the later frame at a constant rate; at a varying rate the float rounding
    decides, and either is equally right. A video slower than ``fps`` repeats frames; see ``has_wrong_fps``.
    """
    usable = np.asarray(timestamps, dtype=np.float64)[skip : len(timestamps) - skip]
    if fps <= 0 or skip < 0:
        raise ValueError(f"fps={fps}, skip={skip}: expected fps > 0 and skip >= 0")
    if len(usable) == 0:
        return FrameSelection([], 0.0, fps)

    span = float(usable[-1] - usable[0])  # seconds
    fit = int(np.floor(span * fps + _ROUNDING)) + 1
    count = largest_legal_count(min(fit, max_frames), frame_multiple)
    steps = np.arange(count)
    period = span / (len(usable) - 1) if span > 0 else 1.0  # seconds per source frame
    regular = usable[0] + np.arange(len(usable)) * period
    if np.abs(usable - regular).max() < _JITTER * period:
        stride = 1 / (period * fps)  # source frames per wanted frame
        indices = np.floor(steps * stride + 0.5 + _ROUNDING).astype(int)
    else:
        indices = np.abs(usable[None, :] - (usable[0] + steps / fps)[:, None]).argmin(axis=1)

    chosen = [skip + int(i) for i in indices]
    duration = float(usable[indices[-1]] - usable[indices[0]])
    real_fps = (len(set(chosen)) - 1) / duration if duration > 0 else 0.0
    return FrameSelection(chosen, real_fps, fps)
