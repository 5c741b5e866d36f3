"""What the demo shows: report.html (one file, videos inside), a contact sheet and loss curves as png."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvideox.engine.logging import read_metrics
from cogvideox.page import STYLE, data_url, page
from cogvideox.report.series import smooth
from cogvideox.sampling.video_io import write_contact_sheet
from scripts.demo.plan import spread
from scripts.demo.scores import AIMS, ATTRIBUTES, Verdict, read_clip

RUNS = {"VAE": "vae", "transformer": "t2v", "LoRA": "lora"}
STYLE_SHEET = Path(__file__).with_name("report.css")


@dataclass(frozen=True)
class Card:
    """One prompt and its videos: (label such as "real" or "sampled", verdict)."""

    prompt: str
    videos: Sequence[tuple[str, Verdict]]


@dataclass(frozen=True)
class Section:
    """A set of prompts. ``name`` is its key in the scores."""

    name: str
    title: str
    note: str
    cards: Sequence[Card]


def write_report(
    path: Path,
    results: dict[str, Any],
    sections: Sequence[Section],
    curves: Path,
) -> None:
    """Write one self-contained HTML page. ``results`` is the content of scores.json, ``curves`` a png."""
    body = [
        "<header><h1>Moving shapes: a text-to-video model trained from nothing</h1>",
        f"<p>{_summary(results)}</p></header>",
        "<section><h2>Scores</h2>",
        "<p>The fraction of videos that show what their prompt names, measured on the pixels by a detector that knows "
        "how the clips were drawn and nothing about the model. “All” needs colour, shape and direction at once.</p>",
        _score_table(results["scores"], results["titles"]),
        "</section>",
        *(_section(section) for section in sections),
        "<section><h2>Loss curves</h2>",
        f'<img class="curves" alt="Training loss of VAE, transformer and LoRA" src="{data_url(curves)}">',
        "<p>Each run has a report of its own, with its validation, its previews and its times: "
        + ", ".join(f"{escape(name)} <code>runs/{run}/report.html</code>" for name, run in RUNS.items())
        + ".</p></section>",
        "<section><h2>Time, memory, commands</h2>",
        _stage_table(results["stages"]),
        *(
            f"<details><summary>{escape(name)}</summary><pre>{escape(record['command_line'])}</pre></details>"
            for name, record in results["stages"].items()
            if record["command_line"]
        ),
        f"<p class=small>{escape(_machine(results))}</p></section>",
    ]
    text = page("CogVideoX demo", f"<main>{''.join(body)}</main>", STYLE + STYLE_SHEET.read_text())
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _summary(results: dict[str, Any]) -> str:
    clip = results["clip"]
    peak = results["peak_memory_gib"]
    memory = f" with at most {peak:.1f} GiB of memory" if peak else ""
    return (
        f"{clip['clips']} clips of {clip['num_frames']} frames, {clip['height']} x {clip['width']}. VAE, expert "
        f"transformer and LoRA trained and sampled in {_minutes(results['seconds_total'])} on "
        f"{results['machine']['cores']} CPU cores{memory}."
    )


def _score_table(scores: dict[str, dict[str, float]], titles: dict[str, str]) -> str:
    columns = [*ATTRIBUTES, "all"]
    head = "".join(f"<th>{column}</th>" for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(titles[name])}</th><td>{row["n"]}</td>'
        + "".join(_score_cell(row[column], AIMS.get(name, {}).get(column)) for column in columns)
        + "</tr>"
        for name, row in scores.items()
    )
    return f'<div class="scroll"><table class="scores"><tr><th></th><th>videos</th>{head}</tr>{rows}</table></div>'


def _score_cell(value: float, aim: float | None) -> str:
    aim_text = "" if aim is None else f"<small>{'✓' if value >= aim else '✗'} aim {aim:.2f}</small>"
    kind = "" if aim is None else (" reached" if value >= aim else " missed")
    return f'<td class="score{kind}" style="--share:{100 * value:.1f}%">{value:.2f}{aim_text}</td>'


def _section(section: Section) -> str:
    cards = "".join(
        f'<article><h3>{escape(card.prompt)}</h3><div class="videos">'
        + "".join(_figure(label, verdict) for label, verdict in card.videos)
        + "</div></article>"
        for card in section.cards
    )
    heading = f"<h2>{escape(section.title)}</h2><p>{escape(section.note)}</p>"
    return f'<section>{heading}<div class="cards">{cards}</div></section>'


def _figure(label: str, verdict: Verdict) -> str:
    chips = "".join(
        f'<span class="{"right" if right else "wrong"}" title="{name}: wanted {getattr(verdict.wanted, name)}">'
        f"{'✓' if right else '✗'} {escape(getattr(verdict.found, name))}</span>"
        for name, right in verdict.right.items()
    )
    return (
        f'<figure><video src="{data_url(verdict.video)}" autoplay loop muted playsinline></video>'
        f"<figcaption>{escape(label)}<div>{chips}</div></figcaption></figure>"
    )


def _stage_table(stages: dict[str, dict[str, Any]]) -> str:
    longest = max((record["seconds"] for record in stages.values()), default=0) or 1
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td class="score" style="--share:{100 * record["seconds"] / longest:.1f}%">'
        f"{_minutes(record['seconds'])}</td>"
        f"<td>{_gibibytes(record['peak_memory_gib'])}</td></tr>"
        for name, record in stages.items()
    )
    return (
        '<div class="scroll"><table><tr><th>stage</th><th>time</th><th>peak memory, GiB, all processes</th></tr>'
        f"{rows}</table></div>"
    )


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    size = f"{machine['cores']} cores, {machine['memory_gib']} GiB"
    return f"{machine['processor']}, {size}, {machine['system']}. {versions}."


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _gibibytes(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def write_sheet(path: Path, sections: Sequence[Section], cards_per_section: int = 8, frames: int = 5) -> None:
    """A contact sheet: a row per prompt, frames of its first video (real), a gap, frames of the second (sampled)."""
    rows = []
    for section in sections:
        for card in spread(section.cards, cards_per_section):
            strips = [_few_frames(read_clip(verdict.video), frames) for _, verdict in card.videos[:2]]
            gap = torch.full_like(strips[0][:1], 255)
            labels = " | ".join(label for label, _ in card.videos[:2])
            rows.append((f"{card.prompt}: {labels}", torch.cat([strips[0], gap, strips[1]])))
    write_contact_sheet(
        path, rows, columns=max(len(video) for _, video in rows), cell_height=64, label_width=230
    )


def _few_frames(video: torch.Tensor, count: int) -> torch.Tensor:
    return video[np.linspace(0, len(video) - 1, count).round().astype(int)]


def write_curves(path: Path, runs: dict[str, Path]) -> None:
    """A png with the training loss of each run, and the loss on held-out clips where it was measured.

    runs: title -> metrics.jsonl.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(runs), 3.2), dpi=130, layout="constrained")
    for axes, (title, metrics) in zip(
        figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True
    ):
        records = read_metrics(metrics)
        for key, label, colour in (
            ("train/loss", "training", "#3b6fd8"),
            ("val/loss", "validation", "#d8733b"),
        ):
            points = np.array([(r["step"], r[key]) for r in records if r.get(key) is not None], dtype=float)
            if not len(points):
                continue
            steps, losses = points.T
            many = len(points) > 20
            marker = None if many else "o"
            axes.plot(
                steps,
                losses,
                color=colour,
                alpha=0.25 if many else 1.0,
                label=None if many else label,
                marker=marker,
            )
            if many:
                axes.plot(steps, smooth(losses, width=len(points) / 40), color=colour, label=label)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.grid(alpha=0.25, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path)
