"""What a weight file or folder holds, from its headers: ``python -m scripts.inspect_weights PATH [--json]``."""

from __future__ import annotations

import argparse
import json
import sys

from cogvideox.weights.identify import identify
from cogvideox.weights.locate import COMPONENTS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.inspect_weights", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "path", help="a SAT, DeepSpeed, diffusers or run folder, or a safetensors or torch file"
    )
    parser.add_argument("--component", choices=COMPONENTS, help="which part of a pipeline folder")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args(argv)
    try:
        info = identify(arguments.path, arguments.component)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(info.as_dict(), indent=2) if arguments.json else info)
    return 0


if __name__ == "__main__":
    sys.exit(main())
