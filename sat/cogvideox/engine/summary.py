"""``summary.json``: a whole run in one object, written when it ends or is stopped."""

from __future__ import annotations

import json
import os
from typing import Any

from cogvideox import dist, environment
from cogvideox.engine.events import read_events
from cogvideox.engine.resources import highest

FILE = "summary.json"


def write_summary(trainer: Any) -> None:
    """Write ``RUN/summary.json`` from a ``Trainer``'s account of its run. Every rank must call; rank 0 writes.

    What a run does not have (a quarantine, a best checkpoint, a fingerprint of its data) is null. Seconds, samples and
    peaks are those of all lives of the run, as far as they were saved: a life that was killed after its last checkpoint
    leaves no account of the time since.
    """
    bad = dist.gather(_bad_clips(trainer.loader))
    peaks = dist.gather(trainer.resources.peaks())
    if not dist.is_main():
        return
    facts = {
        "steps": trainer.step,
        "finished": trainer.step >= trainer.config.steps,
        "samples_seen": trainer.samples_seen,
        "skipped_steps": trainer.skipped.steps,
        "skipped_clips": None if bad[0] is None else len({clip for rank in bad for clip in rank}),
        "best": trainer.looks.best,
        "seconds": {phase: round(value, 3) for phase, value in trainer.resources.seconds().items()},
        **peak_memory(peaks),
        "attempts": max(sum(event.get("kind") == "started" for event in read_events(trainer.run_dir)), 1),
        "ranks": dist.world_size(),
        "versions": environment.versions(),
        "dataset": trainer.facts().get("dataset"),
    }
    temporary = trainer.run_dir / f".{FILE}"
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(temporary, trainer.run_dir / FILE)


def peak_memory(ranks: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The highest rank's, from phase -> kind -> GiB of each.

    ``peak_memory_gib``: phase -> what the device's allocator has given out, or a process's resident size on a CPU.
    ``peak_reserved_gib``: phase -> what the allocator held, its cache included; absent on a CPU.
    """
    phases = dict.fromkeys(phase for rank in ranks for phase in rank)
    sizes = {phase: highest([rank.get(phase, {}) for rank in ranks]) for phase in phases}
    result: dict[str, dict[str, float]] = {}
    for key, kinds in (("peak_memory_gib", ("alloc", "rss")), ("peak_reserved_gib", ("reserved",))):
        found = {p: round(size, 4) for p, of in sizes.items() for kind, size in of.items() if kind in kinds}
        if found:
            result[key] = found
    return result


def _bad_clips(loader: Any) -> list[str] | None:
    """The names of the clips that this rank's loader has left out; None where it does not say."""
    quarantine = getattr(loader, "quarantine", None)
    return None if quarantine is None else [entry["clip"] for entry in quarantine.entries]
