"""An opened checkpoint: headers at once, tensors when asked for, out of mapped memory; no code of the file runs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cogvideox.weights.files.headers import TensorHeader, position, read_headers
from cogvideox.weights.files.locate import STATES, locate
from cogvideox.weights.files.zero import read_masters
from cogvideox.weights.geometry import T5_ALIAS
from cogvideox.weights.identify import describe


class WeightsReader:
    """The tensors of ``path`` by name. Averaged (EMA) tensors, where wanted and there, replace those of their names.

    Raises ValueError where nothing can be read (locate.py, headers.py, zero.py), where a pickle asks for more than
    weights need, and where a rank's share of the averaged weights or of the masters is missing.
    """

    def __init__(self, path: str | Path, component: str | None, *, ema: bool, masters: bool = False):
        """masters: the optimizer's fp32 copies in place of a run's weights; ZeRO-3 has no other weights."""
        source = locate(path, component)
        headers = read_headers(source.files)
        if masters and source.files[0].name == STATES:
            headers = read_masters(source.files[0])
        elif masters and "zero_stage" not in headers.metadata:
            raise ValueError(f"{source.path}: fp32 masters are asked for; only a run of DeepSpeed has them")
        if headers.foreign_globals:
            raise ValueError(
                f"{headers.files[0]}: refused: its pickle asks for {', '.join(headers.foreign_globals[:3])}, which "
                f"would run when it is opened, and weights need no such thing; use a safetensors file"
            )
        self.path, self.source, self.headers = source.path, source, headers
        self.info = describe(headers, source)
        self.tensors: dict[str, TensorHeader] = dict(headers.tensors)
        self.used_ema = ema and bool(source.ema_files)
        if self.used_ema:
            ranks = headers.metadata.get("dp_world_size", len(source.ema_files))
            if len(source.ema_files) != ranks:
                raise ValueError(
                    f"{source.folder}: averaged weights of {len(source.ema_files)} ranks, but {ranks} trained; "
                    f"restore the missing ema_rank_*.safetensors, or set load.ema=false"
                )
            averaged = read_headers(source.ema_files).tensors
            self.tensors.update(averaged)
            for name, header in averaged.items():
                # T5's token embedding has two names, and an average holds each tensor once.
                alias = name.removesuffix("shared.weight") + T5_ALIAS
                if name.endswith("shared.weight") and alias in self.tensors:
                    self.tensors[alias] = header
        self._mapped: dict[Path, torch.UntypedStorage] = {}

    def tensor(self, name: str) -> Tensor:
        """On the CPU, in the file's dtype; its bytes are read when they are used.

        Writing to it changes no file. One that ZeRO has split is put together in memory.
        """
        header = self.tensors[name]
        if not header.slices:
            return self.view(header)
        parts = [self.view(part) for part in header.slices]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(header.shape)

    def expect(self, family: str) -> None:
        """ValueError unless these are weights of that family (transformer, vae, t5)."""
        if self.info.family != family:
            raise ValueError(f"{self.path}: expected the weights of a {family}, this is {self.info.variant}")

    def view(self, header: TensorHeader) -> Tensor:
        """The tensor at a header's place, mapped; ``header``: without slices."""
        dtype = getattr(torch, header.dtype)
        if header.numel == 0:
            return torch.empty(header.shape, dtype=dtype)
        start = position(header)
        # A storage of its own for each tensor: torch.save writes the whole storage of what it is given.
        storage = self._map(header.file)[start : start + header.extent]
        if start % dtype.itemsize:
            # Only torch before 1.6, and other writers of safetensors, leave numbers unaligned.
            storage = storage.clone()
        strides = header.stride or torch.empty(header.shape, device="meta").stride()
        return torch.empty(0, dtype=dtype).set_(storage, 0, header.shape, strides)

    def _map(self, file: Path) -> torch.UntypedStorage:
        if file not in self._mapped:
            self._mapped[file] = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
        return self._mapped[file]
