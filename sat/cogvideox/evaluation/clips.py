"""Fixed clips: which ones of a dataset are looked at, the same in every run and on every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from cogvideox import dist
from cogvideox.data.loader import collate
from cogvideox.data.reader import VideoError

logger = logging.getLogger("cogvideox")


@dataclass(frozen=True)
class FixedClips:
    """``clips[i]`` is a batch of one clip, read when asked for. ``keys`` names them."""

    dataset: Dataset
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return collate([self.dataset[self.indices[place]]])

    @property
    def keys(self) -> list[str]:
        describe = getattr(self.dataset, "describe", None)
        return [str(i) if describe is None else str(describe(i)["key"]) for i in self.indices]


def first_clips(dataset: Dataset, count: int, name: str) -> FixedClips:
    """The first ``count`` clips that can be read, or all where there are fewer (name: the key of their path).

    ValueError where there is none. Every rank must call.
    """
    return _readable(dataset, range(len(dataset)), count, name)


def drawn_clips(dataset: Dataset, count: int, seed: int, name: str) -> FixedClips:
    """``count`` clips drawn without replacement by the seed, or all where there are fewer, which is reported."""
    order = np.random.default_rng([seed, 0x7A1]).permutation(len(dataset)).tolist()
    clips = _readable(dataset, order, count, name)
    if len(clips) < count:
        logger.warning(
            "%s has %d clips, fewer than the %d held-out ones: val/train_loss and val/gap are of those",
            name,
            len(clips),
            count,
        )
    return clips


def _readable(dataset: Dataset, order: Iterable[int], count: int, name: str) -> FixedClips:
    """The first ``count`` of ``order`` that can be read. Reading is shared out, the choice does not depend on it.

    A clip that cannot be is left out and listed where the dataset says on_bad_clip=skip, and an error elsewhere.
    """
    waiting, chosen, bad = iter(order), [], {}
    skips = getattr(dataset, "on_bad_clip", "error") == "skip"
    while candidates := list(islice(waiting, count - len(chosen))):
        found: dict[int, str] = {}
        for index in candidates[dist.rank() :: dist.world_size()]:
            try:
                dataset[index]
            except VideoError as error:
                found[index] = str(error)
        failed = {index: reason for part in dist.gather(found) for index, reason in part.items()}
        if failed and not skips:
            raise ValueError(
                f"{name}: {next(iter(failed.values()))}. Mend the clip, or set data.params.on_bad_clip=skip"
            )
        bad |= failed
        chosen += [index for index in candidates if index not in failed]
    if bad:
        listed = "\n".join(f"  {reason}" for reason in bad.values())
        logger.warning("%s: %d clips cannot be read and are not validated on:\n%s", name, len(bad), listed)
    if not chosen:
        raise ValueError(f"{name} holds no clip that can be read: there is nothing to validate on")
    return FixedClips(dataset, chosen)
