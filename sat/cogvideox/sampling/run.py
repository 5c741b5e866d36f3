"""Make the videos of a list of requests: batches of one rank, progress, mp4 files with sidecars."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from cogvideox import environment
from cogvideox.config import Config
from cogvideox.data.transforms import crop, resize_to_cover
from cogvideox.sampling.prompts import Request
from cogvideox.sampling.video_io import to_uint8, write_video
from cogvideox.system import Conditions, VideoDiffusion

logger = logging.getLogger("cogvideox")


def sample_all(
    system: VideoDiffusion, requests: list[Request], output_dir: Path, *, rank: int = 0, world_size: int = 1
) -> list[Path]:
    """Sample this rank's share of ``requests`` and write ``{index:04d}-{slug}.mp4`` and ``.json`` for each.

    Returns the paths of the videos. A video and its sidecar appear together or not at all.
    """
    section = system.config.sample
    output_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(output_dir, os.W_OK):
        raise ValueError(f"--output-dir {output_dir} is not writable")
    batches = list(_batches(requests, section.batch_size))[rank::world_size]
    # All prompts first: a T5-XXL is as large as the network and is not needed after them.
    conditions = [
        encode(system, batch)
        for batch in tqdm(batches, desc="prompts", unit="batch", disable=rank != 0, dynamic_ncols=True)
    ]
    system.conditioner.release()
    written = []
    with tqdm(total=len(batches) * section.steps, unit="step", disable=rank != 0, dynamic_ncols=True) as bar:
        for batch, condition in zip(batches, conditions, strict=True):
            start = time.perf_counter()
            bar.set_description(f"video {batch[0].index + 1}/{len(requests)}")
            latents = denoise(system, batch, condition, callback=lambda state: bar.update())
            for row, request in enumerate(batch):
                path, _ = write_sample(system, latents[row : row + 1], request, output_dir, start)
                written.append(path)
    return written


def encode(system: VideoDiffusion, batch: list[Request]) -> Conditions:
    """What guidance steers towards and away from for these prompts and their images."""
    section = system.config.sample
    images = [read_image(r.image, section.height, section.width) for r in batch if r.image]
    return system.encode_prompts([r.prompt for r in batch], torch.stack(images) if images else None)


def denoise(
    system: VideoDiffusion,
    batch: list[Request],
    condition: Conditions,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """Scaled latents (B, T, C, h, w), float32, in the size and steps of the section ``sample``."""
    section = system.config.sample
    return system.sample_latents(
        condition,
        seeds=[r.seed for r in batch],
        num_frames=section.num_frames,
        height=section.height,
        width=section.width,
        steps=section.steps,
        callback=callback,
    )


def _batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """Runs of at most ``size`` requests that are alike in having an image or not."""
    batch: list[Request] = []
    for request in requests:
        if batch and (len(batch) == size or (batch[0].image is None) != (request.image is None)):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def read_image(path: Path, height: int, width: int) -> Tensor:
    """(3, height, width) uint8, resized to cover and cropped at the centre."""
    try:
        pixels = np.array(Image.open(path).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
    frame = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return crop(resize_to_cover(frame, (height, width)), (height, width))[0]


def write_sample(
    system: VideoDiffusion,
    latents: Tensor,
    request: Request,
    folder: Path,
    start: float,
    config: Config | None = None,
) -> tuple[Path, str]:
    """Decode latents (1, T, C, h, w) into ``NAME.mp4`` with its sidecar ``NAME.json``.

    start: ``time.perf_counter()`` at the beginning of the work.  config: what makes this video again, where it is not
    the system's own.  Returns the video's path and the SHA-256 of its uint8 pixels.
    """
    section = system.config.sample
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:60].strip("-")
    path = folder / f"{request.index:04d}-{slug}.mp4"
    digest = hashlib.sha256()
    write_video(path, hashed((chunk[0] for chunk in system.decode(latents)), digest), fps=section.fps)
    sidecar = {
        "prompt": request.prompt,
        "seed": request.seed,
        "image": str(request.image.resolve()) if request.image else None,
        "video": path.name,
        "num_frames": section.num_frames,
        "height": section.height,
        "width": section.width,
        "fps": section.fps,
        "steps": section.steps,
        "seconds": round(time.perf_counter() - start, 3),
        "device": str(system.device),
        "versions": environment.versions(),
        "config": dataclasses.asdict(config or system.config),
    }
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(sidecar, indent=1))
    temporary.replace(path.with_suffix(".json"))
    return path, digest.hexdigest()


def hashed(chunks: Iterable[Tensor], digest: Any) -> Iterator[Tensor]:
    """The chunks (f, 3, H, W) as uint8; ``digest`` (of hashlib) has seen all bytes of the video in the end."""
    for chunk in chunks:
        pixels = to_uint8(chunk).cpu().contiguous()
        digest.update(pixels.numpy().tobytes())
        yield pixels
