"""A forward pass of the transformer: ours and diffusers', plain and compiled, with the same weights and inputs.

On a CPU 2 layers, 512 wide; on a GPU all layers of 2B and 5B at 49 x 480 x 720, a batch of two as in guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.config import load_config
from cogvideox.model.transformer import ExpertTransformer
from cogvideox.system import build_transformer
from scripts.benchmark.memory import ROOT, memory_of
from scripts.benchmark.pairs import Candidate, max_difference, paired
from scripts.benchmark.results import Row
from scripts.benchmark.roofline import bound_of
from scripts.benchmark.settings import Settings
from scripts.benchmark.twins import randomise, rotary_of, transformer_twin

BATCH = 2
BUDGET_S = 15.0
"""Of the rounds of one case on a CPU, warm-ups and compilation apart."""


@dataclass(frozen=True)
class Case:
    """config: a file of configs/, for everything that the other fields do not change; None leaves it as it is."""

    name: str
    config: str
    dtype: str
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    latent: tuple[int, int, int] = (13, 60, 90)  # frames, height, width
    is_compiled: bool = True  # compiling both networks takes about a minute on a CPU

    @property
    def title(self) -> str:
        return f"{self.name}, {self.dtype}"

    def network(self, device: str) -> ExpertTransformer:
        frames, height, width = self.latent
        changes = {"num_layers": self.layers, "hidden_size": self.width, "num_attention_heads": self.heads}
        settings = [f"model.transformer.{key}={value}" for key, value in changes.items() if value is not None]
        settings += [
            f"data.num_frames={4 * frames - 3}",
            f"data.height={8 * height}",
            f"data.width={8 * width}",
            f"model.transformer.num_frames={4 * frames - 3}",
            f"model.transformer.latent_height={height}",
            f"model.transformer.latent_width={width}",
        ]
        config = load_config([ROOT / "configs" / f"{self.config}.yaml"], settings)
        net = build_transformer(config, device=device, skip_init=True).to(getattr(torch, self.dtype))
        return randomise(net).eval().requires_grad_(False)

    def inputs(self, net: ExpertTransformer) -> dict[str, Tensor]:
        device, dtype = net.time_embed[0].weight.device, net.time_embed[0].weight.dtype
        generator = torch.Generator(device).manual_seed(1)
        frames, height, width = self.latent
        g = net.geometry

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return {
            "x": randn(BATCH, frames, g["in_channels"], height, width),
            "timesteps": torch.full((BATCH,), 500, device=device),  # guidance: one timestep for both
            "context": randn(BATCH, g["text_length"], g["text_hidden_size"]),
        }


SMALL = Case("2 layers x 512, 226 + 960 tokens", "cogvideox_5b", "float32", 2, 512, 8, (4, 24, 40))
CPU_CASES = (
    replace(SMALL, name=f"rope, {SMALL.name}"),
    replace(SMALL, name=f"rope, {SMALL.name}", dtype="bfloat16", is_compiled=False),
)
GPU_CASES = (
    Case("2B, 49 x 480 x 720", "cogvideox_2b", "bfloat16"),
    Case("5B, 49 x 480 x 720", "cogvideox_5b", "bfloat16"),
)
QUICK_CASES = (replace(SMALL, name="1 layer x 64", layers=1, width=64, heads=2, latent=(2, 4, 6)),)


def cases(settings: Settings) -> tuple[Case, ...]:
    if settings.quick:
        return QUICK_CASES
    return GPU_CASES if settings.is_cuda else CPU_CASES


def run(settings: Settings) -> list[Row]:
    return [row for case in cases(settings) for row in compare(case, settings)]


@torch.no_grad()
def compare(case: Case, settings: Settings) -> list[Row]:
    net = case.network(settings.device)
    arguments = case.inputs(net)
    theirs = partial(twin_forward(net), arguments)
    candidates = [Candidate("ours", lambda: net(**arguments)), Candidate("diffusers", theirs)]
    if settings.is_cuda:
        candidates.append(Candidate("diffusers, cuDNN attention", partial(with_cudnn_attention, theirs)))
    if settings.compile and case.is_compiled:
        candidates += compiled(net, arguments, settings)
    times = paired(candidates, settings, budget_s=BUDGET_S)
    bound = None if settings.quick else bound_of(candidates[0].run, settings.device, case.dtype)
    rows = []
    fastest = min((name for name in times.seconds if name.startswith("ours")), key=times.median)
    for name in times.seconds:
        is_ours, is_compiled = name.startswith("ours"), name.endswith("compiled")
        against = (
            fastest if is_compiled else "ours"
        )  # a compiler may gain nothing: at its best against at its best
        rows.append(
            Row(
                "model",
                case.title,
                name,
                times.median(name),
                None if is_ours else times.ratio(name, against),
                None if name == "ours" else max_difference(times.results["ours"], times.results[name]),
                {} if is_compiled else memory(case, name, settings),
                bound and bound / times.median(name),
                note=f"ratio against {against}" if is_compiled and not is_ours else "",
            )
        )
    return rows


def twin_forward(net: ExpertTransformer) -> Callable[[dict[str, Tensor]], Tensor]:
    """diffusers' forward as its pipeline calls it: the rotary table is made once."""
    twin = transformer_twin(net).eval().requires_grad_(False)
    return forward_of(net, twin)


def forward_of(net: ExpertTransformer, twin: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    rope: list[Any] = []

    def forward(arguments: dict[str, Tensor]) -> Tensor:
        if not rope:
            rope.append(rotary_of(net, arguments["x"]))
        return twin(
            arguments["x"],
            arguments["context"],
            arguments["timesteps"],
            image_rotary_emb=rope[0],
            return_dict=False,
        )[0]

    return forward


def with_cudnn_attention(work: Callable[[], Tensor]) -> Tensor:
    """diffusers at its best on Hopper: it takes torch's default backend unless it is told."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return work()


def compiled(net: ExpertTransformer, arguments: dict[str, Tensor], settings: Settings) -> list[Candidate]:
    twin = torch.compile(transformer_twin(net).eval().requires_grad_(False))
    theirs = partial(forward_of(net, twin), arguments)
    if settings.is_cuda:
        theirs = partial(with_cudnn_attention, theirs)
    ours = torch.compile(net)
    return [
        Candidate("ours, compiled", lambda: ours(**arguments)),
        Candidate("diffusers, compiled", theirs),
    ]


def memory(case: Case, candidate: str, settings: Settings) -> dict[str, int]:
    index = cases(settings).index(case)
    return memory_of("scripts.benchmark.model:memory_case", index, candidate, settings)


def memory_case(index: int, candidate: str, device: str, quick: bool) -> Callable[[], None]:
    case = cases(Settings(device=device, quick=quick))[index]
    net = case.network(device)
    arguments = case.inputs(net)
    work = partial(net, **arguments)
    if candidate != "ours":
        work = partial(twin_forward(net), arguments)
        if "cuDNN" in candidate:
            work = partial(with_cudnn_attention, work)
        net.to("meta")  # one network alone is measured

    def once() -> None:
        with torch.no_grad():
            work()

    return once
