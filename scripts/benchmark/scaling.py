"""What larger videos and more GPUs cost, calculated from counted work and bytes and the planner's rates. Nothing here
was measured: ``planning/step_time.py`` says where its rates are from.

Sampling is split by guidance (each half of the pair on its own GPUs) and by heads (Ulysses, Jacobs et al. 2023,
arXiv:2309.14509: all-to-all before and after each attention); training by data (ZeRO-2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cogvideox.config import Config
from cogvideox.flops import Flops, clip_of, forward_flops
from cogvideox.gpus import GPU, gpu_named
from cogvideox.planning.communication import EFFICIENCY, Cluster, step_volumes
from cogvideox.planning.communication import seconds as collective_seconds
from cogvideox.planning.memory import method_of
from cogvideox.planning.step_time import PASSES, Rates, step_time
from scripts.benchmark.full_size import MODELS, config_of, load
from scripts.benchmark.results import Row

CALCULATED = "calculated"
STEPS = 50
DECODE_FLOPS_PER_PIXEL = 315.0e12 / (49 * 480 * 720)
"""The published decoder (128 channels), counted; it is linear in pixels."""
FLASH_3 = 497 / 989
"""Of the sheet's rate, attention with heads of 64 in FlashAttention-3 (Shah et al. 2024, fig. 5); torch chooses
FlashAttention-2, 324 of 989, which the planner takes."""
CALL_SECONDS = 30e-6
"""Of a collective of no bytes (estimate)."""

SIZES = (
    ("2B", 49, 480, 720),
    ("2B", 97, 480, 720),
    ("2B", 49, 720, 1280),
    ("5B", 49, 480, 720),
    ("5B", 97, 480, 720),
    ("5B", 49, 720, 1280),
    ("1.5-5B", 81, 480, 720),
    ("1.5-5B", 81, 768, 1360),
    ("1.5-5B", 161, 768, 1360),
)
PUBLISHED = (("2B", 49, 480, 720), ("5B", 49, 480, 720), ("1.5-5B", 81, 768, 1360))
GPUS = (1, 8, 64)


def sampling_config(model: str, frames: int, height: int, width: int) -> Config:
    size = (f"sample.num_frames={frames}", f"sample.height={height}", f"sample.width={width}")
    return load(MODELS[model], overrides=size)


@dataclass(frozen=True)
class Split:
    """One video on ``gpus`` = guidance x heads GPUs."""

    guidance: int
    heads: int

    @property
    def gpus(self) -> int:
        return self.guidance * self.heads

    def __str__(self) -> str:
        return (
            "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs (guidance {self.guidance} x heads {self.heads})"
        )


@dataclass(frozen=True)
class SampleTime:
    """Seconds of one video, by part.  sent: bytes that each GPU sends."""

    split: Split
    network: float
    communication: float
    decode: float
    sent: float

    @property
    def total(self) -> float:
        return self.network + self.communication + self.decode


def sample_time(
    config: Config, cluster: Cluster, split: Split, *, attention: float | None = None
) -> SampleTime:
    """Of STEPS steps with guidance. attention: its share of the sheet's rate; None is the planner's.

    Communication is not hidden. The decoder runs on one GPU.
    """
    t, s = config.model.transformer, config.sample
    clip, rates = clip_of(config, s), Rates.of(cluster.gpu)
    attend = rates.attention if attention is None else attention * cluster.gpu.bf16_tflops * 1e12
    flops: Flops = forward_flops(t, clip)
    unit = clip.tokens * t.hidden_size * 2
    pass_seconds = flops.matmul / rates.matmul + flops.attention / attend
    pass_seconds += PASSES * t.num_layers * unit / rates.memory
    network = STEPS * pass_seconds * (2 / split.guidance) / split.heads

    # q, k and v go out and the attention's output comes back, each GPU keeping its own part.
    sent = (
        STEPS * t.num_layers * 4 * unit / split.heads * (split.heads - 1) / split.heads * (2 / split.guidance)
    )
    calls = STEPS * t.num_layers * 2 * (split.heads > 1) * (2 / split.guidance)
    latents = 4 * clip.latents * t.out_channels * clip.height * clip.width
    exchanged = STEPS * latents * (split.guidance > 1)
    communication = sent / _all_to_all_rate(cluster, split.heads) if sent else 0.0
    communication += exchanged / (EFFICIENCY * cluster.network_gb_s * 1e9) + calls * CALL_SECONDS
    decode = DECODE_FLOPS_PER_PIXEL * s.num_frames * s.height * s.width / rates.convolution
    return SampleTime(split, network, communication, decode, sent + exchanged)


def _all_to_all_rate(cluster: Cluster, ranks: int) -> float:
    """Bytes per second that leave one of ``ranks`` GPUs, of which those beyond its machine go through its card."""
    outside = max(0, ranks - cluster.gpus_per_node) / (ranks - 1)
    inside = 1 - outside
    times = (inside / cluster.gpu.link_gb_s, outside / cluster.network_gb_s)
    return EFFICIENCY * 1e9 / max(times)


def splits(heads: int, gpus: int) -> list[Split]:
    """All that fit: guidance halves the pair, and every GPU takes the same number of heads."""
    ways = [Split(g, h) for g in (1, 2) for h in range(1, heads + 1) if heads % h == 0]
    return [way for way in ways if way.gpus <= gpus]


def fastest(config: Config, cluster: Cluster, gpus: int) -> SampleTime:
    """The split with the shortest time for one video."""
    ways = splits(config.model.transformer.num_attention_heads, gpus)
    return min((sample_time(config, cluster, way) for way in ways), key=lambda time: time.total)


# -------------------------------------------------------------------------------------------------------------- rows


def rows(name: str = "h200") -> Iterator[Row]:
    gpu = gpu_named(name)
    yield from size_rows(gpu)
    yield from sampling_rows(gpu)
    yield from training_rows(gpu)


def size_rows(gpu: GPU) -> Iterator[Row]:
    for model, frames, height, width in SIZES:
        config = sampling_config(model, frames, height, width)
        clip, one = clip_of(config, config.sample), Split(1, 1)
        flops = forward_flops(config.model.transformer, clip)
        time = sample_time(config, Cluster(gpu), one)
        numbers = {
            "tokens": clip.tokens,
            "forward TFLOP": flops.forward / 1e12,
            "attention share": flops.attention / flops.forward,
            "50 steps PFLOP": 2 * STEPS * flops.forward / 1e15,
            "decode TFLOP": DECODE_FLOPS_PER_PIXEL * frames * height * width / 1e12,
            "seconds with FA3": sample_time(config, Cluster(gpu), one, attention=FLASH_3).network,
            "decode seconds": time.decode,
        }
        case = f"size: {model}, {frames}x{height}x{width}"
        yield Row("growth", case, f"{CALCULATED}, 1 {gpu.name}", time.network, counted=numbers)


def sampling_rows(gpu: GPU) -> Iterator[Row]:
    for model, frames, height, width in PUBLISHED:
        config = sampling_config(model, frames, height, width)
        alone = sample_time(config, Cluster(gpu), Split(1, 1))
        for gpus in GPUS:
            time = fastest(config, Cluster(gpu), gpus)
            numbers = {
                "gpus": gpus,
                "network seconds": time.network,
                "communication seconds": time.communication,
                "sent GB per GPU": time.sent / 1e9,
                "decode seconds": time.decode,
                "times as fast": alone.total / time.total,
                "videos per hour, split": 3600 / time.total * (gpus // time.split.gpus),
                "videos per hour, one per GPU": 3600 / alone.total * gpus,
            }
            case = f"sampling: {model}, {frames}x{height}x{width}, {STEPS} steps, {gpus} {gpu.name}"
            yield Row(
                "growth", case, CALCULATED, time.total, counted=numbers, note=f"a video on {time.split}"
            )


def training_rows(gpu: GPU) -> Iterator[Row]:
    cluster = Cluster(gpu)
    for model in ("2B", "5B"):
        for method in ("full", "LoRA"):
            config = config_of(model, method, "selective", "deepspeed.zero_optimization.stage=2")
            alone = step_time(config, cluster, 1).total
            for gpus in GPUS:
                time, run = step_time(config, cluster, gpus), method_of(config, gpus)
                numbers = {
                    "gpus": gpus,
                    "sent GB per GPU": sum(step_volumes(run).values()) / 1e9,
                    "communication seconds": sum(collective_seconds(run, cluster).values()),
                    "waited seconds": time.communication,
                    "clips per second": gpus * config.train.batch_size / time.total,
                    "efficiency": alone / time.total,
                }
                case = f"training: {model} {method}, 49x480x720, ZeRO-2, {gpus} {gpu.name}"
                yield Row("growth", case, CALCULATED, time.total, counted=numbers)
