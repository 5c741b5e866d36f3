"""What a torch checkpoint holds and where its bytes lie, read without torch and without running its pickle.

``torch.save`` writes a pickle, in which each tensor is a place in a storage, and the storages as plain bytes beside it:
as records of a zip archive, uncompressed, or one after the other (before torch 1.6). So shapes come from the pickle,
read as data (inert_pickle.py), and values from the file's bytes: nothing ever unpickles the file. The names that the
pickle asks for are kept: one that weights have no need of is an attack, or no weights.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cogvideox.weights.files.inert_pickle import OPAQUE, Name, read_pickle

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_HARMLESS = re.compile(
    r"torch\.(Size|Tensor|device|nn\.parameter\.Parameter)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|meta_tensor_no_storage)"
    r"|torch\._tensor\._rebuild_from_type_v2"
    r"|(collections\.OrderedDict|(builtins|__builtin__)\.(set|bytearray)|_codecs\.encode)"
    r"|numpy(\._?core\.multiarray\.(_reconstruct|scalar)|\.ndarray|\.dtype|\.dtypes\.\w+DType)"
)
# What DeepSpeed puts into the files of its optimizer.
_DEEPSPEED = re.compile(
    r"deepspeed\.runtime\.(fp16\.loss_scaler\.(Dynamic)?LossScaler|zero\.config\.ZeroStageEnum)"
    r"|deepspeed\.utils\.tensor_fragment\.fragment_address"
)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE_BYTES = 256 * 2**20  # The pickle of a published 5B has 0.2 MB; data lies outside of it.
_MAX_DIMENSIONS = 64  # torch's own limit
_DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError, RecursionError, NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class TensorRecord:
    """A tensor's place in a storage. ``storage`` None: saved from the meta device, there are no bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    storage: str | None
    offset: int  # in elements

    @property
    def end_byte(self) -> int:
        """Bytes of the storage that the tensor needs."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (self.offset + last + 1) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class TorchFile:
    """``root``: what was saved, with TensorRecords for tensors. ``globals``: every name that the pickle asks for."""

    root: Any
    globals: tuple[str, ...]
    is_zip: bool
    places: dict[str, int] = field(default_factory=dict)
    # Storage -> where its bytes begin in the file; in a zip, where its record's header begins, which they follow.

    @property
    def foreign(self) -> list[str]:
        """Globals that weights have no need of; one of them may be an attack."""
        return [name for name in self.globals if not is_harmless(name)]


def is_harmless(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    if module in ("torch", "torch.storage") and (attribute in _STORAGES or attribute in DTYPE_BYTES):
        return True
    return bool(_HARMLESS.fullmatch(name) or _DEEPSPEED.fullmatch(name))


def read_torch_file(path: Path) -> TorchFile:
    """Read a file of ``torch.save`` (zip, or the format before torch 1.6). ValueError names path and reason."""
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(b"PK"):
            return _read_zip(path, file)
        if magic.startswith(b"\x80"):
            return _read_legacy(path, file)
    raise ValueError(f"{path}: not a torch checkpoint (it begins with the bytes {magic!r})")


def _read_zip(path: Path, file: IO[bytes]) -> TorchFile:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: truncated: it begins like a torch checkpoint, but the archive's directory, which stands at the "
            f"end, is missing ({size:,} bytes are here); download or copy it again"
        ) from error
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path}: a zip archive without data.pkl, so not a torch checkpoint")
        _check_record(path, members[pickles[0]])
        if members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(
                f"{path}: its data.pkl has {members[pickles[0]].file_size:,} bytes, far beyond any model's "
                f"(at most {_MAX_PICKLE_BYTES:,}): refused"
            )
        folder = pickles[0].removesuffix("data.pkl")
        try:
            data = archive.read(pickles[0])
            order = b"little"
            if f"{folder}byteorder" in members:
                order = archive.open(f"{folder}byteorder").read(8)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged: {error}") from error
        if order != b"little":
            raise ValueError(
                f"{path}: its numbers are {order!r}-endian; only little-endian files can be read"
            )
        reader = _Reader(path)
        root = reader.load(io.BytesIO(data))
        places = {}
        for key, needed in reader.bytes_needed().items():
            info = members.get(f"{folder}data/{key}")
            if info is None or info.file_size < needed:
                found = "is missing" if info is None else f"has {info.file_size:,} of {needed:,} bytes"
                raise ValueError(f"{path}: damaged: record data/{key} {found}")
            _check_record(path, info)
            places[key] = info.header_offset
    return TorchFile(root, tuple(reader.names), True, places)


def _check_record(path: Path, info: zipfile.ZipInfo) -> None:
    """torch.save never compresses: compressed weights cannot be mapped, and a small file could unpack to any size."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(
            f"{path}: its record {info.filename} is compressed ({info.compress_size:,} bytes for "
            f"{info.file_size:,}), which torch.save never does: refused; save it again with torch"
        )


def _read_legacy(path: Path, file: IO[bytes]) -> TorchFile:
    """magic, protocol, system, object, storage keys: five pickles; then (elements: int64, bytes) for each key."""
    first, reader = _Reader(path), _Reader(path)
    limited = _Limited(file, min(_MAX_PICKLE_BYTES, path.stat().st_size))
    if first.load(limited) != _LEGACY_MAGIC:
        runs = f"; opening it would run {', '.join(first.names[:3])}" if first.names else ""
        raise ValueError(f"{path}: a bare pickle, not a torch checkpoint{runs}: refused")
    for _ in range(2):
        _Reader(path).load(limited)
    root = reader.load(limited)
    keys = _Reader(path).load(limited)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(reader.storage_bytes):
        raise ValueError(f"{path}: damaged: its list of storages is not that of its tensors")
    end, places = file.tell(), {}
    for key in keys:
        places[key] = end + 8
        end = places[key] + reader.storage_bytes[key]
    if path.stat().st_size < end:
        raise ValueError(
            f"{path}: truncated: {path.stat().st_size:,} bytes where its header speaks of {end:,}"
        )
    short = next((k for k, needed in reader.bytes_needed().items() if needed > reader.storage_bytes[k]), None)
    if short is not None:
        raise ValueError(f"{path}: damaged: a tensor reaches beyond its storage {short}")
    return TorchFile(root, tuple(reader.names), False, places)


class _Limited:
    """A file of which at most so many bytes can be read: a pickle may claim a string of any length."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, size: int) -> bytes:
        return self._count(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left))

    def tell(self) -> int:
        return self._file.tell()

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str


class _Reader:
    """Gives the few functions that make up a tensor their meaning, and notes what they speak of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.storage_bytes: dict[str, int] = {}
        self._records: list[TensorRecord] = []

    def load(self, stream: Any) -> Any:
        try:
            root, self.names = read_pickle(stream, self._call, self._persistent)
        except _DAMAGE as error:
            raise ValueError(
                f"{self.path}: its pickle is damaged ({type(error).__name__}: {error})"
            ) from error
        return root

    def bytes_needed(self) -> dict[str, int]:
        """For each storage, the bytes that the tensors in it reach to."""
        needed: dict[str, int] = {}
        for record in self._records:
            if record.storage is not None:
                needed[record.storage] = max(needed.get(record.storage, 0), record.end_byte)
        return needed

    def _call(self, name: Name, arguments: tuple[Any, ...]) -> Any:
        if name == "torch._tensor._rebuild_from_type_v2":
            # A tensor with Python attributes: (function, type, its arguments, state).
            function, _type, inner, *_ = arguments
            return self._call(function, inner) if isinstance(function, Name) else OPAQUE
        value = _FUNCTIONS[name](*arguments) if name in _FUNCTIONS else OPAQUE
        if isinstance(value, TensorRecord):
            self._records.append(value)
        return value

    def _persistent(self, pid: Any) -> _Storage:
        """``("storage", StorageType, key, device, elements)``; the older format adds a view, None since torch 0.4."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Name):
            raise pickle.UnpicklingError("a persistent id that is no storage")
        _, kind, key, _device, elements, *view = pid
        if not isinstance(key, str) or type(elements) is not int or elements < 0 or any(view):
            raise pickle.UnpicklingError("a persistent id that is no storage")
        dtype = _STORAGES[kind.rpartition(".")[2]]
        self.storage_bytes[key] = elements * DTYPE_BYTES[dtype]
        return _Storage(key, dtype)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str) -> TensorRecord:
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise pickle.UnpicklingError("a tensor without a storage")
    shape, stride = _sizes(shape), _sizes(stride)
    if dtype not in DTYPE_BYTES or len(shape) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of dtype {dtype}, shape {shape} and stride {stride}")
    return TensorRecord(shape, stride, dtype, storage.key, offset)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > _MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a shape that is none")
    if not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise pickle.UnpicklingError("a shape that is none")
    return tuple(value)


def _dtype(name: Any) -> str:
    return str(name).removeprefix("torch.")


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": lambda s, offset, size, stride: _tensor(s, offset, size, stride, s.dtype),
    "torch._utils._rebuild_tensor_v2": lambda s, offset, size, stride, *_: _tensor(
        s, offset, size, stride, s.dtype
    ),
    "torch._utils._rebuild_tensor_v3": lambda s, offset, size, stride, grad, hooks, dtype, *_: _tensor(
        s, offset, size, stride, _dtype(dtype)
    ),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype, size, stride, *_: TensorRecord(
        _sizes(size), _sizes(stride), _dtype(dtype), None, 0
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.Size": lambda size=(): _sizes(size),
    # In Python 3 its entries follow the call; a list of pairs as its argument is Python 2's.
    "collections.OrderedDict": lambda *pairs: OPAQUE if pairs else {},
    "deepspeed.runtime.zero.config.ZeroStageEnum": lambda stage: stage,
}
