"""Speed and memory against diffusers, with the same weights, inputs and precision, in the same run.

    python -m scripts.benchmark model            one of model, vae, train, sample, loader, counted, roofline, growth
    python -m scripts.benchmark all              all of them, under ten minutes

On a GPU the sizes are the published ones, on a CPU small ones. Results go to docs/benchmarks/speed.{json,md,png}; the
benchmarks that were not run keep theirs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from scripts.benchmark import report, results
from scripts.benchmark.settings import Settings, one_thread

BENCHMARKS = {
    "roofline": "what this machine can do",
    "counted": "operations, bytes and live memory at the published sizes, exact",
    "model": "a forward pass of the transformer",
    "vae": "encode and decode",
    "train": "a LoRA step",
    "sample": "a sampling run",
    "loader": "clips from video files",
    "growth": "time and memory against frames and pixels",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("names", nargs="+", choices=[*BENCHMARKS, "all"], metavar="NAME",
                        help="; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items()))  # fmt: skip
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--rounds", type=int, default=Settings.rounds, help="of each comparison (%(default)s)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave compiled candidates out")
    parser.add_argument(
        "--output", type=Path, default=results.FOLDER, help="folder of the results (docs/benchmarks)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes, to try it; with --output only"
    )
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: expected at least 1")
    if arguments.quick and arguments.output == results.FOLDER:
        parser.error("--quick measures nothing of use: give it an --output of its own")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch finds no GPU here")
    settings = Settings(
        device=arguments.device,
        rounds=arguments.rounds,
        compile=not arguments.no_compile,
        quick=arguments.quick,
    )
    names = list(BENCHMARKS) if "all" in arguments.names else list(dict.fromkeys(arguments.names))
    command = f"python -m scripts.benchmark {' '.join(sys.argv[1:] if argv is None else argv)}"
    for name in names:
        print(f"{name}: {BENCHMARKS[name]}", flush=True)
        start = time.monotonic()
        with one_thread():
            rows = importlib.import_module(f"scripts.benchmark.{name}").run(settings)
        spent = time.monotonic() - start
        results.save(arguments.output, name, rows, command=command, seconds=spent, device=settings.device)
        for row in rows:
            print(f"  {line(row)}", flush=True)
    report.write(arguments.output)
    return 0


def line(row: results.Row) -> str:
    """A row for the console."""
    parts = [f"{row.case} | {row.candidate}"]
    if row.seconds is not None:
        parts.append(f"{row.seconds:.4g} s")
    if row.ratio is not None:
        parts.append(f"{row.ratio.median:.3f} x ours ({row.ratio.low:.3f}-{row.ratio.high:.3f})")
    if row.max_difference is not None:
        parts.append(f"max |difference| {row.max_difference:.2g}")
    parts += [f"{kind} {value / 1e6:.1f} MB" for kind, value in row.memory.items()]
    parts += [f"{name} {value:.6g}" for name, value in row.counted.items()]
    if row.bound_fraction is not None:
        parts.append(f"{row.bound_fraction:.0%} of the bound")
    return " | ".join([*parts, *([row.note] if row.note else [])])


if __name__ == "__main__":
    sys.exit(main())
