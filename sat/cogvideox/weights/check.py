"""NaN and infinity among weights: every value of a file or folder is looked at, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cogvideox.weights.files.headers import TensorHeader
from cogvideox.weights.files.locate import COMPONENTS, locate
from cogvideox.weights.files.torch_pickle import DTYPE_BYTES
from cogvideox.weights.reader import WeightsReader

_CHUNK = 2**22  # elements


def check_values(path: str | Path, component: str | None = None) -> list[str]:
    """One line for each tensor that holds a NaN or an infinity: its name, how many there are, where the first one is.

    component: which part of a pipeline folder (COMPONENTS); None checks all of its parts. A run's averages are checked
    beside its weights. Reads all bytes once; takes a few megabytes of memory beside the mapped files. Raises ValueError
    as WeightsReader does.
    """
    folder = locate(path, component).path
    if component is None and (folder / "model_index.json").is_file():
        parts = [name for name in COMPONENTS if (folder / name).is_dir()]
        return [f"{part}/{line}" for part in parts for line in check_values(folder, part)]
    reader = WeightsReader(path, component, ema=False)
    lines = _check(reader)
    if reader.info.has_ema:
        averages = WeightsReader(path, component, ema=True)
        names = [name for name, header in averages.tensors.items() if header != reader.tensors.get(name)]
        lines += [f"averaged {line}" for line in _check(averages, names)]
    return lines


def _check(reader: WeightsReader, names: list[str] | None = None) -> list[str]:
    lines = []
    for name in reader.tensors if names is None else names:
        nans = infinities = seen = 0
        first = None
        for chunk in _chunks(reader, reader.tensors[name]):
            if not _is_finite(chunk):
                nan, inf = chunk.isnan(), chunk.isinf()
                nans, infinities = nans + int(nan.sum()), infinities + int(inf.sum())
                first = seen + int((nan | inf).flatten().nonzero()[0]) if first is None else first
            seen += chunk.numel()
        if first is not None:
            place = [int(i) for i in torch.unravel_index(torch.tensor(first), reader.tensors[name].shape)]
            lines.append(
                f"{name}: {nans:,} NaN and {infinities:,} inf of {seen:,} values, the first at {place}"
            )
    return lines


def _is_finite(chunk: Tensor) -> bool:
    if not chunk.numel() or not (chunk.is_floating_point() or chunk.is_complex()):
        return True
    if chunk.is_complex():
        chunk = torch.view_as_real(chunk)
    # A NaN is the smallest and the largest of all. Many times faster than isfinite().all(), which takes temporaries.
    return bool(torch.stack(torch.aminmax(chunk)).isfinite().all())


def _chunks(reader: WeightsReader, header: TensorHeader) -> Iterator[Tensor]:
    """A tensor in order, in pieces of about ``_CHUNK`` elements, of which no two are in memory at a time."""
    if header.stride is not None:  # a view of another tensor, as torch.save keeps it
        yield from _rows(reader.view(header))
        return
    for part in header.slices or (header,):
        for first in range(0, part.numel, _CHUNK):
            count = min(_CHUNK, part.numel - first)
            start = part.start + first * DTYPE_BYTES[part.dtype]
            chunk = reader.view(replace(part, shape=(count,), start=start))
            # Eight-bit floats have next to no operations.
            yield chunk.float() if chunk.is_floating_point() and chunk.itemsize == 1 else chunk


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.numel() <= _CHUNK:
        yield tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    else:
        for row in tensor:
            yield from _rows(row)
