"""The first frame as a condition: image-to-video by channel concatenation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Encode = Callable[[Tensor], Tensor]


class FirstFrameCondition(nn.Module):
    """The clip's first frame -> ``{"concat": (B, T, C, h, w)}``: its latent in frame 0, zeros in the later ones.

    In training the frame is noised in pixel space before it is encoded, image + sigma * noise with
    sigma = exp(N(noise_log_mean, noise_log_std^2)) per sample, so that the model does not copy it (CogVideoX,
    section 3.3, after Blattmann et al. 2023, SVD). At inference it is clean.

    dropout: probability that the whole condition is zero in training.
    dropout_per: "sample", or "batch" to drop a rank's whole micro-batch together.
    repeat: put the image latent into every latent frame instead of zeros (upstream: noised_image_all_concat).
    temporal_compression: pixel frames per latent frame of the VAE, for clips that come without latents.
    """

    # Upstream draws one number per step and zeroes the whole batch; per sample has the same rate and less variance.

    def __init__(
        self,
        noise_log_mean: float = -3.0,
        noise_log_std: float = 0.5,
        dropout: float = 0.05,
        dropout_per: str = "sample",
        repeat: bool = False,
        temporal_compression: int = 4,
    ):
        super().__init__()
        if noise_log_std < 0:
            raise ValueError(f"image condition noise_log_std={noise_log_std}: expected a number >= 0")
        if not 0 <= dropout <= 1:
            raise ValueError(f"image condition dropout={dropout}: expected a probability from 0 to 1")
        if dropout_per not in ("sample", "batch"):
            raise ValueError(f"image condition dropout_per={dropout_per!r}: expected 'sample' or 'batch'")
        self.noise_log_mean, self.noise_log_std = noise_log_mean, noise_log_std
        self.dropout, self.dropout_per, self.repeat = dropout, dropout_per, repeat
        self.temporal_compression = temporal_compression

    def forward(
        self,
        batch: dict[str, Any],
        drop: Tensor,
        *,
        encode: Encode,
        rng: Any = None,
        num_latent_frames: int | None = None,
        image_latent_scale: str = "training",
        scale_factor: float = 1.0,
    ) -> dict[str, Tensor]:
        """batch: ``image`` (B, 3, H, W) or (B, 1, 3, H, W), or ``video`` (B, F, 3, H, W) whose frame 0 it is;
        uint8 or in [-1, 1].  drop: (B,) bool, on the device where the condition is wanted.

        encode: pixels (B, 1, 3, H, W) in [-1, 1] -> scaled latents (B, 1, C, h, w).
        rng: the step's random streams; None is inference, without noise.
        num_latent_frames: T. None: from the batch's ``moments`` (B, T, ...) or ``video``.
        """
        multiplier = image_latent_multiplier(image_latent_scale, scale_factor)
        frames = self._latent_frames(batch) if num_latent_frames is None else num_latent_frames
        image = _first_frame(batch).to(drop.device)
        if rng is not None:
            log_sigma = torch.randn(len(image), generator=rng.local, device=image.device)
            noise = torch.randn(image.shape, generator=rng.local, device=image.device)
            image = add_image_noise(image, self.noise_log_mean + self.noise_log_std * log_sigma, noise)
        latent = multiplier * encode(image)  # (B, 1, C, h, w)
        later = latent if self.repeat else torch.zeros_like(latent)
        concat = torch.cat([latent, later.expand(-1, frames - 1, -1, -1, -1)], dim=1)  # (B, T, C, h, w)
        return {"concat": concat.masked_fill(drop[:, None, None, None, None], 0)}

    def _latent_frames(self, batch: dict[str, Any]) -> int:
        if "moments" in batch:
            return batch["moments"].shape[1]
        if "video" in batch:
            return (batch["video"].shape[1] - 1) // self.temporal_compression + 1
        raise ValueError("image condition: num_latent_frames is needed where the batch holds only an image")


def add_image_noise(image: Tensor, log_sigma: Tensor, noise: Tensor) -> Tensor:
    """image + exp(log_sigma) noise.  image, noise: (B, ...) in [-1, 1] and standard normal;  log_sigma: (B,)."""
    return image + log_sigma.exp().view(-1, *[1] * (image.ndim - 1)) * noise


def image_latent_multiplier(convention: str, scale_factor: float) -> float:
    """What scaled image latents (scale_factor * z) are multiplied by, for the conventions that exist.

    "training": scale_factor * z, which 1.5-I2V was trained with and 1.0-I2V always uses;  "sat_sampling": z, which the
    SAT code gives 1.5-I2V when it samples;  "diffusers": z / scale_factor, which diffusers gives it.
    """
    powers = {"training": 0, "sat_sampling": 1, "diffusers": 2}
    if convention not in powers:
        raise ValueError(f"image_latent_scale={convention!r}: expected one of {', '.join(powers)}")
    return scale_factor ** -powers[convention]


def _first_frame(batch: dict[str, Any]) -> Tensor:
    """(B, 1, 3, H, W) float32 in [-1, 1]."""
    if "image" in batch:
        image = batch["image"] if batch["image"].ndim == 5 else batch["image"][:, None]
    elif "video" in batch:
        image = batch["video"][:, :1]
    else:
        raise ValueError(
            "image condition: there is no image; an image-to-video model needs one for every prompt"
        )
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image.float()
