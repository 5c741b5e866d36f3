"""Start ``train_toy.py`` alone or under torchrun, and leave no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("train_toy.py")
SECONDS = 450  # far above the ten to forty that a launch takes on an idle machine


def start(
    runs: list[dict[str, Any]], ranks: int, folder: Path, worker: Path | None = None
) -> subprocess.Popen[str]:
    """Begin to train ``runs`` in one launch of ``ranks`` processes (1: plain python, no launcher).

    worker: None is WORKER.
    """
    listing = folder / "runs.json"
    listing.write_text(json.dumps(runs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(worker or WORKER), str(listing)]
    launcher_variables = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    environment = {k: v for k, v in os.environ.items() if k not in launcher_variables} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": search_path(),
    }
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def search_path() -> str:
    """PYTHONPATH with which workers find one another, and the package of this very checkout."""
    tests = WORKER.parents[1]
    return os.pathsep.join(
        map(str, [tests, tests.parent, tests.parent / "sat", os.environ.get("PYTHONPATH", "")])
    )


def launch(
    runs: list[dict[str, Any]], ranks: int, folder: Path, worker: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``start``, and wait for the end."""
    process = start(runs, ranks, folder, worker)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a launch that still runs, with all that it started."""
    # torchrun puts each worker into a session of its own; a killed torchrun leaves them alive.
    for pid in [process.pid, *descendants(process.pid)] if process.poll() is None else []:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]
    return [found for child in children for found in (child, *descendants(child))]
