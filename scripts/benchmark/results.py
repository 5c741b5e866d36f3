"""What a benchmark found, as rows, and the file that holds the rows of all of them."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.benchmark.machine import machine
from scripts.benchmark.pairs import Ratio

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


@dataclass(frozen=True)
class Row:
    """One candidate in one case. None: not measured in this run.

    benchmark: "model", ...;  case: what was computed, with its sizes and dtype;  candidate: by whom.
    seconds: median of one run.  ratio: this candidate's time / ours, so above 1 ours is faster; None for ours.
    max_difference: max |ours - this| of the results.  memory: bytes by kind ("above", "total", "reserved", ...).
    bound_fraction: the least time that the machine's own rates allow / ``seconds``.  counted: name -> exact count.
    """

    benchmark: str
    case: str
    candidate: str
    seconds: float | None = None
    ratio: Ratio | None = None
    max_difference: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    bound_fraction: float | None = None
    counted: dict[str, float] = field(default_factory=dict)
    note: str = ""


def save(folder: Path, benchmark: str, rows: list[Row], *, command: str, seconds: float) -> dict[str, Any]:
    """Put the rows of ``benchmark`` in FOLDER/speed.json in place of those of before. Returns the whole file."""
    file = folder / "speed.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    report[benchmark] = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "seconds": round(seconds, 1),
        "machine": machine("diffusers", "transformers", "deepspeed", "peft"),
        "rows": [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    return report


def load(folder: Path) -> dict[str, list[Row]]:
    """The rows of FOLDER/speed.json, by benchmark."""
    report = json.loads((folder / "speed.json").read_text())
    return {name: [_row(values) for values in part["rows"]] for name, part in report.items()}


def _row(values: dict[str, Any]) -> Row:
    ratio = values["ratio"]
    return Row(**values | {"ratio": None if ratio is None else Ratio(**ratio)})
