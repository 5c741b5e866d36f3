"""The SHA-256 of whole files, each read once: remembered for as long as size, time stamp and inode stay."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("cogvideox")

_SETTLED_SECONDS = 2.0
# A file that was written so short ago may be written again under the same time stamp: it is not remembered yet.


class FileDigests:
    """``digests(path)`` -> hex SHA-256 of the file's bytes.

    folder: where ``*.jsonl`` remember them, one file per ``writer`` (a rank), appended to and read by all; None
    remembers for this process alone. A folder that cannot be written costs the next start its time, nothing else.
    also: further such folders, which are read.
    """

    def __init__(self, folder: Path | None, writer: str = "0", also: Iterable[Path] = ()):
        self.folder, self.writer, self._also = folder, writer, list(also)
        self.hashed_bytes = 0  # read by this process, since its start
        self._known = self._read_index()

    def __call__(self, path: Path) -> str:
        path = Path(os.path.realpath(path))
        state = _state(path)
        known = self._known.get(str(path))
        if known is not None and known[0] == state:
            return known[1]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.hashed_bytes += state[0]
        # Compared again: a file that changes while it is read has no digest that could be trusted.
        if _state(path) == state and time.time() - state[1] / 1e9 > _SETTLED_SECONDS:
            self._remember(str(path), state, digest)
        return digest

    def of_all(self, paths: Iterable[Path]) -> str:
        """Of one file its digest; of several, the SHA-256 over theirs in the order of their names (as provenance)."""
        digests = [self(path) for path in sorted(paths)]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def read_ahead(self, paths: Iterable[Path]) -> None:
        """Hash many files at once; hashing and reading release Python's lock."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            list(threads.map(self, paths))

    def _read_index(self) -> dict[str, tuple[list[int], str]]:
        known: dict[str, tuple[list[int], str]] = {}
        folders = [*self._also, *([] if self.folder is None else [self.folder])]
        for file in (file for folder in folders for file in sorted(folder.glob("*.jsonl"))):
            for line in file.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    known[entry["path"]] = (entry["state"], entry["sha256"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a kill: that file is hashed again
        return known

    def _remember(self, path: str, state: list[int], digest: str) -> None:
        self._known[path] = (state, digest)
        if self.folder is None:
            return
        line = json.dumps({"path": path, "state": state, "sha256": digest}) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{self.writer}.jsonl").open("a") as file:
                file.write(line)  # one write: a kill leaves it whole, or cut and unreadable
        except OSError as error:
            logger.debug("%s: digests are not remembered (%s)", self.folder, error)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of named tensors (a state dict): for weights that are in no file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]
