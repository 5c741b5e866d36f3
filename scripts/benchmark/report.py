"""The results as a page: docs/benchmarks/speed.json -> speed.md, speed.png, growth.png.

Gates first, then a table for each benchmark, with the machine, the versions and the command that made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.benchmark import plots
from scripts.benchmark.counted import DIFFUSERS, KNOWN, OURS
from scripts.benchmark.gates import COUNTED, COUNTED_GATES, CPU, H200, MEASURED_GATES, MET, UNKNOWN, Gate
from scripts.benchmark.growth import MEASURED
from scripts.benchmark.results import ON, Row, Section, sections
from scripts.benchmark.scaling import CALCULATED

TITLES = {
    "model": "A forward pass of the transformer",
    "vae": "VAE encode and decode",
    "train": "A LoRA step",
    "sample": "A sampling run",
    "loader": "Clips from video files",
    "counted": "Counted at the published sizes",
    "roofline": "What the machine can do",
    "growth": "Growth",
}
INTRODUCTION = """\
Written by `python -m scripts.benchmark`; what is measured how is in [README.md](README.md).

Ratio: the candidate's time to ours, the median over paired rounds with the band of 80 % of them; above 1 ours is
faster. Peak memory: above what was held before the work (weights, inputs). Of the bound: the least time that this
machine's own rates allow, to the time.
"""


def write(folder: Path) -> None:
    """speed.md and the two plots, from FOLDER/speed.json."""
    found = sections(folder)
    (folder / "speed.md").write_text(markdown(found))
    for name, draw in (("speed.png", plots.draw_ratios), ("growth.png", plots.draw_growth)):
        if not draw(folder / name, found):
            (folder / name).unlink(missing_ok=True)


def markdown(found: dict[str, Section]) -> str:
    parts = ["# Speed and memory", INTRODUCTION]
    if plots.ratio_rows(found):
        parts.append("![Time of each baseline to ours](speed.png)")
    parts += ["## Gates", gates_table(found)]
    for title, name, section in in_order(found):
        parts += [f"## {title}", provenance(section), *tables(name, section.rows)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def in_order(found: dict[str, Section]) -> Iterable[tuple[str, str, Section]]:
    """(title, benchmark, section): by benchmark, the CPU's before the GPUs'."""
    for benchmark, title in TITLES.items():
        for name in sorted(name for name in found if name.partition(ON)[0] == benchmark):
            yield f"{title}{name.removeprefix(benchmark)}", benchmark, found[name]


def provenance(section: Section) -> str:
    machine = dict(section.machine)
    gpu = f"{machine.pop('gpu')}, " if "gpu" in machine else ""
    cores, memory = machine.pop("cpu_cores", "?"), machine.pop("memory_gb", "?")
    where = f"{gpu}{machine.pop('cpu')}, {cores} cores (one used), {memory} GB"
    machine.pop("system", None)
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    return f"`{section.command}`, {section.date}, {section.seconds:.0f} s. {where}. {versions}."


# ------------------------------------------------------------------------------------------------------------- gates


def gates_table(found: dict[str, Section]) -> str:
    lines = [(*gate_cells(gate, found),) for gate in (*COUNTED_GATES, *MEASURED_GATES)]
    counts = {
        status: sum(line[-1].startswith(status) for line in lines) for status in (MET, "not met", UNKNOWN)
    }
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    note = "Gates on counted values are tests (tests/test_counted.py); those on times fail no build."
    return f"{summary}. {note}\n\n" + table(
        ("gate", "limit", "value", "where", ""), lines, text=("gate", "where")
    )


def gate_cells(gate: Gate, found: dict[str, Section]) -> tuple[str, ...]:
    status, value = gate.status(rows_of(gate.where, found))
    limit = f"{'>=' if gate.at_least else '<='} {gate.limit:g} {gate.unit}"
    number = "-" if value is None else f"{number_text(value)} {gate.unit}"
    return gate.what, limit.strip(), number.strip(), gate.where, status


def rows_of(where: str, found: dict[str, Section]) -> list[Row]:
    """Of the machine that a gate speaks of."""
    if where == COUNTED:
        names = [name for name in found if name == "counted"]
    elif where == CPU:
        names = [name for name in found if ON not in name]
    else:
        assert where == H200
        names = [name for name in found if ON in name and H200 in name]
    return [row for name in names for row in found[name].rows]


# ------------------------------------------------------------------------------------------------------------ tables


def tables(benchmark: str, rows: list[Row]) -> list[str]:
    if benchmark == "counted":
        return [counted_table(rows)]
    if benchmark == "roofline":
        return [roofline_table(rows)]
    if benchmark == "growth":
        return growth_tables(rows)
    return [timed_table(rows)]


def timed_table(rows: list[Row]) -> str:
    """Columns that no row fills are left out."""
    columns = {
        "case": [row.case for row in rows],
        "candidate": [row.candidate for row in rows],
        "seconds": [number_text(row.seconds) for row in rows],
        "ratio (10-90 %)": [ratio_text(row) for row in rows],
        "max abs. difference": ["" if r.max_difference is None else f"{r.max_difference:.2g}" for r in rows],
        "peak MB": [memory_text(row) for row in rows],
        "of the bound": ["" if r.bound_fraction is None else f"{r.bound_fraction:.0%}" for r in rows],
        "": [note_text(row) for row in rows],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return table(tuple(filled), list(zip(*filled.values(), strict=True)), text=("case", "candidate", ""))


def ratio_text(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"**{row.ratio.median:.2f}** ({row.ratio.low:.2f}-{row.ratio.high:.2f})"


def memory_text(row: Row) -> str:
    """Above what was held; on a GPU torch's reserved and the device's own figure beside it."""
    more = [
        f"{kind} {row.memory[kind] / 1e6:,.0f}" for kind in ("reserved", "device") if row.memory.get(kind)
    ]
    found = [f"{row.memory['above'] / 1e6:,.0f}"] if "above" in row.memory else []
    return "; ".join(found + more)


def note_text(row: Row) -> str:
    return "; ".join(
        [*(f"{k} {number_text(v)}" for k, v in row.counted.items()), *([row.note] if row.note else [])]
    )


def counted_table(rows: list[Row]) -> str:
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        mine = {row.candidate: row.counted for row in rows if row.case == case}
        for index, name in enumerate(mine[OURS]):
            known = [
                f"{number_text(values[name])} ({who.removeprefix(KNOWN)})"
                for who, values in mine.items()
                if who.startswith(KNOWN) and name in values
            ]
            theirs = number_text(mine.get(DIFFUSERS, {}).get(name))
            lines.append(
                ("" if index else case, name, number_text(mine[OURS][name]), theirs, ", ".join(known))
            )
    head = ("case", "", "ours", "diffusers", "known before, of")
    return table(head, lines, text=("case", head[-1]))


def roofline_table(rows: list[Row]) -> str:
    lines = [
        (
            row.case,
            row.candidate,
            number_text(row.seconds),
            number_text(next(iter(row.counted.values()), None)),
            row.note,
        )
        for row in rows
    ]
    return table(("case", "by", "seconds", "10^9 FLOP or byte / s", ""), lines, text=("case", "by", ""))


def growth_tables(rows: list[Row]) -> list[str]:
    here = [row for row in rows if row.candidate == MEASURED]
    line = {row.case: row for row in rows if row.candidate == CALCULATED}
    parts = ["![Growth](growth.png)", "Small networks on this machine:"]
    lines = [
        (
            row.case,
            number_text(row.seconds),
            number_text(line[row.case].seconds),
            memory_text(row),
            memory_text(line[row.case]),
        )
        for row in here
    ]
    parts.append(table(("clip", "seconds, measured", "calculated", "peak MB, measured", "calculated"), lines))
    for kind, text in KINDS.items():
        mine = [row for row in rows if row.case.startswith(f"{kind}: ")]
        if mine:
            parts += [text, calculated_table(kind, mine)]
    return parts


KINDS = {
    "size": "The published sizes, 50 steps with guidance, the network alone. Calculated:",
    "sampling": "One video on more GPUs, decoding included, communication not hidden. Calculated:",
    "training": "Training on more GPUs, a clip on each, latents and text cached, selective recomputation. Calculated:",
}


def calculated_table(kind: str, rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.counted if name != "gpus"))
    head = (kind, f"seconds ({rows[0].candidate.removeprefix(CALCULATED).strip(', ') or 'total'})", *names)
    head += ("",) * any(row.note for row in rows)
    lines = []
    for row in rows:
        cells = [row.case.removeprefix(f"{kind}: "), number_text(row.seconds)]
        cells += [number_text(row.counted.get(name)) for name in names]
        lines.append((*cells, row.note)[: len(head)])
    return table(head, lines)


def number_text(value: float | None) -> str:
    """Four digits, no exponent for what people read."""
    if value is None:
        return ""
    if value == round(value) and abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]], text: Sequence[str] = ()) -> str:
    """Columns of numbers stand to the right: all but the first, unless ``text`` names those of words."""
    words = set(text) or {head[0], ""}
    rule = ["---" if name in words else "---:" for name in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
