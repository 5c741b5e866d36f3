"""Read a LoRA from any file into the one form of low_rank.py, with its scale and where that was found."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox.weights import provenance
from cogvideox.weights.geometry import lora_width
from cogvideox.weights.lora import alpha as lora_alpha
from cogvideox.weights.lora.formats import LoraNames, parse
from cogvideox.weights.lora.low_rank import Lora, LowRank, place
from cogvideox.weights.reader import WeightsReader


@dataclass
class LoraFile:
    """A LoRA and what its file says of it. ``modules`` keep the file's dtype and stay mapped."""

    path: Path
    modules: Lora
    format: str
    # SAT, diffusers, kohya or ComfyUI: whose names the tensors had.
    alpha: float | None
    # None: differs by module.
    alpha_source: str
    # One phrase: "8 from RUN/config.yaml".
    provenance: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    # All that was read.

    @property
    def ranks(self) -> list[int]:
        """Every rank that occurs, ascending."""
        return sorted({part.rank for part in self.modules.values()})

    @property
    def method(self) -> str:
        return "DoRA" if any(part.gain is not None for part in self.modules.values()) else "LoRA"

    @property
    def num_layers(self) -> int:
        """1 + the last transformer layer that is updated."""
        found = (re.match(r"transformer_blocks\.(\d+)\.", module) for module in self.modules)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    @property
    def width(self) -> int | None:
        """hidden_size of the network it was trained on; None where no update shows it."""
        found = (
            lora_width(m, tuple(part.down.shape), tuple(part.up.shape)) for m, part in self.modules.items()
        )
        return next((width for width in found if width is not None), None)

    @property
    def tensors(self) -> int:
        """Matrices, two for each module."""
        return 2 * len(self.modules)


def read_lora(path: str | Path, *, alpha: float | None = None, ema: bool = True) -> LoraFile:
    """Read a LoRA: a run folder of ours, a LoRA checkpoint of SAT, or a file of diffusers, PEFT, kohya or ComfyUI.

    alpha: overrides what the file says. ema: take averaged matrices where the checkpoint has them. Only the matrices of
    a checkpoint are read. Raises ValueError where there is nothing to read (locate.py, reader.py), for names that are
    no LoRA of a CogVideoX transformer (formats.py), matrices that do not belong together, and a missing alpha.
    """
    reader = WeightsReader(path, "transformer", ema=ema)
    source, headers = reader.source, reader.headers
    try:
        names = parse(reader.tensors)
        modules = {m: (reader.tensor(names.down[m]), reader.tensor(names.up[m])) for m in names.down}
        ranks = {module: _rank(module, *pair) for module, pair in modules.items()}
        if alpha is not None:
            scales, alpha_source = lora_alpha.given(alpha, ranks)
        else:
            scales, alpha_source = lora_alpha.find(names, ranks, headers, source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return LoraFile(
        path=Path(path),
        modules={m: LowRank(*pair, scales[m], _gain(reader, names, m)) for m, pair in modules.items()},
        format=names.format,
        alpha=lora_alpha.common_alpha(scales, ranks),
        alpha_source=alpha_source,
        provenance=provenance.read(headers.metadata, source.folder),
        files=(*source.files, *(source.ema_files if reader.used_ema else ())),
    )


def _gain(reader: WeightsReader, names: LoraNames, module: str) -> Tensor | None:
    """The module's rows of its layer's gains."""
    if module not in names.gain:
        return None
    where = place(module, "SAT")
    chunks = reader.tensor(names.gain[module]).chunk(where.count)
    return torch.cat([chunks[number] for number in where.chunks])


def _rank(module: str, down: Tensor, up: Tensor) -> int:
    shapes = f"{module}: down {tuple(down.shape)}, up {tuple(up.shape)}"
    if down.ndim != 2 or up.ndim != 2:
        raise ValueError(f"{shapes}: not the matrices of a linear layer")
    if down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{shapes}: the ranks differ ({down.shape[0]} and {up.shape[1]}); expected (r, in) and (out, r)"
        )
    if down.shape[0] == 0:
        raise ValueError(f"{shapes}: the rank is 0, there is nothing in it")
    return down.shape[0]
