"""A folder of entries made by one encoder: each is a safetensors file, whole or absent, under a name that decides it.

``ROOT/KIND-ID/`` holds the entries, ID being a digest of all that is known of the encoder (weights, settings, dtype),
and ``maker.json``, which says the same for people. So entries of two encoders live side by side in one ROOT and cannot
be taken for each other. Everything can be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAKER = "maker.json"
_CHECKSUM = "crc32"
_GIB = 2**30


class DamagedEntry(ValueError):
    """An entry that cannot be read, or whose numbers are not those that were written."""


@dataclass(frozen=True)
class OtherFolder:
    """Entries of the same kind by another encoder, which this one cannot use."""

    path: Path
    maker: dict[str, Any]
    note: dict[str, Any]
    count: int
    bytes: int


class EntryFolder:
    """The entries of one encoder.

    root: what the configuration names under ``config_key``.  kind: "latents" or "text", the folder's name begins so.
    maker: JSON values, all that decides an entry apart from its input.  note: further facts for people (a path).
    Nothing is written before the first entry.
    """

    def __init__(
        self,
        root: str | Path,
        kind: str,
        maker: Mapping[str, Any],
        *,
        config_key: str,
        note: Mapping[str, Any] | None = None,
    ):
        self.root, self.kind, self.maker, self.config_key = (
            Path(root).expanduser(),
            kind,
            dict(maker),
            config_key,
        )
        self.note = dict(note or {})
        self.folder = self.root / f"{kind}-{digest_of(self.maker)[:16]}"

    def path(self, name: str) -> Path:
        """``AB/NAME-ABCD....safetensors``: two letters of the digest that ends the name spread a large folder out."""
        return self.folder / name.rpartition("-")[2][:2] / f"{name}.safetensors"

    def files(self) -> Iterator[Path]:
        """All entries that are there, used by this configuration or not."""
        return entry_files(self.folder)

    def others(self) -> list[OtherFolder]:
        """The folders of other encoders that hold entries, in the order of their names."""
        found = []
        for folder in sorted(self.root.glob(f"{self.kind}-*")) if self.root.is_dir() else ():
            if folder != self.folder and folder.is_dir():
                sizes = [file.stat().st_size for file in entry_files(folder)]
                if sizes:
                    found.append(OtherFolder(folder, *read_maker(folder), len(sizes), sum(sizes)))
        return found

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """``write(partial)``, then the name. OSError in words where the disk is full or nothing may be written."""
        try:
            if not (self.folder / MAKER).is_file():
                text = json.dumps({"maker": self.maker, "note": self.note}, indent=1)
                write_whole(self.folder / MAKER, lambda partial: partial.write_text(text + "\n"))
            write_whole(path, write)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{self.config_key}={self.root}: cannot write {path.name}: {_reason(error, path)}"
            ) from error

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """tensors: of any dtype, on the CPU, contiguous. Their checksum goes into the file."""
        metadata = {_CHECKSUM: _checksum(tensors)}
        self.write(path, lambda partial: save_file(dict(tensors), partial, metadata))

    def check_room(self, count: int, bytes_each: int) -> None:
        """Before ``count`` entries are computed: ValueError where they cannot be written, or the disk is too small."""
        probe = self.folder / f".{os.getpid()}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"{self.config_key}={self.root}: {count} entries are missing and none can be written there "
                f"({error.strerror}): name a folder that can be written, or complete this one where that is possible "
                f"(python -m scripts.cache_latents)"
            ) from error
        free, needed = shutil.disk_usage(self.folder).free, count * bytes_each
        if needed > free:
            raise ValueError(
                f"{self.config_key}={self.root}: {count} missing entries need {needed / _GIB:.2f} GiB, the disk has "
                f"{free / _GIB:.2f} GiB: free some (--prune of scripts.cache_latents lists what no run needs), or name "
                f"a folder on another disk"
            )


def digest_of(value: Any) -> str:
    """Hex digest, 32 letters, of a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def entry_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.safetensors") if not path.name.startswith("."))


def partial_files(folder: Path) -> Iterator[Path]:
    """What killed processes left: never read, and of no use."""
    return (path for path in folder.rglob(".*.partial*") if path.is_file())


def read_maker(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(maker, note) of a folder's ``maker.json``; empty where it is lost."""
    try:
        record = json.loads((folder / MAKER).read_text())
        return dict(record["maker"]), dict(record["note"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, {}


def is_whole(path: Path, names: set[str], *, deep: bool = False) -> bool:
    """Whether an entry is there, of full length, with tensors of these names; deep: and its checksum is right."""
    try:
        if deep:
            read_tensors(path, names)
            return True
        with safe_open(path, framework="pt") as file:  # compares the file's length with its header
            return names <= set(file.keys())
    except (OSError, SafetensorError, DamagedEntry):
        return False


def read_tensors(path: Path, names: set[str]) -> dict[str, Tensor]:
    """The tensors of an entry, at least ``names``.  DamagedEntry where it is not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            expected = (file.metadata() or {}).get(_CHECKSUM)
    except (OSError, SafetensorError) as error:
        raise DamagedEntry(f"{path}: damaged ({error}); {_ADVICE}") from error
    if not names <= tensors.keys():
        raise DamagedEntry(f"{path}: holds {sorted(tensors)}, expected {sorted(names)}; {_ADVICE}")
    if expected is not None and _checksum(tensors) != expected:
        raise DamagedEntry(f"{path}: damaged, its checksum is wrong; {_ADVICE}")
    return tensors


_ADVICE = "delete it, and the next start computes it anew"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name of this process, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def _reason(error: Exception, path: Path) -> str:
    """The system's words; safetensors raises its own error with the number in its text."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        return f"the disk is full ({path.parent}); what is written is whole, the same command goes on"
    return getattr(error, "strerror", None) or str(error)
