"""Parts of a latent that are given: a prefix to continue, an image to animate, a masked region to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.diffusion.stepping import Denoise


class KeepRegion:
    """``denoise(x, t) -> x0`` in which the region mask == 1 is ``known``: wrap a denoiser, give it to any sampler.

    At each call the region of ``x`` is replaced by ``known`` noised to the level of that step, and the prediction has
    ``known`` there (the replacement method: Song et al. 2021, "Score-based generative modeling", appendix I.2; Ho et
    al. 2022, "Video diffusion models", section 3.1). The region comes out exactly. The rest sees it only as
    noisy as itself, and so follows it less than the conditional distribution does (Ho et al., there): deterministic
    samplers least, those with fresh noise more, ``euler_ancestral`` with repeats nearly in full.

    known: (B, T, C, h, w), scaled latents. noise: the same shape, one standard normal draw, used in all steps; the
    starting noise of the run makes the region's trajectory that of DDIM.
    mask: broadcasts against ``known``: (B or 1, T, 1, h or 1, w or 1), of 0 and 1, best on the CPU, as it is
    looked at once. A prefix of k latent frames is ones for the first k of T.
    schedule, steps: those of the sampler, a ``TailSchedule`` too. Raises ValueError for shapes that do not fit.
    """

    def __init__(
        self,
        denoise: Denoise,
        schedule: ZeroSNRSchedule,
        known: Tensor,
        mask: Tensor,
        noise: Tensor,
        steps: int,
    ):
        if noise.shape != known.shape:
            raise ValueError(
                f"known is {tuple(known.shape)}, its noise {tuple(noise.shape)}: expected one shape"
            )
        fits = mask.ndim == known.ndim and all(
            m in (1, k) for m, k in zip(mask.shape, known.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"the mask is {tuple(mask.shape)}: expected {tuple(known.shape)}, or 1 in place of any of them"
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                "the mask has values between 0 and 1: expected 1 where latents are kept, 0 elsewhere"
            )
        self.denoise, self.known, self.noise = denoise, known, noise
        self.inside = mask.to(known.device) == 1
        self._alpha_of = dict(
            zip(schedule.timesteps(steps).tolist(), schedule.alphas(steps).tolist(), strict=False)
        )

    def __call__(self, x: Tensor, t: int | Tensor) -> Tensor:
        """The prediction of the clean sample, with ``known`` in the region: x (B, ...) -> (B, ...)."""
        if x.shape != self.known.shape:
            raise ValueError(
                f"the state is {tuple(x.shape)}, the known latents are {tuple(self.known.shape)}"
            )
        if int(t) not in self._alpha_of:
            raise ValueError(f"timestep {int(t)} is none of the sampling steps: {sorted(self._alpha_of)}")
        alpha = self._alpha_of[int(t)]
        noised = alpha * self.known + (1 - alpha**2) ** 0.5 * self.noise
        x0 = self.denoise(torch.where(self.inside, noised.to(x.dtype), x), t)
        return torch.where(self.inside, self.known.to(x0.dtype), x0)
