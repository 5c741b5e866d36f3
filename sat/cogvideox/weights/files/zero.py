"""Weights that DeepSpeed's ZeRO has split over the files of the ranks: names, shapes and slices, from headers alone.

Stages 1 and 2: ``mp_rank_00_model_states.pt`` holds the weights, and each rank's
``*_optim_states.pt`` a slice of their fp32 masters: per parameter group one flat vector, cut into as many slices as
there are ranks. Stage 3: the weights exist as fp32 masters only, and each parameter is cut by itself; frozen ones stand
in the ranks' ``*_model_states.pt``. Tensors become lists of slices, which reader.py joins one tensor at a time.
DeepSpeed's own tool is ``deepspeed/utils/zero_to_fp32.py``; tests/test_zero.py compares with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogvideox.weights.files.headers import Headers, TensorHeader, beside, read_headers, torch_tensor
from cogvideox.weights.files.torch_pickle import DTYPE_BYTES, TensorRecord, TorchFile, read_torch_file

_NAME = re.compile(r"(bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_00_(?P<kind>model|optim)_states\.pt")
_Vector = list[TensorHeader]  # one-dimensional tensors, one behind the other


def is_partitioned(files: Sequence[Path]) -> bool:
    """Whether these are the files in which ZeRO-3 keeps what belongs to the model."""
    return bool(files) and all((m := _NAME.fullmatch(f.name)) and m["kind"] == "model" for f in files)


def rank_files(folder: Path, kind: str) -> list[Path]:
    """The ranks' files of a checkpoint in the order of the ranks; none where there are none.

    kind: "model" (ZeRO-3) or "optim". ValueError where a rank's file is missing or there are two.
    """
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob(f"*zero_pp_rank_*_{kind}_states.pt")):
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match["rank"]), []).append(path)
    twice = next((paths for paths in found.values() if len(paths) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{folder}: {twice[0].name} and {twice[1].name}: files of two runs; remove one run's"
        )
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if missing:
        raise ValueError(
            f"{folder}: the {kind}_states file of rank {missing[0]} is missing ({len(found)} are there); copy it from "
            f"the machine where that rank ran"
        )
    return [found[rank][0] for rank in sorted(found)]


def stage(folder: Path) -> int | None:
    """ZeRO's stage in a checkpoint folder of DeepSpeed (1, 2, 3); None where nothing is split."""
    files = rank_files(folder, "optim")
    return _optimizer(read_torch_file(files[0]), files[0]).get("zero_stage") if files else None


def read_masters(states: Path) -> Headers:
    """The fp32 masters of a run of stage 1 or 2 in place of its weights; what was not trained stays as it is.

    states: ``mp_rank_00_model_states.pt``. ValueError where the folder holds no masters.
    """
    files = rank_files(states.parent, "optim")
    if not files:
        raise ValueError(
            f"{states.parent}: no fp32 masters in it (no *_optim_states.pt); convert its weights instead"
        )
    model, headers = read_torch_file(states), read_headers([states])
    optimizers, foreign = _read_optimizers(files)
    groups = _shapes(model.root.get("param_shapes"), states)
    flats = [_flat_groups(opt, "single_partition_of_fp32_groups", file) for opt, file in optimizers]
    if {len(groups)} != {len(flat) for flat in flats}:
        raise ValueError(
            f"{states.parent}: {len(groups)} groups of parameters, {len(flats[0])} groups of masters"
        )
    paddings = _optimizer(*optimizers[0]).get("param_alignment_paddings") or [[0] * len(g) for g in groups]
    if [len(gaps) for gaps in paddings] != [len(group) for group in groups]:
        raise ValueError(
            f"{files[0]}: its param_alignment_paddings do not fit the parameters: files of two runs?"
        )
    tensors, weights = headers.tensors, dict(headers.tensors)
    for number, shapes in enumerate(groups):
        vector = [flat[number] for flat in flats]
        offset = 0
        for (name, shape), gap in zip(shapes.items(), paddings[number], strict=True):
            tensors[name] = _joined(shape, _cut(vector, offset, math.prod(shape)), states)
            offset += math.prod(shape) + gap
        _check_all_used(offset, vector, 2 * len(files), states.parent)
    by_place = {weights[name]: tensors[name] for shapes in groups for name in shapes if name in weights}
    for name, weight in weights.items():  # a module under two names
        tensors[name] = by_place.get(weight, tensors[name])
    _share(tensors, model)
    size = headers.size_bytes + sum(file.stat().st_size for file in files)
    return Headers(
        tensors,
        [states, *files],
        size,
        headers.metadata | {"masters": True},
        headers.foreign_globals + foreign,
    )


def read_partitioned(files: Sequence[Path]) -> Headers:
    """The weights of a run of ZeRO-3, in fp32 (frozen ones in their dtype); files: one of each rank, in order."""
    folder = files[0].parent
    models = [read_torch_file(file) for file in files]
    if not all(isinstance(model.root, dict) for model in models):
        raise ValueError(f"{folder}: a model_states file that is no dictionary, so none of DeepSpeed's")
    optimizer_files = rank_files(folder, "optim")
    if len(optimizer_files) != len(files):
        raise ValueError(
            f"{folder}: model_states of {len(files)} ranks, optim_states of {len(optimizer_files)}: ZeRO-3 keeps the "
            f"weights in both; restore the missing files"
        )
    optimizers, foreign = _read_optimizers(optimizer_files)
    tensors: dict[str, TensorHeader] = {}
    module = _table(models[0], "module")
    for name in models[0].root.get("buffer_names") or []:
        if isinstance(module.get(name), TensorRecord):
            tensors[name] = torch_tensor(module[name], models[0], files[0])

    for name, shape in _table(models[0], "frozen_param_shapes").items():
        parts = [_table(model, "frozen_param_fragments").get(name) for model in models]
        if not all(isinstance(part, TensorRecord) for part in parts):
            raise ValueError(f"{folder}: {name} was frozen, and a rank's file lacks its part")
        vectors = [[torch_tensor(part, m, f)] for part, m, f in zip(parts, models, files, strict=True)]
        tensors[name] = _gathered(shape, vectors, 0, files[0])

    vectors = [_flat_groups(opt, "fp32_flat_groups", file) for opt, file in optimizers]
    offset = 0
    for shapes in _shapes(models[0].root.get("param_shapes"), files[0]):
        for name, shape in shapes.items():
            tensors[name] = _gathered(shape, vectors, offset, files[0])
            offset += -(-math.prod(shape) // len(files))
    for vector in vectors:
        _check_all_used(offset, vector, 1, folder)
    _share(tensors, models[0])
    every = [*files, *optimizer_files]
    return Headers(
        tensors,
        every,
        sum(file.stat().st_size for file in every),
        beside(models[0]) | {"zero_stage": 3},
        [name for model in models for name in model.foreign] + foreign,
    )


# --------------------------------------------------------------------------------------------------- what files hold


def _read_optimizers(files: Sequence[Path]) -> tuple[list[tuple[TorchFile, Path]], list[str]]:
    opened = [(read_torch_file(file), file) for file in files]
    counts = _optimizer(*opened[0]).get("partition_count")
    # A number for each group of parameters, or one for all.
    ranks = max(counts) if isinstance(counts, list) and counts else counts
    if ranks != len(files):
        raise ValueError(
            f"{files[0].parent}: saved by {ranks} ranks, optim_states of {len(files)} are here; restore the missing "
            f"ones, or remove those of another run"
        )
    return opened, [name for file, _ in opened for name in file.foreign]


def _table(file: TorchFile, key: str) -> Mapping[str, Any]:
    """A dictionary at the top of a file; {} where DeepSpeed has written None."""
    value = file.root.get(key) if isinstance(file.root, dict) else None
    return value if isinstance(value, dict) else {}


def _optimizer(file: TorchFile, path: Path) -> Mapping[str, Any]:
    root = _table(file, "optimizer_state_dict")
    if "partition_count" not in root:
        raise ValueError(f"{path}: not a file of DeepSpeed's ZeRO optimizer (no partition_count in it)")
    return root


def _flat_groups(file: TorchFile, key: str, path: Path) -> _Vector:
    records = _optimizer(file, path).get(key)
    if not isinstance(records, list) or not all(
        isinstance(r, TensorRecord) and len(r.shape) == 1 for r in records
    ):
        raise ValueError(f"{path}: no {key} of flat tensors in it (masters offloaded to NVMe are not saved)")
    return [torch_tensor(record, file, path) for record in records]


def _shapes(groups: Any, path: Path) -> list[dict[str, tuple[int, ...]]]:
    known = isinstance(groups, list) and all(
        isinstance(group, dict) and all(isinstance(shape, tuple) for shape in group.values())
        for group in groups
    )
    if not known:
        raise ValueError(f"{path}: no param_shapes in it, by which DeepSpeed's flat vectors are cut")
    return groups


def _share(tensors: dict[str, TensorHeader], model: TorchFile) -> None:
    """Tied parameters are stored once."""
    for name, original in _table(model, "shared_params").items():
        if original in tensors:
            tensors[name] = tensors[original]


# ------------------------------------------------------------------------------------------------ slices of vectors


def _cut(vector: _Vector, offset: int, length: int) -> Iterator[TensorHeader]:
    """The parts of ``vector``'s elements [offset, offset + length)."""
    for tensor in vector:
        begin, end = max(offset, 0), min(offset + length, tensor.numel)
        if begin < end:
            start = tensor.start + begin * DTYPE_BYTES[tensor.dtype]
            yield replace(tensor, shape=(end - begin,), start=start, stride=None)
        offset -= tensor.numel


def _gathered(shape: tuple[int, ...], vectors: Sequence[_Vector], offset: int, path: Path) -> TensorHeader:
    """ZeRO-3's parameter: ceil(numel / ranks) elements at the same place of every rank's vector, the last padded."""
    numel, share = math.prod(shape), -(-math.prod(shape) // len(vectors))
    slices = [
        part
        for rank, vector in enumerate(vectors)
        for part in _cut(vector, offset, min(share, max(numel - rank * share, 0)))
    ]
    return _joined(shape, slices, path)


def _joined(shape: tuple[int, ...], slices: Any, path: Path) -> TensorHeader:
    slices = tuple(slices)
    if sum(part.numel for part in slices) != math.prod(shape):
        raise ValueError(
            f"{path.parent}: the ranks' vectors end before a parameter of shape {list(shape)}: files of two runs?"
        )
    dtype = slices[0].dtype if slices else "float32"
    return TensorHeader(tuple(shape), dtype, slices[0].file if slices else path, slices=slices)


def _check_all_used(used: int, vector: _Vector, alignment: int, folder: Path) -> None:
    length = sum(tensor.numel for tensor in vector)
    if not 0 <= length - used < alignment:
        raise ValueError(
            f"{folder}: parameters of {used:,} elements, masters of {length:,}: files of two runs?"
        )
