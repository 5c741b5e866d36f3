"""A dataset with the encoded caption beside each item, read by the loader's processes ahead of the step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.data import Dataset

from cogvideox.data.fingerprint import dataset_fingerprint
from cogvideox.data.reader import VideoError


class WithTextFeatures(Dataset):
    """Items of ``dataset`` and ``text_features`` (L, D), which ``read(caption)`` gives.

    Everything else is the dataset's own, items that change from epoch to epoch included. A ValueError of ``read`` (a
    damaged entry) becomes a ``VideoError``: the clip cannot be used.
    """

    def __init__(self, dataset: Dataset, read: Callable[[str], Tensor]):
        self.dataset, self.read = dataset, read
        self.on_bad_clip = getattr(dataset, "on_bad_clip", "error")
        self.max_bad_fraction = getattr(dataset, "max_bad_fraction", 0.0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self._with_text(self.dataset[index])

    def item(self, index: int, epoch: int) -> dict:
        item = getattr(self.dataset, "item", None)
        return self._with_text(self.dataset[index] if item is None else item(index, epoch))

    def describe(self, index: int) -> dict:
        return self.dataset.describe(index)

    def fingerprint(self) -> str | None:
        return dataset_fingerprint(self.dataset)

    def _with_text(self, item: dict) -> dict:
        try:
            return {**item, "text_features": self.read(item["caption"])}
        except ValueError as error:
            raise VideoError(f"data.text_cache: {error}") from error
