"""A sampling run with guidance, from noise to latents: ours, and diffusers' pipeline with the same weights and noise.

DDIM with the published "dynamic" guidance, on diffusers' table of noise levels (ours differs from it by design, by up
to 1.2e-3). On a CPU two layers and two steps. On a GPU 2B and 5B at 49 x 480 x 720: four steps of every candidate in
turn, then one whole run of 50 steps of ours, whose gates are 26 s (2B) and 67 s (5B) on an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from cogvideox.diffusion.denoiser import GuidedDenoiser
from cogvideox.diffusion.guidance import DynamicTimestepGuidance
from cogvideox.diffusion.samplers import ddim
from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.execution import AUTO
from cogvideox.model.attention_backends import KERNELS, Shape, activate, fastest_backend
from cogvideox.model.compiled_blocks import layer_runner
from scripts.benchmark import model
from scripts.benchmark.memory import memory_of
from scripts.benchmark.pairs import Candidate, max_difference, paired
from scripts.benchmark.results import Row
from scripts.benchmark.roofline import bound_of
from scripts.benchmark.settings import Settings
from scripts.benchmark.twins import transformer_twin

SCALE = 6.0
WHOLE_RUN = 50
"""Steps of the published setting."""

BUDGET_S = 25.0
"""Of the rounds of one case on a CPU, warm-ups and compilation apart."""


@dataclass(frozen=True)
class Case:
    """network: its weights and the size of the latents.  gate: seconds of ``WHOLE_RUN`` steps on an H200.

    steps: a divisor of 1000; of others diffusers steps to t - 1000 // steps, which is not its next timestep.
    """

    network: model.Case
    steps: int
    gate: float | None = None

    @property
    def title(self) -> str:
        return f"{self.network.title}, {self.steps} steps"


CPU_CASES = (Case(replace(model.SMALL, name="rope, 2 layers x 512, 226 + 960 tokens"), steps=2),)
GATES = (26.0, 67.0)
GPU_CASES = tuple(
    Case(network, steps=4, gate=gate) for network, gate in zip(model.GPU_CASES, GATES, strict=True)
)
QUICK_CASES = tuple(Case(network, steps=2) for network in model.QUICK_CASES)


def cases(settings: Settings) -> tuple[Case, ...]:
    if settings.quick:
        return QUICK_CASES
    return GPU_CASES if settings.is_cuda else CPU_CASES


def run(settings: Settings) -> list[Row]:
    return [row for case in cases(settings) for row in compare(case, settings)]


@torch.no_grad()
def compare(case: Case, settings: Settings) -> list[Row]:
    run = Run(case, settings.device)
    twin = transformer_twin(run.net).eval().requires_grad_(False)
    theirs = partial(run.theirs, pipeline_of(twin))
    candidates = [Candidate("ours", run.ours), Candidate("diffusers", partial(with_kernel, AUTO, theirs))]
    if settings.is_cuda:
        name = f"diffusers, {run.backend} attention"
        candidates.append(Candidate(name, partial(with_kernel, run.backend, theirs)))
    if settings.compile:
        fast = partial(run.theirs, pipeline_of(torch.compile(twin)))
        candidates += [
            Candidate("ours, compiled", partial(run.ours, compile="blocks")),
            Candidate("diffusers, compiled", partial(with_kernel, run.backend, fast)),
        ]
    times = paired(candidates, replace(settings, warmups=1), budget_s=BUDGET_S)
    bound = None if settings.quick else bound_of(run.ours, settings.device, case.network.dtype)
    rows = []
    fastest = min((name for name in times.seconds if name.startswith("ours")), key=times.median)
    for name in times.seconds:
        is_compiled = name.endswith("compiled")
        against = fastest if is_compiled else "ours"
        rows.append(
            Row(
                "sample",
                case.title,
                name,
                times.median(name),
                None if name.startswith("ours") else times.ratio(name, against),
                None if name == "ours" else max_difference(times.results["ours"], times.results[name]),
                {} if is_compiled or "attention" in name else memory(case, name, settings),
                bound and bound / times.median(name),
                note=f"ratio against {against}" if name == "diffusers, compiled" else "",
            )
        )
    return rows + (whole_run(run, settings) if settings.is_cuda else [])


def whole_run(run: Run, settings: Settings) -> list[Row]:
    """What ``case.gate`` is about: 50 steps, once, after warm-ups of the same shapes."""
    compile = "blocks" if settings.compile else "none"
    work = partial(run.ours, compile=compile, steps=WHOLE_RUN)
    times = paired([Candidate("ours", work)], replace(settings, rounds=1, warmups=0))
    seconds, gate = times.median("ours"), run.case.gate
    note = f"{run.backend} attention; gate on an H200: {gate:g} s, {'met' if seconds <= gate else 'missed'}"
    title = f"{run.case.network.title}, {WHOLE_RUN} steps"
    return [Row("sample", title, f"ours{', compiled' if settings.compile else ''}", seconds, note=note)]


class Run:
    """One pair of texts, one starting noise, one network: what both sides sample from."""

    def __init__(self, case: Case, device: str):
        self.case, self.net = case, case.network.network(device)
        arguments = case.network.inputs(self.net)
        self.noise = arguments["x"][:1].float()  # (1, T, C, h, w)
        unconditional, conditional = arguments["context"].split(1)
        self.cond, self.uncond = {"tokens": conditional}, {"tokens": unconditional}
        self.schedule = DiffusersTable()
        self.backend = self._fastest(torch.device(device))

    def _fastest(self, device: torch.device) -> str:
        g, (_, frames, _, height, width) = self.net.geometry, self.noise.shape
        _, rows, columns = g["patch_size"]
        tokens = g["text_length"] + frames * (height // rows) * (width // columns)
        items = 2 * g["num_attention_heads"]
        return fastest_backend(
            Shape(items, tokens, g["head_dim"], self.net.time_embed[0].weight.dtype), device
        )

    def ours(self, compile: str = "none", steps: int | None = None) -> Tensor:
        """As ``VideoDiffusion.sample_latents`` does it."""
        net, steps = self.net, steps or self.case.steps
        activate(self.backend, self.noise.device)
        net.attention_backend, net.transformer.run_layer = self.backend, layer_runner(compile)

        def network(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            return net(x, t, condition["tokens"])

        denoise = GuidedDenoiser(
            network, self.schedule, steps, DynamicTimestepGuidance(SCALE), self.cond, self.uncond
        )
        table = net.precompute_modulations(self.schedule.timesteps(steps))
        with net.use_modulations(table), net.project_texts_once():
            return ddim(denoise, self.noise, self.schedule, steps=steps)

    def theirs(self, pipeline: Any) -> Tensor:
        """diffusers' loop as it is; it keeps the state in the texts' dtype."""
        frames, height, width = self.case.network.latent
        return pipeline(
            prompt_embeds=self.cond["tokens"],
            negative_prompt_embeds=self.uncond["tokens"],
            latents=self.noise.to(self.cond["tokens"].dtype),
            num_frames=4 * frames - 3,
            height=8 * height,
            width=8 * width,
            num_inference_steps=self.case.steps,
            guidance_scale=SCALE,
            use_dynamic_cfg=True,
            output_type="latent",
            return_dict=False,
        )[0]


class DiffusersTable:
    """Our schedule with diffusers' sqrt(alpha_cumprod), which rescales before it chooses timesteps, not after."""

    def __init__(self) -> None:
        self._ours, self.predict_x0 = ZeroSNRSchedule(), ZeroSNRSchedule.predict_x0
        self._table = scheduler().alphas_cumprod.double().sqrt()

    def timesteps(self, steps: int) -> Tensor:
        return self._ours.timesteps(steps)

    def alphas(self, steps: int) -> Tensor:
        return torch.cat([self._table[self.timesteps(steps)], torch.ones(1, dtype=torch.float64)])

    @staticmethod
    def quantise(alpha: Tensor) -> tuple[None, Tensor]:
        return None, alpha


def scheduler() -> Any:
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        snr_shift_scale=1.0,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def pipeline_of(transformer: Any) -> Any:
    """diffusers' pipeline without its text encoder and VAE: texts are given, latents are taken."""
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline(None, None, None, transformer, scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_kernel(backend: str, work: Callable[[], Tensor]) -> Tensor:
    """diffusers with a kernel that it would not take by itself; auto: as it is, FlashAttention-2 on a GPU."""
    with kernel(backend):
        return work()


@contextmanager
def kernel(backend: str) -> Iterator[None]:
    activate(
        backend if backend != AUTO else "flash", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    with nullcontext() if backend == AUTO else sdpa_kernel(KERNELS[backend]):
        yield


def memory(case: Case, candidate: str, settings: Settings) -> dict[str, int]:
    index = cases(settings).index(case)
    return memory_of("scripts.benchmark.sample:memory_case", index, candidate, settings)


def memory_case(index: int, candidate: str, device: str, quick: bool) -> Callable[[], None]:
    run = Run(cases(Settings(device=device, quick=quick))[index], device)
    work: Callable[[], Tensor] = run.ours
    if candidate != "ours":
        work = partial(run.theirs, pipeline_of(transformer_twin(run.net).eval().requires_grad_(False)))
        run.net.to("meta")  # one network alone is measured

    def once() -> None:
        with torch.no_grad():
            work()

    return once
