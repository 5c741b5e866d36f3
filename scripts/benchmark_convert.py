"""Time and memory of converting full-size weights: ``python -m scripts.benchmark_convert SCRATCH --models 2b 5b``.

Makes checkpoints of the published size with random values, converts them to diffusers and back in processes of their
own, samples what those hold, and compares every tensor at the end. 2B takes 11 GB of SCRATCH, 5B 34 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = {"2b": ("configs/cogvideox_2b.yaml", "fp16"), "5b": ("configs/cogvideox_5b.yaml", "bf16")}
SAMPLE_SECONDS = 0.02
ROOT = Path(__file__).resolve().parents[1]


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
        results += measure(model, arguments.scratch, arguments.tiny)
    results.sort(key=lambda result: result["model"])
    report = {"machine": machine(), "results": results}
    if not arguments.tiny:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))
    print(table(report))
    return 0 if all(result["bit_identical"] for result in results) else 1


def measure(model: str, scratch: Path, tiny: bool) -> list[dict[str, Any]]:
    """Both ways, from a random checkpoint; what was written is deleted as soon as it has been read."""
    import shutil

    sat, diffusers, back = (scratch / f"{model}-{name}" for name in ("sat", "diffusers", "back"))
    results = []
    try:
        make_checkpoint(sat, *MODELS[model], tiny)
        for source, output, to in ((sat, diffusers, "diffusers"), (diffusers, back, "sat")):
            command = ["-m", "scripts.convert_weights", str(source), str(output), "--to", to, "--no-verify"]
            results.append({"model": model, "route": f"{source.name} to {output.name}", **run(command)})
            results[-1] |= {"input_gb": gigabytes(source), "output_gb": gigabytes(output)}
        identical = same_tensors(sat, back)
        for result in results:
            result["bit_identical"] = identical
    finally:
        for folder in (sat, diffusers, back):
            shutil.rmtree(folder, ignore_errors=True)
    return results


def make_checkpoint(folder: Path, config_file: str, precision: str, tiny: bool) -> None:
    """A SAT folder with the names and shapes of our own network, as published files have them, and random values."""
    import torch

    from cogvideox.config import load_config
    from cogvideox.convert.models import STATES, TAG
    from cogvideox.convert.writer import Entry, write_torch
    from cogvideox.model.position import SincosPosition3D
    from cogvideox.system import DTYPES, build_transformer
    from cogvideox.weights.transformer_keys import POSITION_TABLE, SAT_PREFIX

    overrides = ["model.transformer.num_layers=2"] if tiny else []
    net = build_transformer(load_config([str(ROOT / config_file)], overrides), device="meta")
    dtype, position = DTYPES[precision], net.mixins["pos_embed"]
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    tables = {"transformer.position_embeddings.weight": torch.zeros(64, net.hidden_size)}
    if isinstance(position, SincosPosition3D):
        tables = {POSITION_TABLE: position.table(position.grid, position.text_length)}
    entries = [Entry(SAT_PREFIX + name, shape, dtype) for name, shape in shapes.items()]
    entries += [Entry(SAT_PREFIX + name, tuple(t.shape), dtype) for name, t in tables.items()]
    generator = torch.Generator().manual_seed(0)

    def tensors():
        for name, shape in shapes.items():
            # Bits of all numbers from 0 to 2, which any rounding on the way would change.
            bits = torch.randint(0, 2**14, shape, dtype=torch.int16, generator=generator)
            yield SAT_PREFIX + name, bits.view(dtype)
        for name, tensor in tables.items():
            yield SAT_PREFIX + name, tensor.to(dtype)

    (folder / TAG).mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    write_torch(folder / STATES, "module", entries, tensors(), {})


def run(command: list[str]) -> dict[str, Any]:
    """Seconds and peak memory of ``python COMMAND`` in a process of its own."""
    path = os.pathsep.join([str(ROOT / "sat"), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
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
    return {
        "seconds": round(seconds, 1),
        "peak_anonymous_gb": round(peak["RssAnon"] / 1e9, 2),
        "peak_mapped_gb": round(peak["RssFile"] / 1e9, 2),
    }


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


def machine() -> dict[str, Any]:
    from importlib import metadata

    memory = next(line for line in _lines(Path("/proc/meminfo")) if line.startswith("MemTotal"))
    return {
        "cpu_cores": os.cpu_count(),
        "memory_gb": round(int(memory.split()[1]) * 1024 / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "safetensors")},
    }


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        "| route | in | out | seconds | peak anonymous | peak mapped | bit-identical both ways |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        rows.append(
            f"| {result['route']} | {result['input_gb']} GB | {result['output_gb']} GB | {result['seconds']} | "
            f"{result['peak_anonymous_gb']} GB | {result['peak_mapped_gb']} GB | "
            f"{'yes' if result['bit_identical'] else 'NO'} |"
        )
    where = report["machine"]
    note = (
        f"Random weights of the published sizes, shards of 5 GB, {where['cpu_cores']} CPU cores, "
        f"{where['memory_gb']} GB of memory, torch {where['torch']}; `python -m scripts.benchmark_convert`. Seconds "
        f"include the hash of the source for the record. Mapped memory is the system's file cache, which it takes back."
    )
    return "\n".join([*rows, "", note, ""])


def gigabytes(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 2)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []


if __name__ == "__main__":
    sys.exit(main())
