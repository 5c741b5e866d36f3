"""Batches in an order that follows from (seed, clips taken) alone, so that a run resumes without a saved loader state.

Clips are numbered through all epochs: position p is place p % n of epoch p // n, and each epoch is a permutation drawn
from (seed, epoch). After ``start`` clips the k-th batch of all ranks holds the positions start + [k G, (k + 1) G), G =
batch_size * world_size, and rank r takes its r-th slice. So the global batch is the same for every split into ranks, a
run goes on at the right clip on another number of them, and an epoch whose length G does not divide goes on into the
next one within a batch: no clip is dropped and none is repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cogvideox.data.quarantine import Quarantine
from cogvideox.data.reader import VideoError
from cogvideox.data.worker_pool import InProcess, WorkerPool


@dataclass
class ClipOrder:
    """Position -> (index, epoch). Keeps one epoch's permutation at a time: 8 bytes per clip."""

    num_clips: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.num_clips)
        return int(self._of_epoch(epoch)[place]), epoch

    def after(self, position: int) -> Iterator[int]:
        """All other clips of this position's epoch, in order, from the next one around to the one before."""
        epoch, place = divmod(position, self.num_clips)
        permutation = self._of_epoch(epoch)
        return (int(permutation[(place + i) % self.num_clips]) for i in range(1, self.num_clips))

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            self._permutation = self._permutation if self._epoch >= 0 else np.arange(self.num_clips)
        elif epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_clips)
        self._epoch = epoch
        return self._permutation


def collate(items: list[dict]) -> dict:
    """Tensors are stacked along a new first dimension, everything else becomes a list.

    Where there is a GPU they are stacked in pinned memory, from which copies do not hold up the CPU.
    """
    batch = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, torch.Tensor):
            shapes = {tuple(value.shape) for value in values}
            if len(shapes) > 1:
                raise ValueError(
                    f"{name!r} has the shapes {sorted(shapes)} in one batch: expected equal ones"
                )
            batch[name] = _stacked(values)
        else:
            batch[name] = values
    return batch


def _stacked(values: list[Tensor]) -> Tensor:
    if not torch.cuda.is_available():
        return values[0][None] if len(values) == 1 else torch.stack(values)
    shape = len(values), *values[0].shape
    return torch.stack(values, out=torch.empty(shape, dtype=values[0].dtype, pin_memory=True))


class ResumableLoader:
    """Endless batches of a map-style dataset for one rank.

    batch_size: per rank. num_workers: decoding processes; 0 decodes in this one, where nothing can be cut off.
    clip_timeout_seconds: a clip that takes longer to read has failed. None: for ever.

    A clip that fails (``VideoError``, no answer in time, a process that dies of it again and again) is put aside
    (``quarantine``) and replaced by the next good one of the epoch's order, the same one after a resume; one more than
    the dataset's ``max_bad_fraction`` (0 where it has none: the first) is an error. ``on_bad_clip`` of a dataset does
    not matter here: it says what its scan before training does.

    A dataset may have ``item(index, epoch)`` where items change from epoch to epoch, and ``describe(index)["key"]``,
    the name of a clip.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle: bool = True,
        clip_timeout_seconds: float | None = 60.0,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size={batch_size}, num_workers={num_workers}: expected at least 1 and 0 (train.batch_size, "
                "data.num_workers)"
            )
        if clip_timeout_seconds is not None and clip_timeout_seconds <= 0:
            raise ValueError(
                f"data.clip_timeout_seconds={clip_timeout_seconds}: expected more than 0 s, or null to wait for ever"
            )
        if len(dataset) < world_size:
            raise ValueError(
                f"more ranks than data: {world_size} ranks, {len(dataset)} clips; start fewer processes or add clips"
            )
        self.dataset = dataset
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.num_workers, self.clip_timeout_seconds = num_workers, clip_timeout_seconds
        self.order = ClipOrder(len(dataset), seed, shuffle)
        self.quarantine = Quarantine(len(dataset), getattr(dataset, "max_bad_fraction", 0.0), rank)
        self._pool: WorkerPool | InProcess | None = None

    def iterate(self, start: int = 0) -> Iterator[dict]:
        """The batches of this rank after ``start`` clips of all ranks, without end. Closing it ends its processes."""
        self.close()
        pool = self._pool = self._make_pool()
        positions = self._positions(start)
        under_way: deque[_UnderWay] = deque()
        # As far ahead as torch's DataLoader, in clips: two for each process, and a batch.
        ahead = self.batch_size + 2 * self.num_workers if self.num_workers else self.batch_size
        try:
            while True:
                while len(under_way) < ahead:
                    under_way.append(self._begin(pool, next(positions)))
                yield collate([self._finish(pool, under_way.popleft()) for _ in range(self.batch_size)])
        finally:
            pool.close()

    def close(self) -> None:
        """End the decoding processes. Safe to call twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _make_pool(self) -> WorkerPool | InProcess:
        read = self._read
        return (
            WorkerPool(read, self.num_workers, self.clip_timeout_seconds)
            if self.num_workers
            else InProcess(read)
        )

    def _positions(self, start: int) -> Iterator[int]:
        """This rank's positions of each batch from the position ``start`` on."""
        for first in count(start + self.rank * self.batch_size, self.world_size * self.batch_size):
            yield from range(first, first + self.batch_size)

    def _begin(self, pool: WorkerPool | InProcess, position: int) -> _UnderWay:
        """Have the clip of ``position`` read, as far as is known now which one that is."""
        index, epoch = self.order.at(position)
        candidates = chain([index], self.order.after(position))
        first = next((i for i in candidates if not self._is_aside(i)), index)
        return _UnderWay(position, epoch, first, pool.submit(first, epoch))

    def _finish(self, pool: WorkerPool | InProcess, begun: _UnderWay) -> dict:
        """The item of a position. Positions are finished in their order, whatever order the processes work in.

        So which clips are out at a position follows from the positions before it alone: a clip that was read ahead, but
        was put aside by an earlier position meanwhile, is thrown away.
        """
        if self._is_aside(begun.index):
            pool.forget(begun.ticket)
        index, _ = self.order.at(begun.position)
        for candidate in chain([index], self.order.after(begun.position)):
            if self._is_aside(candidate):
                continue
            ticket = begun.ticket if candidate == begun.index else pool.submit(candidate, begun.epoch)
            outcome = pool.take(ticket)
            if outcome.failure is None:
                return outcome.item
            self.quarantine.put_aside(self._key(candidate), outcome.failure)
        raise VideoError(f"none of the {len(self.dataset)} clips can be read (data.path)")

    def _is_aside(self, index: int) -> bool:
        return bool(self.quarantine) and self._key(index) in self.quarantine

    def _read(self, index: int, epoch: int) -> dict:
        item = getattr(self.dataset, "item", None)
        return self.dataset[index] if item is None else item(index, epoch)

    def _key(self, index: int) -> str:
        describe = getattr(self.dataset, "describe", None)
        return str(index) if describe is None else describe(index)["key"]


@dataclass(frozen=True)
class _UnderWay:
    """A position whose clip is being read: the one with ``index``, to be had for ``ticket``."""

    position: int
    epoch: int
    index: int
    ticket: Any
