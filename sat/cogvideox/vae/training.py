"""Training the VAE: the module that the engine steps, `(batch, rng) -> (loss, metrics)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.vae.autoencoder import CausalVAE, sample_posterior
from cogvideox.vae.losses import ReconstructionKL, psnr
from cogvideox.vae.tiling import Tiling


class VAETraining(nn.Module):
    """Encode, draw from the posterior, decode, compare.

    vae: stored under `first_stage_model.`, as in the checkpoints of the diffusion models.
    loss: `(reconstruction, video, moments) -> (loss, metrics)`; None is `ReconstructionKL()`.
    """

    def __init__(self, vae: CausalVAE, loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None):
        super().__init__()
        if vae.tiling != Tiling(None, None):
            raise ValueError(
                f"vae.tile_latent_height={vae.tiling.height} and vae.tile_latent_width={vae.tiling.width}: a VAE is "
                "trained on whole frames; set both to null (smaller frames save memory)"
            )
        self.first_stage_model = vae
        self.loss = ReconstructionKL() if loss is None else loss

    def forward(self, batch: dict[str, Any], rng: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """batch["video"]: (B, F, C, H, W), uint8 or floats in [-1, 1], F = 4k+1 (1: images);  rng.local: a generator.

        Decodes in one pass, whatever the chunks of inference: no caches, and activation checkpointing applies.
        """
        vae = self.first_stage_model
        parameter = next(vae.parameters())
        video = pixels_to_float(batch["video"].to(parameter.device))
        moments = vae.encode(video.to(parameter.dtype))
        latents = sample_posterior(moments, generator=rng.local)
        reconstruction = vae.decode(latents, chunked=False)
        loss, metrics = self.loss(reconstruction, video, moments)
        return loss, metrics | {"psnr": psnr(reconstruction.detach(), video)}


def pixels_to_float(video: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]; floats, already in that range, as they are."""
    return video.float() / 127.5 - 1 if video.dtype == torch.uint8 else video
