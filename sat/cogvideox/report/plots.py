"""The plots of one run, ``RUN/plots/NAME.png``. Each is drawn where there is something to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cogvideox.report.drawing import (
    COLOURS,
    band,
    colour,
    draw,
    line,
    log_if_wide,
    mark_restarts,
    stack,
    zero_line,
)
from cogvideox.report.run_folder import RunFolder
from cogvideox.report.series import Records, at_same_steps, names, series, smooth, thinned
from cogvideox.sampling.drift import MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = "plots"
PARTS_OF_A_STEP = ("data", "text", "vae", "forward", "backward", "optimizer", "communication")


@dataclass(frozen=True)
class Plot:
    """``fill(run, axes)`` draws into the axes, or returns False where the run has no such numbers."""

    name: str
    title: str
    caption: str
    fill: Callable[[RunFolder, Axes], bool]


def draw_plots(run: RunFolder) -> dict[Plot, Path]:
    """Draw all that have data; one of an earlier time that has none any more is removed."""
    drawn = {}
    for plot in PLOTS:
        path = run.path / FOLDER / f"{plot.name}.png"
        if draw(path, plot.title, lambda axes, plot=plot: _filled(run, plot, axes)):
            drawn[plot] = path
        else:
            path.unlink(missing_ok=True)
    return drawn


def _filled(run: RunFolder, plot: Plot, axes: Axes) -> bool:
    if not plot.fill(run, axes):
        return False
    mark_restarts(axes, run.restarts)
    return True


def smoothed(points: np.ndarray) -> np.ndarray:
    """(n, 2) with the running mean of a fortieth of the points; few points as they are."""
    if len(points) <= 20:
        return points
    return np.stack([points[:, 0], smooth(points[:, 1], len(points) / 40)], axis=1)


def _curves(
    records: Records, found: Sequence[str], axes: Axes, label: Callable[[str], str]
) -> list[np.ndarray]:
    curves = [series(records, name) for name in found]
    for index, (name, points) in enumerate(zip(found, curves, strict=True)):
        line(axes, points, colour(index), label(name))
    return curves


def _loss(run: RunFolder, axes: Axes) -> bool:
    train, held_out, compared = (
        series(run.records, name) for name in ("train/loss", "val/loss", "val/train_loss")
    )
    if not len(train) + len(held_out):
        return False
    if len(train) > 20:
        line(axes, train, COLOURS[0], faint=True)
    line(axes, smoothed(train), COLOURS[0], "training, smoothed" if len(train) > 20 else "training")
    line(axes, held_out, COLOURS[1], "held-out clips")
    line(axes, compared, COLOURS[2], "as many training clips")
    log_if_wide(axes, [train, held_out, compared])
    return True


def _loss_by_timestep(kind: str, run: RunFolder, axes: Axes) -> bool:
    bands = names(run.records, f"{kind}/loss_by_t/")
    curves = [smoothed(series(run.records, name)) for name in bands]
    for index, (name, points) in enumerate(zip(bands, curves, strict=True)):
        first, _, last = name.rpartition("/")[2].partition("-")
        line(axes, points, colour(index), f"{int(first)} - {int(last)}" if last else first.lstrip("0"))
    log_if_wide(axes, curves)
    return bool(bands)


def _delta(run: RunFolder, axes: Axes) -> bool:
    points, known = (
        series(run.records, "val/delta"),
        at_same_steps(run.records, ["val/delta", "val/delta_se"]),
    )
    if not len(points):
        return False
    zero_line(axes)
    label = "held-out loss - that of step 0, ± standard error"
    if len(known["step"]):
        band(axes, known["step"], known["val/delta"], known["val/delta_se"], COLOURS[0], label)
    else:
        line(axes, points, COLOURS[0], "held-out loss - that of step 0 (no error known)")
    return True


def _gap(run: RunFolder, axes: Axes) -> bool:
    points = series(run.records, "val/gap")
    zero_line(axes)
    line(axes, points, COLOURS[1], "held-out - training clips")
    return bool(len(points))


def _gradient_norm(run: RunFolder, axes: Axes) -> bool:
    groups = names(run.records, "train/grad_norm/")
    whole = series(run.records, "train/grad_norm")
    line(axes, whole, COLOURS[6], "all" if groups else "", faint=bool(groups))
    curves = _curves(run.records, groups, axes, lambda name: name.split("/", 2)[2])
    log_if_wide(axes, [whole, *curves])
    return bool(len(whole) or groups)


def _update_ratio(run: RunFolder, axes: Axes) -> bool:
    groups = names(run.records, "train/update_ratio/")
    log_if_wide(axes, _curves(run.records, groups, axes, lambda name: name.split("/", 2)[2]))
    return bool(groups)


def _learning_rate(run: RunFolder, axes: Axes) -> bool:
    rates = [name for name in ("train/lr",) if len(series(run.records, name))] + names(
        run.records, "train/lr/"
    )
    _curves(run.records, rates, axes, lambda name: "" if len(rates) == 1 else name.rpartition("/")[2])
    axes.set_ylim(bottom=0)
    return bool(rates)


def _step_time(run: RunFolder, axes: Axes) -> bool:
    total = series(run.records, "perf/step_s")
    if not len(total):
        return False
    parts = [name for name in PARTS_OF_A_STEP if len(series(run.records, f"perf/{name}_s"))]
    found = at_same_steps(run.records, ["perf/step_s", *(f"perf/{name}_s" for name in parts)])
    if not len(found["step"]):
        line(axes, total, COLOURS[0], "step")
        return True
    table = thinned(np.stack(list(found.values()), axis=1))
    steps, whole, measured = table[:, 0], table[:, 1], table[:, 2:]
    layers = {name: measured[:, i] for i, name in enumerate(parts)}
    stack(axes, steps, layers | {"other": np.maximum(whole - measured.sum(axis=1), 0)})
    if whole.max() > 4 * np.median(whole):  # a first step that compiles would flatten all the rest
        axes.set_ylim(top=2 * float(np.quantile(whole, 0.95)))
    return True


def _memory(run: RunFolder, axes: Axes) -> bool:
    found = names(run.records, "mem/")
    labels = {"mem/reserved_gib": "reserved", "mem/alloc_gib": "allocated", "mem/rss_gib": "process"}
    for (name, label), style in zip(labels.items(), ("--", "-", "-"), strict=True):
        points = series(run.records, name)
        if len(points):
            marker = "o" if len(points) == 1 else None
            axes.plot(*points.T, color=COLOURS[6], linestyle=style, marker=marker, label=label)
    phases = [name for name in found if name not in labels and name.endswith(("_alloc_gib", "_rss_gib"))]
    _curves(run.records, phases, axes, lambda name: name.removeprefix("mem/").rsplit("_", 2)[0])
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    return bool(found)


def _drift(run: RunFolder, axes: Axes) -> bool:
    curves = {name: series(run.records, f"preview/{name}_drift") for name in MEASURES}
    zero_line(axes)
    for index, (name, points) in enumerate(curves.items()):
        line(axes, points * (1, 100), colour(index), name)
    limit = (run.config.get("train") or {}).get("preview_drift_warning")
    if limit and (run.config.get("load") or {}).get("transformer"):
        low, high = axes.get_ylim()
        for edge in (-100 * limit, 100 * limit):
            axes.axhline(edge, color=COLOURS[1], linewidth=1.0, linestyle=":", zorder=1)
        axes.set_ylim(min(low, -115 * limit), max(high, 115 * limit))
    return any(map(len, curves.values()))


def _looks(run: RunFolder, axes: Axes) -> bool:
    found = [f"preview/{name}" for name in MEASURES if len(series(run.records, f"preview/{name}"))]
    _curves(run.records, found, axes, lambda name: name.rpartition("/")[2])
    axes.set_ylim(bottom=0)
    return bool(found)


PLOTS = (
    Plot("loss", "Loss", "Every logged step, the running mean, and fixed clips with fixed noise.", _loss),
    Plot(
        "delta",
        "Better than before training?",
        "Mean change of the loss of each held-out clip since step 0, same noise and timesteps. Below 0 is better.",
        _delta,
    ),
    Plot(
        "gap",
        "Gap between held-out and training clips",
        "Rising from its value at step 0: the model learns its clips by heart.",
        _gap,
    ),
    Plot(
        "loss_by_timestep",
        "Training loss by timestep",
        "Low timesteps are fine detail, high ones are layout: a mean hides that one of them gets worse.",
        lambda run, axes: _loss_by_timestep("train", run, axes),
    ),
    Plot(
        "val_loss_by_timestep",
        "Held-out loss by timestep",
        "The same bands on the held-out clips.",
        lambda run, axes: _loss_by_timestep("val", run, axes),
    ),
    Plot("grad_norm", "Gradient norm", "Before clipping, by group of parameters.", _gradient_norm),
    Plot(
        "update_ratio",
        "Update / weight",
        "Norm of a step's change over the norm of the weights, by group. About 0.001 is usual.",
        _update_ratio,
    ),
    Plot(
        "learning_rate", "Learning rate", "Of the first group, where groups have their own.", _learning_rate
    ),
    Plot(
        "drift",
        "Drift of the previews, %",
        "Against the base model's. Dotted: train.preview_drift_warning.",
        _drift,
    ),
    Plot(
        "looks",
        "Looks of the previews",
        "Colourfulness, luma, and change from frame to frame, 0 to 1.",
        _looks,
    ),
    Plot("step_time", "Seconds per step", "Where they go.", _step_time),
    Plot("memory", "Peak memory, GiB", "Since the last line of the log, by phase.", _memory),
)
