"""Many short lives of a training run at the price of one import: a process that forks a rank at a time.

``ForkServer`` (in the test) starts this file, which imports torch, SAT, DeepSpeed and the trainer once, makes no
process group and no thread, and then forks every rank of every attempt. A rank may be killed (-9) at a moment of the
test's choice; the launcher's part is played as torchrun does: when one rank is dead the others soon are.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 240
# Far above what an attempt takes on an idle machine: one that hangs is killed, and the test fails by its exit codes.
GRACE_SECONDS = 3.0
# For the ranks that are left after a kill, to notice it themselves.


class ForkServer:
    """``with ForkServer() as server: server.run(job, ranks, log, kill)``."""

    def __enter__(self) -> ForkServer:
        root = Path(__file__).resolve().parents[2]
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {k: v for k, v in os.environ.items() if k not in launcher}
        paths = [str(root / "tests"), str(root), str(root / "sat"), environment.get("PYTHONPATH", "")]
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()  # it ends its ranks and leaves
        try:
            self.process.wait(timeout=30)
        finally:
            self.process.kill()
            self.process.wait()

    def run(
        self, job: dict[str, Any], ranks: int, log: Path, kill: dict[str, Any] | None = None
    ) -> list[int]:
        """One attempt; returns each rank's exit code, -9 for one that was killed.

        job: {"toy": entries of train_toy.py} or {"door": the arguments of train_video.py}.  log: gets what the ranks
        print.  kill: {"rank", "at", "count"}: -9 at the count-th time that this rank comes to "file" (it creates,
        renames or removes one in the run folder), "write" (into a file of a checkpoint), "validate" or "preview"
        (their beginnings and ends); or {"rank", "seconds"}: so long after its training loop began.
        """
        order = {"job": job, "ranks": ranks, "log": str(log), "kill": kill or {}}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


# ------------------------------------------------------------------------------------------------------ in the server


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    for module in (
        "train_video",
        "workers.train_toy",
        "cogvideox.engine.same_config",
        "cogvideox.system",
        "cogvideox.vae.training",
        "cogvideox.conditioning.text",
        "cogvideox.data.loader",
        "cogvideox.data.video_folder",
        "cogvideox.data.fingerprint",
        "cogvideox.data.fixed_batches",
        "cogvideox.sampling.preview",
        "cogvideox.weights.sources",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "torch._inductor.compile_fx",  # and the next, which compiles when it is imported
        "deepspeed.runtime.zero.muon.original_muon",
        "deepspeed.runtime.zero.stage_1_and_2",
        "deepspeed.runtime.zero.stage3",
        "transformers.models.t5.modeling_t5",
        "deepspeed.checkpoint.ds_to_universal",
        "sat.mpu",
    ):
        importlib.import_module(module)
    from cogvideox import dist

    dist.import_deepspeed()
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    # Arrow's allocator, which comes with SAT, has one that gives memory back: nothing waits for it.
    assert len(threads - {"jemalloc_bg_thd"}) == 1, f"a fork would lose all but one of the threads {threads}"
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(attempt(json.loads(line))) + "\n")
        answers.flush()


def attempt(order: dict[str, Any]) -> list[int]:
    ranks, kill, port = order["ranks"], order["kill"], free_port()
    began, begins = os.pipe()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.close(began)
            live(order, rank, port, begins)
        pids.append(pid)
    os.close(begins)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    killing_at = dying_since = None
    while len(codes) < ranks:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if killing_at is None and "seconds" in kill and select.select([began], [], [], 0)[0]:
            killing_at = now + kill["seconds"]
        if killing_at is not None and now >= killing_at and kill["rank"] not in codes:
            os.kill(pids[kill["rank"]], signal.SIGKILL)
            killing_at = float("inf")
        if dying_since is None and any(codes.values()):
            dying_since = now
        if now > deadline or (dying_since is not None and now > dying_since + GRACE_SECONDS):
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    os.close(began)
    return [codes[rank] for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --------------------------------------------------------------------------------------------------------- in a rank


def live(order: dict[str, Any], rank: int, port: int, begins: int) -> None:
    """The life of one rank; never returns."""
    code = 70
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the server
    try:
        log = os.open(f"{order['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if order["ranks"] > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(order["ranks"]),
                "LOCAL_WORLD_SIZE": str(order["ranks"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        job, kill = order["job"], order["kill"]
        run_dir = job["toy"][0]["run_dir"] if "toy" in job else value_of("run.dir", job["door"])
        watch_for_moments(run_dir, kill if kill.get("rank") == rank else {}, begins)
        code = train(job)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(job: dict[str, Any]) -> int:
    if "toy" in job:
        from workers import train_toy

        train_toy.main(job["toy"])
        return 0
    import train_video
    from cogvideox.command_line import run_door

    sys.argv = ["train_video.py", *job["door"]]
    return run_door(train_video.main)


def value_of(key: str, argv: list[str]) -> str:
    return next(word for word in argv if word.startswith(f"{key}=")).partition("=")[2]


def watch_for_moments(run_dir: str, kill: dict[str, Any], begins: int) -> None:
    from cogvideox.engine import durable
    from cogvideox.engine.looks import Looks
    from cogvideox.engine.trainer import Trainer

    left = kill.get("count", 0)

    def come_to(moment: str) -> None:
        nonlocal left
        if moment == kill.get("at"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(owner: Any, name: str, moment: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            come_to(moment)
            result = original(*args, **kwargs)
            come_to(moment)
            return result

        setattr(owner, name, call)

    def begun(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            os.write(begins, b".")
            return run(*args)

        return call

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            is_change = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            is_change = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        # shutil.rmtree names what it removes relative to an open folder.
        if is_change and (str(args[0]).startswith(run_dir) or event in ("os.remove", "os.rmdir")):
            come_to("file")

    watched(durable.HashedWriter, "write", "write")
    watched(Looks, "evaluate", "validate")
    watched(Looks, "render", "preview")
    Trainer.run = begun(Trainer.run)
    if kill.get("at") == "file":
        sys.addaudithook(audit)


if __name__ == "__main__":
    serve()
