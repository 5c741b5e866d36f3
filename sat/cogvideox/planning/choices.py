"""The ways one training run can be set up, each with its planned memory and time; a memory budget made a policy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from cogvideox.config import Config, ConfigError, LoraConfig, trains_text_encoder
from cogvideox.gpus import GPU, gpu_named
from cogvideox.planning.communication import Cluster
from cogvideox.planning.memory import RESERVE, training_peak, zero_section
from cogvideox.planning.step_time import step_time
from cogvideox.recompute import KEPT, Budget, Recompute, read_recompute

LARGEST_BATCH = 64
"""Clips per GPU up to which a choice looks for the largest batch."""


@dataclass(frozen=True)
class Choice:
    """One way.  method: full or LoRA.  stage, offload: of ZeRO.  batch: clips per rank and micro-step.

    cached: latents, and the text features of an encoder that is not trained.
    """

    method: str
    policy: Recompute
    stage: int
    offload: bool
    cached: bool
    batch: int

    @classmethod
    def of(cls, config: Config) -> Choice:
        """The configured one; its policy must not be a budget."""
        zero = zero_section(config)
        return cls(
            method="LoRA" if config.lora else "full",
            policy=read_recompute(config.model.transformer.checkpoint_activations),
            stage=zero.get("stage", 2),
            offload=(zero.get("offload_optimizer") or {}).get("device") == "cpu",
            cached=config.data.latent_cache is not None,
            batch=config.train.batch_size,
        )

    def applied(self, config: Config) -> Config:
        """``config`` set up this way."""
        config = copy.copy(config)
        t = dataclasses.replace(config.model.transformer, checkpoint_activations=self.policy)
        config.model = dataclasses.replace(config.model, transformer=t)
        config.train = dataclasses.replace(config.train, batch_size=self.batch)
        if self.cached != (config.data.latent_cache is not None):
            latents = "cache" if self.cached else None
            text = None if trains_text_encoder(config) else latents
            config.data = dataclasses.replace(config.data, latent_cache=latents, text_cache=text)
        config.lora = (config.lora or LoraConfig(rank=128)) if self.method == "LoRA" else None
        zero = {
            k: v for k, v in zero_section(config).items() if k not in ("offload_optimizer", "cpu_offload")
        }
        zero |= {"stage": self.stage} | ({"offload_optimizer": {"device": "cpu"}} if self.offload else {})
        config.deepspeed = {**config.deepspeed, "zero_optimization": zero}
        return config

    @property
    def zero(self) -> str:
        return f"{self.stage}{', offload' if self.offload else ''}"


@dataclass(frozen=True)
class Planned:
    """peak: bytes per GPU.  seconds: per step of ``choice.batch`` clips.  most: largest batch that fits, 0: none."""

    choice: Choice
    peak: float
    seconds: float
    most: int


def planned(config: Config, choice: Choice, cluster: Cluster, ranks: int) -> Planned:
    def peak(batch: int) -> float:
        return training_peak(dataclasses.replace(choice, batch=batch).applied(config), ranks)

    low, high = 0, LARGEST_BATCH + 1
    while high - low > 1:  # the peak grows with the batch
        middle = (low + high) // 2
        low, high = (middle, high) if fits(peak(middle), cluster.gpu) else (low, middle)
    seconds = step_time(choice.applied(config), cluster, ranks).total
    return Planned(choice, peak(choice.batch), seconds, low)


def fits(peak: float, gpu: GPU) -> bool:
    return peak + RESERVE <= gpu.memory_gib * 2**30


def choices(config: Config, ranks: int) -> Iterator[Choice]:
    """full and LoRA x policy x ZeRO, cached; ZeRO's stages differ only where there are several ranks."""
    stages = [(0, False), (1, False), (2, False), (3, False)] if ranks > 1 else [(2, False)]
    configured = Choice.of(config)
    for method in ("full", "LoRA"):
        for what in KEPT:
            for stage, offload in [*stages, (2, True)]:
                yield dataclasses.replace(
                    configured, method=method, policy=Recompute(what), stage=stage, offload=offload
                )


def resolve_budget(config: Config, ranks: int = 1) -> Config:
    """``config`` with the policy that ``checkpoint_activations`` means where it is a memory budget; else as it is.

    The fastest whose planned peak fits, by the time of a step on an H200: which is fastest hardly depends on the GPU.
    Raises ConfigError for a budget that even the smallest policy does not meet, saying the least that is possible.
    """
    t = config.model.transformer
    if t is None or not isinstance(read_recompute(t.checkpoint_activations), Budget):
        return config
    if config.train is None or config.data is None or config.vae is None:
        return _with_policy(config, Recompute("none"))  # nothing is trained
    budget = read_recompute(t.checkpoint_activations)
    policies = [*map(Recompute, KEPT), *(Recompute("full", n) for n in (2, 3, 4))]
    options = [_with_policy(config, policy) for policy in policies]
    peaks = [training_peak(option, ranks) for option in options]
    cluster = Cluster(gpu_named("H200"))
    fitting = [option for option, peak in zip(options, peaks, strict=True) if peak <= budget.bytes]
    if not fitting:
        least = min(peaks)
        raise ConfigError(
            f"model.transformer.checkpoint_activations={t.checkpoint_activations!r} cannot be met: the least that "
            f"recomputation reaches is {_ceil_gib(least)} GiB ({policies[peaks.index(least)]}), planned. Use "
            f"'{_ceil_gib(least)} GiB' or full{_other_ways(config, ranks)}"
        )
    return min(fitting, key=lambda option: step_time(option, cluster, ranks).total)


def _with_policy(config: Config, policy: Recompute) -> Config:
    config = copy.copy(config)
    t = dataclasses.replace(config.model.transformer, checkpoint_activations=policy)
    config.model = dataclasses.replace(config.model, transformer=t)
    return config


def _other_ways(config: Config, ranks: int) -> str:
    """What would need less than the smallest policy: the settings that help, with what they reach."""
    smallest = dataclasses.replace(Choice.of(_with_policy(config, Recompute("full"))))
    ways = {
        "train.batch_size=1": dataclasses.replace(smallest, batch=1),
        "data.latent_cache and data.text_cache": dataclasses.replace(smallest, cached=True),
        "deepspeed.zero_optimization.offload_optimizer.device=cpu": dataclasses.replace(
            smallest, offload=True
        ),
        "a LoRA (configs/lora.yaml)": dataclasses.replace(smallest, method="LoRA"),
    }
    now = training_peak(smallest.applied(config), ranks)
    reached = {way: training_peak(choice.applied(config), ranks) for way, choice in ways.items()}
    helps = [f"{way} ({_ceil_gib(peak)} GiB)" for way, peak in reached.items() if peak < 0.99 * now]
    return f". Less is reached with {', or '.join(helps)}" if helps else ""


def _ceil_gib(count: float) -> float:
    """GiB with one digit, upwards: a limit that is met."""
    return -(-count // (2**30 / 10)) / 10
