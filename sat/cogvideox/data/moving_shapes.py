"""The demo's data: clips of one flat shape that moves over a dark background, with captions, and a detector for them.

Everything that a caption says ("a red circle moving right") can be measured on the pixels again, so that the demo can
score how well sampled videos follow their prompts. The detector knows the drawing rules and no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FPS = 8

COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 90, 240), "yellow": (235, 215, 40)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y points down

# Never in the base set: what a LoRA learns.
NEW_COLOURS = {"purple": (170, 50, 230)}
NEW_SHAPES = ("star",)

_ALL_COLOURS = COLOURS | NEW_COLOURS
_ALL_SHAPES = SHAPES + NEW_SHAPES


class Combination(NamedTuple):
    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"

    @classmethod
    def of_caption(cls, caption: str) -> Combination:
        """The combination whose caption it is. ValueError for any other text."""
        for words in product(_ALL_COLOURS, _ALL_SHAPES, DIRECTIONS):
            if cls(*words).caption == caption.strip():
                return cls(*words)
        raise ValueError(
            f"{caption!r} is no caption of the demo's clips, such as {cls('red', 'circle', 'left').caption!r}"
        )


def combinations() -> tuple[list[Combination], list[Combination]]:
    """(trained, held out): 36 and 12 of the 48 combinations of the base colours, shapes and directions.

    Each pair of attributes (a colour with a shape, a shape with a direction, ...) is trained on; a held-out combination
    is new only as a whole. That is a Latin square: colour number = (shape number + direction number) mod 4.
    """
    trained, held_out = [], []
    for (c, colour), (s, shape), (d, direction) in product(
        enumerate(COLOURS), enumerate(SHAPES), enumerate(DIRECTIONS)
    ):
        (held_out if c == (s + d) % 4 else trained).append(Combination(colour, shape, direction))
    return trained, held_out


# --- drawing ---------------------------------------------------------------------------------------------------------


def _polygon(shape: str) -> np.ndarray:
    """Corners (n, 2) as x, y around the centroid, counted so that all shapes look about equally large."""
    if shape == "square":
        return 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
    if shape == "triangle":
        angles = np.deg2rad([-90, 30, 150])
        return 1.35 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "star":
        angles = np.deg2rad(-90 + 36 * np.arange(10))
        radii = np.where(np.arange(10) % 2 == 0, 1.35, 0.55)
        return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    raise ValueError(f"shape {shape!r}: expected one of {', '.join(_ALL_SHAPES)}")


def _coverage(shape: str, radius: float, x: float, y: float, size: int, supersample: int = 4) -> np.ndarray:
    """(size, size) share of each pixel that the shape covers, 0..1: antialiased by supersampling."""
    axis = (np.arange(size * supersample) + 0.5) / supersample
    px, py = (axis[None, :] - x) / radius, (axis[:, None] - y) / radius
    if shape == "circle":
        inside = px**2 + py**2 <= 1
    else:  # a point is inside a polygon where a ray to the right crosses its edges an odd number of times
        inside = np.zeros((len(axis), len(axis)), dtype=bool)
        corners = _polygon(shape)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            if y0 != y1:
                crosses = (py > y0) != (py > y1)
                inside ^= crosses & (px < x0 + (py - y0) * (x1 - x0) / (y1 - y0))
    return inside.reshape(size, supersample, size, supersample).mean(axis=(1, 3))


def draw_clip(
    colour: str, shape: str, direction: str, num_frames: int, size: int, generator: torch.Generator
) -> Tensor:
    """(num_frames, 3, size, size) uint8: a flat shape that moves steadily in one direction and stays in the picture.

    Radius, place, distance and the dark background vary with the generator. The distance is 26 to 32 % of the width.
    """

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    radius = size * between(0.2, 0.225)
    distance = size * between(0.26, 0.32)
    step = np.array(DIRECTIONS[direction], dtype=float)
    reach = 1.35 * radius + 1  # the furthest corner, and a pixel of background around it
    along = np.abs(step)  # which axis moves
    low = reach + along * distance / 2
    if low.max() > size / 2:
        raise ValueError(f"size={size}: too small for the shapes to move in; at least 32 is needed")
    middle = np.array([between(a, size - a) for a in low])

    background = _background(size, between)
    rgb = np.array(_ALL_COLOURS[colour], dtype=float) * between(0.9, 1.0)
    frames = []
    for progress in np.linspace(-0.5, 0.5, num_frames):
        x, y = middle + step * distance * progress
        alpha = _coverage(shape, radius, x, y, size)[..., None]
        frames.append(background * (1 - alpha) + rgb * alpha)
    return (
        torch.from_numpy(np.stack(frames).round().clip(0, 255).astype(np.uint8))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def _background(size: int, between: Callable[[float, float], float]) -> np.ndarray:
    """(size, size, 1) dark grey with a faint gradient."""
    level, slope, angle = between(15, 45), between(0, 15), between(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, size)
    return (level + slope * (math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]))[..., None]


def make_dataset(
    folder: str | Path,
    combos: Sequence[Combination],
    clips_per_combo: int,
    seed: int,
    *,
    write_video: Callable[..., None],
    num_frames: int = 9,
    size: int = 32,
    crf: int = 8,
    held_out: Sequence[Combination] = (),
) -> list[Path]:
    """Write ``folder/videos/*.mp4``, ``folder/labels/*.txt`` and ``folder/manifest.json``; returns the videos' paths.

    write_video: ``sampling.video_io.write_video`` or another function (path, video, fps, crf=...); an argument, because
    data stands below sampling. crf 8: at 32x32 the default 17 visibly blurs edges, and files are some kB either way.
    Clip i of a combination depends on (seed, combination, i) alone. held_out is only noted in the manifest.
    """
    folder = Path(folder)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    paths = []
    for combo, i in product(combos, range(clips_per_combo)):
        name = f"{'_'.join(combo)}_{i:03d}"
        clip = draw_clip(*combo, num_frames, size, _generator_for(seed, combo, i))
        paths.append(folder / "videos" / f"{name}.mp4")
        write_video(paths[-1], clip, FPS, crf=crf)
        (folder / "labels" / f"{name}.txt").write_text(combo.caption + "\n")
    manifest = {
        "seed": seed,
        "num_frames": num_frames,
        "size": size,
        "fps": FPS,
        "clips_per_combination": clips_per_combo,
        "combinations": [c._asdict() for c in combos],
        "held_out": [c._asdict() for c in held_out],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return paths


def _generator_for(seed: int, combo: Combination, i: int) -> torch.Generator:
    entropy = [seed, i, *"-".join(combo).encode()]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


# --- detection -------------------------------------------------------------------------------------------------------

NONE = "none"

_MIN_CHROMA = 0.2  # of 1: strongest colour in the picture; the background is grey
_MAX_HUE_ERROR = 35  # degrees; the palette's nearest hues are 50 degrees apart
_AREA = (0.02, 0.3)  # of the picture; drawn shapes cover 0.08 to 0.17
_MAX_STRAY = 0.2  # of the figure's pixels may lie apart from it
_MIN_OVERLAP = 0.6  # soft IoU with the best template; two different shapes of one area overlap by 0.6 to 0.85
_BLURS = (0, 0.03, 0.06)  # of the width: none, one and two pixels at 32
_MIN_DISTANCE = 0.1  # of the width, over the whole clip; drawn shapes move 0.26 to 0.32
_MIN_STRAIGHTNESS = 2.0  # movement along the main axis against the other


@dataclass(frozen=True)
class Detection:
    """What a clip shows; "none" where it cannot be said. ``overlap``: soft IoU of the shape with its template, 0..1."""

    colour: str = NONE
    shape: str = NONE
    direction: str = NONE
    overlap: float = 0.0


@dataclass(frozen=True)
class _Figure:
    """The foreground of one frame."""

    alpha: np.ndarray  # (H, W), 0..1: how much of each pixel is foreground
    rgb: np.ndarray  # (3,), 0..1: its colour
    x: float
    y: float


def detect(video: Tensor | np.ndarray) -> Detection:
    """Measure colour, shape and direction of a clip.

    video: (F, 3, H, W), uint8 0..255 or float -1..1, square or not.

    Colour: the hue of the foreground, nearest in the palette. Direction: the line through the foreground's centroid
    over time. Shape: the template of the same area and centroid that overlaps the foreground best, over all frames.
    A clip in which fewer than two thirds of the frames have one compact coloured figure shows nothing.
    """
    video = torch.as_tensor(video)
    pixels = video.float() / 255 if video.dtype == torch.uint8 else (video.float().clamp(-1, 1) + 1) / 2
    frames = pixels.permute(0, 2, 3, 1).cpu().double().numpy()
    figures = {i: figure for i, frame in enumerate(frames) if (figure := _find_figure(frame)) is not None}
    if len(figures) < max(1, math.ceil(2 / 3 * len(frames))):
        return Detection()
    shape, overlap = _detect_shape(list(figures.values()))
    if overlap < _MIN_OVERLAP:  # coloured, but no figure: noise, a smear, several pieces
        return Detection(overlap=overlap)
    colour = _detect_colour(np.mean([f.rgb for f in figures.values()], axis=0))
    return Detection(colour, shape, _detect_direction(figures, frames.shape[1:3]), overlap)


def _find_figure(frame: np.ndarray) -> _Figure | None:
    """Separate a coloured figure from a grey background; None where there is none of a plausible size."""
    chroma = frame.max(axis=2) - frame.min(axis=2)
    strongest = np.quantile(chroma, 1 - _AREA[0] / 2)
    is_grey = chroma < 0.3 * strongest
    if strongest < _MIN_CHROMA or not is_grey.any():
        return None
    background = np.median(frame[is_grey], axis=0)
    rgb = np.median(frame[chroma >= 0.8 * strongest], axis=0)
    # Position of each pixel on the line from the background's colour to the figure's.
    line = rgb - background
    alpha = ((frame - background) @ line / (line @ line)).clip(0, 1)
    alpha[alpha < 0.15] = 0  # the background's gradient and compression noise

    rows, columns = np.indices(alpha.shape) + 0.5
    core = alpha > 0.5
    if not _AREA[0] <= core.mean() <= _AREA[1]:
        return None
    reach = 2 * math.sqrt(core.sum() / math.pi) + 1  # a star's tips lie at 1.6 radii of the disc of its area
    near = np.hypot(rows - np.median(rows[core]), columns - np.median(columns[core])) <= reach
    if (core & ~near).sum() > _MAX_STRAY * core.sum():  # more than one figure, or none
        return None
    alpha[~near] = 0
    area = alpha.sum()
    return _Figure(alpha, rgb, float((alpha * columns).sum() / area), float((alpha * rows).sum() / area))


def _detect_colour(rgb: np.ndarray) -> str:
    hue = _hue(rgb)
    errors = {
        name: abs((hue - _hue(np.array(value)) + 180) % 360 - 180) for name, value in _ALL_COLOURS.items()
    }
    best = min(errors, key=errors.get)
    return best if errors[best] <= _MAX_HUE_ERROR else NONE


def _hue(rgb: np.ndarray) -> float:
    """Degrees: 0 red, 120 green, 240 blue."""
    r, g, b = (float(v) for v in rgb)
    return math.degrees(math.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360


def _detect_direction(figures: dict[int, _Figure], size: tuple[int, int]) -> str:
    """From the least-squares line through the centroids; "none" for a still, a diagonal or a jumping figure."""
    times = np.array(list(figures), dtype=float)
    if len(times) < 2:
        return NONE
    span = times[-1] - times[0]
    centres = np.array([(f.x / size[1], f.y / size[0]) for f in figures.values()])
    moved = np.polyfit(times, centres, 1)[0] * span  # (x, y) in widths and heights
    main = int(np.abs(moved).argmax())
    if abs(moved[main]) < max(_MIN_DISTANCE, _MIN_STRAIGHTNESS * abs(moved[1 - main])):
        return NONE
    step = tuple(int(math.copysign(1, moved[main])) if axis == main else 0 for axis in (0, 1))
    return next(name for name, value in DIRECTIONS.items() if value == step)


def _detect_shape(figures: list[_Figure]) -> tuple[str, float]:
    """The best template and its mean soft IoU with the figures.

    Templates come sharp and blurred, so that a soft edge (a codec, an autoencoder) does not round a square off.
    """
    smooth = [
        _gaussian_matrix(blur * max(figures[0].alpha.shape), max(figures[0].alpha.shape)) for blur in _BLURS
    ]
    mean_overlaps = {
        shape: np.mean([_overlaps(f, shape, smooth) for f in figures], axis=0) for shape in _ALL_SHAPES
    }
    best = max(mean_overlaps, key=lambda shape: mean_overlaps[shape].max())
    return best, float(mean_overlaps[best].max())


def _overlaps(figure: _Figure, shape: str, smooth: list[np.ndarray]) -> list[float]:
    """Soft IoU, sum of minima over sum of maxima, with a template of the figure's area and centroid, per blur."""
    height, width = figure.alpha.shape
    radius = math.sqrt(figure.alpha.sum() / _unit_area(shape))
    sharp = _coverage(shape, radius, figure.x, figure.y, max(height, width), supersample=3)
    overlaps = []
    for matrix in smooth:
        template = (matrix @ sharp @ matrix.T)[:height, :width]
        overlaps.append(np.minimum(figure.alpha, template).sum() / np.maximum(figure.alpha, template).sum())
    return overlaps


def _gaussian_matrix(sigma: float, size: int) -> np.ndarray:
    """(size, size): blur of a row by a Gaussian of ``sigma`` pixels, zeros outside; the identity for sigma = 0."""
    if sigma == 0:
        return np.eye(size)
    distance = np.subtract.outer(np.arange(size), np.arange(size))
    return np.exp(-0.5 * (distance / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def _unit_area(shape: str) -> float:
    """Area at radius 1: pi, or the shoelace formula."""
    if shape == "circle":
        return math.pi
    x, y = _polygon(shape).T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))
