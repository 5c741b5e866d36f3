"""The ways into a video: text, an image, a video, the end of a video, and DDIM inversion, for a batch of requests.

``prepare`` reads prompts and pictures (the text encoder may go afterwards), ``denoise`` makes latents and ``Sampled``
decodes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogvideox.config import Config
from cogvideox.sampling import windows
from cogvideox.sampling.clips import keep_indices
from cogvideox.sampling.inputs import last_of, read_clip, read_image, read_tail, tail_latents
from cogvideox.sampling.prompts import Request, takes_image
from cogvideox.system import Conditions, VideoDiffusion
from cogvideox.system_sampling import DEFAULT_STRENGTH, Start, kept_latents

Callback = Callable[[dict[str, Any]], None]

_NEXT_WINDOW = 1_000_003
# Added to a seed for each further window, so that no two windows start from one noise: a prime above any number of
# videos in a run. (A shift by 2^32 would do nothing: torch's CPU generator takes the low 32 bits.)


@dataclass(frozen=True)
class Prepared:
    """conditions: of the prompts and first frames.  source: those of the videos to invert, where they have prompts."""

    conditions: Conditions
    source: Conditions | None = None


def num_frames(config: Config, continued: bool = False) -> int:
    """Pixel frames of each result. continued: it goes on from a file."""
    return windows.plan(config, continued).total


def total_steps(config: Config, batch: list[Request]) -> int:
    """Calls of ``denoise``'s callback for a batch: the steps of all windows, and those of the inversion."""
    section = config.sample
    if section.invert:
        return 2 * section.steps
    if batch[0].video and not (section.strength is None and section.keep_frames):
        return round(_strength(config) * section.steps)
    return windows.plan(config, batch[0].continue_from is not None).windows * section.steps


def _strength(config: Config) -> float:
    return DEFAULT_STRENGTH if config.sample.strength is None else config.sample.strength


def prepare(system: VideoDiffusion, batch: list[Request]) -> Prepared:
    """Everything that needs the text encoder. The requests agree in ``Request.way``."""
    images = _first_frames(system, batch)
    conditions = system.encode_prompts([r.prompt for r in batch], images)
    if not system.config.sample.invert or batch[0].source_prompt is None:
        return Prepared(conditions)
    return Prepared(conditions, system.encode_prompts([r.source_prompt for r in batch], images))


def _first_frames(system: VideoDiffusion, batch: list[Request]) -> Tensor | None:
    """(B, 3, H, W) for a model with an image condition."""
    config = system.config
    if not takes_image(config):
        return None
    if batch[0].image:
        size = config.sample.height, config.sample.width
        return torch.stack([read_image(r.image, *size) for r in batch])
    if batch[0].video:
        return torch.stack([read_clip(r.video, config)[0] for r in batch])
    shared = windows.plan(config, continued=True).shared
    return torch.stack([read_tail(system, r.continue_from, shared)[0] for r in batch])


def denoise(
    system: VideoDiffusion, batch: list[Request], prepared: Prepared, callback: Callback | None = None
) -> Sampled:
    """The latents of a batch, in the size and steps of the section ``sample``."""
    section, seeds = system.config.sample, [r.seed for r in batch]
    if section.invert:
        latents = system.encode_pixels(_clips(system, batch))
        run = {"steps": section.steps, "seeds": seeds, "callback": callback}
        edited = system.edit_latents(prepared.conditions, latents, source=prepared.source, **run)
        return Sampled([edited], windows.plan(system.config))
    if batch[0].continue_from or section.total_frames is not None:
        return _in_windows(system, batch, prepared, callback)
    start = keep = None
    if batch[0].video:
        latents = system.encode_pixels(_clips(system, batch))
        if section.keep_frames:
            frames = keep_indices(section.keep_frames, section.num_frames)
            keep = latents, kept_latents(frames, section.num_frames, system.vae.temporal_compression)
        if not (section.strength is None and keep):
            start = Start(latents, _strength(system.config))
    elif batch[0].last_image:
        keep = _kept_ends(system, batch)
    latents = _window(system, prepared.conditions, seeds, callback, start=start, keep=keep)
    return Sampled([latents], windows.plan(system.config))


def _window(
    system: VideoDiffusion, conditions: Conditions, seeds: list[int], callback: Callback | None, **ways: Any
) -> Tensor:
    section = system.config.sample
    return system.sample_latents(
        conditions,
        seeds=seeds,
        num_frames=section.num_frames,
        height=section.height,
        width=section.width,
        steps=section.steps,
        callback=callback,
        **ways,
    )


def _clips(system: VideoDiffusion, batch: list[Request]) -> Tensor:
    """(B, F, 3, H, W) uint8."""
    return torch.stack([read_clip(r.video, system.config) for r in batch])


def _kept_ends(system: VideoDiffusion, batch: list[Request]) -> tuple[Tensor, Tensor]:
    """(known, mask) that keep the last image, and the first one where the model has no condition for it."""
    section, ratio = system.config.sample, system.vae.temporal_compression
    size, count = (section.height, section.width), system.vae.num_latents(section.num_frames)
    # A last latent holds four frames and is encoded after others: that of a clip in which the picture stands still.
    still = torch.stack([read_image(r.last_image, *size) for r in batch])[:, None]
    last = system.encode_pixels(still.expand(-1, 2 * ratio + 1, -1, -1, -1))[:, -1:]
    known = torch.zeros(len(batch), count, *last.shape[2:], device=last.device)
    mask = torch.zeros(1, count, 1, 1, 1)
    known[:, -1:], mask[:, -1] = last, 1
    if batch[0].image and not takes_image(system.config):
        first = torch.stack([read_image(r.image, *size) for r in batch])[:, None]
        known[:, :1], mask[:, 0] = system.encode_pixels(first), 1
    return known, mask


def _in_windows(
    system: VideoDiffusion, batch: list[Request], prepared: Prepared, callback: Callback | None
) -> Sampled:
    continued = batch[0].continue_from is not None
    plan = windows.plan(system.config, continued)
    segments: list[Tensor] = []
    tail = None  # (B, shared, 3, H, W), the frames that the next window begins with
    if continued:
        tail = torch.stack([read_tail(system, r.continue_from, plan.shared) for r in batch])
    before = None if tail is None else tail[:, -1]
    for index in range(plan.windows):
        conditions, keep = prepared.conditions, None
        if index or continued:
            keep = _taken_over(system, plan, segments, tail, batch)
            if index and takes_image(system.config):
                conditions = system.with_images(conditions, tail[:, 0])
        seeds = [r.seed + index * _NEXT_WINDOW for r in batch]
        segments.append(_window(system, conditions, seeds, callback, keep=keep))
        if plan.by != "latents" and index + 1 < plan.windows:
            tail = last_of(system.decode(segments[-1]), plan.shared)
    if plan.by == "latents":
        segments = [torch.cat([segments[0], *(s[:, plan.kept :] for s in segments[1:])], dim=1)]
    return Sampled(segments, plan, before)


def _taken_over(
    system: VideoDiffusion,
    plan: windows.Plan,
    segments: list[Tensor],
    tail: Tensor | None,
    batch: list[Request],
) -> tuple[Tensor, Tensor] | None:
    """(known, mask) for ``keep``: the first ``plan.kept`` latents of a window. None by image."""
    if plan.by == "image":
        return None
    if plan.by == "latents" and segments:
        known = segments[-1][:, -plan.kept :]
    elif plan.by == "latents" and batch[0].continue_from.suffix == ".safetensors":
        known = torch.stack([tail_latents(system, r.continue_from, plan.kept) for r in batch])
    else:
        known = system.encode_pixels(tail)
    rest = system.vae.num_latents(plan.window) - plan.kept
    mask = torch.zeros(1, plan.kept + rest, 1, 1, 1)
    mask[:, : plan.kept] = 1
    return torch.cat([known, known.new_zeros(len(known), rest, *known.shape[2:])], dim=1), mask


class Sampled:
    """Latents of a batch, and the pixels of its items.

    segments: scaled latents, each (B, T, C, h, w), float32; one, unless windows are joined as pixels.
    before: (B, 3, H, W) in [-1, 1], the frames that the videos go on from, for the seam at their start.
    """

    def __init__(self, segments: list[Tensor], plan: windows.Plan, before: Tensor | None = None):
        self.segments, self.plan, self.before = segments, plan, before
        self._meters: dict[int, windows.SeamMeter] = {}

    def pixels(self, system: VideoDiffusion, row: int) -> Iterator[Tensor]:
        """Chunks (f, 3, H, W) in [-1, 1] of item ``row``, as they are decoded: overlaps dropped, cut to the length."""
        before = None if self.before is None else self.before[row]
        self._meters[row] = meter = windows.SeamMeter(self.plan.seams, before)
        rows = (segment[row : row + 1] for segment in self.segments)
        decoded = ((chunk[0] for chunk in system.decode(segment)) for segment in rows)
        return meter.watch(windows.joined(decoded, self.plan))

    def seams(self, row: int) -> dict[str, Any] | None:
        """How visible the seams are (``windows.SeamMeter.report``), once all of ``pixels(row)`` is consumed."""
        meter = self._meters.get(row)
        return None if meter is None else meter.report()
