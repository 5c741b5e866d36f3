"""From the finished stages to what a reader looks at: scores.json, contact sheet, loss curves, report.html."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.data.moving_shapes import NEW_COLOURS, Combination
from scripts.demo.plan import available_cores, spread
from scripts.demo.report import Card, Section, write_curves, write_report, write_sheet
from scripts.demo.scores import ATTRIBUTES, Verdict, judge, missed_aims, sampled_videos, score
from scripts.demo.stage import say
from scripts.demo.vae import read_measurement

if TYPE_CHECKING:
    from scripts.demo.plan import Demo

NEW = ", ".join(NEW_COLOURS)
TITLES = {
    "real": "real clips",
    "reconstructed": "real clips through the VAE",
    "seen": "seen prompts",
    "held_out": "held-out combinations",
    "lora": f"{NEW}, with LoRA",
    "without_lora": f"{NEW}, without LoRA",
    "untrained": "untrained transformer",
}
PACKAGES = ("torch", "deepspeed", "SwissArmyTransformer", "transformers", "numpy", "av")


def write_results(demo: Demo, records: dict[str, dict[str, Any]]) -> Path:
    """Judge every video, write the files into the demo's folder, print the scores. Returns the report's path."""
    verdicts = judge_all(demo)
    scores = {name: score(verdicts[name]) for name in TITLES}
    results = {
        "scores": scores,
        "missed_aims": missed_aims(scores),
        "titles": TITLES,
        "vae": read_measurement(demo),
        "clip": {
            "clips": len(demo.true_clips("train")),
            **{key: getattr(demo.config.data, key) for key in ("num_frames", "height", "width", "fps")},
        },
        "seconds_total": round(sum(record["seconds"] for record in records.values()), 1),
        "peak_memory_gib": max(r["peak_memory_gib"] or 0.0 for r in records.values()) or None,
        "stages": {
            name: {
                "seconds": record["seconds"],
                "peak_memory_gib": record["peak_memory_gib"],
                "command_line": shell_line(record["command"], demo.environment)
                if record["command"]
                else None,
            }
            for name, record in records.items()
        },
        "ranks": demo.ranks,
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "videos": {
            name: [
                {"video": os.path.relpath(v.video, demo.output), "wanted": v.wanted, "found": v.found}
                for v in verdicts[name]
            ]
            for name in TITLES
        },
    }
    sections = make_sections(demo, verdicts)
    curves = demo.output / "loss.png"
    titles = {"vae": "VAE", "t2v": "transformer", "lora": "LoRA"}
    write_curves(curves, {title: demo.run(name) / "metrics.jsonl" for name, title in titles.items()})
    write_sheet(demo.output / "contact_sheet.png", sections)
    (demo.output / "scores.json").write_text(json.dumps(results, indent=1) + "\n")
    report = demo.output / "report.html"
    write_report(report, results, sections, curves)
    print_scores(results)
    return report


def judge_all(demo: Demo) -> dict[str, list[Verdict]]:
    """Set of videos -> a verdict for each."""
    true_clips = demo.true_clips("validation", "held_out", "lora")
    reconstructed = [
        demo.samples("reconstructed") / path.name for path in demo.true_clips("validation", "held_out")
    ]
    from_trained = [judge(video, wanted) for video, wanted in _sampled(demo, "trained")]
    seen, held_out = len(demo.seen), len(demo.seen) + len(demo.held_out) * demo.scale.repeats
    return {
        "real": [judge(path, drawn(path)) for path in true_clips],
        "reconstructed": [judge(path, drawn(path)) for path in reconstructed],
        "seen": from_trained[:seen],
        "held_out": from_trained[seen:held_out],
        "without_lora": from_trained[held_out:],
        "lora": [judge(video, wanted) for video, wanted in _sampled(demo, "lora")],
        "untrained": [judge(video, wanted) for video, wanted in _sampled(demo, "untrained")],
    }


def _sampled(demo: Demo, model: str) -> list[tuple[Path, Combination]]:
    wanted = demo.prompts[model]
    return list(zip(sampled_videos(demo.samples(model), wanted), wanted, strict=True))


def drawn(path: Path) -> Combination:
    """What a clip of ``make_dataset`` shows, by its name."""
    return Combination(*path.stem.split("_")[:3])


def make_sections(demo: Demo, verdicts: dict[str, list[Verdict]]) -> list[Section]:
    """What the report shows, with a true clip beside every sampled one."""
    real: dict[Combination, Verdict] = {}
    for verdict in verdicts["real"]:
        real.setdefault(verdict.wanted, verdict)

    def cards(*columns: tuple[str, list[Verdict]]) -> list[Card]:
        """A card per prompt: the true clip, then one video of each column."""
        rows = zip(*(column for _, column in columns), strict=True)
        labels = ["real", *(label for label, _ in columns)]
        return [
            Card(row[0].wanted.caption, list(zip(labels, [real[row[0].wanted], *row], strict=True)))
            for row in rows
        ]

    held_out, new = len(demo.held_out), len(demo.new)
    repeated = [
        (f"sampled {i + 1}" if i else "sampled", verdicts["held_out"][i * held_out : (i + 1) * held_out])
        for i in range(demo.scale.repeats)
    ]
    return [
        Section(
            "seen",
            "Seen prompts",
            "Combinations that the training clips show. The real clip is one that was drawn apart from them.",
            cards(("sampled", verdicts["seen"])),
        ),
        Section(
            "held_out",
            "Held-out combinations",
            "The model has seen each colour, shape and direction, and each pair of them, never these three together.",
            cards(*repeated),
        ),
        Section(
            "lora",
            f"A new colour by LoRA: {NEW}",
            f"{len(demo.true_clips('lora'))} clips, adapters on a frozen transformer, beside the same without.",
            cards(("with LoRA", verdicts["lora"][:new]), ("without LoRA", verdicts["without_lora"][:new])),
        ),
        Section(
            "untrained",
            "The same without training",
            "A transformer with random weights: what the scores are worth.",
            spread(cards(("untrained", verdicts["untrained"])), 4),
        ),
    ]


def shell_line(command: list[str], environment: dict[str, str]) -> str:
    """A command as a reader types it: torchrun instead of this machine's Python."""
    words = (
        ["torchrun", *command[3:]]
        if command[:3] == [sys.executable, "-m", "torch.distributed.run"]
        else command
    )
    return " ".join([*(f"{name}={value}" for name, value in environment.items()), shlex.join(words)])


def machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor,
        "cores": available_cores(),
        "memory_gib": round(memory),
        "system": f"{platform.system()} {platform.machine()}",
    }


def print_scores(results: dict[str, Any]) -> None:
    columns = [*ATTRIBUTES, "all"]
    say("scores: the fraction of videos that show what their prompt names")
    print(f"{'':28}{'videos':>8}" + "".join(f"{column:>11}" for column in columns))
    for name, row in results["scores"].items():
        print(f"{TITLES[name]:28}{row['n']:>8}" + "".join(f"{row[column]:>11.2f}" for column in columns))
    for line in results["missed_aims"]:
        print(f"missed: {line}")
    print(
        f"time {results['seconds_total'] / 60:.1f} min, VAE {results['vae']['psnr']:.1f} dB, "
        f"peak memory {results['peak_memory_gib'] or float('nan'):.2f} GiB"
    )
