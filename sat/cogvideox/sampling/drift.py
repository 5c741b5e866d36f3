"""How a video looks in three numbers, and how far they have moved from the base model's: a fine-tune that burns in.

Measured on the pixels (uint8) as they leave the decoder, frame by frame, with sums of whole numbers: the numbers depend
neither on how the stream is cut nor on the machine that adds them up.

saturation  Colourfulness of a frame, mean over frames: M = sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)
            with rg = R - G, yb = (R + G) / 2 - B, R, G, B in 0..1 (Hasler & Suesstrunk 2003, "Measuring colorfulness in
            natural images", the third measure). Grey is 0. The paper's scale is 255 times this: 0.06 is slightly, 0.18
            averagely, 0.32 highly colourful. HSV's (max - min) / max would count the noise of dark pixels as colour.
brightness  Mean luma of the gamma-encoded values, 0.2126 R + 0.7152 G + 0.0722 B (ITU-R BT.709-6, item 3.2), in 0..1.
motion      Mean absolute difference of neighbouring frames over pixels and channels, in 0..1 per frame. None for a
            video of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MEASURES = ("saturation", "brightness", "motion")
LUMA = (0.2126, 0.7152, 0.0722)

_FLOOR = 1 / 255
# One step of eight bits: what is below it in the base model is divided by it, so that a grey or a still video has a
# drift too.


class Appearance:
    """Takes a video in chunks (f, 3, H, W) uint8 and says how it looks."""

    def __init__(self) -> None:
        self._saturation: list[float] = []
        self._brightness: list[float] = []
        self._motion: list[float] = []
        self._before: Tensor | None = None

    def add(self, chunk: Tensor) -> None:
        for frame in chunk.cpu().to(torch.int32):
            count = frame[0].numel()
            self._saturation.append(_colourfulness(frame))
            sums = frame.sum(dim=(1, 2)).tolist()
            weighted = math.fsum(weight * total for weight, total in zip(LUMA, sums, strict=True))
            self._brightness.append(weighted / count / 255)
            if self._before is not None:
                self._motion.append((frame - self._before).abs().sum().item() / (3 * count) / 255)
            self._before = frame

    def result(self) -> dict[str, float | None]:
        """``MEASURES`` -> mean over the frames, rounded to 9 decimals; None where there was nothing to measure."""
        values = (self._saturation, self._brightness, self._motion)
        return {name: _mean(found) for name, found in zip(MEASURES, values, strict=True)}


def _colourfulness(frame: Tensor) -> float:
    """frame: (3, H, W) int32, 0..255. Whole numbers up to the square roots."""
    red, green, blue = frame
    rg, twice_yb = red - green, red + green - 2 * blue
    count = rg.numel()
    moments = []
    for values, unit in ((rg, 1), (twice_yb, 2)):
        total, squares = values.sum().item(), values.square().sum().item()
        variance = (count * squares - total * total) / (count * unit) ** 2
        moments.append((total / count / unit, variance))
    (mean_rg, var_rg), (mean_yb, var_yb) = moments
    return (math.sqrt(var_rg + var_yb) + 0.3 * math.hypot(mean_rg, mean_yb)) / 255


def _mean(values: Sequence[float]) -> float | None:
    return round(math.fsum(values) / len(values), 9) if values else None


def base_of(videos: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What has to be kept of the base model's previews: for each, what identifies it, and its looks."""
    return [
        {name: video[name] for name in ("prompt", "seed", "image", "appearance")}
        | {"shape": video["latents"]["shape"]}
        for video in videos
    ]


def metrics(
    videos: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]] | None
) -> dict[str, float]:
    """``preview/<measure>``, the mean over ``videos``, and ``preview/<measure>_drift``: (now - then) / then.

    ``then`` and ``now`` are means over the videos that ``base`` has too (same prompt, seed, image and size); 0 is
    unchanged, 1 twice as much. No drift where there is no such video. A ``then`` below 1/255 counts as 1/255.
    """
    known = {_identity(video, video["shape"]): video["appearance"] for video in base or ()}
    pairs = [
        (video["appearance"], known[identity])
        for video in videos
        if (identity := _identity(video, video["latents"]["shape"])) in known
    ]
    found = {}
    for name in MEASURES:
        value = _mean(_present(video["appearance"][name] for video in videos))
        if value is not None:
            found[f"preview/{name}"] = value
        now, then = (_mean(_present(pair[side][name] for pair in pairs)) for side in (0, 1))
        if now is not None and then is not None:
            found[f"preview/{name}_drift"] = (now - then) / max(then, _FLOOR)
    return found


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _identity(video: Mapping[str, Any], shape: Sequence[int]) -> tuple[Any, ...]:
    return video["prompt"], video["seed"], video["image"], tuple(shape)


def beyond(found: Mapping[str, float], limit: float) -> dict[str, float]:
    """Measure -> drift, of those that moved by more than ``limit`` either way."""
    drifts = {name: found.get(f"preview/{name}_drift") for name in MEASURES}
    return {name: value for name, value in drifts.items() if value is not None and abs(value) > limit}
