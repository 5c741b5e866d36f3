"""Names, shapes and dtypes of the tensors in weight files, read from the headers alone: no data, no torch.

safetensors (one file or shards) and torch checkpoints (see torch_pickle.py). A file that is missing, empty, truncated
or something else raises a ValueError with its path and the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox.weights.torch_pickle import DTYPE_BYTES, TensorRecord, read_torch_file

WRAPPERS = ("module", "state_dict", "model")
# Keys under which checkpoints keep the weights: SAT and DeepSpeed, Lightning (`3d-vae.pt`), and common practice.
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
_MAX_JSON_BYTES = 100 * 2**20  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorHeader:
    shape: tuple[int, ...]
    dtype: str  # torch's name: "bfloat16"
    file: Path

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass
class Headers:
    """The tensors of one or more files, under their names there; a wrapper (``module``) is taken off."""

    tensors: dict[str, TensorHeader]
    files: list[Path]
    size_bytes: int
    wrappers: dict[Path, str] = field(default_factory=dict)
    # Of torch files: the key under which the weights lie.
    metadata: dict[str, Any] = field(default_factory=dict)
    # Text and numbers that stand beside the weights (``iteration``, ``ds_version``, a safetensors file's metadata).
    foreign_globals: list[str] = field(default_factory=list)
    # Names in a pickle that weights have no need of ("posix.system"); loading refuses such a file.


def read_headers(files: Iterable[Path]) -> Headers:
    """The union of the files' tensors. A name that stands in two of them is taken from the last."""
    merged = Headers({}, [], 0)
    for path in files:
        one = _read_file(path)
        merged.tensors.update(one.tensors)
        merged.files.append(path)
        merged.size_bytes += one.size_bytes
        merged.wrappers.update(one.wrappers)
        merged.metadata.update(one.metadata)
        merged.foreign_globals += one.foreign_globals
    return merged


def is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then a JSON object. A file's ending is no evidence."""
    # The length may begin with the bytes of a zip ("PK") or a pickle (0x80): its size decides.
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_JSON_BYTES


def shards_of(index: Path) -> list[Path]:
    """The files that an index (``*.safetensors.index.json``, ``*.bin.index.json``) names; all must exist."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of shards (expected JSON with a `weight_map`)") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{index}: {len(missing)} of its {len(names)} shards are missing: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}; finish the download"
        )
    return [index.parent / name for name in names]


def _read_file(path: Path) -> Headers:
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes); download or copy it again")
    if is_safetensors(path):
        return _read_safetensors(path, size)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: not a safetensors file, whatever its name says (no header at its start)")
    return _read_torch(path, size)


def _read_safetensors(path: Path, size: int) -> Headers:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{path}: truncated: {size:,} bytes, its header alone takes {8 + length:,}")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            tensors = {
                name: TensorHeader(tuple(entry["shape"]), _SAFETENSORS_DTYPES[entry["dtype"]], path)
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(
                f"{path}: its safetensors header is damaged ({type(error).__name__}: {error})"
            ) from error
    if end > size:
        raise ValueError(
            f"{path}: truncated: {size:,} bytes where its header speaks of {end:,}; download it again"
        )
    return Headers(tensors, [path], size, metadata=metadata)


def _read_torch(path: Path, size: int) -> Headers:
    checkpoint = read_torch_file(path)
    wrapper, state = _unwrap(checkpoint.root)
    tensors = {
        name: TensorHeader(value.shape, value.dtype, path)
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, TensorRecord)
    }
    hollow = next((name for name in tensors if state[name].storage is None), None)
    if hollow is not None:
        raise ValueError(f"{path}: {hollow} was saved from the meta device: it has a shape and no data")
    if not tensors:
        names = f"; its pickle asks for {', '.join(checkpoint.foreign[:3])}" if checkpoint.foreign else ""
        raise ValueError(f"{path}: a torch file without weights (no dictionary of tensors in it){names}")
    beside = checkpoint.root if wrapper else {}
    metadata = {str(k): v for k, v in beside.items() if isinstance(v, str | int | float | bool)}
    return Headers(
        tensors, [path], size, {path: wrapper} if wrapper else {}, metadata, list(checkpoint.foreign)
    )


def _unwrap(root: Any) -> tuple[str, Mapping[Any, Any]]:
    """The dictionary of tensors inside a checkpoint, and the key under which it lies ("" at the top)."""
    if not isinstance(root, Mapping):
        return "", {}
    for key in WRAPPERS:
        inner = root.get(key)
        if isinstance(inner, Mapping) and any(isinstance(v, TensorRecord) for v in inner.values()):
            return key, inner
    return "", root
