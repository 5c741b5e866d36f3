"""One number for a training set: equal where the same clips with the same captions are read in the same way.

It is made of names, sizes and captions, so no video is opened. A file that is exchanged for another one of the same
name and length is not noticed; the latent cache, which must notice it, has a digest of the contents of each clip.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from cogvideox.data.layouts import Clip


def dataset_fingerprint(dataset: Dataset) -> str | None:
    """What the dataset's own method ``fingerprint()`` says; None where it has none."""
    own = getattr(dataset, "fingerprint", None)
    return None if own is None else own()


def clips_fingerprint(clips: Iterable[Clip], roots: list[Path], settings: list[Any]) -> str:
    """SHA-256 (hex) over the sorted (name, bytes, caption) of the clips, and over the settings.

    The same on every machine: names are relative to the root that holds the file (numbered, where there are several),
    and a file outside all of them goes by its last name. Time stamps do not count.
    settings: JSON values, all that changes what is read from the same files.
    """
    rows = sorted([_name(clip.path, roots), clip.path.stat().st_size, clip.caption] for clip in clips)
    text = json.dumps([rows, settings])
    return hashlib.sha256(text.encode()).hexdigest()


def _name(path: Path, roots: list[Path]) -> str:
    for number, root in enumerate(roots):
        if path.is_relative_to(root):
            return f"{number}/{path.relative_to(root).as_posix()}"
    return path.name
