"""Names, shapes and dtypes of the tensors in weight files, and where their bytes lie: from the headers, without torch.

safetensors (one file or shards), torch checkpoints (torch_pickle.py) and DeepSpeed's weights in slices (zero.py). A
file that is missing, empty, truncated, damaged or something else raises a ValueError with its path and the reason.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox.weights.files.torch_pickle import DTYPE_BYTES, TensorRecord, TorchFile, read_torch_file

WRAPPERS = ("module", "state_dict", "model")
# Keys under which checkpoints keep the weights: SAT and DeepSpeed, Lightning (`3d-vae.pt`), and common practice.
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
_STRUCT_CODES = {
    "float64": "d", "float32": "f", "float16": "e", "bfloat16": "f", "int64": "q", "int32": "i", "int16": "h",
    "int8": "b", "uint8": "B",
}  # fmt: skip
_LIBRARY_JSON_BYTES = 100 * 2**20  # the limit of the safetensors library
_MAX_JSON_BYTES = 16 * 2**20  # a published 5B has 0.1 MB; 100 MB would take seconds and a gigabyte to parse
_LOCAL_HEADER = struct.Struct(
    "<4s22xHH"
)  # of a zip record: signature, lengths of its name and of its extra field


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's shape, and the place of its bytes: ``position(header)``, or in turn those of its ``slices``."""

    shape: tuple[int, ...]
    dtype: str  # torch's name: "bfloat16"
    file: Path
    start: int = 0  # in bytes: from the file's beginning, or from the data of the zip record
    record: int | None = None  # where the header of its zip record begins
    stride: tuple[int, ...] | None = None  # in elements; None: contiguous
    slices: tuple[TensorHeader, ...] = ()
    # Of a tensor that ZeRO has split: one-dimensional, in order; together they have its elements.

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def extent(self) -> int:
        """Bytes from its first element to its last; more than ``nbytes`` for a view of a larger tensor."""
        if self.stride is None or 0 in self.shape:
            return self.nbytes
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * DTYPE_BYTES[self.dtype]


@dataclass
class Headers:
    """The tensors of one or more files, under their names there; a wrapper (``module``) is taken off."""

    tensors: dict[str, TensorHeader]
    files: list[Path]
    size_bytes: int
    metadata: dict[str, Any] = field(default_factory=dict)
    # Text and numbers that stand beside the weights (``iteration``, ``ds_version``, a safetensors file's metadata).
    foreign_globals: list[str] = field(default_factory=list)
    # Names in a pickle that weights have no need of ("posix.system"); loading refuses such a file.


def read_headers(files: Iterable[Path]) -> Headers:
    """The union of the files' tensors. A name that stands in two of them is taken from the last.

    DeepSpeed's files of ZeRO-3, one of each rank, give the gathered tensors.
    """
    from cogvideox.weights.files.zero import is_partitioned, read_partitioned  # which builds on this file

    files = list(files)
    if is_partitioned(files):
        return read_partitioned(files)
    merged = Headers({}, [], 0)
    for path in files:
        one = _read_file(path)
        merged.tensors.update(one.tensors)
        merged.files.append(path)
        merged.size_bytes += one.size_bytes
        merged.metadata.update(one.metadata)
        merged.foreign_globals += one.foreign_globals
    return merged


def position(tensor: TensorHeader) -> int:
    """Where its first byte lies in its file. ValueError where the file has not all of its bytes."""
    assert not tensor.slices, "each slice has a position of its own"
    start, size = tensor.start, tensor.file.stat().st_size
    if tensor.record is not None:
        # Only the record's own header tells how long it is: torch aligns the data behind it by padding.
        with tensor.file.open("rb") as file:
            file.seek(tensor.record)
            header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{tensor.file}: damaged: no zip record at byte {tensor.record:,}")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start += tensor.record + _LOCAL_HEADER.size + name_length + extra_length
    if start + tensor.extent > size:
        raise ValueError(
            f"{tensor.file}: truncated: {size:,} bytes where a tensor ends at {start + tensor.extent:,}"
        )
    return start


def scalars(headers: Headers, names: Iterable[str]) -> dict[str, float]:
    """The values of one-element tensors (kohya's ``.alpha``), a few bytes each, without torch.

    Raises ValueError for a tensor of more than one element, or of a dtype that is no number.
    """
    values = {}
    for name in names:
        tensor = headers.tensors[name]
        code = _STRUCT_CODES.get(tensor.dtype)
        if tensor.numel != 1 or code is None:
            raise ValueError(
                f"{tensor.file}: {name} is {tensor.dtype} of shape {list(tensor.shape)}; expected one number"
            )
        start = position(tensor)
        with tensor.file.open("rb") as file:
            file.seek(start)
            data = file.read(tensor.nbytes)
        # bfloat16 is the upper half of a float32.
        data = b"\0\0" + data if tensor.dtype == "bfloat16" else data
        values[name] = float(struct.unpack(f"<{code}", data)[0])
    return values


def is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then a JSON object. A file's ending is no evidence."""
    # The length may begin with the bytes of a zip ("PK") or a pickle (0x80): its size decides.
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _LIBRARY_JSON_BYTES


def shards_of(index: Path) -> list[Path]:
    """The files that an index (``*.safetensors.index.json``, ``*.bin.index.json``) names; all must exist beside it."""
    if index.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{index}: {index.stat().st_size:,} bytes, far beyond any model's index: refused")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if not is_file_name(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index}: not an index of shards, or a part of one (expected JSON with a `weight_map`); download it again"
        ) from error
    if not names:
        raise ValueError(f"{index}: its `weight_map` is empty: it names no shard")
    if outside:
        raise ValueError(f"{index}: names {outside[0]!r}; shards lie beside their index: refused")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{index}: {len(missing)} of its {len(names)} shards are missing: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}; finish the download"
        )
    return [index.parent / name for name in names]


def is_file_name(text: str) -> bool:
    """Whether it names an entry of a folder, and no place elsewhere: what comes with a download is not trusted."""
    return text not in ("", ".", "..") and Path(text).name == text and "\\" not in text


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
    """The format: https://huggingface.co/docs/safetensors, "Format"."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{path}: truncated: {size:,} bytes, its header alone takes {8 + length:,}")
        if length > _MAX_JSON_BYTES:
            raise ValueError(
                f"{path}: its header has {length:,} bytes, far beyond any model's "
                f"(at most {_MAX_JSON_BYTES:,}): refused"
            )
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict):
                raise ValueError("its __metadata__ is no object")
            tensors = {name: _safetensors_entry(entry, path, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(
                f"{path}: its safetensors header is damaged ({type(error).__name__}: {error})"
            ) from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise ValueError(f"{path}: its safetensors header is damaged: {name} {what}")
        end += tensor.nbytes
    if end > size:
        raise ValueError(
            f"{path}: truncated: {size:,} bytes where its header speaks of {end:,}; download it again"
        )
    if end < size:
        raise ValueError(f"{path}: damaged: {size:,} bytes where its header speaks of {end:,}")
    return Headers(tensors, [path], size, metadata=metadata)


def _safetensors_entry(entry: Mapping[str, Any], path: Path, data: int) -> TensorHeader:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"shape {shape} at {begin} to {end}")
    tensor = TensorHeader(tuple(shape), _SAFETENSORS_DTYPES[entry["dtype"]], path, data + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{entry['dtype']} of shape {shape} in the bytes {begin} to {end}")
    return tensor


def _read_torch(path: Path, size: int) -> Headers:
    checkpoint = read_torch_file(path)
    wrapper, state = _unwrap(checkpoint.root)
    records = {name: value for name, value in state.items() if isinstance(value, TensorRecord)}
    hollow = next((name for name, record in records.items() if record.storage is None), None)
    if hollow is not None:
        raise ValueError(f"{path}: {hollow} was saved from the meta device: it has a shape and no data")
    if not records:
        names = f"; its pickle asks for {', '.join(checkpoint.foreign[:3])}" if checkpoint.foreign else ""
        raise ValueError(f"{path}: a torch file without weights (no dictionary of tensors in it){names}")
    tensors = {name: torch_tensor(record, checkpoint, path) for name, record in records.items()}
    return Headers(tensors, [path], size, beside(checkpoint) if wrapper else {}, checkpoint.foreign)


def torch_tensor(record: TensorRecord, checkpoint: TorchFile, path: Path) -> TensorHeader:
    """The header of a tensor in a torch checkpoint."""
    place, start = checkpoint.places[record.storage], record.offset * DTYPE_BYTES[record.dtype]
    steps = tuple(math.prod(record.shape[i + 1 :]) for i in range(len(record.shape)))
    stride = None if record.stride == steps else record.stride
    if checkpoint.is_zip:
        return TensorHeader(record.shape, record.dtype, path, start, place, stride)
    return TensorHeader(record.shape, record.dtype, path, place + start, None, stride)


def beside(checkpoint: TorchFile) -> dict[str, Any]:
    """The text and numbers at the top of a checkpoint, beside the weights."""
    return {k: v for k, v in checkpoint.root.items() if isinstance(v, str | int | float | bool)}


def _unwrap(root: Any) -> tuple[str, Mapping[Any, Any]]:
    """The dictionary of tensors inside a checkpoint, and the key under which it lies ("" at the top)."""
    if not isinstance(root, Mapping):
        return "", {}
    for key in WRAPPERS:
        inner = root.get(key)
        if isinstance(inner, Mapping) and any(isinstance(v, TensorRecord) for v in inner.values()):
            return key, inner
    return "", root
