"""The noise schedule: scaled-linear betas, SNR shift, zero terminal SNR. Training and sampling read the same object."""

from __future__ import annotations

import torch
from torch import Tensor

from cogvideox.diffusion.spacing import spacing_named


class ZeroSNRSchedule:
    """x_t = a_t x_0 + sqrt(1 - a_t^2) noise, with a_t = sqrt(alpha_cumprod_t) and a_999 = 0 exactly.

    Three steps make the table:
      betas = linspace(sqrt(linear_start), sqrt(linear_end), N)^2;
      SNR shift: alpha_cumprod / (s + (1 - s) alpha_cumprod), which divides the signal-to-noise ratio by s;
      zero terminal SNR: sqrt(alpha_cumprod) is moved and stretched so that the noisiest entry is 0 and the cleanest
      one is unchanged (Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed").

    snr_shift: s, 3 for CogVideoX-2B and 1 (none) for the others.  num_timesteps: N.
    shift_after_rescale: shift last instead, as upstream's ``post_shift`` (no published model does).
    spacing: which timesteps a sampling run visits: "trailing" (published), "leading", "linspace", "karras" or
    "log_snr", see ``diffusion.spacing``. Training does not depend on it.

    ``table`` is (N,) float32 on the CPU, sqrt(alpha_cumprod) with index == timestep: ~0.9996 at 0, 0 at N - 1.
    """

    def __init__(
        self,
        snr_shift: float = 1.0,
        num_timesteps: int = 1000,
        linear_start: float = 8.5e-4,
        linear_end: float = 0.012,
        shift_after_rescale: bool = False,
        spacing: str = "trailing",
    ):
        if snr_shift <= 0:
            raise ValueError(
                f"model.schedule snr_shift={snr_shift}: expected a positive number (1 is no shift)"
            )
        if num_timesteps < 2:
            raise ValueError(f"model.schedule num_timesteps={num_timesteps}: expected at least 2")
        if not 0 < linear_start <= linear_end < 1:
            raise ValueError(
                f"model.schedule linear_start={linear_start}, linear_end={linear_end}: "
                f"expected 0 < linear_start <= linear_end < 1"
            )
        self._spacing = spacing_named(spacing)
        self.num_timesteps = num_timesteps
        betas = torch.linspace(linear_start**0.5, linear_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if not shift_after_rescale:
            alphas_cumprod = _shift_snr(alphas_cumprod, snr_shift)
        self._alphas_cumprod = alphas_cumprod  # (N,) float64, before the rescale
        self._late_shift = snr_shift if shift_after_rescale else 1.0
        self.table = self._rescale(self._alphas_cumprod)
        self._copies: dict[torch.device, Tensor] = {self.table.device: self.table}

    def timesteps(self, steps: int) -> Tensor:
        """The timesteps that ``steps`` sampling steps feed to the network: (steps,) int64, descending.

        All spacings but "leading" begin at N - 1.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"sample.steps={steps}: expected a number from 1 to {self.num_timesteps}")
        log_snr = self._alphas_cumprod.logit() / 2
        return torch.from_numpy(self._spacing(log_snr.numpy(), steps))

    def alphas(self, steps: int) -> Tensor:
        """sqrt(alpha_cumprod) before, between and after ``steps`` sampling steps: (steps + 1,) float32, from 0 to 1.

        Entry i belongs to ``timesteps(steps)[i]``; the last entry, 1, is the clean sample.
        """
        # Zero terminal SNR comes after sub-sampling (diffusers: before), so these are not entries of `table`:
        # up to 1.2e-3 from it at 50 steps, more at fewer. The published samplers step with these values.
        chosen = self._rescale(self._alphas_cumprod[self.timesteps(steps).flip(0)]).flip(0)
        return torch.cat([chosen, chosen.new_ones(1)])

    def quantise(self, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
        """The entry of ``table`` nearest to ``alpha`` (the denoiser sees this one). Returns (index int64, value)."""
        alpha = torch.as_tensor(alpha, dtype=torch.float32, device=self.table.device)
        index = (alpha[..., None] - self.table).abs().argmin(dim=-1)
        return index, self.table[index]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuse ``x0`` to timestep ``t``: a_t x0 + sqrt(1 - a_t^2) noise  (Ho et al. 2020, eq. 4).

        x0, noise: (B, ...);  t: (B,) int64 in [0, N).  Returns (B, ...), float32 or wider.
        """
        alpha, sigma = self._at(t, x0)
        return alpha * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network learns to predict: v = a_t noise - sqrt(1 - a_t^2) x0  (Salimans & Ho 2022, eq. 11)."""
        alpha, sigma = self._at(t, x0)
        return alpha * noise - sigma * x0

    @staticmethod
    def predict_x0(v: Tensor, x_t: Tensor, alpha: float | Tensor) -> Tensor:
        """The clean sample that a predicted velocity means: a x_t - sqrt(1 - a^2) v.

        alpha: a number, or a tensor that broadcasts against ``x_t``, such as (B, 1, 1, 1, 1).
        """
        return alpha * x_t - (1 - alpha**2) ** 0.5 * v

    def _rescale(self, alphas_cumprod: Tensor) -> Tensor:
        root = _zero_terminal_snr(alphas_cumprod)
        return root if self._late_shift == 1 else _shift_snr(root**2, self._late_shift).sqrt()

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, sqrt(1 - a_t^2)), each (B, 1, ..., 1) to broadcast against ``like``."""
        assert t.shape == like.shape[:1], f"t is {tuple(t.shape)} for a batch of {like.shape[0]}"
        if t.device not in self._copies:  # copying the table in every training step would wait for the device
            self._copies[t.device] = self.table.to(t.device)
        alpha = self._copies[t.device][t].view(-1, *[1] * (like.ndim - 1))
        return alpha, (1 - alpha**2) ** 0.5


def _shift_snr(alphas_cumprod: Tensor, shift: float) -> Tensor:
    return alphas_cumprod / (shift + (1 - shift) * alphas_cumprod)


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Move and stretch sqrt(alphas_cumprod) so that its last entry is 0 and its first stays (Lin et al. 2024, alg. 1).

    alphas_cumprod: (n,) float64, from clean to noisy.  Returns (n,) float32: upstream rounds before the rescale.
    """
    root = alphas_cumprod.float().sqrt()
    if len(root) == 1:  # the only step starts from pure noise; the formula below would say 0 / 0
        return torch.zeros_like(root)
    return (root - root[-1]) * (root[0] / (root[0] - root[-1]))
