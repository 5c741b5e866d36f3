"""One look for all plots: colours that the colour-blind tell apart, thin axes, a legend that covers nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cogvideox.sampling.complete import complete_or_absent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008, "Color Universal Design", without the yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#8C564B")
INK, FAINT = "#2b2f38", "#8a93a3"

_WIDTH, _HEIGHT, _DPI = 6.2, 3.3, 150
PLOT_STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.useoffset": False,
    "grid.color": "#e3e6eb",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "agg.path.chunksize": 10_000,
}


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def draw(path: Path, title: str, fill: Callable[[Axes], bool]) -> bool:
    """Write what ``fill`` draws as png. False, and no file, where it says that there is nothing to draw."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.105, 0.135, 0.875, 0.68))
        if not fill(axes):
            return False
        _widen_if_flat(axes)
        figure.text(0.018, 0.965, title, va="top", size=PLOT_STYLE["axes.titlesize"], weight="bold")
        _legend(axes)
        axes.set_xlabel("step", loc="right", labelpad=1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        # One pass, at fixed margins: savefig and the layout engines draw everything two or three times.
        canvas.draw()
        with complete_or_absent(path) as partial:
            picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
            picture.quantize(128).save(partial, format="PNG")
    return True


def _widen_if_flat(axes: Axes) -> None:
    """Rounding errors of a constant are not worth a scale of their own."""
    low, high = axes.get_ylim()
    if high - low < 1e-6 * max(abs(low), abs(high)):
        axes.set_ylim(min(0.9 * low, 1.1 * low), max(0.9 * high, 1.1 * high))


def _legend(axes: Axes) -> None:
    """Above the axes, below the title: it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.99),
            ncols=len(labels) if len(labels) <= 8 else -(-len(labels) // 2),
            frameon=False,
            fontsize=8.5 if len(labels) <= 6 else 7.5,
            handlelength=1.2,
            handletextpad=0.5,
            columnspacing=1.1,
            borderaxespad=0.2,
        )


def line(axes: Axes, points: np.ndarray, colour: str, label: str = "", faint: bool = False) -> None:
    """points: (n, 2). Few of them are marked, so that a single one is seen too."""
    if not len(points):
        return
    axes.plot(
        *points.T,
        color=colour,
        label=label,
        alpha=0.3 if faint else 1.0,
        linewidth=0.9 if faint else None,
        marker=None if len(points) > 25 else "o",
        markersize=3.5,
    )


def band(
    axes: Axes, steps: np.ndarray, middle: np.ndarray, half: np.ndarray, colour: str, label: str
) -> None:
    """A curve with ``half`` above and below it; a single point gets an error bar."""
    if len(steps) == 1:
        axes.errorbar(steps, middle, half, color=colour, label=label, marker="o", markersize=3.5, capsize=3)
        return
    axes.fill_between(steps, middle - half, middle + half, color=colour, alpha=0.18, linewidth=0)
    line(axes, np.stack([steps, middle], axis=1), colour, label)


def stack(axes: Axes, steps: np.ndarray, parts: dict[str, np.ndarray]) -> None:
    """Layers on top of each other, the first at the bottom; a single step is a bar."""
    bottom = np.zeros(len(steps))
    for index, (label, values) in enumerate(parts.items()):
        if len(steps) == 1:
            axes.bar(steps, values, bottom=bottom, color=colour(index), label=label, width=0.4)
        else:
            layer = {"color": colour(index), "alpha": 0.85, "linewidth": 0, "label": label}
            axes.fill_between(steps, bottom, bottom + values, **layer)
        bottom = bottom + values
    axes.set_ylim(bottom=0)


def zero_line(axes: Axes) -> None:
    axes.axhline(0, color=FAINT, linewidth=1.0, zorder=1)


def mark_restarts(axes: Axes, steps: Sequence[int]) -> None:
    """Thin lines where the run went on after an end."""
    for step in steps:
        axes.axvline(step, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)


def log_if_wide(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """A logarithmic axis where all values allow it and the largest is more than five times the smallest."""
    values = np.concatenate([points[:, 1] for points in curves] or [np.zeros(0)])
    if len(values) and values.min() > 0 and values.max() > 5 * values.min():
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:.3g}")
        axes.yaxis.set_major_formatter(plain)
        if values.max() > 100 * values.min():
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(plain)
