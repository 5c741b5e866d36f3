"""The plan of a run as text, for ``--dry-run``: parameters, tokens, work, memory by phase, and what fits a GPU."""

from __future__ import annotations

import dataclasses

from cogvideox import plan
from cogvideox.config import Config, DataConfig, SampleConfig
from cogvideox.flops import clip_of, forward_flops, step_flops
from cogvideox.gpus import GPU, gpu_named
from cogvideox.planning.choices import Choice, Planned, choices, fits, planned, resolve_budget
from cogvideox.planning.communication import Cluster
from cogvideox.planning.memory import method_of, peak, training_phases
from cogvideox.planning.sampling import LADDER, savings_for, stage_bytes
from cogvideox.planning.states import on_host
from cogvideox.planning.step_time import ATTENTION, ATTENTION_HOPPER, MATMUL, Rates, step_time

Row = tuple[str, str, str]


def describe(
    config: Config, world_size: int = 1, *, sampling: bool | None = None, gpu: str | None = None
) -> str:
    """The plan as a table: parameters, tokens per clip, FLOPs, memory per GPU.

    sampling: the plan of sample_video.py instead of train_video.py's. None: where there is no section ``train``.
    gpu: plan for that one (gpus.py), with estimates of time, and for training a table of the other ways.
    """
    sampling = config.train is None if sampling is None else sampling
    device = gpu_named(gpu) if gpu else None
    if not sampling:
        config = resolve_budget(config, world_size)
    rows = [("" if i else "parameters", name, f"{n:,}") for i, (name, n) in enumerate(_counts(config))]
    section = config.sample if sampling else config.data
    is_known = bool(config.model.transformer and config.vae and section)
    if is_known:
        rows += _work(config, section, device, world_size)
    after = ""
    if sampling and is_known:
        rows += _sampling_rows(config, device)
    elif config.train and not sampling:
        after = "\n" + _training_memory(config, world_size, is_known)
        if device and is_known:
            after += "\n\n" + _choices_table(config, device, world_size)
    width = max((len(name) for _, name, _ in rows), default=0)
    return "\n".join(f"{kind:<16}{name:<{width}}  {value:>16}".rstrip() for kind, name, value in rows) + after


def _counts(config: Config) -> list[tuple[str, int]]:
    counts: list[tuple[str, int]] = []
    if t := config.model.transformer:
        compression = config.vae.temporal_compression if config.vae else 4
        name = f"transformer, {t.num_layers} layers x {t.hidden_size}, {t.num_attention_heads} heads"
        counts.append((name, plan.transformer_parameters(t, compression)))
    if config.vae:
        counts.append(("VAE", plan.vae_parameters(config.vae)))
    if text := plan.text_encoder(config):
        counts.append(("text encoder" + (", trained" if text.trained else ""), text.parameters))
    if config.lora and config.model.transformer:
        counts.append((f"LoRA, rank {config.lora.rank}", plan.lora_parameters(config)))
    if config.train:
        counts.append(("trained in all", plan.trained_parameters(config)))
    return counts


def _work(config: Config, section: DataConfig | SampleConfig, gpu: GPU | None, ranks: int) -> list[Row]:
    clip, t = clip_of(config, section), config.model.transformer
    flops = forward_flops(t, clip)
    size = f"{section.num_frames} frames {section.height}x{section.width} at {section.fps:g} fps"
    rows = [
        ("clip", size, f"{section.num_frames / section.fps:.1f} s"),
        ("", f"latents, {clip.latents} x {clip.height} x {clip.width}", f"{clip.video_tokens:,} tokens"),
        ("", "with the text", f"{clip.tokens:,} tokens"),
        (
            "work",
            f"one forward pass, {flops.attention / flops.forward:.0%} attention",
            _operations(flops.forward),
        ),
    ]
    if section is config.data:
        adapters = plan.lora_parameters(config) if config.lora else 0
        rows.append(("", "one training step, per clip", _operations(step_flops(config, clip, adapters))))
        if gpu:
            rows += _time_rows(config, gpu, ranks)
    else:
        rows.append(
            ("", f"{section.steps} steps with guidance", _operations(2 * section.steps * flops.forward))
        )
        if gpu:
            rates = Rates.of(gpu)
            seconds = 2 * section.steps * (flops.matmul / rates.matmul + flops.attention / rates.attention)
            rows.append(("time", f"denoising, on {gpu.name} (estimate)", f"{seconds:,.1f} s"))
    return rows


def _time_rows(config: Config, gpu: GPU, ranks: int) -> list[Row]:
    time = step_time(config, Cluster(gpu), ranks)
    parts = {
        "text encoder": time.text,
        "VAE encoding": time.vae,
        "forward": time.forward,
        "backward": time.backward,
        "recomputation": time.recomputation,
        "update": time.update,
        "communication that is waited for": time.communication,
    }
    rows = [("", name, f"{seconds:.3f} s") for name, seconds in parts.items() if seconds >= 5e-4]
    attention = ATTENTION_HOPPER if gpu.name.startswith(("H", "B")) else ATTENTION
    total = (
        f"one step on {gpu.name}, products at {MATMUL:.0%} and attention at {attention:.0%} of its "
        f"{gpu.bf16_tflops:g} TFLOP/s (estimate)"
    )
    return [("time", *rows[0][1:]), *rows[1:], ("", total, f"{time.total:.2f} s")]


def _sampling_rows(config: Config, gpu: GPU | None) -> list[Row]:
    sample = config.sample
    chosen, rows = savings_for(config, sample.memory), []
    for savings in LADDER:
        stages = stage_bytes(config, savings, sample.quantize)
        stage = max(stages, key=stages.get)
        marks = " *" if savings is chosen else ""
        if gpu and not fits(stages[stage], gpu):
            marks += f" (too much for {gpu.name})"
        rows.append(("", f"{savings.name}, most in {stage} (estimate){marks}", _size(stages[stage])))
    named = "* " if chosen else "nothing fits "
    return [
        ("memory per GPU", *rows[0][1:]),
        *rows[1:],
        ("", f"{named}sample.memory={sample.memory}, {sample.precision or 'as stored'}", ""),
    ]


def _training_memory(config: Config, ranks: int, is_known: bool) -> str:
    """Kinds down, phases across; nothing of one phase lives in another unless both show it."""
    phases = training_phases(config, ranks)
    names = list(phases)
    kinds = list(dict.fromkeys(kind for kinds in phases.values() for kind in kinds))
    width = max(len(kind) for kind in [*kinds, "memory per GPU"]) + 2
    lines = [f"{'memory per GPU':<{width}}" + "".join(f"{name:>24}" for name in names)]
    for kind in kinds:
        counts = [phases[name].get(kind, 0.0) for name in names]
        if any(counts):
            lines.append(f"{kind:<{width}}" + "".join(f"{_size(c) if c else '-':>24}" for c in counts))
    sums = [sum(phases[name].values()) for name in names]
    lines.append(f"{'together':<{width}}" + "".join(f"{_size(count):>24}" for count in sums))
    method = method_of(config, ranks)
    how = f"ZeRO-{method.stage} on {ranks} rank{'s' if ranks > 1 else ''}, {config.train.precision}"
    how += f", batch {config.train.batch_size}"
    if method.offload:
        how += f", {_size(on_host(method))} of host memory per rank"
    if not is_known:
        lines.append(f"{how}; without activations")
        return "\n".join(line.rstrip() for line in lines)
    phase, most = peak(phases)
    policy = config.model.transformer.checkpoint_activations
    kept = Choice.of(config).policy
    lines.append(
        f"most: {_size(most)} in {phase} (estimate): {how}, checkpoint_activations: {kept if policy else 'none'}"
    )
    return "\n".join(line.rstrip() for line in lines)


def _choices_table(config: Config, gpu: GPU, ranks: int) -> str:
    """Each way with cached and with raw clips; "*" is the configured one, "no" does not fit."""
    cluster, configured = Cluster(gpu), Choice.of(config)
    width = max(len(str(configured.policy)), 9)
    head = [
        f"ways on {ranks} x {gpu.name} ({gpu.memory_gib:g} GiB), batch {configured.batch}: peak GiB, seconds per step, "
        "largest batch that fits (estimates)",
        f"  {'':<5} {'':<{width}} {'':<11} {'cached latents and text':>26}   {'raw clips':>26}",
        f"  {'':<5} {'keeps':<{width}} {'ZeRO':<11} {'peak':>9} {'s/step':>8} {'batch':>7}   {'peak':>9} {'s/step':>8} "
        f"{'batch':>7}",
    ]
    lines, found = [], []
    ways = list(choices(config, ranks))
    if not any(_same_way(configured, way) for way in ways):
        ways.insert(0, configured)
    for way in ways:
        pair = [planned(config, _with_cache(way, cached), cluster, ranks) for cached in (True, False)]
        found += pair
        mark = "*" if _same_way(configured, way) else " "
        cells = "   ".join(_cells(p, gpu, p.choice == configured) for p in pair)
        lines.append(f"{mark} {way.method:<5} {str(way.policy):<{width}} {way.zero:<11} {cells}".rstrip())
    return "\n".join([*head, *lines, *_fastest(found, configured, gpu)])


def _cells(way: Planned, gpu: GPU, is_configured: bool) -> str:
    peak_gib = f"{way.peak / 2**30:.1f}" + ("*" if is_configured else "")
    fits_it = fits(way.peak, gpu)
    time = f"{way.seconds:.2f}" if fits_it else "no"
    return f"{peak_gib:>9} {time:>8} {way.most or '-':>7}"


def _fastest(found: list[Planned], configured: Choice, gpu: GPU) -> list[str]:
    lines = ["* configured; no: does not fit, with 1 GiB left for the driver and workspaces"]
    for method in ("full", "LoRA"):
        fitting = [p for p in found if p.choice.method == method and fits(p.peak, gpu)]
        alike = [p for p in fitting if p.choice.cached == configured.cached] or fitting
        if not alike:
            lines.append(f"fastest {method} that fits: none; more ranks, or a smaller clip")
            continue
        best = min(alike, key=lambda p: (p.seconds, p.peak))
        way, source = best.choice, "cached" if best.choice.cached else "raw"
        lines.append(
            f"fastest {method} that fits, {source}: {way.policy}, ZeRO-{way.zero}, batch {way.batch}: "
            f"{best.peak / 2**30:.1f} GiB, {best.seconds:.2f} s per step"
        )
    return lines


def _same_way(one: Choice, other: Choice) -> bool:
    return _with_cache(one, True) == _with_cache(other, True)


def _with_cache(choice: Choice, cached: bool) -> Choice:
    return dataclasses.replace(choice, cached=cached)


def _operations(flops: float) -> str:
    unit, scale = ("GFLOP", 1e9) if flops < 1e12 else ("TFLOP", 1e12) if flops < 1e16 else ("PFLOP", 1e15)
    return f"{flops / scale:,.1f} {unit}"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"
