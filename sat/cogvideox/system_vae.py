"""The frozen VAE of a system: there from the start, or, where latents are cached, only while it is used."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox.config import Config, ConfigError
from cogvideox.vae.autoencoder import CausalVAE
from cogvideox.vae.training import pixels_to_float
from cogvideox.weights import load
from cogvideox.weights.files.locate import locate
from cogvideox.weights.fill import LoadReport

logger = logging.getLogger("cogvideox")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_vae(config: Config, *, device: torch.device | str | None = None) -> CausalVAE:
    """The VAE of the section ``vae`` with random weights. Its latents are unscaled: see ``vae.scale_factor``."""
    if config.vae is None:
        raise ConfigError("vae is missing: add a model file such as configs/cogvideox_2b.yaml")
    arguments = {f.name: getattr(config.vae, f.name) for f in dataclasses.fields(config.vae)}
    del arguments["scale_factor"], arguments["precision"]
    with torch.device(device or "cpu"):
        return CausalVAE(**arguments)


class FrozenVAE:
    """The VAE of a configuration, outside of any module tree.

    is_late: it stands on the meta device, where it has its sizes and no weights, and gets those of ``load.vae`` for the
    time of each ``in_use``. So it is in training with a latent cache, but for image conditions, which encode a frame
    in every step, and without ``load.vae``, as random weights cannot be made twice.
    """

    def __init__(self, config: Config, *, is_late: bool | None = None):
        self.config = config
        self.is_late = _is_late(config) if is_late is None else is_late
        device = "meta" if self.is_late else None
        self.module = build_vae(config, device=device).requires_grad_(False).eval()
        self._device, self._is_used = torch.device("cpu"), False

    def load(self) -> list[LoadReport]:
        """Fill it from ``load.vae``, where that is set; of a late one the file's header is compared now."""
        section = self.config.load
        if section.vae is None:
            return []
        if self.is_late:
            info = load.check_vae(self.module, section.vae, ema=section.ema)
            logger.info("load.vae: %s is read when a video is encoded or decoded", info.path)
            return []
        return [load.load_vae(self.module, section.vae, ema=section.ema)]

    def stay(self) -> None:
        """Late no more: sampling needs it in every video."""
        if self.is_late:
            self.is_late = False
            self.module.to_empty(device="cpu")
            load.load_vae(self.module, self.config.load.vae, ema=self.config.load.ema)

    def place(self, device: torch.device) -> None:
        """On ``device`` in ``vae.precision``; a late one goes there when it is used."""
        self._device = device
        if not self.is_late:
            self.module.to(device, DTYPES[self.config.vae.precision])

    @contextmanager
    def in_use(self) -> Iterator[CausalVAE]:
        """The VAE with its weights. A late one is read now and freed at the end."""
        if not self.is_late or self._is_used:
            yield self.module
            return
        section = self.config.load
        self.module.to(DTYPES[self.config.vae.precision]).to_empty(device=self._device)
        try:
            load.load_vae(self.module, section.vae, ema=section.ema)
            self._is_used = True
            yield self.module
        finally:
            self._is_used = False
            self.module.to("meta")

    @torch.no_grad()
    def moments(self, video: Tensor) -> Tensor:
        """video (B, F, 3, H, W), uint8 or in [-1, 1], where the VAE is placed -> moments (B, T, 2C, h, w), unscaled, in
        ``vae.precision``."""
        pixels = pixels_to_float(video)
        with self.in_use() as vae:
            return vae.encode(pixels.to(DTYPES[self.config.vae.precision]))


def vae_files(config: Config) -> list[Path]:
    """The files of ``load.vae``, averaged weights included where they are taken."""
    source = locate(config.load.vae, "vae")
    return [*source.files, *(source.ema_files if config.load.ema else ())]


def vae_identity(config: Config, weights: str) -> dict[str, Any]:
    """All that decides the moments of a clip: a digest of the weights, the VAE's sizes, cuts and precision.

    Not in it: ``vae.scale_factor``, which acts behind the cache, and ``vae.slice_batch``, which changes no number.
    """
    settings = dataclasses.asdict(config.vae)
    del settings["scale_factor"], settings["slice_batch"]
    return {"weights": weights, **settings}


def _is_late(config: Config) -> bool:
    is_cached = config.train is not None and config.data is not None and config.data.latent_cache is not None
    return is_cached and config.load.vae is not None and not config.model.has_image_condition
