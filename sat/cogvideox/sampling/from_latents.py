"""Decode latents that an earlier run wrote (``--output latents``): the VAE alone is loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cogvideox.config import Config, ConfigError, config_from_dict
from cogvideox.sampling import windows
from cogvideox.sampling.outputs import read_latents
from cogvideox.sampling.progress import Stages
from cogvideox.sampling.prompts import Request
from cogvideox.sampling.run import frames_of, keeping, write_sample
from cogvideox.sampling.targets import Target, checked_outputs
from cogvideox.sampling.ways_in import Sampled
from cogvideox.system import VideoDiffusion
from cogvideox.system_vae import FrozenVAE


class VAEDecoder:
    """The part of ``VideoDiffusion`` that turns latents into pixels, without its network and text encoder."""

    decode = VideoDiffusion.decode

    def __init__(self, config: Config, device: torch.device):
        if config.load.vae is None:
            raise ConfigError(
                "load.vae is not set: latents mean nothing to a VAE with random weights; load.vae=PATH"
            )
        self.config, self.device = config, device
        self.frozen_vae = FrozenVAE(config, is_late=False)
        self.frozen_vae.load()
        self.frozen_vae.place(device)


def decode_files(
    paths: Sequence[str | Path], overrides: Sequence[str], device: torch.device, *, is_shown: bool = True
) -> list[Target]:
    """Write what ``sample.outputs`` names (mp4 where that is latents only) for each file of latents, beside it.

    overrides: ``key.path=value`` over the configuration that stands in the file; with sample.output_dir among them, the
    videos go there. A sidecar of the same name then describes the video.
    """
    written: list[Target] = []
    shared: tuple[object, VAEDecoder] | None = None
    stages = Stages(device, len(paths), is_shown)
    is_placed = any(override.startswith("sample.output_dir=") for override in overrides)
    for path in map(Path, paths):
        start = time.perf_counter()
        segments, record = read_latents(path)
        config = config_from_dict(record["config"], list(overrides))
        request = Request.from_sidecar(record["sample"])
        kinds = [kind for kind in checked_outputs(config) if kind != "latents"] or ["mp4"]
        folder = Path(config.sample.output_dir).expanduser() if is_placed else path.parent
        target = Target(request, folder, path.stem, tuple(kinds), record["sample"].get("fingerprint"))
        key = (config.vae, config.load.vae)
        if shared is None or shared[0] != key:
            shared = (key, VAEDecoder(config, device))
        decoder = shared[1]
        decoder.config = config
        batch = [segment[None].to(device) for segment in segments]
        sampled = Sampled(batch, windows.plan(config, continued=request.continue_from is not None))
        name = f"decoding {len(written) + 1}/{len(paths)}"
        with keeping(written, paths, config), stages(name, frames_of(config, target), "frame") as advance:
            kept = {} if is_placed else {"latents": path.name}
            write_sample(decoder, sampled, 0, target, start, advance=advance, kept=kept)
        written.append(target)
    return written
