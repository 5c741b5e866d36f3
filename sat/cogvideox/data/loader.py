"""Batches in an order that follows from (seed, clips taken) alone, so that a run resumes without a saved loader state.

Clips are numbered through all epochs: position p is place p % n of epoch p // n, and each epoch is a permutation drawn
from (seed, epoch). After ``start`` clips the k-th batch of all ranks holds the positions start + [k G, (k + 1) G), G =
batch_size * world_size, and rank r takes its r-th slice. So the global batch is the same for every split into ranks, a
run goes on at the right clip on another number of them, and an epoch whose length G does not divide goes on into the
next one within a batch: no clip is dropped and none is repeated.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cogvideox.data.reader import VideoError

logger = logging.getLogger(__name__)


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


@dataclass
class _Loaded:
    """What a worker sends back for one position."""

    item: dict | None
    skipped: dict[str, str]  # key -> reason, of clips tried before this one
    error: str | None = None


class _Positions(Dataset):
    """The dataset as a worker sees it: asked for positions, with replacements for bad clips."""

    def __init__(self, dataset: Dataset, order: ClipOrder):
        self.dataset, self.order = dataset, order
        self.skips = getattr(dataset, "on_bad_clip", "error") == "skip"
        self.max_bad = getattr(dataset, "max_bad_fraction", 0.0) * order.num_clips

    def __getitem__(self, position: int) -> _Loaded:
        index, epoch = self.order.at(position)
        skipped: dict[str, str] = {}
        for candidate in chain([index], self.order.after(position)):
            try:
                return _Loaded(self._item(candidate, epoch), skipped)
            except VideoError as error:
                # As text: an exception raised in a worker arrives wrapped in the worker's traceback.
                if not self.skips:
                    return _Loaded(None, skipped, str(error))
                skipped[self._key(candidate)] = str(error)
            if len(skipped) > self.max_bad:
                break
        return _Loaded(None, skipped, f"{len(skipped)} clips in a row cannot be read")

    def _item(self, index: int, epoch: int) -> dict:
        item = getattr(self.dataset, "item", None)
        return self.dataset[index] if item is None else item(index, epoch)

    def _key(self, index: int) -> str:
        describe = getattr(self.dataset, "describe", None)
        return str(index) if describe is None else describe(index)["key"]


@dataclass
class _LocalPositions:
    """Batch sampler: this rank's positions of each batch from the position ``start`` on, without end."""

    start: int
    batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.world_size * self.batch_size


def _ignore_stop_signals(worker_id: int) -> None:
    """torchrun signals a rank's whole session. The rank saves and ends its workers itself; it needs them until then."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _unpack(loaded: list[_Loaded]) -> tuple[dict | None, dict[str, str], str | None]:
    """(batch, skipped, error) of one step; runs in the worker, so that pinning sees a dict of tensors."""
    skipped = {key: reason for one in loaded for key, reason in one.skipped.items()}
    error = next((one.error for one in loaded if one.error), None)
    return (None if error else collate([one.item for one in loaded])), skipped, error


def collate(items: list[dict]) -> dict:
    """Tensors are stacked along a new first dimension, everything else becomes a list."""
    batch = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, torch.Tensor):
            shapes = {tuple(value.shape) for value in values}
            if len(shapes) > 1:
                raise ValueError(
                    f"{name!r} has the shapes {sorted(shapes)} in one batch: expected equal ones"
                )
            batch[name] = torch.stack(values)
        else:
            batch[name] = values
    return batch


class ResumableLoader:
    """Endless batches of a map-style dataset for one rank.

    batch_size: per rank. num_workers: decoding processes; 0 decodes in this one.
    timeout_seconds: a worker silent for longer (a decoder that hangs) ends the run with an error; 0 waits for ever.

    If the dataset says ``on_bad_clip = "skip"``, a clip that raises ``VideoError`` is replaced by the next good one of
    the epoch's order, the same one after a resume; ``skipped`` lists them, and more than ``max_bad_fraction`` of the
    clips is an error. A dataset may have ``item(index, epoch)`` where items change from epoch to epoch.
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
        timeout_seconds: float = 600,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size={batch_size}, num_workers={num_workers}: expected at least 1 and 0 (train.batch_size, "
                "data.num_workers)"
            )
        if len(dataset) < world_size:
            raise ValueError(
                f"more ranks than data: {world_size} ranks, {len(dataset)} clips; start fewer processes or add clips"
            )
        self.dataset = dataset
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.num_workers, self.timeout_seconds = num_workers, timeout_seconds
        self.order = ClipOrder(len(dataset), seed, shuffle)
        self.skipped: dict[str, str] = {}  # key -> reason, since the start of this process
        self._iterator = None

    def iterate(self, start: int = 0) -> Iterator[dict]:
        """The batches of this rank after ``start`` clips of all ranks, without end. Closing it ends its workers."""
        self.close()
        loader = DataLoader(
            _Positions(self.dataset, self.order),
            batch_sampler=_LocalPositions(start, self.batch_size, self.rank, self.world_size),
            collate_fn=_unpack,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_stop_signals,
            timeout=self.timeout_seconds if self.num_workers else 0,
            generator=torch.Generator(),  # else it draws from the global one, which belongs to the training
        )
        iterator = self._iterator = iter(loader)
        try:
            for batch, skipped, error in iterator:
                self._count(skipped)
                if error is not None:
                    raise VideoError(
                        f"{error}\nMend the clip, or set data.on_bad_clip=skip to leave such clips out"
                    )
                yield batch
        finally:
            if self._iterator is iterator:
                self.close()

    def close(self) -> None:
        """End the worker processes. Safe to call twice."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and self.num_workers:
            workers = list(iterator._workers)
            iterator._shutdown_workers()  # no public call exists; left to the collector, processes stay behind
            for worker in workers:
                if worker.is_alive():  # hanging in a decoder; it ignores SIGTERM
                    worker.kill()
                    worker.join()

    def _count(self, skipped: dict[str, str]) -> None:
        for key, reason in skipped.items():
            if key not in self.skipped:
                logger.warning("skipped %s: %s", key, reason)
                self.skipped[key] = reason
        allowed = getattr(self.dataset, "max_bad_fraction", 0.0)
        if len(self.skipped) > allowed * len(self.dataset):
            listed = "\n".join(f"  {key}: {reason}" for key, reason in list(self.skipped.items())[:10])
            raise VideoError(
                f"{len(self.skipped)} of {len(self.dataset)} clips failed, more than data.max_bad_fraction={allowed}:\n"
                f"{listed}"
            )
