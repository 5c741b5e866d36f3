"""Weight files written tensor by tensor: safetensors, in shards or whole, and torch's zip format.

The names, shapes and dtypes of a file are known before its first byte is written; the tensors then arrive one after
the other and are dropped again, so that a file of 11 GB needs the memory of its largest part. Files depend on their
contents only: no clock, no machine.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}  # fmt: skip
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""``--dtype`` of the commands that write weights."""
_ALIGNMENT = 64  # of tensors in torch's files, so that mapped ones are aligned as allocated ones are
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)

Tensors = Iterator[tuple[str, Tensor]]
"""(name, tensor) in the order of the entries that were promised."""


@dataclass(frozen=True)
class Entry:
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _quiet(nbytes: int) -> None: ...


def split(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Shards of at most ``max_bytes`` of data, in order; a tensor that is larger has a shard of its own."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def write_sharded(
    folder: Path,
    stem: str,
    entries: Sequence[Entry],
    tensors: Tensors,
    metadata: Mapping[str, str],
    max_bytes: int,
    progress: Callable[[int], None] = _quiet,
) -> list[Path]:
    """STEM.safetensors, or STEM-00001-of-0000n.safetensors and STEM.safetensors.index.json, as diffusers names them.

    max_bytes: of data in a shard. progress: told the bytes of each tensor that was written. Returns the files.
    """
    shards = split(entries, max_bytes)
    if len(shards) == 1:
        return [
            write_safetensors(folder / f"{stem}.safetensors", entries, tensors, metadata, progress=progress)
        ]
    files, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        files.append(write_safetensors(path, shard, tensors, metadata, progress=progress))
        weight_map |= {entry.name: path.name for entry in shard}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    files.append(folder / f"{stem}.safetensors.index.json")
    files[-1].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return files


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    tensors: Tensors,
    metadata: Mapping[str, str],
    *,
    progress: Callable[[int], None] = _quiet,
) -> Path:
    """One safetensors file. Takes as many tensors from ``tensors`` as there are entries.

    The library writes a file from a dictionary that holds all of it; here the header comes first, then each tensor.
    """
    offsets, end = {}, 0
    # Wide dtypes first, as the library does: each tensor then starts at a multiple of its element size.
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        offsets[entry.name], end = end, end + entry.nbytes
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        start = offsets[entry.name]
        place = [start, start + entry.nbytes]
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": place,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            data = _next_bytes(entry, tensors)
            file.seek(8 + len(text) + offsets[entry.name])
            file.write(data)
            progress(entry.nbytes)
        _flush(file)
    return path


def write_torch(
    path: Path,
    wrapper: str,
    entries: Sequence[Entry],
    tensors: Tensors,
    beside: Mapping[str, Any],
    *,
    progress: Callable[[int], None] = _quiet,
) -> Path:
    """``torch.save({wrapper: {name: tensor}, **beside})``, without holding the tensors together.

    beside: text and numbers. The file is an uncompressed zip in torch's layout with valid checksums: a pickle of
    references, then a record for each tensor, aligned to 64 bytes, so that ``torch.load(mmap=True)`` maps it.
    """
    root = {wrapper: {entry.name: _Reference(str(i), entry) for i, entry in enumerate(entries)}, **beside}
    stem = path.stem
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _write_record(archive, f"{stem}/data.pkl", _pickled(root))
            _write_record(archive, f"{stem}/byteorder", b"little")
            for i, entry in enumerate(entries):
                _write_record(archive, f"{stem}/data/{i}", _next_bytes(entry, tensors))
                progress(entry.nbytes)
            _write_record(archive, f"{stem}/version", b"3\n")
        _flush(file)
    return path


def _next_bytes(entry: Entry, tensors: Tensors) -> np.ndarray:
    """The next tensor's memory as bytes; no copy where it is contiguous."""
    name, tensor = next(tensors)
    assert (name, tuple(tensor.shape), tensor.dtype) == (entry.name, entry.shape, entry.dtype), (
        f"{name} {tuple(tensor.shape)} {tensor.dtype} came where {entry} was promised"
    )
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _flush(file: IO[bytes]) -> None:
    """To the disk, so that the rename which follows never shows a file without its data."""
    file.flush()
    os.fsync(file.fileno())


def _write_record(archive: zipfile.ZipFile, name: str, data: bytes | np.ndarray) -> None:
    info = zipfile.ZipInfo(name, _ZIP_EPOCH)
    size = len(data)
    info.file_size = size
    large = size >= zipfile.ZIP64_LIMIT
    # Local header, name, the extra field of large records and the head of the padding, which is an extra field too.
    taken = archive.start_dir + 30 + len(name.encode()) + (20 if large else 0) + 4
    padding = -taken % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as record:
        record.write(data)


@dataclass(frozen=True)
class _Reference:
    """A tensor in the pickle: rebuilt by torch from the record ``key``."""

    key: str
    entry: Entry


@dataclass(frozen=True)
class _Storage:
    key: str
    entry: Entry


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Reference):
            return NotImplemented
        shape = value.entry.shape
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        storage = _Storage(value.key, value.entry)
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        entry = value.entry
        return ("storage", _STORAGES[entry.dtype], value.key, "cpu", math.prod(entry.shape))


def _pickled(root: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(root)
    return buffer.getvalue()
