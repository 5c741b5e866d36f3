"""The noise that a clip is diffused with in training."""

from __future__ import annotations

import torch
from torch import Tensor


def training_noise(x0: Tensor, generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """Standard normal noise for latents x0 (B, T, C, h, w), on their device, float32.

    offset: standard deviation of a constant that is added to each item's noise; 0 draws none.
    generator: on whichever device; draws are made there.
    """
    noise = torch.randn(x0.shape, generator=generator, device=generator.device)
    if offset:
        constant = torch.randn(len(x0), generator=generator, device=generator.device)
        noise = noise + offset * constant[:, None, None, None, None]
    return noise.to(x0.device)
