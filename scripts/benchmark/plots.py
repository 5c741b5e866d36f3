"""The two pictures of the results: what each baseline takes to ours, and growth with frames, pixels and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox.report.drawing import COLOURS, INK, PLOT_STYLE
from scripts.benchmark.growth import MEASURED, TRANSFORMER, VAE
from scripts.benchmark.results import ON, Row, Section
from scripts.benchmark.scaling import CALCULATED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI, QUIET = 150, "#5b6472"
GROUPS = {"model": "forward", "vae": "VAE", "train": "LoRA step", "sample": "sampling", "loader": "loading"}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI)


def _save(figure: Figure, path: Path) -> None:
    """With few colours, as the plots of a run: half the bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    from cogvideox.sampling.complete import complete_or_absent

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    with complete_or_absent(path) as partial:
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128).save(
            partial, format="PNG"
        )


# ------------------------------------------------------------------------------------------------------------ ratios


def ratio_rows(found: dict[str, Section]) -> list[tuple[str, Row]]:
    """(section, row) of every row with a ratio, by benchmark, the CPU's before the GPUs'."""
    order = list(GROUPS)
    names = sorted(
        (name for name in found if name.partition(ON)[0] in GROUPS),
        key=lambda name: (ON in name, order.index(name.partition(ON)[0])),
    )
    return [(name, row) for name in names for row in found[name].rows if row.ratio is not None]


def draw_ratios(path: Path, found: dict[str, Section]) -> bool:
    """A point with its band for each baseline, against 1. False where there is no ratio."""
    import matplotlib

    rows = ratio_rows(found)
    if not rows:
        return False
    lines = list(_lines(rows))
    groups = list(dict.fromkeys(name for name, _ in rows))
    top, bottom = 0.68, 0.55
    height = top + bottom + 0.225 * (lines[-1][0] + 0.9)
    with matplotlib.rc_context(PLOT_STYLE):
        figure = _figure(8.4, height)
        axes = figure.add_axes((0.39, bottom / height, 0.54, 1 - (top + bottom) / height))
        axes.axvspan(1e-3, 1.0, color="#f4f1ee", zorder=0)
        axes.axvline(1.0, color=INK, linewidth=1.1, zorder=2)
        for y, name, what in lines:
            colour = COLOURS[groups.index(name) % len(COLOURS)]
            if isinstance(what, Row):
                _one_ratio(axes, what, y, colour)
                continue
            is_title = what == name
            axes.text(-0.70, y, _group_title(name) if is_title else what, transform=axes.get_yaxis_transform(),
                      va="center", weight="bold" if is_title else "normal", color=colour if is_title else QUIET,
                      size=9.5 if is_title else 8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
                      zorder=5)  # fmt: skip
        _ratio_axis(axes, [row for _, row in rows])
        axes.set_ylim(lines[-1][0] + 0.7, 0.2)
        ratios = [(y, what.candidate) for y, _, what in lines if isinstance(what, Row)]
        axes.set_yticks([y for y, _ in ratios], [candidate for _, candidate in ratios], size=8.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        _heading(figure, height, "How many times as long the alternative takes as ours",
                 "median of paired rounds on the same weights and inputs, and the band of 80 % of them")  # fmt: skip
        _save(figure, path)
    return True


def _lines(rows: Sequence[tuple[str, Row]]) -> Iterator[tuple[float, str, str | Row]]:
    """(place, section, what): the section's title, the words of a case, or a row, from the top down."""
    place, name, case = 0.0, "", ""
    for section, row in rows:
        if section != name:
            place += 1.35 if name else 0.9
            yield place, section, section
            case = ""
        if row.case != case:
            place += 1.0
            yield place, section, row.case.replace(" x ", "x")
        place += 0.95
        yield place, section, row
        name, case = section, row.case


def _heading(figure: Figure, height: float, title: str, below: str) -> None:
    figure.text(0.012, 1 - 0.12 / height, title, weight="bold", va="top", size=12)
    figure.text(0.012, 1 - 0.38 / height, below, va="top", size=8.5, color=QUIET)


def _group_title(name: str) -> str:
    benchmark, _, gpu = name.partition(ON)
    return f"{GROUPS[benchmark]}, {gpu or 'CPU'}"


def _one_ratio(axes: Axes, row: Row, y: float, colour: str) -> None:
    ratio = row.ratio
    axes.plot(
        [ratio.low, ratio.high],
        [y, y],
        color=colour,
        linewidth=4.5,
        alpha=0.30,
        solid_capstyle="round",
        zorder=3,
    )
    axes.plot([ratio.median], [y], marker="o", color=colour, markersize=5.5, zorder=4)
    axes.annotate(f"{ratio.median:.2f}", (1.015, y), xycoords=axes.get_yaxis_transform(), va="center", size=8.5,
                  color=INK, weight="bold" if ratio.median >= 1 else "normal", annotation_clip=False)  # fmt: skip


def _ratio_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Logarithmic, so that 2 and 1/2 stand as far from 1; marked where people read."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low = min(0.9, *(row.ratio.low for row in rows)) / 1.04
    high = max(1.25, *(row.ratio.high for row in rows)) * 1.04
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    step = 0.1 if high / low < 2 else 0.25 if high / low < 4 else 1.0
    marks = [round(step * k, 2) for k in range(1, 200) if low <= step * k <= high]
    axes.xaxis.set_major_locator(FixedLocator(marks[:: max(1, len(marks) // 9)] if step == 1.0 else marks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("slower than the alternative  <  1  <  ours is faster", size=8.5)


# ------------------------------------------------------------------------------------------------------------ growth


def draw_growth(path: Path, found: dict[str, Section]) -> bool:
    """Six panels. False where nothing was measured. A GPU's measurements before a CPU's."""
    import matplotlib

    names = sorted(name for name in found if name.partition(ON)[0] == "growth")
    if not names:
        return False
    rows = found[names[-1]].rows
    with matplotlib.rc_context(PLOT_STYLE | {"axes.titlesize": 9.5, "font.size": 8.5}):
        figure = _figure(10.4, 6.5)
        for index, panel in enumerate(PANELS):
            column, line = index % 3, index // 3
            axes = figure.add_axes((0.062 + 0.327 * column, 0.545 - 0.465 * line, 0.258, 0.315))
            panel(axes, rows)
        machine = names[-1].partition(ON)[2] or "one CPU thread"
        below = f"filled dots: measured ({machine}); lines and open dots: calculated, those of GPUs too"
        _heading(figure, 6.5, "Growth with frames, pixels and GPUs", below)
        _save(figure, path)
    return True


def _sweep(rows: Sequence[Row], part: str, along: str, candidate: str) -> list[Row]:
    """Rows of one network along "frames" (at the size that most have) or "pixels" (at the frames that most have)."""
    mine = [row for row in rows if row.case.startswith(part) and row.candidate == candidate]
    fixed = "pixels" if along == "frames" else "frames"
    values = [row.counted[fixed] for row in mine]
    common = max(values, key=values.count)
    return sorted((row for row in mine if row.counted[fixed] == common), key=lambda row: row.counted[along])


def _curve(axes: Axes, rows: Sequence[Row], part: str, along: str, scale: float, value: Callable[[Row], float],
           colour: str, bound: str) -> None:  # fmt: skip
    for candidate in (CALCULATED, MEASURED):
        mine = _sweep(rows, part, along, candidate)
        x, y = [row.counted[along] / scale for row in mine], [value(row) for row in mine]
        if candidate == CALCULATED:
            axes.plot(x, y, color=colour, linewidth=1.4, label=f"calculated, {bound}")
        else:
            axes.plot(x, y, color=colour, marker="o", linestyle="", markersize=4.5, label="measured")


def _from_zero(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc="upper left", fontsize=8, handlelength=1.3)


def _seconds(row: Row) -> float:
    return row.seconds


def _transformer_frames(axes: Axes, rows: Sequence[Row]) -> None:
    _curve(axes, rows, TRANSFORMER, "frames", 1, _seconds, COLOURS[0], "at the roofline")
    _from_zero(axes, "Transformer: time against frames", "frames", "seconds a forward pass")


def _transformer_pixels(axes: Axes, rows: Sequence[Row]) -> None:
    _curve(axes, rows, TRANSFORMER, "pixels", 1e3, _seconds, COLOURS[0], "at the roofline")
    _from_zero(axes, "Transformer: time against size", "thousand pixels a frame", "seconds a forward pass")


def _memory(axes: Axes, rows: Sequence[Row]) -> None:
    for candidate, style in ((CALCULATED, {"linewidth": 1.4}), (MEASURED, {"marker": "o", "linestyle": ""})):
        mine = [row for row in rows if row.case.startswith(TRANSFORMER) and row.candidate == candidate]
        mine.sort(key=lambda row: row.counted["tokens"])
        x, y = [r.counted["tokens"] for r in mine], [r.memory["above"] / 1e6 for r in mine]
        axes.plot(x, y, color=COLOURS[2], markersize=4.5, label=candidate, **style)
    _from_zero(axes, "Transformer: memory against tokens", "tokens", "peak MB beside weights")


def _vae_time(axes: Axes, rows: Sequence[Row]) -> None:
    for candidate, style in ((CALCULATED, {"linewidth": 1.4}), (MEASURED, {"marker": "o", "linestyle": ""})):
        mine = [row for row in rows if row.case.startswith(VAE) and row.candidate == candidate]
        mine.sort(key=lambda row: row.counted["frames"] * row.counted["pixels"])
        x = [row.counted["frames"] * row.counted["pixels"] / 1e3 for row in mine]
        label = "linear in pixels" if candidate == CALCULATED else "measured, frames and size varied"
        axes.plot(x, [r.seconds for r in mine], color=COLOURS[1], markersize=4.5, label=label, **style)
    _from_zero(axes, "VAE decode: time against pixels", "thousand pixels, all frames", "seconds a decode")


def _vae_memory(axes: Axes, rows: Sequence[Row]) -> None:
    mine = _sweep(rows, VAE, "frames", MEASURED)
    y = [row.memory["above"] / 1e6 for row in mine]
    axes.plot([row.counted["frames"] for row in mine], y, color=COLOURS[3], marker="o", markersize=4.5, linewidth=1.0,
              linestyle=":", label="measured")  # fmt: skip
    _from_zero(axes, "VAE decode: memory against frames", "frames", "peak MB beside weights")
    axes.set_ylim(0, 1.45 * max(y))


def _gpus(axes: Axes, rows: Sequence[Row]) -> None:
    """Seconds of one video by number of GPUs, and what no communication and no rest would give."""
    mine = [row for row in rows if row.case.startswith("sampling: ")]
    models = list(dict.fromkeys(row.case.removeprefix("sampling: ").partition(",")[0] for row in mine))
    for model, colour in zip(models, COLOURS, strict=False):
        of_model = [row for row in mine if row.case.startswith(f"sampling: {model},")]
        x, y = [row.counted["gpus"] for row in of_model], [row.seconds for row in of_model]
        axes.plot(x, [y[0] * x[0] / n for n in x], color=colour, linewidth=0.8, linestyle=":")
        axes.plot(x, y, color=colour, marker="o", markersize=4.5, markerfacecolor="white", label=model)
        for n, seconds in zip(x, y, strict=True):
            axes.annotate(
                f"{seconds:.3g}",
                (n, seconds),
                (4, -11 if model == models[0] else 4),
                textcoords="offset points",
                size=7.5,
                color=INK,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(
        [row.counted["gpus"] for row in of_model], [f"{row.counted['gpus']:g}" for row in of_model]
    )
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    axes.minorticks_off()
    axes.set_xlim(0.8, 130)
    axes.set_ylim(0.4, 3000)
    axes.set_xlabel("GPUs (H200) for one video; dotted: ideal")
    axes.set_ylabel("seconds, 50 steps")
    axes.set_title("A video on more GPUs, calculated", loc="left")
    axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=8, handlelength=1.2, columnspacing=0.9)


PANELS = (_transformer_frames, _transformer_pixels, _memory, _vae_time, _vae_memory, _gpus)
