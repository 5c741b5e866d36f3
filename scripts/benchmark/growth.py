"""Time and memory against frames and pixels: measured here on small networks, and calculated for them and for the
published sizes on more GPUs (``scaling.py``). Every row says which.

    python -m scripts.benchmark growth

Calculated are, of the transformer, 24 S d^2 L operations of products and 4 S^2 d L of attention (S tokens, d wide, L
layers) at the rates of this machine's roofline; of the VAE, the straight line in pixels that fits its times best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from cogvideox.config import Config
from cogvideox.flops import clip_of, forward_flops
from cogvideox.planning.sampling import LIVE_TENSORS, LIVE_TENSORS_UNFUSED
from cogvideox.system import build_transformer, build_vae
from scripts.benchmark.full_size import load
from scripts.benchmark.memory import peaks_of
from scripts.benchmark.results import Row
from scripts.benchmark.roofline import fastest, rates
from scripts.benchmark.scaling import CALCULATED
from scripts.benchmark.scaling import rows as scaling_rows
from scripts.benchmark.settings import Settings
from scripts.benchmark.twins import randomise

MEASURED = "measured"
TRANSFORMER, VAE = "transformer", "VAE decode"


@dataclass(frozen=True)
class Point:
    """A clip through one of the two networks."""

    part: str
    frames: int
    height: int
    width: int

    @property
    def case(self) -> str:
        return f"{self.part}, {self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Networks:
    """What is measured on one kind of device.  transformer, vae: configuration overrides.  dtype: of both."""

    config: str
    transformer: tuple[str, ...]
    vae: tuple[str, ...]
    dtype: str
    points: tuple[Point, ...]

    def configuration(self, point: Point) -> Config:
        size = (f"num_frames={point.frames}", f"height={point.height}", f"width={point.width}")
        overrides = (*self.transformer, *self.vae, *(f"sample.{value}" for value in size))
        return load(self.config, overrides=overrides)


def sweeps(
    part: str, frames: tuple[int, ...], sizes: tuple[tuple[int, int], ...], middle: int
) -> tuple[Point, ...]:
    """``frames`` at the middle one of ``sizes`` (height, width), and all sizes at the middle number of frames."""
    along = [Point(part, count, *sizes[middle]) for count in frames]
    across = [Point(part, frames[len(frames) // 2], *size) for size in sizes]
    return tuple(dict.fromkeys((*along, *across)))


CPU = Networks(
    "cogvideox_5b",
    (
        "model.transformer.num_layers=2",
        "model.transformer.hidden_size=256",
        "model.transformer.num_attention_heads=4",
    ),
    ("vae.channels=16", "vae.norm_groups=16"),
    "float32",
    (
        *sweeps(
            TRANSFORMER, (1, 17, 33, 65, 97), ((64, 96), (96, 144), (128, 192), (192, 288), (224, 352)), 2
        ),
        *sweeps(VAE, (1, 5, 9, 17, 25), ((16, 32), (32, 48), (48, 64), (64, 96)), 1),
    ),
)
"""2 layers, 256 wide, so that attention overtakes the products inside the range (S = 6 d = 1536); a VAE 16 wide."""

GPU = Networks(
    "cogvideox_2b",
    (),
    (),
    "bfloat16",
    (
        *sweeps(TRANSFORMER, (1, 17, 49, 81, 97), ((240, 360), (480, 720), (720, 1280)), 1),
        *sweeps(VAE, (1, 17, 49, 81, 97), ((240, 360), (480, 720), (720, 1280)), 1),
    ),
)

QUICK = replace(
    CPU,
    points=(
        *sweeps(TRANSFORMER, (1, 5), ((16, 16), (32, 48)), 0),
        *sweeps(VAE, (1, 5), ((16, 16), (16, 32)), 0),
    ),
)


def networks(device: str, quick: bool) -> Networks:
    return QUICK if quick else GPU if device == "cuda" else CPU


def run(settings: Settings) -> list[Row]:
    used = networks(settings.device, settings.quick)
    rows = list(scaling_rows())
    points = used.points
    case = "scripts.benchmark.growth:memory_case"
    peaks = peaks_of(case, settings.device, settings.quick, device=settings.device)
    seconds = [fastest(work_of(used, point, settings.device), settings.device, 0.0) for point in points]
    for point, spent in zip(points, seconds, strict=True):
        memory = {"above": peaks[point.case].above}
        rows.append(Row("growth", point.case, MEASURED, spent, memory=memory, counted=numbers(used, point)))
    rows += transformer_lines(used, points, settings)
    rows += vae_lines(used, points, dict(zip(points, seconds, strict=True)))
    return rows


def numbers(used: Networks, point: Point) -> dict[str, float]:
    """Where a point stands."""
    found = {"frames": point.frames, "pixels": point.height * point.width}
    if point.part == TRANSFORMER:
        config = used.configuration(point)
        found["tokens"] = clip_of(config, config.sample).tokens
    return found


def transformer_lines(used: Networks, points: tuple[Point, ...], settings: Settings) -> Iterator[Row]:
    best, size = rates(settings.device, used.dtype), getattr(torch, used.dtype).itemsize
    for point in points:
        if point.part == TRANSFORMER:
            config = used.configuration(point)
            t, clip = config.model.transformer, clip_of(config, config.sample)
            flops = forward_flops(t, clip)
            weights = sum(p.numel() for p in build_transformer(config, device="meta").parameters())
            bound = best.bound_seconds(flops.matmul, flops.attention, weights * size)
            # A CPU has no product that ends in a GELU.
            tensors = LIVE_TENSORS if settings.is_cuda else LIVE_TENSORS_UNFUSED
            live = tensors * clip.tokens * t.hidden_size * size
            yield Row(
                "growth",
                point.case,
                CALCULATED,
                bound,
                memory={"above": round(live)},
                counted=numbers(used, point) | {"GFLOP": flops.forward / 1e9},
            )


def vae_lines(used: Networks, points: tuple[Point, ...], seconds: dict[Point, float]) -> Iterator[Row]:
    """Time alone: the memory of a decode is that of the convolutions' own copies on a CPU."""
    size = {point: point.frames * point.height * point.width for point in points if point.part == VAE}
    per_pixel = sum(seconds[p] * size[p] for p in size) / sum(count**2 for count in size.values())
    for point, count in size.items():
        yield Row("growth", point.case, CALCULATED, per_pixel * count, counted=numbers(used, point))


def memory_case(device: str, quick: bool) -> dict[str, Callable[[], None]]:
    used = networks(device, quick)
    return {point.case: work_of(used, point, device) for point in used.points}


def work_of(used: Networks, point: Point, device: str) -> Callable[[], None]:
    config, dtype = used.configuration(point), getattr(torch, used.dtype)
    clip, generator = clip_of(config, config.sample), torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    if point.part == VAE:
        vae = randomise(build_vae(config, device=device).to(dtype)).eval().requires_grad_(False)
        latents = randn(1, (point.frames + 3) // 4, config.vae.z_channels, clip.height, clip.width)

        def decode() -> None:
            for _ in vae.decode_stream(latents):
                pass

        return decode
    net = build_transformer(config, device=device, skip_init=True).to(dtype)
    net = randomise(net).eval().requires_grad_(False)
    t = config.model.transformer
    x = randn(1, clip.latents, t.in_channels, clip.height, clip.width)
    context, steps = randn(1, t.text_length, t.text_hidden_size), torch.full((1,), 500, device=device)

    def forward() -> None:
        net(x, steps, context)

    return forward
