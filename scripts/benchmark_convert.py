"""Time and memory of converting full-size weights: ``python -m scripts.benchmark_convert SCRATCH --models 2b 5b``.

Makes checkpoints of the published size with random values, converts them on every route in processes of their own,
samples what those hold, and compares: tensors bit for bit, one forward pass in diffusers, LoRA updates. 2B takes 11 GB
of SCRATCH, 5B 36 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.benchmark.machine import machine

MODELS = {"2b": ("configs/cogvideox_2b.yaml", "fp16"), "5b": ("configs/cogvideox_5b.yaml", "bf16")}
LORA_RANK = 128
SAMPLE_SECONDS = 0.02
ROOT = Path(__file__).resolve().parents[1]

_VERIFY = """
import json, sys
from cogvideox.convert.verify import first_failure, verify
from cogvideox.weights.lora.file import read_lora
source, output, merged = sys.argv[1:]
loras = [(read_lora(source), 1.0)] if merged == "True" else []
stages = verify(source, output, "transformer", loras=loras)
assert first_failure(stages) is None, first_failure(stages)
worst = max(stages, key=lambda stage: stage.max_difference - stage.known)
print(json.dumps([worst.max_difference, worst.largest]))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark_convert", description=__doc__.partition(":")[0]
    )
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure; emptied at the end")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "convert.json")
    parser.add_argument("--tiny", action="store_true", help="two layers, to try it: nothing is recorded")
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/status").is_file():
        parser.error("it reads /proc, so it needs Linux")
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    old = json.loads(arguments.output.read_text())["results"] if arguments.output.is_file() else []
    results = [result for result in old if result["model"] not in arguments.models]
    for model in arguments.models:
        scratch = arguments.scratch / model
        try:
            results += measure_model(model, scratch, arguments.tiny) + measure_lora(
                model, scratch, arguments.tiny
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    results.sort(key=lambda result: result["model"])
    report = {"machine": machine("safetensors"), "results": results}
    if not arguments.tiny:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))
    print(table(report))
    return 0


def measure_model(model: str, scratch: Path, tiny: bool) -> list[dict[str, Any]]:
    """A whole transformer to diffusers and back, and to safetensors under its own names."""
    sat, diffusers = scratch / "sat", scratch / "diffusers"
    make_checkpoint(sat, *MODELS[model], tiny)
    results = [converted(model, "SAT to diffusers", sat, diffusers, "diffusers")]
    results[-1] |= verified(sat, diffusers)
    for route, source, to in (
        ("diffusers to SAT", diffusers, "sat"),
        ("SAT to safetensors", sat, "safetensors"),
    ):
        output = scratch / to.replace("sat", "back")
        results.append(converted(model, route, source, output, to))
        if not same_tensors(sat, output):
            raise ValueError(f"{model}, {route}: the tensors are not those of the first checkpoint")
        results[-1]["compared"] = "all tensors bit-identical to the first"
        shutil.rmtree(output)
    shutil.rmtree(scratch)
    return results


def measure_lora(model: str, scratch: Path, tiny: bool) -> list[dict[str, Any]]:
    """A LoRA checkpoint of SAT, which is a whole model: the LoRA alone in every format, and merged."""
    sat = scratch / "sat"
    make_checkpoint(sat, *MODELS[model], tiny, rank=LORA_RANK)
    results = []
    for to in ("diffusers", "kohya", "comfyui"):
        output = scratch / f"{to}.safetensors"
        results.append(
            converted(
                model, f"LoRA of SAT to {to}", sat, output, to, "--component", "lora", "--dtype", "fp32"
            )
        )
        difference, largest = compared_loras(sat, output)
        results[-1]["compared"] = f"updates: max abs. difference {difference:.1e} of {largest:.2g}"
        output.unlink()
    merged = scratch / "merged"
    results.append(converted(model, "SAT, LoRA merged, to diffusers", sat, merged, "diffusers", "--merge"))
    results[-1] |= verified(sat, merged, merged=True)
    shutil.rmtree(scratch)
    return results


def converted(model: str, route: str, source: Path, output: Path, to: str, *options: str) -> dict[str, Any]:
    command = ["-m", "scripts.convert_weights", str(source), str(output), "--to", to, "--no-verify", *options]
    measured, _ = run(command)
    sizes = {"input_gb": gigabytes(source), "output_gb": gigabytes(output)}
    return {"model": model, "route": route, **measured, **sizes}


def verified(source: Path, output: Path, merged: bool = False) -> dict[str, Any]:
    """One forward pass on both sides; the stage with the largest difference beyond that of the last norm's eps."""
    measured, printed = run(["-c", _VERIFY, str(source), str(output), str(merged)])
    difference, largest = json.loads(printed.splitlines()[-1])
    return {
        "compared": f"forward in diffusers: max abs. difference {difference:.1e} of {largest:.2g}",
        "verify_seconds": measured["seconds"],
        "verify_peak_anonymous_gb": measured["peak_anonymous_gb"],
    }


def compared_loras(source: Path, output: Path) -> tuple[float, float]:
    from cogvideox.convert.lora import largest_difference
    from cogvideox.weights.lora.file import read_lora

    return largest_difference(read_lora(source).modules, read_lora(output).modules)


def make_checkpoint(folder: Path, config_file: str, precision: str, tiny: bool, rank: int = 0) -> None:
    """A SAT folder with the names and shapes of our own network, as published files have them, and random values.

    rank: of a LoRA beside the weights, as SAT saves one.
    """
    import torch

    from cogvideox.config import load_config
    from cogvideox.convert.models import STATES, TAG
    from cogvideox.convert.writer import Entry, write_torch
    from cogvideox.model.lora import inject_lora
    from cogvideox.model.position import SincosPosition3D
    from cogvideox.system import DTYPES, build_transformer
    from cogvideox.weights.transformer_keys import POSITION_TABLE, SAT_PREFIX

    overrides = ["model.transformer.num_layers=2"] if tiny else []
    net = build_transformer(load_config([str(ROOT / config_file)], overrides), device="meta")
    dtype, position = DTYPES[precision], net.mixins["pos_embed"]
    if rank:
        inject_lora(net, rank)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    tables = {"transformer.position_embeddings.weight": torch.zeros(64, net.hidden_size)}
    if isinstance(position, SincosPosition3D):
        tables = {POSITION_TABLE: position.table(position.grid, position.text_length)}
    entries = [Entry(SAT_PREFIX + name, shape, dtype) for name, shape in shapes.items()]
    entries += [Entry(SAT_PREFIX + name, tuple(t.shape), dtype) for name, t in tables.items()]
    generator = torch.Generator().manual_seed(0)

    def tensors():
        for name, shape in shapes.items():
            # A scale at which activations stay near 1, so that their differences mean something.
            value = torch.empty(shape).normal_(std=shape[-1] ** -0.5, generator=generator)
            yield SAT_PREFIX + name, (value + 1 if is_norm(name) else value).to(dtype)
        for name, tensor in tables.items():
            yield SAT_PREFIX + name, tensor.to(dtype)

    def is_norm(name: str) -> bool:
        return "norm" in name and name.endswith("weight")

    (folder / TAG).mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    write_torch(folder / STATES, "module", entries, tensors(), {})


def run(command: list[str]) -> tuple[dict[str, Any], str]:
    """Seconds and peak memory of ``python COMMAND`` in a process of its own, and what it printed."""
    path = os.pathsep.join([str(ROOT / "sat"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    status, peak = Path(f"/proc/{process.pid}/status"), {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        for line in _lines(status):
            key, _, value = line.partition(":")
            if key in peak:
                peak[key] = max(peak[key], int(value.split()[0]) * 1024)
        time.sleep(SAMPLE_SECONDS)
    seconds = time.monotonic() - start
    if process.returncode:
        raise OSError(f"{' '.join(command)} ended with exit code {process.returncode}")
    measured = {
        "seconds": round(seconds, 1),
        "peak_anonymous_gb": round(peak["RssAnon"] / 1e9, 2),
        "peak_mapped_gb": round(peak["RssFile"] / 1e9, 2),
    }
    return measured, process.stdout.read()


def same_tensors(first: Path, second: Path) -> bool:
    """Whether all tensors but optional ones are equal bit for bit."""
    import torch

    from cogvideox.weights.geometry import OPTIONAL_KEYS
    from cogvideox.weights.reader import WeightsReader
    from cogvideox.weights.transformer_keys import SAT_PREFIX

    readers = [WeightsReader(path, "transformer", ema=False) for path in (first, second)]
    names = [
        {name for name in reader.tensors if not OPTIONAL_KEYS.fullmatch(name.removeprefix(SAT_PREFIX))}
        for reader in readers
    ]
    return names[0] == names[1] and all(
        torch.equal(*(reader.tensor(name).view(torch.int16) for reader in readers)) for name in names[0]
    )


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        "| model | route | in | out | seconds | peak anonymous | peak mapped | compared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        rows.append(
            f"| {result['model'].upper()} | {result['route']} | {result['input_gb']} GB | {result['output_gb']} GB | "
            f"{result['seconds']} | {result['peak_anonymous_gb']} GB | {result['peak_mapped_gb']} GB | "
            f"{result['compared']}{_verification(result)} |"
        )
    where = report["machine"]
    note = (
        f"Random weights of the published sizes, shards of 5 GB, {where['cpu_cores']} CPU cores, "
        f"{where['memory_gb']} GB of memory, torch {where['torch']}; `python -m scripts.benchmark_convert`. Seconds "
        f"include the hash of the source for the record. Mapped memory is the system's file cache, which it takes back."
    )
    return "\n".join([*rows, "", note, ""])


def _verification(result: dict[str, Any]) -> str:
    if "verify_seconds" not in result:
        return ""
    return f" ({result['verify_seconds']} s, {result['verify_peak_anonymous_gb']} GB anonymous)"


def gigabytes(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1e9, 2)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []


if __name__ == "__main__":
    sys.exit(main())
