"""The doors on several ranks, one command after the other: a JSON list of [module, arguments]."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from cogvideox.command_line import leave

if __name__ == "__main__":
    for module, arguments in json.loads(Path(sys.argv[1]).read_text()):
        # Without run_door, which would end the process group that the next command goes on with.
        code = importlib.import_module(module).main(arguments)
        print(f"{module}: exit code {code or 0}", flush=True)
    leave(0)
