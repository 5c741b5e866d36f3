"""wandb and TensorBoard beside ``metrics.jsonl``. A run never fails or waits for one of them once it has begun."""

from __future__ import annotations

import logging
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from cogvideox.engine import durable
from cogvideox.engine.events import Events

logger = logging.getLogger("cogvideox")

_WAITING_RECORDS = 1000
_WAITING_VALUES = 100_000
_GO_ON = "The run goes on, metrics.jsonl is complete, and later steps are sent as soon as it answers again"


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run, each served by a thread of its own: a server that does not answer holds up nobody.

    A tracker that raises, or that is so far behind that records must be dropped, is reported once, in the console and
    as the event ``tracker_lost``. Each later record tries it again; that it is back is reported too.
    """

    def __init__(self, names: list[str], run_dir: Path, events: Events):
        """ValueError where one cannot be started: at the start of a run that is a mistake, and nothing is lost yet."""
        self._lines = [_Line(name, _TRACKERS[name](run_dir), events) for name in names]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for line in self._lines:
            line.log(step, metrics)

    def close(self, seconds: float) -> None:
        """Let them finish, for at most ``seconds`` each."""
        for line in self._lines:
            line.close(seconds)


class _Line:
    """One tracker, its thread, and the records that wait for it."""

    def __init__(self, name: str, tracker: Tracker, events: Events):
        self.name, self.tracker, self.events = name, tracker, events
        self._records: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_WAITING_RECORDS)
        self._lost = False
        self._thread = threading.Thread(target=self._serve, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._records.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._report(step, f"it is {_WAITING_RECORDS} records behind")

    def close(self, seconds: float) -> None:
        try:
            self._records.put(None, timeout=seconds)
            self._thread.join(seconds)
        except queue.Full:
            pass
        if self._thread.is_alive():
            logger.warning(f"{self.name} did not finish within {seconds:g} s; metrics.jsonl is complete")

    def _serve(self) -> None:
        step = 0
        while (record := self._records.get()) is not None:
            step, metrics = record
            if self._tried(step, self.tracker.log, step, metrics) and self._lost and self._records.empty():
                logger.warning(f"{self.name} answers again at step {step}")
                self._lost = False
        self._tried(step, self.tracker.close)

    def _tried(self, step: int, call: Callable[..., None], *arguments: Any) -> bool:
        try:
            call(*arguments)
        except Exception as error:  # of any kind: what a tracker does is not the run's business
            self._report(step, f"{type(error).__name__}: {error}")
            return False
        return True

    def _report(self, step: int, reason: str) -> None:
        if not self._lost:
            self._lost = True
            logger.warning(f"lost the tracker {self.name} at step {step}: {reason}. {_GO_ON}")
            with suppress(OSError):  # the same full disk, perhaps
                self.events.write("tracker_lost", tracker=self.name, step=step, error=reason)


class WandbTracker:
    """wandb, online or offline (WANDB_MODE=offline); the run goes on under its id after a resume."""

    def __init__(self, run_dir: Path):
        import wandb

        id_file = run_dir / "wandb_id"
        if not id_file.is_file():
            durable.replace(id_file, uuid.uuid4().hex[:8])
        run_id = id_file.read_text().strip()
        try:
            self.run = wandb.init(
                project="cogvideox", name=run_dir.name, id=run_id, resume="allow", dir=str(run_dir)
            )
        except wandb.errors.Error as error:
            raise ValueError(_wandb_remedy(error)) from error
        # Steps that a resumed run makes again overwrite in the plots instead of being refused.
        self.run.define_metric("*", step_metric="step")

    @staticmethod
    def check() -> None:
        """ValueError where wandb is to work online and has no key, or its server refuses it or does not answer."""
        import wandb

        if wandb.setup().settings.mode != "online":
            return
        try:
            has_key = wandb.login(prompt=False)
        except wandb.errors.Error as error:
            raise ValueError(_wandb_remedy(error)) from error
        if not has_key:
            raise ValueError(_wandb_remedy("it has no API key"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"step": step, **metrics})

    def close(self) -> None:
        self.run.finish()


def _wandb_remedy(error: object) -> str:
    return (
        f"train.trackers has wandb, which cannot start: {error}; run `wandb login`, or set WANDB_MODE=offline"
    )


class TensorBoardTracker:
    """Event files in ``RUN/tensorboard``; a new one after a write that failed."""

    def __init__(self, run_dir: Path):
        self.folder = str(run_dir / "tensorboard")
        self.writer = None
        self._open()

    @staticmethod
    def check() -> None:
        import tensorboardX  # noqa: F401

    def _open(self) -> None:
        from tensorboardX import SummaryWriter

        # Its own thread writes. A queue that fills up would hold this one up for ever once that thread has died.
        self.writer = SummaryWriter(self.folder, max_queue=_WAITING_VALUES)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.writer is None:
            self._open()
        try:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
            # The thread dies of a full disk without a word: flushed here, the error is ours.
            self.writer.flush()
            if not self.writer.file_writer.event_writer._worker.is_alive():
                raise OSError("the thread that writes its files has died")
        except OSError:
            self.writer = None
            raise

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


_TRACKERS = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}


def check_trackers(names: list[str]) -> None:
    """ValueError for a tracker that does not exist."""
    for name in names:
        if name not in _TRACKERS:
            raise ValueError(f"train.trackers has {name!r}: expected any of {', '.join(_TRACKERS)}")


def check_trackers_start(names: list[str]) -> None:
    """ValueError for a tracker that will not start; before the models are loaded, which takes minutes."""
    check_trackers(names)
    for name in names:
        try:
            _TRACKERS[name].check()
        except ImportError as error:
            raise ValueError(f"train.trackers has {name}, which is not installed ({error})") from error
