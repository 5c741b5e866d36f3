"""What the caches save in training: ``python -m scripts.benchmark_cache SCRATCH``.

The tiny model with a frozen text encoder, from videos and from caches, on this CPU: process time of a step in pairs,
which take turns so that both see the same machine; memory and time until the first step in processes of their own.
Beside it, the arithmetic for the published models, where no run was made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.benchmark.machine import machine

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 15
SAMPLE_SECONDS = 0.01

# FLOPs of the published VAE and T5-XXL for 49 frames of 480x720, counted on meta tensors; the GPU's rate is one that
# large matrix products reach on an H200, an upper bound for all parts alike.
VAE_TFLOP, T5_TFLOP, TFLOP_PER_SECOND = 149.0, 2.2, 790.0
T5_GB, VAE_GB, VAE_ENCODE_GB = 9.5, 0.43, 30.6
MODELS = {
    "2B": ("cogvideox_2b", "lora"),
    "2B full": ("cogvideox_2b", "sft"),
    "5B": ("cogvideox_5b", "lora"),
    "5B full": ("cogvideox_5b", "sft"),
}

_OVERLAY = """
model:
  conditions:
    - target: cogvideox.conditioning.text.TextCondition
      params: {max_length: 32, dropout: 0.1, tokenizer: byt5}
train: {ema_decay: null, save_every: 1000000, log_every: 1000000}
"""
_T5 = dict(d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, vocab_size=384, dropout_rate=0.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark_cache", description=__doc__.partition(":")[0]
    )
    parser.add_argument("scratch", type=Path, help="a folder for clips, weights, caches and runs")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "cache.json")
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/status").is_file():
        parser.error("it reads /proc, so it needs Linux")
    scratch = arguments.scratch.resolve()
    base = prepare(scratch)
    cached = [*base, f"data.latent_cache={scratch}/cache", f"data.text_cache={scratch}/cache"]
    report: dict[str, Any] = {"machine": machine(), "starts": {}}
    # Nothing is cached; then the same; then all is.
    for name, command in (("raw", base), ("cached, filling", cached), ("cached, complete", cached)):
        report["starts"][name] = start(command, scratch / "runs" / name.replace(", ", "-"))
    report["step"] = compare_steps(base, cached, arguments.pairs)
    report["calculated"] = [calculated(name, *files) for name, files in MODELS.items()]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(table(report))
    print(table(report))
    return 0


def prepare(scratch: Path) -> list[str]:
    """Clips, a VAE and a T5 with random weights; returns the command line that trains from them."""
    import torch
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    from cogvideox.config import load_config
    from cogvideox.data.moving_shapes import combinations, make_dataset
    from cogvideox.sampling.video_io import write_video
    from cogvideox.system_vae import build_vae

    scratch.mkdir(parents=True, exist_ok=True)
    tiny, overlay = ROOT / "configs" / "tiny_t2v.yaml", scratch / "frozen.yaml"
    overlay.write_text(_OVERLAY)
    make_dataset(scratch / "clips", combinations()[0], 2, seed=0, write_video=write_video)
    torch.manual_seed(0)
    save_file(build_vae(load_config([tiny])).state_dict(), scratch / "vae.safetensors")
    T5EncoderModel(T5Config(**_T5)).save_pretrained(scratch / "t5")
    paths = [
        f"data.path={scratch}/clips",
        f"load.vae={scratch}/vae.safetensors",
        f"load.text_encoder={scratch}/t5",
    ]
    return ["--base", str(tiny), str(overlay), *paths]


def start(command: list[str], run: Path) -> dict[str, float]:
    """A run of one step in a process of its own: its CPU time, and its peak of memory that is no file's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "sat"), "OMP_NUM_THREADS": "1"}
    options = [*command, f"run.dir={run}", "train.steps=1"]
    process = subprocess.Popen(
        [sys.executable, "train_video.py", *options], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        try:
            found = next((line for line in status.read_text().splitlines() if line.startswith("RssAnon")), "")
            peak = max(peak, int(found.split()[1])) if found else peak
        except (FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(SAMPLE_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise OSError(f"train_video.py {' '.join(options)} ended with exit code {process.returncode}")
    return {"cpu_seconds": round(ended[2].ru_utime, 2), "peak_anonymous_mb": round(peak / 1e3)}


def compare_steps(raw: list[str], cached: list[str], pairs: int) -> dict[str, Any]:
    """CPU seconds of forward and backward with the loader's share, raw and cached in turn."""
    takers = {"raw": stepper(raw), "cached": stepper(cached)}
    seconds: dict[str, list[float]] = {name: [] for name in takers}
    for pair in range(pairs + 2):
        names = list(takers) if pair % 2 else list(reversed(takers))
        for name in names:
            before = time.process_time()
            next(takers[name])
            if pair >= 2:  # the first ones allocate
                seconds[name].append(time.process_time() - before)
    ratios = [raw / cached for raw, cached in zip(seconds["raw"], seconds["cached"], strict=True)]
    return {
        "pairs": pairs,
        "raw_seconds": round(statistics.median(seconds["raw"]), 4),
        "cached_seconds": round(statistics.median(seconds["cached"]), 4),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_quartiles": [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]],
    }


def stepper(command: list[str]) -> Any:
    """Endless training steps without an optimizer: batch, loss, gradients."""
    import torch

    from cogvideox import dist
    from cogvideox.build import build
    from cogvideox.config import load_config
    from cogvideox.data.loader import ResumableLoader
    from cogvideox.dist import RandomStreams
    from cogvideox.system_cache import with_caches
    from train_video import open_data

    dist.init()
    torch.set_num_threads(1)
    files = [word for word in command[1:] if word.endswith(".yaml")]
    config = load_config(files, [word for word in command if "=" in word])
    dist.seed_everything(config.seed)
    system = build(config.system, config=config)
    dataset = open_data(config, config.data.path)
    if config.data.latent_cache:
        (dataset,) = with_caches(system, [dataset])
    system.load_weights()
    system.prepare_training(dist.device())
    for step, batch in enumerate(ResumableLoader(dataset, config.train.batch_size, config.seed).iterate()):
        loss, _ = system(batch, RandomStreams.at(config.seed, step))
        loss.backward()
        system.zero_grad()
        yield


def calculated(name: str, model: str, method: str) -> dict[str, Any]:
    """Arithmetic for one clip of a published model: what a step costs besides the network, and what stays in memory."""
    from cogvideox.config import load_config
    from cogvideox.plan import clip_of, step_flops

    configs = ROOT / "configs"
    config = load_config([configs / f"{model}.yaml", configs / f"{method}.yaml"])
    step = step_flops(config, clip_of(config, config.data)) / 1e12
    moments = 13 * 32 * 60 * 90 * 2  # bf16
    return {
        "model": name,
        "step_tflop": round(step),
        "vae_and_t5_tflop": VAE_TFLOP + T5_TFLOP,
        "step_ratio": round((step + VAE_TFLOP + T5_TFLOP) / step, 2),
        "seconds_saved_at_least": round((VAE_TFLOP + T5_TFLOP) / TFLOP_PER_SECOND, 2),
        "resident_gb_saved": T5_GB + VAE_GB,
        "peak_gb_saved_at_most": round(T5_GB + VAE_GB + VAE_ENCODE_GB, 1),
        "entry_mb": round((moments + 226 * 4096 * 2) / 1e6, 1),
    }


_MEASURED = """Measured: `configs/tiny_t2v.yaml` with a frozen text encoder, batch 16, one thread, torch {torch};
`python -m scripts.benchmark_cache SCRATCH`.

A step (batch, loss, gradients) takes {raw_seconds} s of CPU time from videos and {cached_seconds} s from caches: videos
take **{ratio} times** as long (median of {pairs} pairs, quartiles {low} and {high}).

| a run of one step | CPU time, start included | peak memory (anonymous) |
|---|---|---|
{starts}

Most of that memory is the libraries': these models are small.
"""

_CALCULATED = """Calculated, not measured: one clip of 49 frames of 480x720, encoded whole, in bf16; the network's step
from `plan.py`, VAE encode {vae} and T5-XXL {t5} TFLOP. Memory: T5 {t5_gb} GB, VAE {vae_gb} GB, and {encode_gb} GB
that an encode needs for a moment, of which a run saves what is above its own peak. Seconds are at {rate} TFLOP/s, a
floor.

| model | step | VAE and T5 | raw / cached | saved per clip | memory saved | peak saved, at most | on disk |
|---|---|---|---|---|---|---|---|
{rows}
"""


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    step = report["step"]
    low, high = step["ratio_quartiles"]
    starts = [
        f"| {name} | {found['cpu_seconds']} s | {found['peak_anonymous_mb']} MB |"
        for name, found in report["starts"].items()
    ]
    rows = [
        f"| {row['model']} | {row['step_tflop']} TFLOP | {row['vae_and_t5_tflop']:.0f} TFLOP | "
        f"{row['step_ratio']} | {row['seconds_saved_at_least']} s or more | {row['resident_gb_saved']:.1f} GB | "
        f"{row['peak_gb_saved_at_most']} GB | {row['entry_mb']} MB |"
        for row in report["calculated"]
    ]
    measured = _MEASURED.format(
        torch=report["machine"]["torch"], low=low, high=high, starts="\n".join(starts), **step
    )
    calculated = _CALCULATED.format(
        vae=f"{VAE_TFLOP:.0f}", t5=T5_TFLOP, t5_gb=T5_GB, vae_gb=VAE_GB, encode_gb=VAE_ENCODE_GB,
        rate=f"{TFLOP_PER_SECOND:.0f}", rows="\n".join(rows),
    )  # fmt: skip
    return f"{measured}\n{calculated}"


if __name__ == "__main__":
    sys.exit(main())
