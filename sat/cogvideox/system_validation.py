"""What ``VideoDiffusion.losses_at`` does: the loss of one clip at given timesteps, all draws from one generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogvideox.diffusion.loss import losses_by_item
from cogvideox.diffusion.noise import training_noise

System = Any
"""A VideoDiffusion, which imports this file."""


@torch.no_grad()
def losses_at(
    system: System, batch: dict[str, Any], t: Tensor, generator: torch.Generator, at_once: int = 1
) -> Tensor:
    """The loss of one clip (a batch of one, as in ``forward``) at each of the timesteps t (K,) int64: (K,) float32.

    generator: of all its draws; one on the CPU gives the same numbers on every device.
    at_once: timesteps in one forward pass, which changes no draw; the clip is encoded once.
    """
    x0 = system.encode_batch(batch, generator)  # (1, T, C, h, w)
    assert len(x0) == 1, f"losses_at takes one clip, got {len(x0)}"
    # As in sampling: no caption is dropped, and the first frame of image-to-video is clean.
    condition = system.conditioner(
        batch, None, system.encode_pixels, device=x0.device, num_latent_frames=x0.shape[1]
    )
    # One draw per timestep, before any forward pass: they do not depend on at_once.
    noises = torch.cat([training_noise(x0, generator, system.config.model.offset_noise) for _ in t])
    losses = []
    for timesteps, noise in zip(t.to(x0.device).split(at_once), noises.split(at_once), strict=True):
        size = len(timesteps)
        clips = x0.expand(size, *x0.shape[1:])
        conditions = {name: value.expand(size, *value.shape[1:]) for name, value in condition.items()}
        prediction, target = system.denoised(clips, conditions, timesteps, noise)
        losses.append(losses_by_item(system.loss, prediction, target, timesteps, system.schedule))
    return torch.cat(losses)
