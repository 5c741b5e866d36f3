"""Make the videos of a list of requests: batches of one rank, progress, mp4 files with sidecars."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from cogvideox import environment
from cogvideox.data.transforms import crop, resize_to_cover
from cogvideox.sampling.prompts import Request
from cogvideox.sampling.video_io import write_video
from cogvideox.system import VideoDiffusion

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
    images = {r.image: read_image(r.image, section.height, section.width) for r in requests if r.image}
    batches = list(_batches(requests, section.batch_size))[rank::world_size]
    # All prompts first: a T5-XXL is as large as the network and is not needed after them.
    conditions = [
        system.encode_prompts(
            [r.prompt for r in batch],
            torch.stack([images[r.image] for r in batch]) if batch[0].image else None,
        )
        for batch in tqdm(batches, desc="prompts", unit="batch", disable=rank != 0, dynamic_ncols=True)
    ]
    system.conditioner.release()
    written = []
    with tqdm(total=len(batches) * section.steps, unit="step", disable=rank != 0, dynamic_ncols=True) as bar:
        for batch, condition in zip(batches, conditions, strict=True):
            start = time.perf_counter()
            bar.set_description(f"video {batch[0].index + 1}/{len(requests)}")
            latents = system.sample_latents(
                condition,
                seeds=[r.seed for r in batch],
                num_frames=section.num_frames,
                height=section.height,
                width=section.width,
                steps=section.steps,
                callback=lambda state: bar.update(),
            )
            for row, request in enumerate(batch):
                written.append(_write(system, latents[row : row + 1], request, output_dir, start))
    return written


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


def _write(system: VideoDiffusion, latents: Tensor, request: Request, folder: Path, start: float) -> Path:
    section = system.config.sample
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:60].strip("-")
    path = folder / f"{request.index:04d}-{slug}.mp4"
    chunks = (chunk[0] for chunk in system.decode(latents))
    write_video(path, chunks, fps=section.fps)
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
        "config": dataclasses.asdict(system.config),
    }
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(sidecar, indent=1))
    temporary.replace(path.with_suffix(".json"))
    return path
