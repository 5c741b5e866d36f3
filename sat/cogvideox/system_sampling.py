"""Small parts of sampling: what a video is made from besides noise, and progress as a generator."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Progress = Callable[[dict[str, Any]], None]

DEFAULT_STRENGTH = 0.8
"""Of video to video, as in diffusers."""


@dataclass(frozen=True)
class Start:
    """Video to video: the last ``strength`` of the steps is run, from ``latents`` noised to where they begin.

    latents: (B, T, C, h, w), scaled, T as the VAE gives it.  strength: 0 (the latents themselves) to 1 (all steps;
    a schedule with zero terminal SNR then begins with pure noise and the latents do not count).
    """

    latents: Tensor
    strength: float

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"sample.strength={self.strength}: expected a number from 0 (the video itself) to 1 (all new)"
            )


def kept_latents(frames: Iterable[int], num_frames: int, compression: int) -> Tensor:
    """Which latents hold nothing but ``frames``: a mask (1, T, 1, 1, 1) of 0 and 1, float32.

    frames: indices of pixel frames in [0, num_frames).  Latent 0 holds frame 0, latent j > 0 the frames
    r (j - 1) + 1 ... r j, with r = compression.  ValueError for an index outside, or where no latent is whole.
    """
    frames, last = set(frames), num_frames - 1
    outside = sorted(frame for frame in frames if not 0 <= frame <= last)
    if outside:
        raise ValueError(
            f"sample.keep_frames: frame {outside[0]} is outside 0-{last} (sample.num_frames={num_frames})"
        )
    count = last // compression + 1
    held = [{0}, *(set(range(compression * (j - 1) + 1, compression * j + 1)) for j in range(1, count))]
    mask = torch.tensor([float(own <= frames) for own in held])
    if not mask.any():
        raise ValueError(
            f"sample.keep_frames: {_ranges(frames)} hold no whole latent, which are frame 0, 1-{compression}, "
            f"{compression + 1}-{2 * compression} and so on"
        )
    return mask.view(1, -1, 1, 1, 1)


def _ranges(frames: set[int]) -> str:
    return (
        f"{len(frames)} frames ({', '.join(map(str, sorted(frames)[:8]))}{' ...' if len(frames) > 8 else ''})"
    )


class StageReport:
    """Reports ``{"stage", "step", "steps", "seconds_left"}`` of one stage after the other to ``progress``."""

    def __init__(self, progress: Progress | None):
        self._progress = progress

    def begin(self, stage: str, steps: int) -> None:
        self._stage, self._steps, self._began = stage, steps, time.perf_counter()
        self.at(0)

    def at(self, step: int) -> None:
        """``step`` of the stage's steps are done. seconds_left is None until one is."""
        if self._progress is None:
            return
        left = (time.perf_counter() - self._began) / step * (self._steps - step) if step else None
        self._progress({"stage": self._stage, "step": step, "steps": self._steps, "seconds_left": left})


def in_stage(
    stage: str, steps: int, callback: Callable[[dict[str, Any]], None] | None, report: StageReport | None
) -> Callable[[dict[str, Any]], None] | None:
    """A sampler's callback that also reports to ``report``, where there are any."""
    if report is None:
        return callback
    report.begin(stage, steps)

    def both(state: dict[str, Any]) -> None:
        report.at(state["step"] + 1)
        if callback is not None:
            callback(state)

    return both


class _Abandoned(Exception):
    """The generator was closed: the work ends at its next report."""


def as_generator(work: Callable[[Progress], Tensor]) -> Iterator[dict[str, Any]]:
    """Yield what ``work(progress)`` reports, then ``{"video": what it returned}``. Its errors are raised here.

    The work runs in a thread of its own, as samplers report by callback. It waits while the caller holds a report, so
    the two never run at once; closing the generator ends it at its next report.
    """
    reports: queue.Queue[tuple[str, Any]] = queue.Queue()
    go_on, abandoned = threading.Semaphore(0), threading.Event()

    def progress(report: dict[str, Any]) -> None:
        reports.put(("report", report))
        go_on.acquire()
        if abandoned.is_set():
            raise _Abandoned

    def run() -> None:
        try:
            reports.put(("video", work(progress)))
        except BaseException as error:  # of any kind: it is raised again in the caller's thread
            reports.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = reports.get()
            if kind == "error":
                raise value
            if kind == "video":
                yield {"video": value}
                return
            yield value
            go_on.release()
    finally:
        abandoned.set()
        go_on.release()
        thread.join()
