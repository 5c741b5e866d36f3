"""The first batches of a dataset in its own order, the same in every run and on every rank: for validation."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from cogvideox.data.loader import collate


class FixedBatches(Sequence):
    """``batches[i]``: clips [i * batch_size, (i + 1) * batch_size), read when asked for; at most ``limit`` batches.

    A dataset smaller than one batch gives one smaller batch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, limit: int):
        self.dataset = dataset
        self.batch_size = min(batch_size, len(dataset))
        self.count = min(len(dataset) // self.batch_size, limit)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(index)
        first = index * self.batch_size
        return collate([self.dataset[i] for i in range(first, first + self.batch_size)])
