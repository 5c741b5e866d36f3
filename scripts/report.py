"""Draw the plots of a run and write its report.html, at any time, also while it trains:

python -m scripts.report runs/my_run
"""

from __future__ import annotations

import argparse

from cogvideox.command_line import leave, run_door


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    arguments = parser.parse_args(argv)
    from cogvideox.report.run_report import write_report

    for run in arguments.runs:
        print(write_report(run))
    return 0


if __name__ == "__main__":
    leave(run_door(main))
