"""``RUN/report.html``: a run on one page that needs nothing beside it, plots, previews and settings inside."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from cogvideox.page import STYLE, Html, folded, note, page, picture, section, table, verbatim
from cogvideox.report import settings
from cogvideox.report.look import LOOK
from cogvideox.report.plots import Plot, draw_plots
from cogvideox.report.previews import preview_section
from cogvideox.report.run_folder import RunFolder, read_run
from cogvideox.report.verdict import skipped_clips, verdict
from cogvideox.sampling.complete import complete_or_absent

logger = logging.getLogger("cogvideox")

FILE = "report.html"
_MAX_EVENTS = 200


def write_report(run_dir: str | Path) -> Path:
    """Draw the plots of a run and write its page; of a run that is being trained too. Returns the page's path.

    ValueError where the folder holds no run.
    """
    run = read_run(run_dir)
    plots = draw_plots(run)
    path = run.path / FILE
    with complete_or_absent(path) as partial:
        partial.write_text(report_page(run, plots), encoding="utf-8")
    return path


def write_report_if_possible(run_dir: str | Path) -> None:
    """At the end of a training: what goes wrong here is said, and the run is none the worse."""
    start = time.perf_counter()
    try:
        path = write_report(run_dir)
    except Exception as error:  # whatever a plot or a half-written file may raise
        logger.warning(
            "the report could not be written (%s: %s); later: python -m scripts.report %s",
            type(error).__name__,
            error,
            run_dir,
        )
    else:
        logger.info("report: %s (%.1f s)", path, time.perf_counter() - start)


def report_page(run: RunFolder, plots: Mapping[Plot, Path]) -> str:
    """The whole page as HTML."""
    parts = [
        _header(run),
        _plots(plots),
        preview_section(run),
        _configuration(run),
        _commands(run),
        _quarantine(run),
        _events(run),
        _resources(run),
        _numbers(run),
    ]
    return page(
        f"{run.name}: training", f"<main>{''.join(part for part in parts if part)}</main>\n", STYLE + LOOK
    )


def _header(run: RunFolder) -> str:
    found = verdict(run)
    facts = [f"<span><b>{escape(name)}</b> {escape(value)}</span>" for name, value in _facts(run)]
    problems = "".join(
        f'<p class="wrong">cannot be read: {escape(problem)}</p>' for problem in run.unreadable
    )
    return (
        f"<header><h1>{escape(run.name)}</h1>"
        f'<p class="verdict {found.kind}">{escape(found.sentence)}</p>{problems}'
        f'<div class="facts">{"".join(facts)}</div></header>\n'
    )


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    best, samples = run.summary.get("best"), run.summary.get("samples_seen")
    facts = [
        ("steps", f"{run.step}" + (f" of {run.steps}" if run.steps else "")),
        ("clips seen", f"{samples:,}" if samples is not None else ""),
        ("best held-out loss", f"{best['val/loss']:.4f} at step {best['step']}" if best else ""),
        ("skipped steps", str(run.skipped_steps)),
        ("clips put aside", str(skipped_clips(run))),
        ("starts", str(run.summary.get("attempts") or 1 + len(run.restarts))),
        ("written", time.strftime("%Y-%m-%d %H:%M")),
    ]
    return [(name, value) for name, value in facts if value]


def _plots(plots: Mapping[Plot, Path]) -> str:
    if not plots:
        return section("Curves", note("Nothing is logged yet."))
    figures = "".join(
        f'<figure class="plot">{picture(path, plot.title)}<figcaption>{escape(plot.caption)}</figcaption></figure>'
        for plot, path in plots.items()
    )
    return section("Curves", Html(f'<div class="plots">{figures}</div>'))


def _configuration(run: RunFolder) -> str:
    if not run.config:
        return ""
    parts: list[object] = []
    found = settings.changed_from_files(run)
    if found is not None:
        files, changed = found
        rows = [
            (key, settings.shown(old), settings.shown(new))
            for key, (old, new) in changed.items()
            if key not in settings.OF_THE_RUN
        ]
        parts += [
            note(f"What the command set beside {', '.join(files)}, as they are now:"),
            table(("key", "in the files", "in this run"), rows, "long"),
        ]
    concise = settings.without_defaults(run)
    if concise is not None:
        parts.append(folded("without what is a default", verbatim(concise), is_open=found is None))
    whole = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
    return section("Configuration", *parts, folded("all of config.yaml", verbatim(whole)))


def _commands(run: RunFolder) -> str:
    if not run.commands and run.dataset is None:
        return ""
    parts: list[object] = (
        [verbatim("\n".join(f"{c}\n  {v}" for c, v in run.commands))] if run.commands else []
    )
    if run.dataset is not None:
        facts = run.dataset if isinstance(run.dataset, dict) else {"fingerprint": run.dataset}
        parts.append(table((), [(name, settings.shown(value)) for name, value in facts.items()]))
    return section("Commands, versions, dataset", *parts)


def _quarantine(run: RunFolder) -> str:
    if not run.quarantine:
        return ""
    keys = list(dict.fromkeys(key for entry in run.quarantine for key in entry))
    rows = [[settings.shown(entry.get(key, "")) for key in keys] for entry in run.quarantine]
    return section("Clips put aside", note("Not trained on any more, and why."), table(keys, rows, "long"))


def _events(run: RunFolder) -> str:
    if not run.events:
        return ""
    shown, left_out = run.events, len(run.events) - _MAX_EVENTS
    words = ""
    if left_out > 0:
        shown = run.events[: _MAX_EVENTS // 4] + run.events[-(_MAX_EVENTS - _MAX_EVENTS // 4) :]
        words = f"{left_out} of {len(run.events)} in the middle are left out here; they are in events.jsonl."
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("time", 0))),
            event.get("kind", ""),
            event.get("step", ""),
            "; ".join(
                f"{k}: {settings.shown(v)}" for k, v in event.items() if k not in ("time", "kind", "step")
            ),
        )
        for event in shown
    ]
    return section("Events", words and note(words), table(("when", "what", "step", ""), rows, "long"))


def _resources(run: RunFolder) -> str:
    parts = []
    for key, title, unit in (
        ("seconds", "time", _minutes),
        ("peak_memory_gib", "peak memory, GiB", "{:.2f}".format),
    ):
        values = {k: v for k, v in (run.summary.get(key) or {}).items() if isinstance(v, int | float)}
        if values:
            most = max(values.values()) or 1
            cells = [
                (name, _bar(unit(v), v / most)) for name, v in sorted(values.items(), key=lambda i: -i[1])
            ]
            parts.append(f"<article><h3>{title} by phase</h3>{table((), cells, 'bars')}</article>")
    return section("Time and memory", Html(f'<div class="row">{"".join(parts)}</div>')) if parts else ""


def _bar(words: str, share: float) -> Html:
    return Html(f'<div class="bar" style="--share:{100 * share:.1f}%">{escape(words)}</div>')


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def _numbers(run: RunFolder) -> str:
    newest: dict[str, tuple[int, Any]] = {}
    for record in run.records:
        newest |= {name: (record["step"], value) for name, value in record.items() if name != "step"}
    if not newest:
        return ""
    rows = [(name, settings.shown(value), step) for name, (step, value) in sorted(newest.items())]
    return section(
        "All numbers", folded(f"the newest of each of {len(rows)}", table(("", "value", "step"), rows))
    )
