"""The loss curve of a run as a picture, from its ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cogvideox.engine.logging import read_metrics


def loss_curve(run_dir: Path, output: Path | None = None) -> Path | None:
    """Draw ``RUN/loss.png``: training loss raw and smoothed, held-out loss where there is one.

    Returns the picture's path, or None if no loss was logged yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir / "metrics.jsonl")
    train = _series(records, "train/loss")
    held_out = _series(records, "val/loss")
    if not len(train):
        return None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*train.T, color="tab:blue", alpha=0.3, linewidth=1, label="training")
    if len(train) > 20:
        axes.plot(
            train[:, 0], smooth(train[:, 1], len(train) / 40), color="tab:blue", label="training, smoothed"
        )
    if len(held_out):
        axes.plot(*held_out.T, color="tab:orange", marker="o", markersize=3, label="held-out clips")
    if train[:, 1].min() > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    output = output or run_dir / "loss.png"
    temporary = output.with_name(f".{output.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(output)
    return output


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Exponential mean with time constant ``width`` (in points), unbiased at the start (Kingma & Ba 2015, sec. 3)."""
    decay = np.exp(-1.0 / max(width, 1e-6))
    total = weight = 0.0
    result = np.empty_like(values)
    for index, value in enumerate(values):
        total = decay * total + (1.0 - decay) * value
        weight = decay * weight + (1.0 - decay)
        result[index] = total / weight
    return result


def _series(records: list[dict], name: str) -> np.ndarray:
    """(points, 2): step and value, where there is one."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return np.array(pairs, dtype=float).reshape(-1, 2)
