"""Pictures, clips and latents that videos are made from: resized to cover the model's size, cropped at the centre."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cogvideox.config import Config
from cogvideox.data.reader import open_video
from cogvideox.data.transforms import crop, resize_to_cover
from cogvideox.sampling.clips import first_frames, last_frames
from cogvideox.system import VideoDiffusion


def read_image(path: Path, height: int, width: int) -> Tensor:
    """(3, height, width) uint8."""
    try:
        pixels = np.array(Image.open(path).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
    return _fit(pixels[None], height, width)[0]


def read_clip(path: Path, config: Config) -> Tensor:
    """The first ``sample.num_frames`` frames at ``sample.fps``: (F, 3, height, width) uint8."""
    return _read(path, first_frames(path, config), config)


def read_tail(system: VideoDiffusion, path: Path, count: int) -> Tensor:
    """The last ``count`` frames of a video or of latents: (count, 3, height, width), float32 in [-1, 1]."""
    if path.suffix != ".safetensors":
        frames = _read(path, last_frames(path, system.config, count), system.config)
        return (frames.float() / 127.5 - 1).to(system.device)
    latents = _read_latents(system, path)[None]
    frames = last_of((chunk for chunk in system.decode(latents)), count)[0]
    if len(frames) < count:
        raise ValueError(f"{path} holds {len(frames)} frames, {count} are needed to continue it")
    return frames


def tail_latents(system: VideoDiffusion, path: Path, count: int) -> Tensor:
    """The last ``count`` latent frames of a file: (count, C, h, w), scaled, float32."""
    latents = _read_latents(system, path)
    if len(latents) < count:
        raise ValueError(f"{path} holds {len(latents)} latent frames, sample.overlap={count} are needed")
    return latents[-count:]


def last_of(chunks, count: int) -> Tensor:
    """The last ``count`` frames of chunks (B, f, ...) along dimension 1, without holding the whole video."""
    tail = None
    for chunk in chunks:
        tail = (chunk if tail is None else torch.cat([tail, chunk], dim=1))[:, -count:]
    return tail


def _fit(frames: np.ndarray, height: int, width: int) -> Tensor:
    """(F, h, w, 3) uint8 -> (F, 3, height, width) uint8."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return crop(resize_to_cover(video, (height, width)), (height, width))


def _read(path: Path, indices: list[int], config: Config) -> Tensor:
    section, frames = config.sample, open_video(path).get_frames(indices)
    return _fit(frames, section.height, section.width)


def _read_latents(system: VideoDiffusion, path: Path) -> Tensor:
    """(T, C, h, w) of the entry ``latents``, or of the last of ``latents.0``, ``latents.1`` ..."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if re.fullmatch(r"latents(\.\d+)?", name)]
            name = max(names, key=lambda name: int(name.partition(".")[2] or 0), default=None)
            latents = None if name is None else file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    section, side = system.config.sample, system.vae.spatial_compression
    expected = (system.vae.z_channels, section.height // side, section.width // side)
    if latents is not None and latents.ndim == 5 and len(latents) == 1:
        latents = latents[0]
    if latents is None or latents.ndim != 4 or tuple(latents.shape[1:]) != expected:
        found = "no entry latents" if latents is None else f"latents {tuple(latents.shape)}"
        shape = ", ".join(map(str, expected))
        raise ValueError(f"{path} holds {found}: expected (T, {shape}), as this model samples them")
    return latents.to(system.device).float()
