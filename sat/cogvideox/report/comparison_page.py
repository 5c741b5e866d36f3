"""Several runs on one page: settings that differ, curves over each other, numbers, videos of the same prompt."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox.page import STYLE, Html, folded, note, page, picture, section, table, verbatim
from cogvideox.report import comparison
from cogvideox.report.drawing import band, colour, draw, line, log_if_wide, zero_line
from cogvideox.report.look import LOOK
from cogvideox.report.plots import smoothed
from cogvideox.report.previews import MAX_MIB, title_of, video_figure, video_names
from cogvideox.report.run_folder import RunFolder
from cogvideox.report.series import at_same_steps, series
from cogvideox.report.verdict import verdict
from cogvideox.sampling.complete import complete_or_absent
from cogvideox.sampling.preview_sheet import preview_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = (
    ("train/loss", "Training loss, smoothed"),
    ("val/loss", "Held-out loss"),
    ("val/delta", "Held-out loss less that of step 0, ± standard error"),
    ("val/gap", "Gap between held-out and training clips"),
    ("train/grad_norm", "Gradient norm, smoothed"),
    ("train/lr", "Learning rate"),
    ("perf/step_s", "Seconds per step, smoothed"),
    ("mem/rss_gib", "Peak memory of the process, GiB"),
    ("mem/reserved_gib", "Peak reserved memory, GiB"),
    ("preview/saturation_drift", "Drift of the previews' saturation"),
    ("preview/brightness_drift", "Drift of the previews' brightness"),
    ("preview/motion_drift", "Drift of the previews' motion"),
)
_SMOOTHED = ("train/loss", "train/grad_norm", "perf/step_s")


def write_comparison(runs: Sequence[RunFolder], path: Path) -> None:
    names = comparison.short_names(runs)
    title = " against ".join(names) if len(names) == 2 else f"{len(names)} runs"
    body = "".join(
        (
            _header(title, runs, names),
            _settings(runs, names),
            _curves(runs, names),
            _numbers(runs, names),
            _previews(runs, names),
        )
    )
    with complete_or_absent(path) as partial:
        partial.write_text(page(title, f"<main>{body}</main>\n", STYLE + LOOK), encoding="utf-8")


def _header(title: str, runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    lines = "".join(
        f'<p class="verdict {found.kind}">{escape(comparison.sentence(name, names[0], found))}</p>'
        for name, found in _contests(runs, names)
    )
    alone = table(
        (),
        [
            (_swatch(i, name), verdict(run).sentence)
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ],
        "long",
    )
    return f"<header><h1>{escape(title)}</h1>{lines}{alone}</header>\n"


def _contests(runs: Sequence[RunFolder], names: Sequence[str]) -> list[tuple[str, comparison.Contest]]:
    return [(name, comparison.contest(runs[0], run)) for run, name in zip(runs[1:], names[1:], strict=True)]


def _swatch(index: int, name: str) -> Html:
    return Html(f'<span class="swatch" style="background:{colour(index)}"></span>{escape(name)}')


def _head(names: Sequence[str]) -> list[object]:
    return ["", *(_swatch(i, name) for i, name in enumerate(names))]


def _settings(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    rows = [[key, *values] for key, values in comparison.differences(runs).items()]
    words = (
        "Keys of the configuration that differ; all others are the same."
        if rows
        else "None in the configuration."
    )
    others = [[key, *values] for key, values in comparison.other_differences(runs).items()]
    commands = "\n\n".join(
        f"{name}\n{run.commands[-1][0]}" for run, name in zip(runs, names, strict=True) if run.commands
    )
    return section(
        "What differs",
        note(words),
        rows and table(_head(names), rows, "long") or "",
        others and note("And beside it:") + table(_head(names), others, "long") if others else "",
        folded("the newest command of each", verbatim(commands)) if commands else "",
    )


def _curves(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        for index, (metric, title) in enumerate(CURVES):
            path = Path(scratch) / f"{index}.png"
            if draw(path, title, _overlaid(runs, names, metric)):
                figures.append(f'<figure class="plot">{picture(path, title)}</figure>')
    return section("Curves", Html(f'<div class="plots">{"".join(figures)}</div>'))


def _overlaid(runs: Sequence[RunFolder], names: Sequence[str], metric: str) -> Callable[[Axes], bool]:
    def fill(axes: Axes) -> bool:
        curves = [series(run.records, metric) for run in runs]
        if metric in _SMOOTHED:
            curves = [smoothed(points) for points in curves]
        for index, (run, name, points) in enumerate(zip(runs, names, curves, strict=True)):
            known = at_same_steps(run.records, ["val/delta", "val/delta_se"]) if metric == "val/delta" else {}
            if len(known.get("step", ())):
                band(axes, known["step"], known["val/delta"], known["val/delta_se"], colour(index), name)
            else:
                line(axes, points, colour(index), name)
        if metric in ("val/delta", "val/gap") or metric.endswith("_drift"):
            zero_line(axes)
        elif metric.startswith(("perf/", "mem/")):
            axes.set_ylim(bottom=0)
        else:
            log_if_wide(axes, curves)
        return any(map(len, curves))

    return fill


def _numbers(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    rows = [
        [
            number.name,
            *(
                Html(f'<b class="best">{escape(text)}</b>') if place in number.best else text
                for place, text in enumerate(number.texts)
            ),
        ]
        for number in comparison.final_numbers(runs)
    ]
    words = "The best of a row is marked; above stands whether a difference of held-out losses is beyond its error."
    return section("Final numbers", note(words), table(_head(names), rows))


def _previews(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """The videos of each run's newest previews, at a step that all have where there is one."""
    steps = [preview_steps(run.path) for run in runs]
    if not any(steps):
        return ""
    common = set.intersection(*map(set, steps)) - {0}
    chosen = [max(common) if common else max(own, default=None) for own in steps]
    folders = [
        None if step is None else run.path / "previews" / str(step)
        for run, step in zip(runs, chosen, strict=True)
    ]
    videos = dict.fromkeys(
        name
        for run, step in zip(runs, chosen, strict=True)
        if step is not None
        for name in video_names(run.path, [step])
    )
    parts, room, left_out = [], MAX_MIB * 2**20, 0
    for video in videos:
        paths = [None if folder is None else folder / f"{video}.mp4" for folder in folders]
        room -= sum(path.stat().st_size for path in paths if path is not None and path.is_file())
        if room < 0:
            left_out += 1
            continue
        figures = "".join(
            video_figure(path, f"{name}, step {step}")
            for path, name, step in zip(paths, names, chosen, strict=True)
            if path is not None
        )
        sidecars = [path.with_suffix(".json") for path in paths if path is not None and path.is_file()]
        title = escape(title_of(sidecars[0], video))
        parts.append(
            Html(f'<article class="prompt"><h3>{title}</h3><div class="videos">{figures}</div></article>')
        )
    words = (
        note(f"{left_out} of {len(videos)} prompts are left out for the size of this page.")
        if left_out
        else ""
    )
    return section("Previews of the same prompts", words, *parts)
