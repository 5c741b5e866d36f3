"""Processes that read clips, each of which can be cut off alone: a decoder that hangs or crashes costs its clip only.

Decoders are native code. They may never return, or take the process down; neither an exception nor a thread can end
that, and ``torch.utils.data.DataLoader`` ends the run. Here each process has its own socket and its own queue of
clips. One that is silent about a clip for too long is killed, one that died is noticed by the end of its socket; either
is replaced, and the clips that waited behind are handed out again.

A result travels as a file in memory (``memfd``) whose descriptor is sent over the socket: the tensors are mapped, not
copied, they survive the process that made them, and no limit of ``/dev/shm`` (64 MiB in a container) applies.
"""

from __future__ import annotations

import ctypes
import io
import logging
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from cogvideox.data.reader import VideoError

logger = logging.getLogger(__name__)

Read = Callable[[int, int], Any]

_DEATHS = 3  # of processes with the same clip at hand, until the clip is blamed and not the machine's lack of memory
_IDLE_DEATHS = 20  # in a row without any result: something else is wrong
_GRACE_SECONDS = 1.0  # after the time-out is noticed: the whole job may have been suspended meanwhile
_TASK = struct.Struct("<qqq")  # ticket, index, epoch
_RESULT = struct.Struct("<qqq")  # ticket, kind, bytes of the pickle at the end of the file
_CLOCK = struct.Struct("<dq")  # when the process began with a ticket (time.monotonic), and with which
_ITEM, _BAD_CLIP, _BUG = range(3)
_ALIGNMENT = 64


@dataclass(frozen=True)
class Outcome:
    """What became of one clip: ``item``, or in its place the ``failure`` for which it cannot be used."""

    item: Any
    failure: str | None = None


class InProcess:
    """The interface of ``WorkerPool`` without processes, so without a time-out: a clip is read when it is taken."""

    def __init__(self, read: Read):
        self.read = read

    def submit(self, index: int, epoch: int) -> tuple[int, int]:
        return index, epoch

    def take(self, ticket: tuple[int, int]) -> Outcome:
        try:
            return Outcome(self.read(*ticket))
        except VideoError as error:
            return Outcome(None, str(error))

    def forget(self, ticket: tuple[int, int]) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Worker:
    pid: int
    socket: socket.socket
    clock: mmap.mmap
    tickets: list[int] = field(default_factory=list)  # given to it, in the order in which it works
    overdue_since: float | None = None


class WorkerPool:
    """``submit`` clips, then ``take`` them in any order.

    read: ``read(index, epoch) -> item``, run in a forked process; ``VideoError`` says that the clip cannot be used.
    timeout_seconds: for one clip, from the moment a process begins with it. None: for ever.

    A clip that runs out of time, or whose process dies three times, comes back as a failure. Processes ignore the
    signals that launchers send to whole sessions (the run needs them until its last step is saved), and end with the
    process that made them, however that ends.
    """

    def __init__(self, read: Read, workers: int, timeout_seconds: float | None = None):
        self.read, self.timeout_seconds = read, timeout_seconds
        self._next_ticket = 0
        self._tasks: dict[int, tuple[int, int]] = {}  # what is under way
        self._outcomes: dict[int, Outcome] = {}
        self._forgotten: set[int] = set()
        self._deaths: dict[tuple[int, int], int] = {}
        self._idle_deaths = 0
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end, self._workers)
        for _ in range(workers):
            self._start()

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def submit(self, index: int, epoch: int) -> int:
        """Put a clip into the queue of the process with the least to do; returns the ticket to ``take`` it with."""
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._tasks[ticket] = index, epoch
        self._hand_out(ticket)
        return ticket

    def take(self, ticket: int) -> Outcome:
        """Wait for a clip. RuntimeError, with its traceback, for an error that is not the clip's fault."""
        self._collect(0.0)
        while ticket not in self._outcomes:
            self._collect(self._seconds_to_deadline())
        return self._outcomes.pop(ticket)

    def forget(self, ticket: int) -> None:
        """The clip of ``ticket`` is not wanted any more; its process finishes it all the same."""
        if self._outcomes.pop(ticket, None) is None:
            self._forgotten.add(ticket)

    def close(self) -> None:
        """End all processes, at once: they hold nothing. Safe to call twice."""
        self._finalizer()

    # --------------------------------------------------------------------------------------------------- under way

    def _hand_out(self, ticket: int) -> None:
        worker = min(self._workers, key=lambda worker: len(worker.tickets))
        worker.tickets.append(ticket)
        try:
            worker.socket.sendall(_TASK.pack(ticket, *self._tasks[ticket]))
        except OSError:
            pass  # it died: noticed, with all that it had, at the next look at its socket

    def _collect(self, seconds: float | None) -> None:
        """Receive what is there, waiting for at most ``seconds`` (None: any time); then cut off what is overdue."""
        while ready := wait([worker.socket for worker in self._workers], seconds):
            for worker in [worker for worker in self._workers if worker.socket in ready]:
                self._receive(worker)
            seconds = 0.0  # all that is there: what has been read long ago must not count as overdue
        if self.timeout_seconds is None:
            return
        for worker in list(self._workers):
            seconds = self._seconds_on_clip(worker)
            if seconds is None or seconds < self.timeout_seconds:
                worker.overdue_since = None
            elif worker.overdue_since is None:
                worker.overdue_since = time.monotonic()
            elif time.monotonic() - worker.overdue_since >= _GRACE_SECONDS:
                self._cut_off(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            header, descriptors, _, _ = socket.recv_fds(worker.socket, _RESULT.size, 1)
        except OSError:
            header, descriptors = b"", []
        if not descriptors:  # end of file: the process is gone
            self._bury(worker)
            return
        ticket, kind, size = _RESULT.unpack(header)
        with open(descriptors[0], "rb") as file:
            content = _unpack(file, size)
        worker.tickets.remove(ticket)
        self._idle_deaths = 0
        if kind == _BUG:
            raise RuntimeError(f"a loader process failed:\n{content}")
        self._done(ticket, Outcome(content) if kind == _ITEM else Outcome(None, content))

    def _done(self, ticket: int, outcome: Outcome) -> None:
        del self._tasks[ticket]
        if ticket in self._forgotten:
            self._forgotten.remove(ticket)
        else:
            self._outcomes[ticket] = outcome

    def _seconds_on_clip(self, worker: _Worker) -> float | None:
        """How long ago the process began with the clip that it has not finished; None where it has none."""
        began, ticket = _CLOCK.unpack(worker.clock[:])
        return time.monotonic() - began if ticket in worker.tickets else None

    def _seconds_to_deadline(self) -> float | None:
        """Until a process may have to be cut off; one that has yet to begin with its clip is looked at again soon."""
        if self.timeout_seconds is None:
            return None
        left = [min(self.timeout_seconds, 1.0)]
        for worker in self._workers:
            seconds = self._seconds_on_clip(worker)
            if seconds is not None:
                left.append(max(self.timeout_seconds - seconds, 0.05))
        return min(left)

    # ------------------------------------------------------------------------------------------- hanging and dying

    def _cut_off(self, worker: _Worker) -> None:
        _, ticket = _CLOCK.unpack(worker.clock[:])
        _kill(worker)
        self._workers.remove(worker)
        worker.tickets.remove(ticket)
        self._done(
            ticket, Outcome(None, f"not read within {self.timeout_seconds:g} s (data.clip_timeout_seconds)")
        )
        self._replace(worker.tickets)

    def _bury(self, worker: _Worker) -> None:
        """A process died. The clip it was at is tried again, until it has had its share of deaths."""
        self._workers.remove(worker)
        cause = _kill(worker)
        _, ticket = _CLOCK.unpack(worker.clock[:])
        self._idle_deaths += 1
        if self._idle_deaths > _IDLE_DEATHS:
            raise RuntimeError(
                f"{_IDLE_DEATHS} loader processes in a row ended without reading a clip ({cause})"
            )
        if ticket in worker.tickets:
            task = self._tasks[ticket]
            self._deaths[task] = deaths = self._deaths.get(task, 0) + 1
            if deaths >= _DEATHS:
                worker.tickets.remove(ticket)
                self._done(
                    ticket, Outcome(None, f"{deaths} processes that read it died, the last by {cause}")
                )
        logger.warning("a loader process died (%s) and is replaced", cause)
        self._replace(worker.tickets)

    def _replace(self, orphans: list[int]) -> None:
        self._start()
        for ticket in orphans:
            self._hand_out(ticket)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        clock = mmap.mmap(-1, _CLOCK.size)  # shared with the child, and still there after its death
        clock[:] = _CLOCK.pack(0.0, -1)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()  # else the child would have its copy of what waits to be written
        pid = os.fork()
        if not pid:
            # The end of a process is seen by its socket: no other process may hold the same end.
            for other in self._workers:
                other.socket.close()
            ours.close()
            _serve(self.read, theirs, clock, parent)
        theirs.close()
        self._workers.append(_Worker(pid, ours, clock))


def _kill(worker: _Worker) -> str:
    """Make sure that a process is gone; returns what ended it, in words."""
    try:
        os.kill(worker.pid, signal.SIGKILL)  # of one that is dead already it changes nothing
    except ProcessLookupError:
        pass
    worker.socket.close()
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
    except ChildProcessError:  # reaped by somebody who waits for any child
        return "unknown"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end(workers: list[_Worker]) -> None:
    while workers:
        _kill(workers.pop())


# ---------------------------------------------------------------------------------------------- the process's side


def _serve(read: Read, channel: socket.socket, clock: mmap.mmap, parent: int) -> NoReturn:
    """The life of a loader process: clip after clip until its socket ends."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        _die_with(parent)
        torch.set_num_threads(1)
        while task := channel.recv(_TASK.size, socket.MSG_WAITALL):
            ticket, index, epoch = _TASK.unpack(task)
            clock[:] = _CLOCK.pack(time.monotonic(), ticket)
            try:
                kind, content = _ITEM, read(index, epoch)
            except VideoError as error:
                kind, content = _BAD_CLIP, str(error)
            except Exception:
                kind, content = _BUG, traceback.format_exc()
            with _memory_file() as file:
                size = _pack(content, file)
                socket.send_fds(channel, [_RESULT.pack(ticket, kind, size)], [file.fileno()])
        code = 0
    except (
        BaseException
    ):  # an error of ours, or of a library at a bad moment: the run sees a process that died
        traceback.print_exc()
    finally:
        # Not through the interpreter's exit: its handlers belong to the process that was forked.
        sys.stderr.flush()
        os._exit(code)


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends; elsewhere the end of the socket does it, a clip later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(0)  # it ended before we could ask


def _memory_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("clip"), "w+b")
    return tempfile.TemporaryFile()  # macOS


class _Pickler(pickle.Pickler):
    """Writes tensors into ``file``, and pickles where they stand."""

    def __init__(self, file: BinaryIO, rest: io.BytesIO):
        super().__init__(rest, protocol=pickle.HIGHEST_PROTOCOL)
        self.file = file

    def persistent_id(self, value: Any) -> tuple[torch.dtype, tuple[int, ...], int] | None:
        if not isinstance(value, Tensor):
            return None
        self.file.write(bytes(-self.file.tell() % _ALIGNMENT))
        place = self.file.tell()
        data = value.detach().cpu().contiguous()
        if data.numel():
            self.file.write(data.view(-1).view(torch.uint8).numpy().data)
        return value.dtype, tuple(value.shape), place


class _Unpickler(pickle.Unpickler):
    """Reads what ``_Pickler`` wrote; the tensors are views of ``memory``."""

    def __init__(self, memory: mmap.mmap, rest: io.BytesIO):
        super().__init__(rest)
        self.memory = memory

    def persistent_load(self, saved: tuple[torch.dtype, tuple[int, ...], int]) -> Tensor:
        dtype, shape, place = saved
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=place).view(shape)


def _pack(content: Any, file: BinaryIO) -> int:
    """Write tensors and, behind them, the pickle of everything else; returns the size of the latter in bytes."""
    rest = io.BytesIO()
    _Pickler(file, rest).dump(content)
    file.write(rest.getbuffer())
    file.flush()
    return rest.tell()


def _unpack(file: BinaryIO, size: int) -> Any:
    memory = mmap.mmap(file.fileno(), 0)
    return _Unpickler(memory, io.BytesIO(memory[len(memory) - size :])).load()
