"""Lay runs side by side on one page: what differs in their settings, their curves, numbers and videos:

python -m scripts.compare_runs runs/a runs/b runs/c -o comparison.html

A short table is printed too. The first run is the one that the others are compared with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cogvideox.command_line import leave, run_door


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare_runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT.html",
        type=Path,
        default=Path("comparison.html"),
        help="default: %(default)s",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    arguments = parser.parse_args(argv)
    from cogvideox.report import comparison
    from cogvideox.report.comparison_page import write_comparison

    if arguments.output.suffix != ".html":
        raise ValueError(
            f"-o {arguments.output}: the comparison is a page, expected a name that ends in .html"
        )
    runs = comparison.read_runs(arguments.runs)
    names = comparison.short_names(runs)
    changed = [[key, *values] for key, values in comparison.differences(runs).items()]
    numbers = comparison.final_numbers(runs)
    rows = [
        [n.name, *(f"{text} *" if place in n.best else f"{text}  " for place, text in enumerate(n.texts))]
        for n in numbers
    ]
    print(comparison.as_text(["differs", *names], changed) if changed else "the configurations are the same")
    print()
    print(comparison.as_text(["number (* best)", *(f"{name}  " for name in names)], rows))
    print()
    for run, name in zip(runs[1:], names[1:], strict=True):
        print(comparison.sentence(name, names[0], comparison.contest(runs[0], run)))
    write_comparison(runs, arguments.output)
    print(f"\n{arguments.output}")
    return 0


if __name__ == "__main__":
    leave(run_door(main))
