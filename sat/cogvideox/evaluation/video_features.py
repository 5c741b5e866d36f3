"""Features of videos by a network from a TorchScript file, such as the published I3D of the Frechet video distance."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogvideox.data.frames import select_frames
from cogvideox.data.layouts import VIDEO_SUFFIXES, videos_under
from cogvideox.data.reader import open_video

LAYOUTS = {"NCTHW": (0, 2, 1, 3, 4), "NTCHW": (0, 1, 2, 3, 4), "NTHWC": (0, 1, 3, 4, 2)}


@dataclass(frozen=True)
class NetworkInput:
    """What a feature network is fed with. The defaults are those of the I3D that most papers use (400 features,
    StyleGAN-V's ``i3d_torchscript.pt``): it takes 16 frames of 224 x 224, channels before frames, in [-1, 1]."""

    frames: int | None = 16
    # The first so many of each video. None: all, which must be as many in each.
    fps: float | None = None
    # Frames are taken at this rate (``data.frames``), so that motion is compared at one speed. None: every frame.
    size: int | None = 224
    # Each frame is resized to size x size, without keeping its shape. None: as it is.
    low: float = -1.0
    high: float = 1.0
    # Black and white.
    layout: str = "NCTHW"
    arguments: dict[str, Any] = field(default_factory=dict)
    # Keyword arguments of the network's forward.

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r}: expected one of {', '.join(LAYOUTS)}")
        if (self.frames is not None and self.frames < 1) or (self.size is not None and self.size < 1):
            raise ValueError(f"frames={self.frames}, size={self.size}: expected at least 1")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps={self.fps:g}: expected a positive number")
        if not self.low < self.high:
            raise ValueError(
                f"range {self.low:g} to {self.high:g}: expected the value of black, then that of white"
            )

    def of(self, video: Tensor) -> Tensor:
        """video (F, 3, H, W) uint8 -> (1, ...) float32 in the layout."""
        x = video.float()
        if self.size is not None and tuple(x.shape[-2:]) != (self.size, self.size):
            # Bilinear without antialiasing, as the published pipelines feed their networks.
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return (self.low + x * ((self.high - self.low) / 255))[None].permute(LAYOUTS[self.layout])

    def __str__(self) -> str:
        frames = "all frames" if self.frames is None else f"{self.frames} frames"
        frames += "" if self.fps is None else f" at {self.fps:g} fps"
        size = "their own size" if self.size is None else f"{self.size} x {self.size}"
        return f"{frames}, {size}, values {self.low:g} to {self.high:g}, float32 {self.layout}"


class FeatureNetwork:
    """``network(video) -> (D,)``. Raises ValueError where the file or what it returns is not what it should be."""

    def __init__(self, path: str | Path, takes: NetworkInput, device: torch.device):
        self.path, self.takes, self.device = Path(path).expanduser(), takes, device
        if not self.path.is_file():
            raise ValueError(f"--network {path}: there is no such file")
        try:
            self.module = torch.jit.load(str(self.path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"--network {path} is not a TorchScript file, which torch.jit.save writes "
                f"({str(error).strip().splitlines()[0]}); weights alone do not say which network they belong to"
            ) from error

    @torch.no_grad()
    def __call__(self, video: Tensor) -> np.ndarray:
        """video: (F, 3, H, W) uint8.  Returns (D,) float64."""
        x = self.takes.of(video.to(self.device))
        try:
            features = self.module(x, **self.takes.arguments)
        except RuntimeError as error:
            raise ValueError(
                f"{self.path} does not take {tuple(x.shape)} ({self.takes}): {_last_line(error)}; see --layout, "
                f"--size, --frames and --arguments"
            ) from error
        if not isinstance(features, Tensor) or features.numel() < 2 or features.shape[:1] != (1,):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{self.path} returns {found} for one video: expected one vector, (1, features). Which output is meant "
                f"may be an argument of the network, such as --arguments '{{\"return_features\": true}}'"
            )
        if features.squeeze().ndim > 1:
            raise ValueError(
                f"{self.path} returns {tuple(features.shape)} for one video: expected one vector, (1, features)"
            )
        return features.flatten().double().cpu().numpy()

    @property
    def fingerprint(self) -> str:
        return (
            hashlib.sha256(self.path.read_bytes()).hexdigest() + str(self.takes) + str(self.takes.arguments)
        )


def videos_in(folder: str | Path) -> list[Path]:
    """The videos of a folder at any depth, by name. ValueError where it is none, or holds fewer than two."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of videos")
    found = videos_under(folder)
    if len(found) < 2:
        raise ValueError(
            f"{folder} holds {len(found)} videos ({', '.join(VIDEO_SUFFIXES)}): a distance needs at least 2, and "
            f"hundreds to mean something"
        )
    return found


def read_frames(path: Path, takes: NetworkInput) -> Tensor:
    """The first frames of a video that ``takes`` asks for, (F, 3, H, W) uint8. ValueError where it has fewer."""
    reader = open_video(path)
    indices = list(range(reader.num_frames))
    if takes.fps is not None:
        indices = select_frames(reader.timestamps, takes.fps, len(indices), frame_multiple=1).indices
    if takes.frames is not None and len(indices) < takes.frames:
        at = "" if takes.fps is None else f" at {takes.fps:g} fps"
        raise ValueError(
            f"{path} has {len(indices)} frames{at}, the network is fed with {takes.frames}: lower --frames, if the "
            f"network takes fewer, or leave the video out"
        )
    return torch.as_tensor(reader.get_frames(indices[: takes.frames])).permute(0, 3, 1, 2)


def frame_rates(videos: Sequence[Path]) -> list[float]:
    """Frames per second of each, from the headers."""
    return [open_video(path).average_fps for path in videos]


def features_of(
    videos: Sequence[Path],
    network: FeatureNetwork,
    *,
    cache: str | Path | None = None,
    advance: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """(videos, D) float64. cache: a folder that keeps them, by the contents of videos and network; None: none."""
    file = (
        None if cache is None else Path(cache).expanduser() / f"{_fingerprint(videos, network)}.safetensors"
    )
    known = None if file is None else _read(file)
    if known is not None and len(known) == len(videos):
        return known
    rows = []
    for path in videos:
        rows.append(network(read_frames(path, network.takes)))
        if rows[-1].shape != rows[0].shape:
            raise ValueError(
                f"{path} has {len(rows[-1])} features, {videos[0]} has {len(rows[0])}: the videos differ in length or "
                f"size, set --frames and --size"
            )
        advance()
    features = np.stack(rows)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        save_file({"features": torch.from_numpy(features)}, partial)
        os.replace(partial, file)
    return features


def _fingerprint(videos: Sequence[Path], network: FeatureNetwork) -> str:
    digest = hashlib.sha256(network.fingerprint.encode())
    for path in videos:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _read(file: Path) -> np.ndarray | None:
    try:
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor("features").numpy()
    except (FileNotFoundError, SafetensorError):
        return None


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
