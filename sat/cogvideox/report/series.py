"""Curves out of the records of a ``metrics.jsonl``, in which each line holds what was measured at its step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

Records = list[dict[str, Any]]


def series(records: Records, name: str) -> np.ndarray:
    """(points, 2): step and value, where there is one; (0, 2) where there is none."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return np.array(pairs, dtype=float).reshape(-1, 2)


def names(records: Records, prefix: str) -> list[str]:
    """The metrics that begin with ``prefix`` and have a value somewhere, sorted."""
    found = {name for record in records for name, value in record.items() if value is not None}
    return sorted(name for name in found if name.startswith(prefix))


def last(records: Records, name: str) -> float | None:
    """The newest value."""
    return next((r[name] for r in reversed(records) if r.get(name) is not None), None)


def at_same_steps(records: Records, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """``step`` and each name -> (points,), at the steps that have them all."""
    curves = {name: dict(series(records, name)) for name in wanted}
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values()))) if curves else []
    found = {name: np.array([curve[step] for step in steps]) for name, curve in curves.items()}
    return {"step": np.array(steps), **found}


def thinned(values: np.ndarray, limit: int = 600) -> np.ndarray:
    """(points, k) as at most ``limit`` rows, each the mean of as many neighbours; few points as they are."""
    if len(values) <= limit:
        return values
    return np.stack([part.mean(axis=0) for part in np.array_split(values, limit)])


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
