"""scripts/slurm/train.sbatch, with stand-ins for Slurm's commands and torchrun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "slurm" / "train.sbatch"

STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "node-a\\nnode-b\\n"; else echo "$@" >> "$LOG/scontrol"; fi',
    "srun": 'while [[ $1 == -* ]]; do echo "$1" >> "$LOG/srun"; shift; done; exec "$@"',
    # A rank that saves on SIGTERM and leaves with 0, as train_video.py does under torchrun.
    "torchrun": 'printf "%s\\n" "$@" > "$LOG/torchrun"; env > "$LOG/env"\n'
    '[[ ${LASTS:-0} == 0 ]] && exit "${CODE:-0}"\n'
    'trap "sleep 0.3; echo saved > $LOG/saved; exit 0" TERM\n'
    'touch "$LOG/ready"; for _ in $(seq 600); do sleep 0.1; done',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes; stand-ins log their arguments into LOG."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, body in STAND_INS.items():
        (binaries / name).write_text(f"#!/bin/bash\n{body}\n")
        (binaries / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    return {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path),
        "USER": "someone",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
        **job,
    }


def job(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    checked = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_one_torchrun_per_node_meets_the_others_at_the_first(slurm: dict[str, str], tmp_path: Path) -> None:
    process = job(slurm, "--base", "a file.yaml", "run.dir=/shared/runs/a")
    output = finish(process)
    assert process.returncode == 0, output
    given = (tmp_path / "torchrun").read_text().splitlines()
    assert given[-4:] == ["train_video.py", "--base", "a file.yaml", "run.dir=/shared/runs/a"]
    assert {
        "--nnodes=2",
        "--nproc_per_node=4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node-a:21234",
        "--rdzv-id=41234-0",
    } <= set(given)
    assert "--ntasks-per-node=1" in (tmp_path / "srun").read_text()
    assert "OMP_NUM_THREADS=8\n" in (tmp_path / "env").read_text()
    assert not (tmp_path / "scontrol").exists()


def test_a_run_that_fails_is_a_job_that_fails(slurm: dict[str, str], tmp_path: Path) -> None:
    process = job(slurm | {"CODE": "7"})
    finish(process)
    assert process.returncode == 7 and not (tmp_path / "scontrol").exists()


def test_before_its_time_is_over_a_job_saves_and_is_put_back_into_the_queue(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    process = job(slurm | {"LASTS": "1"})
    for _ in range(600):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@90 does: to the batch shell alone
    output = finish(process)
    assert process.returncode == 0, output
    assert (tmp_path / "saved").read_text() == "saved\n"  # it waited for the checkpoint
    assert (tmp_path / "scontrol").read_text() == "requeue 41234\n"


def test_every_option_of_torchrun_exists() -> None:
    from torch.distributed.run import get_args_parser

    known = {
        option.replace("_", "-") for action in get_args_parser()._actions for option in action.option_strings
    }
    script = SCRIPT.read_text().split("torchrun \\\n")[1].split("train_video.py")[0]
    used = {word.split("=")[0].replace("_", "-") for word in script.split() if word.startswith("--")}
    assert used and used <= known
