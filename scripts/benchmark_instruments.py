"""What a run's instruments cost: ``python -m scripts.benchmark_instruments``.

Trains configs/tiny_t2v.yaml on clips in memory, each step in turn with all instruments and with none, a log line every
``log_every`` steps of each kind, and compares their process CPU time. Short steps are the hard case: what the
instruments do takes about the same time in a step of a large model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.benchmark.machine import machine

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.01  # of a step
BATCH = 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark_instruments", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--pairs", type=int, default=30, help="rounds with instruments, and as many without")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "instruments.json")
    parser.add_argument("--try", dest="is_trial", action="store_true", help="record nothing")
    arguments = parser.parse_args(argv)
    if arguments.pairs < 1:
        parser.error(f"--pairs={arguments.pairs}: expected at least 1")
    with tempfile.TemporaryDirectory() as folder:
        report = {"machine": machine("deepspeed"), **measure(Path(folder), arguments.pairs)}
    if not arguments.is_trial:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))
    print(table(report))
    return 0


def measure(folder: Path, pairs: int) -> dict[str, Any]:
    import torch

    from cogvideox import dist
    from cogvideox.config import load_config
    from cogvideox.engine.logging import RunLog
    from cogvideox.engine.trainer import Trainer
    from cogvideox.system import VideoDiffusion
    from train_video import work_of

    torch.set_num_threads(1)
    dist.init()
    config = load_config(
        [ROOT / "configs" / "tiny_t2v.yaml"], ["train.steps=1000000", f"train.batch_size={BATCH}"]
    )
    dist.seed_everything(config.seed)
    system = VideoDiffusion(config)
    system.prepare_training(dist.device())
    trainer = Trainer(system, Clips(config), config.train, folder, work=work_of(config))
    log = RunLog(folder, steps=config.train.steps, start=0, trackers=[])
    batches = trainer.loader.iterate(0)
    timed_pair(trainer, batches, log)  # what is built in first steps
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(pairs):
        for is_on, spent in timed_pair(trainer, batches, log).items():
            seconds[is_on].append(spent)
    log.close()
    steps = config.train.log_every
    ratios = [on / off for on, off in zip(seconds[True], seconds[False], strict=True)]
    plain = statistics.median(seconds[False]) / steps
    parts = direct_costs(trainer, batches)
    return {
        "config": "configs/tiny_t2v.yaml",
        "steps_per_log_line": steps,
        "pairs": pairs,
        "step_ms": round(1e3 * plain, 2),
        "ratio": quantiles(ratios),
        "direct_ms": {name: round(1e3 * value, 4) for name, value in parts.items()},
        "direct_fraction": round((parts["per_step"] + parts["per_log_line"] / steps) / plain, 6),
    }


def timed_pair(trainer: Any, batches: Iterator[Any], log: Any) -> dict[bool, float]:
    """Process CPU seconds of ``log_every`` steps and a line with instruments, and of as many without.

    Step by step in turn, in changing order, so that what else the machine does falls on both alike.
    """
    steps, seconds = trainer.config.log_every, {True: 0.0, False: 0.0}
    for index in range(steps):
        for is_on in (True, False) if index % 2 else (False, True):
            step = with_instruments if is_on else without_instruments
            seconds[is_on] += step(trainer, batches, log, index == steps - 1)
    return seconds


def with_instruments(trainer: Any, batches: Iterator[Any], log: Any, is_logged: bool) -> float:
    return _step(trainer, batches, log, is_logged, trainer.instruments.step, trainer._measured)


def without_instruments(trainer: Any, batches: Iterator[Any], log: Any, is_logged: bool) -> float:
    """The same step and the same kind of line: loss, gradient norm and learning rate alone."""
    from contextlib import nullcontext

    from cogvideox.engine.logging import Means
    from cogvideox.phases import untimed

    module = trainer.engine.module
    phases, trainer.phases, module.phases = trainer.phases, untimed, untimed
    means, trainer.means = trainer.means, getattr(trainer, "plain_means", None) or Means()
    trainer.plain_means = trainer.means
    module._losses_by_band = lambda *_: {}

    def measured() -> dict[str, float | None]:
        rate = trainer.optimizer.param_groups[0]["lr"]
        return trainer.means.flush() | {"train/grad_norm": float(trainer.grad_norm), "train/lr": rate}

    try:
        return _step(trainer, batches, log, is_logged, lambda *_: nullcontext(), measured)
    finally:
        trainer.phases = module.phases = phases
        trainer.means = means
        del module._losses_by_band


def _step(
    trainer: Any, batches: Iterator[Any], log: Any, is_logged: bool, around: Callable, measured: Callable
) -> float:
    """Process CPU seconds of one step of the trainer's own loop, without saves."""
    start = time.process_time()
    with around(trainer.step + 1, is_logged):
        trainer._train_step(batches)
    trainer.step += 1
    if is_logged:
        log.write(trainer.step, measured())
    return time.process_time() - start


def direct_costs(trainer: Any, batches: Iterator[Any]) -> dict[str, float]:
    """CPU seconds of the instruments' own work: in each step, and on top of it in a step that is logged.

    Less noisy than the difference of two rounds, and blind to what they do to caches.
    """
    import torch

    from cogvideox.phases import Phases

    phases = Phases(trainer.engine.device)
    parts = ("data", "forward", "text", "vae", "backward", "optimizer")

    def marks() -> None:
        with phases.step():
            for part in parts:
                with phases(part):
                    pass

    module = trainer.engine.module
    clip = torch.zeros(trainer.config.batch_size, 3, 8, 8, 8)
    t = torch.arange(len(clip)) * (module.schedule.num_timesteps // len(clip))

    def bands() -> None:
        trainer.means.add(module._losses_by_band(clip, clip, t))

    hooks: list[float] = []
    norms = trainer.instruments.norms

    def timed(hook: Callable) -> Callable:
        def call(*arguments: Any) -> None:
            start = time.process_time()
            hook(*arguments)
            hooks[-1] += time.process_time() - start

        return call

    for handle in norms.hooks:
        handle.remove()
    optimizer = trainer.optimizer
    optimizer.register_step_pre_hook(timed(norms.note_gradients))
    optimizer.register_step_post_hook(timed(norms.note_updates))
    reads = []
    for _ in range(10):
        hooks.append(0.0)
        with trainer.instruments.step(trainer.step + 1, True):
            trainer._train_step(batches)
        trainer.step += 1
        start = time.process_time()
        trainer.instruments.read(float(trainer.grad_norm))
        trainer.resources.metrics()
        reads.append(time.process_time() - start)
    return {
        "per_step": _mean_seconds(marks, 2000) + _mean_seconds(bands, 200),
        "per_log_line": statistics.median(hooks) + statistics.median(reads),
    }


def _mean_seconds(call: Callable[[], None], times: int) -> float:
    call()
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


class Clips:
    """Batches of random clips, made once."""

    def __init__(self, config: Any):
        import torch

        generator, data, size = torch.Generator().manual_seed(0), config.data, config.train.batch_size
        shape = (size, data.num_frames, 3, data.height, data.width)
        video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.batch = {"video": video, "caption": ["a red circle moving right"] * size}

    def iterate(self, start: int) -> Iterator[Any]:
        while True:
            yield self.batch


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    places = {"p10": 0.1, "median": 0.5, "p90": 0.9}
    return {name: round(ordered[round(at * (len(ordered) - 1))], 5) for name, at in places.items()}


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    ratio, direct = report["ratio"], report["direct_ms"]
    rows = [
        "| a step without instruments | with : without, median (10-90 %) | work in each step | more in a logged step | "
        "together, of a step |",
        "|---|---|---|---|---|",
        f"| {report['step_ms']} ms | {ratio['median']:.4f} ({ratio['p10']:.4f}-{ratio['p90']:.4f}) | "
        f"{direct['per_step']} ms | {direct['per_log_line']} ms | {report['direct_fraction']:.2%} |",
    ]
    where = report["machine"]
    note = (
        f"{report['config']} with {BATCH} clips a step on {where['cpu_cores']} CPU cores (one used), "
        f"torch {where['torch']}, process CPU time, {report['pairs']} pairs of {report['steps_per_log_line']} steps "
        f"and a log line; `python -m scripts.benchmark_instruments`. The limit is {LIMIT:.0%} of a step."
    )
    return "\n".join([*rows, "", note, ""])


if __name__ == "__main__":
    sys.exit(main())
