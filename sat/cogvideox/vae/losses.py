"""What a VAE is trained for: reconstruction, sharp outlines, and a posterior near the unit Gaussian.

A loss is any callable `(reconstruction, video, moments) -> (loss, metrics)`, metrics being detached scalars.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideox.vae.autoencoder import split_moments


@dataclass(frozen=True)
class ReconstructionKL:
    """l1 |x - y| + mse (x - y)^2 + gradient |dx - dy| + kl KL(q || N(0, 1)); each term is a mean over its elements.

    Computed in float32. reconstruction, video: (B, F, C, H, W) in [-1, 1];  moments: (B, T, 2 * z, H/s, W/s).
    """

    l1: float = 1.0
    mse: float = 0.0
    gradient: float = 0.0
    # Weight of the error of differences between neighbours (pixels and frames): sharp outlines, no flicker.
    kl: float = 1e-6
    # Per latent element. Only keeps the latents bounded: the diffusion rescales them.

    def __call__(
        self, reconstruction: Tensor, video: Tensor, moments: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        error = reconstruction.float() - video.float()
        rec = self.l1 * error.abs().mean() + self.mse * error.square().mean()
        if self.gradient:
            rec = rec + self.gradient * gradient_error(error)
        kl = kl_divergence(moments.float())
        return rec + self.kl * kl, {"loss/rec": rec.detach(), "loss/kl": kl.detach()}


def gradient_error(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in an error image, summed over height, width and (if several) frames.

    error: (B, F, C, H, W), reconstruction - video. Differences are linear: this compares the two's image gradients.
    """
    return sum(error.diff(dim=dim).abs().mean() for dim in (1, 3, 4) if error.shape[dim] > 1)


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats per latent element  (Kingma & Welling 2014, appendix B)."""
    mean, logvar = split_moments(moments)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over a whole batch in [-1, 1] (peak-to-peak 2; values beyond are clamped)."""
    mse = F.mse_loss(reconstruction.float().clamp(-1, 1), video.float())
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))
