"""A small VAE in which every parameter counts, its twin in diffusers, and inputs for both."""

from __future__ import annotations

import torch

from cogvideox.vae.autoencoder import CausalVAE
from scripts.benchmark.twins import vae_twin as diffusers_twin

__all__ = ["TINY", "build", "close", "diffusers_twin", "random"]

TINY = dict(channels=8, channel_multipliers=[1, 2, 2], num_res_blocks=1, z_channels=4, norm_groups=4)


def build(seed: int = 0, **config) -> CausalVAE:
    """A VAE in which every parameter counts: biases, norms and all."""
    vae = CausalVAE(**config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            scale = 0.2 if p.ndim == 1 else 1.5 / p[0].numel() ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if ("norm" in name and name.endswith("weight") and p.ndim == 1) or name.endswith(
                "conv_y.conv.bias"
            ):
                p += 1
    return vae.eval()


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# float32 on both sides, summed in the same order up to the library's own choices; values reach about 5.
def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)
