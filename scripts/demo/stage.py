"""One stage of the demo: a command, its output on the console and in a log, its time and its memory, done once.

A stage that ended well leaves a record; running the demo again skips it. A stage that was interrupted is run again with
the same command and folder, where training resumes by itself. A stage whose command, input files or earlier stages are
others than recorded starts afresh: its folder is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# torchrun gives its workers 30 s to save after a SIGTERM before it kills them.
SECONDS_TO_STOP = 40
SECONDS_BETWEEN_MEMORY_READINGS = 1.0
LAST_LINES_SHOWN = 15


class StageError(RuntimeError):
    """A stage failed. The message names the stage, the exit code, the log and its last lines."""


@dataclass(frozen=True)
class Stage:
    """A step of the demo: ``action`` is a command line, or a function for work done in this process."""

    name: str
    title: str
    action: Sequence[str] | Callable[[], None]
    folder: Path
    # What the stage writes; removed before it starts afresh.
    settings: str = ""
    # Whatever decides a function's outcome (a command line speaks for itself).
    inputs: Sequence[Path] = ()
    # Files (YAML, prompts) whose change makes the result outdated.
    after: Sequence[Stage] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Digest of everything that decides the stage's result."""
        digest = hashlib.sha256()
        words = [self.settings] if callable(self.action) else list(self.action)
        for word in [self.name, *words, *(stage.key for stage in self.after)]:
            digest.update(word.encode() + b"\0")
        for path in self.inputs:
            digest.update(path.read_bytes() + b"\0")
        return digest.hexdigest()[:16]


def run_stage(stage: Stage, output: Path) -> dict[str, object]:
    """Run a stage unless its record says that it is done. Returns the record, kept as ``output/stages/NAME.json``:
    key, finished, seconds (all attempts together), peak_memory_gib (None where it cannot be measured), command.

    Raises StageError where the command's exit code is not 0.
    """
    path = output / "stages" / f"{stage.name}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("key") != stage.key:
        shutil.rmtree(stage.folder, ignore_errors=True)
        command = None if callable(stage.action) else list(stage.action)
        record = {
            "key": stage.key,
            "finished": False,
            "seconds": 0.0,
            "peak_memory_gib": None,
            "command": command,
        }
    elif record["finished"]:
        say(f"{stage.title}: done before ({record['seconds']:.0f} s)")
        return record
    say(stage.title)
    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, record)
    memory = PeakMemory(os.getpid())
    start = time.monotonic()
    try:
        if callable(stage.action):
            stage.action()
        else:
            _run_command(stage, output / "logs" / f"{stage.name}.log", memory)
        record["finished"] = True
    finally:
        memory.read()
        record["seconds"] = round(record["seconds"] + time.monotonic() - start, 1)
        record["peak_memory_gib"] = max(
            filter(None, [record["peak_memory_gib"], memory.peak_gib]), default=None
        )
        _write_json(path, record)
    return record


def say(text: str) -> None:
    """A line of the demo itself, told apart from the output of its stages."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"{bold}== {text}{plain}", flush=True)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def _run_command(stage: Stage, log_path: Path, memory: PeakMemory) -> None:
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with _output_channel() as (reader, writer), log_path.open("a", encoding="utf-8") as log_file:
        log = LineLog(log_file)
        log.write(f"$ {' '.join(stage.action)}\n".encode())
        # A session of its own: Ctrl-C reaches this process alone, which then ends the stage in good order.
        process = subprocess.Popen(
            stage.action,
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=os.environ | stage.environment,
            start_new_session=True,
        )
        os.close(writer)
        try:
            _copy_output(process, reader, log, memory)
        except BaseException:
            stop_tree(process)
            raise
        finally:
            log.close()
    if process.returncode != 0:
        lines = own_lines(log_path.read_text(encoding="utf-8"))[-LAST_LINES_SHOWN:]
        raise StageError(
            f"the stage '{stage.name}' failed with exit code {process.returncode}; its log is {log_path}, ending in:\n"
            + "\n".join(f"  | {line}" for line in lines)
        )


def own_lines(log: str) -> list[str]:
    """What the command of the last attempt said itself: torchrun ends a failure with a long report of its own."""
    _, _, last_attempt = ("\n" + log).rpartition("\n$ ")
    lines = last_attempt.splitlines()[1:]
    return list(itertools.takewhile(lambda line: "/torch/distributed/elastic/" not in line, lines)) or lines


@contextlib.contextmanager
def _output_channel() -> Iterator[tuple[int, int]]:
    """(read end, write end) for a child's output. On a terminal it is a terminal too, so that bars are drawn."""
    if sys.stdout.isatty():
        import pty
        import termios

        reader, writer = pty.openpty()
        if hasattr(termios, "tcsetwinsize"):
            termios.tcsetwinsize(writer, termios.tcgetwinsize(sys.stdout.fileno()))
    else:
        reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)


def _copy_output(process: subprocess.Popen, reader: int, log: LineLog, memory: PeakMemory) -> None:
    """Copy until the command has ended and its last output is read, reading the memory now and then."""
    next_reading = 0.0
    while True:
        ended = process.poll() is not None
        ready, _, _ = select.select([reader], [], [], 0.0 if ended else 0.2)
        chunk = _read(reader) if ready else b""
        if chunk:
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            log.write(chunk)
        elif ended:
            return
        elif ready:  # closed by the child before its end
            process.wait()
        if time.monotonic() >= next_reading:
            memory.read()
            next_reading = time.monotonic() + SECONDS_BETWEEN_MEMORY_READINGS


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # Linux's answer (EIO) when the other end of a pseudo-terminal is closed
        return b""


class LineLog:
    """A log file of whole lines: what a progress bar overwrote with carriage returns is left out."""

    def __init__(self, file):
        self._file, self._pending = file, b""

    def write(self, chunk: bytes) -> None:
        *lines, self._pending = (self._pending + chunk.replace(b"\r\n", b"\n")).split(b"\n")
        for line in lines:
            self._file.write(self._visible(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._pending:
            self._file.write(self._visible(self._pending) + "\n")
            self._pending = b""

    @staticmethod
    def _visible(line: bytes) -> str:
        parts = [part for part in line.split(b"\r") if part.strip()]
        return parts[-1].decode("utf-8", errors="replace") if parts else ""


def descendants(root: int) -> dict[int, str]:
    """Processes below ``root`` as id -> start time, from /proc; empty where there is no /proc. torchrun's workers lead
    sessions of their own, so that a process group does not hold them."""
    children: dict[int, dict[int, str]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        parent, started = _parent_and_start(int(entry.name))
        children.setdefault(parent, {})[int(entry.name)] = started
    found: dict[int, str] = {}
    todo = [root]
    while todo:
        below = children.get(todo.pop(), {})
        found |= below
        todo += below
    return found


def _parent_and_start(pid: int) -> tuple[int, str]:
    """(parent's id, start time in clock ticks since boot); (-1, "") for a process that has ended."""
    try:
        # "pid (name) state ppid ...": the name may hold spaces and brackets
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1, ""
    return int(words[1]), words[19]


class PeakMemory:
    """The highest memory in use by a process and all below it, GiB: proportional set sizes (shared pages counted once).

    Where /proc does not tell (macOS), the largest resident size of any one child, which is less than their sum.
    """

    def __init__(self, root: int):
        self._root, self.peak_gib = root, None

    def read(self) -> None:
        used = sum(self._proportional_kib(pid) for pid in [self._root, *descendants(self._root)]) / 2**20
        if used == 0:
            largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            used = largest / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere
        self.peak_gib = round(max(self.peak_gib or 0.0, used), 3)

    @staticmethod
    def _proportional_kib(pid: int) -> int:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    return int(line.split()[1])
        return 0


def stop_tree(process: subprocess.Popen) -> None:
    """End a command and everything below it: SIGTERM, on which training saves, then SIGKILL for what is left."""
    below = descendants(process.pid)  # asked now: those that outlive their parent are found no more
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            say("stopping: the running stage may save what it has")
        with contextlib.suppress(
            subprocess.TimeoutExpired, KeyboardInterrupt
        ):  # a second Ctrl-C does not wait
            process.wait(SECONDS_TO_STOP)
    for pid, started in (below | descendants(process.pid)).items():
        if _parent_and_start(pid)[1] == started:  # not another process that has got its number since
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()
