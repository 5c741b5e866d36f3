"""Files that survive a kill and a power cut: written, flushed to the disk, and only then given their name."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any


class HashedWriter:
    """A new file for ``torch.save``: what is written also goes into a SHA-256, so no file is read back to be hashed.

    So the digest is that of the bytes in memory, whatever the disk makes of them.
    """

    def __init__(self, path: str | Path):
        self._file, self._digest = open(path, "wb"), hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> HashedWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def write(path: Path, text: str) -> None:
    with HashedWriter(path) as file:
        file.write(text.encode())


def replace(path: Path, text: str) -> None:
    """The file with another content, or the one before: never half of it."""
    partial = path.with_name(f"{path.name}.tmp")
    write(partial, text)
    os.replace(partial, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Make the contents of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill on the way leaves no half of it under its name, but a ``*.tmp``."""
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    if doomed.exists():  # of a kill on the way
        shutil.rmtree(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
