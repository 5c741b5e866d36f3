"""A LoRA step: ours through the trainer and DeepSpeed, against diffusers' transformer with PEFT in a plain loop.

Latents and text features are given; AdamW, clipped gradients, nothing logged. PEFT with gradient checkpointing is what
its users run. Ours runs under each policy of ``model.transformer.checkpoint_activations``; the one that counts is the
fastest whose peak is not above PEFT's.
On a CPU 3 layers, 512 wide; on a GPU all layers of 2B and 5B at 49 x 480 x 720.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from cogvideox import dist
from cogvideox.config import Config, load_config
from cogvideox.engine.instruments import peak_tflops
from cogvideox.flops import clip_of, model_flops, step_flops
from cogvideox.plan import lora_parameters
from scripts.benchmark.lora_steps import Ours, Pair, Peft
from scripts.benchmark.memory import ROOT, peaks_of
from scripts.benchmark.model import with_cudnn_attention
from scripts.benchmark.pairs import Candidate, max_difference, paired
from scripts.benchmark.results import Row
from scripts.benchmark.roofline import rates
from scripts.benchmark.settings import Settings

OURS = "ours, "
POLICIES = ("full", "selective", "products", "none")
PEFT, PEFT_KEEPS = "diffusers + PEFT, checkpointing", "diffusers + PEFT"
CUDNN = f"{PEFT}, cuDNN attention"
COMPARED_STEPS = 2
BUDGET_S = 20.0
"""Of the rounds of one case on a CPU, warm-ups apart."""


@dataclass(frozen=True)
class Case:
    """config: a file of configs/, under configs/lora.yaml; None in the other fields leaves what they say."""

    name: str
    config: str
    precision: str
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    latent: tuple[int, int, int] = (13, 60, 90)  # frames, height, width
    rank: int | None = None

    def configuration(self, policy: str = "full") -> Config:
        frames, height, width = self.latent
        changes = {
            "model.transformer.num_layers": self.layers,
            "model.transformer.hidden_size": self.width,
            "model.transformer.num_attention_heads": self.heads,
            "model.transformer.num_frames": 4 * frames - 3,
            "model.transformer.latent_height": height,
            "model.transformer.latent_width": width,
            "model.transformer.checkpoint_activations": policy,
            "lora.rank": self.rank,
            "data.num_frames": 4 * frames - 3,
            "data.height": 8 * height,
            "data.width": 8 * width,
            # The batches hold what these give, so that nothing is read.
            "data.latent_cache": "cache",
            "data.text_cache": "cache",
            "load.vae": "vae",
            "train.precision": self.precision,
            "train.warmup_steps": 0,
            "train.steps": 1_000_000,
        }
        settings = [f"{key}={value}" for key, value in changes.items() if value is not None]
        return load_config([ROOT / "configs" / f"{name}.yaml" for name in (self.config, "lora")], settings)


SMALL = Case(
    "3 layers x 512, 226 + 960 tokens, LoRA, float32", "cogvideox_5b", "fp32", 3, 512, 8, (4, 24, 40)
)
CPU_CASES = (SMALL,)
GPU_CASES = (
    Case("2B, 49 x 480 x 720, LoRA, bfloat16", "cogvideox_2b", "bf16"),
    Case("5B, 49 x 480 x 720, LoRA, bfloat16", "cogvideox_5b", "bf16"),
)
QUICK_CASES = (
    replace(SMALL, name="1 layer x 64, LoRA", layers=1, width=64, heads=1, latent=(2, 4, 6), rank=4),
)


def cases(settings: Settings) -> tuple[Case, ...]:
    if settings.quick:
        return QUICK_CASES
    return GPU_CASES if settings.is_cuda else CPU_CASES


def run(settings: Settings) -> list[Row]:
    if torch.cuda.is_available() and not settings.is_cuda:
        raise ValueError(
            "train: the trainer takes the GPU where there is one; hide it with CUDA_VISIBLE_DEVICES="
        )
    dist.init()
    return [row for case in cases(settings) for row in compare(case, settings)]


def compare(case: Case, settings: Settings) -> list[Row]:
    names = [PEFT, *(f"{OURS}{what}" for what in POLICIES), CUDNN if settings.is_cuda else PEFT_KEEPS]
    peaks = memory(case, names, settings)
    pair = Pair(case.configuration())
    gradients = pair.gradients()
    ours, peft, losses = pair.ours(), pair.peft, []
    for _ in range(COMPARED_STEPS):
        theirs = peft.step(True).item()
        ours.step("full")
        losses.append(abs(ours.loss() - theirs))
    differences = {
        "loss_difference": max(losses),
        "matrix_difference": max(max_difference(*both) for both in pair.matrices()),
        "largest_gradient": max(theirs.abs().max().item() for _, theirs in gradients),
    }
    fitting = [name for name in names if name in peaks]
    candidates = [Candidate(name, work_of(name, ours, peft)) for name in fitting]
    times = paired(candidates, replace(settings, warmups=1), budget_s=BUDGET_S)
    kind = "total" if settings.is_cuda else "above"  # a CPU's total is mostly libraries
    allowed = [n for n in fitting if n.startswith(OURS) and peaks[n][kind] <= peaks[PEFT][kind]]
    best = min(allowed or [f"{OURS}full"], key=times.median)
    # MFU: of the maker's figure of a GPU, of the measured products of a CPU.
    peak = peak_tflops(dist.device()) or (
        torch.inf
        if settings.quick
        else rates(settings.device, "bfloat16" if settings.is_cuda else "float32").matmul / 1e12
    )
    rows = []
    for name in fitting:
        is_ours, counted = name.startswith(OURS), flops(case, name)
        if is_ours:
            faster = times.ratio(PEFT, name)
            counted |= {"peft_time_to_this": faster.median, "low": faster.low, "high": faster.high}
        else:
            counted |= differences
        utilised = counted["model_tflop"] / times.median(name) / peak
        rows.append(
            Row(
                "train",
                case.name,
                name,
                times.median(name),
                None if is_ours else times.ratio(name, against(name, best)),
                None if is_ours else max(max_difference(*both) for both in gradients),
                peaks[name],
                utilised or None,
                counted,
                note(name, best, name in allowed),
            )
        )
    missing = [name for name in names if name not in fitting]
    return rows + [Row("train", case.name, name, note="does not fit into this GPU") for name in missing]


def against(name: str, best: str) -> str:
    """Which of ours a baseline is compared with: what keeps as much for the backward pass."""
    return f"{OURS}none" if name == PEFT_KEEPS else best


def note(name: str, best: str, fits: bool) -> str:
    if name == best and fits:
        return f"the fastest of ours whose peak is not above that of {PEFT}"
    if name.startswith(OURS):
        return ""
    return (
        f"ratio against {against(name, best)}; difference of the gradients of all matrices at the first step"
    )


def flops(case: Case, name: str) -> dict[str, float]:
    """TFLOP of a step: what the mathematics asks for, which MFU is measured with, and what ours executes."""
    policy = name.removeprefix(OURS) if name.startswith(OURS) else "full"
    config = case.configuration(policy)
    clip, adapters = clip_of(config, config.data), lora_parameters(config)
    found = {"model_tflop": model_flops(config, clip, adapters) / 1e12}
    return found | (
        {"step_tflop": step_flops(config, clip, adapters) / 1e12} if name.startswith(OURS) else {}
    )


def work_of(name: str, ours: Ours | None, peft: Peft | None) -> Callable[[], object]:
    if name.startswith(OURS):
        return partial(ours.step, name.removeprefix(OURS))
    step = partial(peft.step, name != PEFT_KEEPS)
    return partial(with_cudnn_attention, step) if name == CUDNN else step


def memory(case: Case, names: Sequence[str], settings: Settings) -> dict[str, dict[str, int]]:
    """Bytes by kind of those that fit. Two processes: in each, one network alone."""
    index, found = cases(settings).index(case), {}
    for is_ours in (True, False):
        wanted = [name for name in names if name.startswith(OURS) is is_ours]
        arguments = index, wanted, settings.device, settings.quick
        found |= peaks_of("scripts.benchmark.train:memory_case", *arguments, device=settings.device)
    return {name: found[name].by_kind() for name in names if name in found}


def memory_case(
    index: int, names: Sequence[str], device: str, quick: bool
) -> dict[str, Callable[[], object]]:
    dist.init()
    case = cases(Settings(device=device, quick=quick))[index]
    is_ours = names[0].startswith(OURS)
    pair = Pair(case.configuration(), has_twin=not is_ours)
    if not is_ours:  # the system still says on which device it is
        for parameter in pair.system.transformer.parameters():
            parameter.data = parameter.new_empty(0)
    ours = pair.ours() if is_ours else None
    return {name: work_of(name, ours, pair.peft) for name in names}
