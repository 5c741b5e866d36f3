"""Weight files of any size that take next to no disk: sparse safetensors, torch saves of one repeated element."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Shapes = Mapping[str, tuple[int, ...]]


def sparse_safetensors(path: Path, shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A valid file of the full length whose data is a hole (zeros)."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def repeated(shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Tensors of these shapes over one element each."""
    return {name: torch.zeros((), dtype=dtype).expand(shape) for name, shape in shapes.items()}


def sat_folder(
    folder: Path, state: Mapping[str, torch.Tensor], *, tag: str = "1000", **beside: object
) -> Path:
    """`latest` and `1000/mp_rank_00_model_states.pt`, with what SAT stores beside the weights."""
    (folder / tag).mkdir(parents=True)
    (folder / "latest").write_text(tag)
    states = {
        "module": dict(state),
        "iteration": 1000,
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "random_rng_state": (3, (1, 2, 3), None),
        **beside,
    }
    torch.save(states, folder / tag / "mp_rank_00_model_states.pt")
    return folder
