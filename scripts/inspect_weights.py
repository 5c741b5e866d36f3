"""What weights are, from their headers: ``python -m scripts.inspect_weights PATH [--json] [--check]``."""

from __future__ import annotations

import argparse
import json
import sys

from cogvideox.command_line import run_door
from cogvideox.weights.files.locate import COMPONENTS
from cogvideox.weights.identify import identify


def main(argv: list[str]) -> int:
    """0; 1 where ``--check`` finds NaN or infinity."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.inspect_weights", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "path",
        help="a SAT, DeepSpeed, diffusers or run folder, a safetensors or torch file, or hf://ORG/NAME",
    )
    parser.add_argument("--component", choices=COMPONENTS, help="which part of a pipeline folder")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--check", action="store_true", help="read every value, report NaN and infinity")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    arguments = parser.parse_args(argv)
    info = identify(arguments.path, arguments.component)
    damaged = _damaged(arguments.path, arguments.component) if arguments.check else None
    if arguments.json:
        print(json.dumps(info.as_dict() | ({} if damaged is None else {"damaged_values": damaged}), indent=2))
    else:
        print(info)
        for line in damaged or ():
            print(f"{'DAMAGED':<16}{line}")
        if damaged == []:
            print(f"{'values':<16}all finite")
    return 1 if damaged else 0


def _damaged(path: str, component: str | None) -> list[str]:
    from cogvideox.weights.check import check_values  # torch

    return check_values(path, component)


if __name__ == "__main__":
    sys.exit(run_door(main))
