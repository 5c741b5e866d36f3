"""What a torch checkpoint holds, read from its pickle without running it: no torch, no object of the pickle's choosing.

A pickle is a program: it names functions ("globals") and calls them. Here every name resolves either to one of the few
below, which only note down shapes, or to an inert stand-in that accepts every call and does nothing. The names are
kept, so that a loader can refuse a file by them before it opens it for real.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE_BYTES = 256 * 2**20  # The pickle of a published 5B has 0.2 MB; data lies outside of it.
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

    @property
    def foreign(self) -> list[str]:
        """Globals that weights have no need of; one of them may be an attack."""
        return [name for name in self.globals if not is_harmless(name)]


def is_harmless(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    if module in ("torch", "torch.storage") and (attribute in _STORAGES or attribute in DTYPE_BYTES):
        return True
    return _HARMLESS.fullmatch(name) is not None


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
        if members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(
                f"{path}: its data.pkl has {members[pickles[0]].file_size:,} bytes, far beyond any model's "
                f"(at most {_MAX_PICKLE_BYTES:,}): refused"
            )
        try:
            with archive.open(pickles[0]) as stream:
                reader = _Reader(stream)
                root = reader.load()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: damaged: {error}") from error
        except _DAMAGE as error:
            raise ValueError(f"{path}: its pickle is damaged ({type(error).__name__}: {error})") from error
        folder = pickles[0].removesuffix("data.pkl")
        for key, needed in reader.bytes_needed().items():
            info = members.get(f"{folder}data/{key}")
            if info is None or info.file_size < needed:
                found = "is missing" if info is None else f"has {info.file_size:,} of {needed:,} bytes"
                raise ValueError(f"{path}: damaged: record data/{key} {found}")
    return TorchFile(root, tuple(reader.names))


def _read_legacy(path: Path, file: IO[bytes]) -> TorchFile:
    """magic, protocol, system, object, storage keys: five pickles; then (elements: int64, bytes) for each key."""
    reader = first = _Reader(file)
    try:
        is_checkpoint = first.load() == _LEGACY_MAGIC
        if is_checkpoint:
            for _ in range(2):
                _Reader(file).load()
            reader = _Reader(file)
            root = reader.load()
            keys = list(_Reader(file).load())
            expected = file.tell() + sum(8 + reader.storage_bytes.get(key, 0) for key in keys)
    except _DAMAGE as error:
        raise ValueError(f"{path}: its pickle is damaged ({type(error).__name__}: {error})") from error
    if not is_checkpoint:
        names = ", ".join(list(first.names)[:3])
        runs = f"; opening it would run {names}" if names else ""
        raise ValueError(f"{path}: a bare pickle, not a torch checkpoint{runs}: refused")
    if path.stat().st_size < expected:
        raise ValueError(
            f"{path}: truncated: {path.stat().st_size:,} bytes where its header speaks of {expected:,}"
        )
    return TorchFile(root, tuple(reader.names))


class _Inert:
    """Stands for every object that a pickle builds: takes any call, state or item, and does nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, item: Any) -> None: ...
    def extend(self, items: Any) -> None: ...
    def add(self, item: Any) -> None: ...


class _Dict(dict):
    """An OrderedDict whose pickled attributes (`_metadata`) are dropped, so that none can shadow a method."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args[:1])

    def __setstate__(self, state: Any) -> None: ...


class _Call:
    """A function that pickles may call; without attributes for them to set."""

    __slots__ = ("function",)

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None: ...


class _Name(str):
    """A dtype or a storage class: only its name matters."""

    __slots__ = ()


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str) -> TensorRecord:
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor without a storage, or with a shape that is none")
    return TensorRecord(shape, stride, dtype, storage.key, offset)


_FUNCTIONS = {
    "torch._utils._rebuild_tensor": lambda s, offset, size, stride: _tensor(s, offset, size, stride, s.dtype),
    "torch._utils._rebuild_tensor_v2": lambda s, offset, size, stride, *_: _tensor(
        s, offset, size, stride, s.dtype
    ),
    "torch._utils._rebuild_tensor_v3": lambda s, offset, size, stride, grad, hooks, dtype, *_: _tensor(
        s, offset, size, stride, str(dtype)
    ),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype, size, stride, *_: TensorRecord(
        tuple(size), tuple(stride), str(dtype), None, 0
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    # A tensor with Python attributes: (function, type, its arguments, state). The function came through find_class too.
    "torch._tensor._rebuild_from_type_v2": lambda function, _type, args, *_: function(*args),
    "torch.Size": tuple,
}


class _Reader(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings and TensorRecords, and nothing else."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.names: dict[str, None] = {}  # an ordered set
        self.storage_bytes: dict[str, int] = {}
        self._records: list[TensorRecord] = []

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        self.names[full] = None
        if full == "collections.OrderedDict":
            return _Dict
        if full in _FUNCTIONS:
            return _Call(lambda *args: self._note(_FUNCTIONS[full](*args)))
        if module in ("torch", "torch.storage") and (name in _STORAGES or name in DTYPE_BYTES):
            return _Name(name)
        return _Inert

    def persistent_load(self, pid: Any) -> _Storage:
        """``("storage", StorageType, key, device, elements)``; the older format adds a view."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Name):
            raise pickle.UnpicklingError("a persistent id that is no storage")
        _, kind, key, _device, elements = pid[:5]
        if not isinstance(key, str) or type(elements) is not int:
            raise pickle.UnpicklingError("a persistent id that is no storage")
        dtype = _STORAGES[kind]
        self.storage_bytes[key] = elements * DTYPE_BYTES[dtype]
        return _Storage(key, dtype)

    def bytes_needed(self) -> dict[str, int]:
        """For each storage, the bytes that the tensors in it reach to."""
        needed: dict[str, int] = {}
        for record in self._records:
            if record.storage is not None:
                needed[record.storage] = max(needed.get(record.storage, 0), record.end_byte)
        return needed

    def _note(self, value: Any) -> Any:
        if isinstance(value, TensorRecord):
            self._records.append(value)
        return value
