"""What a benchmark found, as rows, and the file that holds the rows of all of them."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.benchmark.machine import machine
from scripts.benchmark.pairs import Ratio

ON = " on "
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


@dataclass(frozen=True)
class Row:
    """One candidate in one case. None: not measured in this run.

    benchmark: "model", ...;  case: what was computed, with its sizes and dtype;  candidate: by whom.
    seconds: median of one run.  ratio: this candidate's time / ours, so above 1 ours is faster; None for ours.
    max_difference: max |ours - this| of the results.  memory: bytes by kind ("above", "total", "reserved", ...).
    bound_fraction: the least time that the machine's own rates allow / ``seconds``.  counted: name -> a number that
    is not a time: exact counts; rates in the roofline.
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


@dataclass(frozen=True)
class Section:
    """Of one benchmark on one machine."""

    date: str
    command: str
    seconds: float
    machine: dict[str, Any]
    rows: list[Row]


def save(
    folder: Path, benchmark: str, rows: list[Row], *, command: str, seconds: float, device: str = "cpu"
) -> dict[str, Any]:
    """Put the rows of ``benchmark`` in FOLDER/speed.json in place of those of before. Returns the whole file.

    A GPU has a section of its own, "model on NVIDIA H200", beside that of the CPU; counts are of no machine.
    """
    file = folder / "speed.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    found = machine("diffusers", "transformers", "deepspeed", "peft")
    is_of_gpu = device == "cuda" and benchmark != "counted"
    report[f"{benchmark}{ON}{found['gpu']}" if is_of_gpu else benchmark] = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "seconds": round(seconds, 1),
        "machine": found,
        "rows": [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    return report


def sections(folder: Path) -> dict[str, Section]:
    """FOLDER/speed.json, by benchmark and GPU."""
    report = json.loads((folder / "speed.json").read_text())
    return {
        name: Section(**part | {"rows": [_row(values) for values in part["rows"]]})
        for name, part in report.items()
    }


def load(folder: Path) -> dict[str, list[Row]]:
    """Its rows alone."""
    return {name: section.rows for name, section in sections(folder).items()}


def _row(values: dict[str, Any]) -> Row:
    ratio = values["ratio"]
    return Row(**values | {"ratio": None if ratio is None else Ratio(**ratio)})
