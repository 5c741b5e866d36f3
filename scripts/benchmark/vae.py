"""Decode and encode: our VAE and diffusers' with the same weights and inputs, without tiles, in the same chunks.

On a CPU a quarter and half of the published width in float32, on a GPU the published VAE at 49 x 480 x 720 in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.vae.autoencoder import CausalVAE
from scripts.benchmark.memory import peak_of
from scripts.benchmark.pairs import Candidate, max_difference, paired
from scripts.benchmark.results import Row
from scripts.benchmark.roofline import bound_of
from scripts.benchmark.settings import Settings
from scripts.benchmark.twins import randomise, vae_twin

WORKS = ("decode", "encode")
BUDGET_S = 6.0
"""Of the rounds of one case on a CPU, warm-ups apart; the first three rounds are made whatever they take."""


@dataclass(frozen=True)
class Case:
    """channels: of the finest level (published: 128).  frames, height, width: of the video.

    note: what the reader of its ratio should know.
    """

    channels: int
    frames: int
    height: int
    width: int
    dtype: str = "float32"
    note: str = ""

    def title(self, work: str) -> str:
        size = f"{self.frames} x {self.height} x {self.width}"
        return f"{work} {size}, {self.channels} channels, {self.dtype}"

    def vae(self, device: str) -> CausalVAE:
        with torch.device(device):
            vae = CausalVAE(
                channels=self.channels,
                channel_multipliers=[1, 2, 2, 4],
                num_res_blocks=3,
                z_channels=16,
                encode_frames_per_pass=8,
            )
        return randomise(vae.to(getattr(torch, self.dtype))).eval().requires_grad_(False)

    def input(self, work: str, device: str) -> Tensor:
        """Latents (B, T, 16, H / 8, W / 8) to decode, or a video (B, F, 3, H, W) to encode."""
        generator = torch.Generator(device).manual_seed(1)
        shapes = {
            "decode": (1, (self.frames - 1) // 4 + 1, 16, self.height // 8, self.width // 8),
            "encode": (1, self.frames, 3, self.height, self.width),
        }
        x = torch.randn(shapes[work], generator=generator, device=device)
        return (x.tanh() if work == "encode" else x).to(getattr(torch, self.dtype))


CPU_CASES = (
    Case(32, 17, 48, 64, note="torch convolves so small tensors itself"),
    Case(64, 9, 48, 80, note="large enough for oneDNN at the two finest levels"),
)
CPU_MEMORY_CASE = Case(32, 9, 96, 144)
GPU_CASES = (Case(128, 49, 480, 720, "bfloat16"),)
QUICK_CASES = (Case(32, 9, 16, 16),)


def run(settings: Settings) -> list[Row]:
    if settings.quick:
        return [row for case in QUICK_CASES for row in compare(case, settings)]
    if settings.is_cuda:
        return [row for case in GPU_CASES for row in compare(case, settings)] + memory(GPU_CASES[0], settings)
    # Warm-ups and rounds of two decoders take their time on a CPU.
    once = replace(settings, warmups=min(settings.warmups, 1))
    return [row for case in CPU_CASES for row in compare(case, once)] + memory(CPU_MEMORY_CASE, settings)


@torch.no_grad()
def compare(case: Case, settings: Settings) -> list[Row]:
    vae = case.vae(settings.device)
    twin = vae_twin(vae).requires_grad_(False)
    rows = []
    for work in WORKS:
        x = case.input(work, settings.device)
        candidates = [
            Candidate("ours", partial(OURS[work], vae, x)),
            Candidate("diffusers", partial(DIFFUSERS[work], twin, x)),
        ]
        # A compiled VAE takes minutes to compile on a CPU, where its convolutions are nine tenths of its time.
        if settings.is_cuda and settings.compile:
            compiled = _compiled(vae_twin(vae).requires_grad_(False), work)
            candidates.append(Candidate("diffusers, compiled", partial(DIFFUSERS[work], compiled, x)))
        times = paired(candidates, settings, budget_s=BUDGET_S)
        bound = None if settings.quick else bound_of(candidates[0].run, settings.device, case.dtype)
        for name in times.seconds:
            is_ours = name == "ours"
            rows.append(
                Row(
                    "vae",
                    case.title(work),
                    name,
                    times.median(name),
                    None if is_ours else times.ratio(name, "ours"),
                    None if is_ours else max_difference(times.results["ours"], times.results[name]),
                    bound_fraction=bound and bound / times.median(name),
                    note="" if is_ours else case.note,
                )
            )
    return rows


def memory(case: Case, settings: Settings) -> list[Row]:
    """Peaks in processes of their own, at a size that shows against what a process has anyway."""
    return [
        Row("vae", case.title(work), name, memory=_peak(case, work, name, settings))
        for work in WORKS
        for name in ("ours", "diffusers")
    ]


def _peak(case: Case, work: str, name: str, settings: Settings) -> dict[str, int]:
    fields = [case.channels, case.frames, case.height, case.width, case.dtype]
    peak = peak_of(
        "scripts.benchmark.vae:memory_case", fields, work, name, settings.device, device=settings.device
    )
    return peak.by_kind()


def memory_case(fields: list[Any], work: str, name: str, device: str) -> Callable[[], None]:
    """The work of one candidate, in the process that measures it."""
    case = Case(*fields)
    vae, x = case.vae(device), case.input(work, device)
    if name == "ours":
        job = partial(OURS[work], vae, x)
    else:
        job = partial(DIFFUSERS[work], vae_twin(vae).requires_grad_(False), x)
        vae.to("meta")  # one network alone is measured

    @torch.no_grad()
    def once() -> None:
        job()

    return once


def _compiled(twin: nn.Module, work: str) -> nn.Module:
    """The network of one direction compiled; the loop over chunks stays Python's."""
    part = twin.decoder if work == "decode" else twin.encoder
    part.compile(dynamic=False)
    return twin


OURS = {"decode": lambda vae, z: vae.decode(z), "encode": lambda vae, video: vae.encode(video)}
DIFFUSERS = {
    "decode": lambda twin, z: twin.decode(z.transpose(1, 2)).sample.transpose(1, 2),
    "encode": lambda twin, video: twin.encode(video.transpose(1, 2)).latent_dist.parameters.transpose(1, 2),
}
