"""Clips that two datasets share: a held-out clip that is trained on measures memory, not learning."""

from __future__ import annotations

import logging
from collections import defaultdict

from torch.utils.data import Dataset

logger = logging.getLogger("cogvideox")

_NAMED = 5


def shared_clips(dataset: Dataset, other: Dataset) -> list[str] | None:
    """Keys of the clips of ``dataset`` whose file, by its contents, is also in ``other``, under whatever name.

    Only files with the same number of bytes are opened, so that thousands of clips cost a look at their sizes. A clip
    that was cut or compressed anew is not recognised.
    None where a dataset has no ``clips`` with a ``path``, or no ``clip_fingerprint(index)``: it cannot be told.
    """
    if not all(hasattr(d, name) for d in (dataset, other) for name in ("clips", "clip_fingerprint")):
        return None
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, clip in enumerate(other.clips):
        by_size[clip.path.stat().st_size].append(index)
    prints: dict[int, set[str]] = {}  # size -> fingerprints of the other set's files
    shared = []
    for index, clip in enumerate(dataset.clips):
        size = clip.path.stat().st_size
        if size not in by_size:
            continue
        if size not in prints:
            prints[size] = {other.clip_fingerprint(i) for i in by_size[size]}
        if dataset.clip_fingerprint(index) in prints[size]:
            shared.append(clip.key)
    return shared


def warn_of_overlap(training: Dataset, held_out: Dataset) -> None:
    """Say how many held-out clips are also trained on, and the first names."""
    shared = shared_clips(held_out, training)
    if shared is None:
        logger.warning("data.target tells no files: held-out clips that are also trained on go unnoticed")
    elif shared:
        named = ", ".join(shared[:_NAMED]) + (", ..." if len(shared) > _NAMED else "")
        logger.warning(
            "%d of the %d clips of data.validation_path are also in data.path (%s): val/loss and val/gap look better "
            "than they are",
            len(shared),
            len(held_out),
            named,
        )
