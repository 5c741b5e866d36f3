"""What is converted: one model among the tensors of a file or folder, and what its configuration says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox.convert import diffusers_config as configs
from cogvideox.weights.beside import read_beside, stated_geometry
from cogvideox.weights.geometry import Geometry, find_model, transformer_geometry
from cogvideox.weights.lora.formats import is_lora
from cogvideox.weights.reader import WeightsReader


class Model:
    """One model among the tensors of a source.

    ``headers``: its tensors by name, prefix taken off, in the file's order. ``known``: what the source's configuration
    says beyond shapes, as keys of diffusers' config.json, and before that ``given``, what the user says. ValueError
    where the source does not hold such a model.
    """

    def __init__(
        self, path: Path, family: str, *, ema: bool, dtype: torch.dtype | None, known: Mapping[str, Any]
    ):
        """dtype: wanted; for float32 the fp32 masters of a run's optimizer are taken where its weights are shorter."""
        self.path, self.family = path, family
        reader = WeightsReader(path, family, ema=ema)
        info = reader.info
        self.masters = (
            dtype == torch.float32
            and not reader.used_ema
            and info.has_optimizer
            and info.zero_stage in (1, 2)
            and info.dtype != "float32"
        )
        self.reader = WeightsReader(path, family, ema=ema, masters=True) if self.masters else reader
        self.stored_dtype = info.dtype
        found = find_model(self.reader.tensors, family)
        if found is None:
            raise ValueError(f"{path}: expected the weights of a {family}, this is {info.variant}")
        self.prefix, self.naming = found
        self.headers = {
            name[len(self.prefix) :]: header
            for name, header in self.reader.tensors.items()
            if name.startswith(self.prefix)
        }
        self.others = [name for name in self.reader.tensors if not name.startswith(self.prefix)]
        self.files = sorted(
            {part.file for header in self.headers.values() for part in header.slices or [header]}
        )
        self.record = info.provenance
        self.beside = read_beside(self.files[0].parent)
        self.given = dict(known)
        self.known = {**self._stated(), **known}

    def tensor(self, name: str) -> Tensor:
        return self.reader.tensor(self.prefix + name)

    @property
    def lora_names(self) -> list[str]:
        return [name for name in self.headers if is_lora(self.prefix + name)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Without LoRA, which moves ``x.weight`` to ``x.original.weight``."""
        lora = set(self.lora_names)
        return {plain(name): header.shape for name, header in self.headers.items() if name not in lora}

    @property
    def dtype(self) -> torch.dtype | None:
        """What averaged weights, which are kept in float32, are rounded to: the checkpoint's own type. Else None."""
        return getattr(torch, self.stored_dtype) if self.reader.used_ema else None

    @property
    def geometry(self) -> Geometry:
        """Of a transformer. ValueError where a part of it is missing."""
        geometry = transformer_geometry(self.shapes, self.naming)
        if geometry is None:
            raise ValueError(
                f"{self.path}: a part of a transformer; all of it is needed: finish the download"
            )
        stated, _ = stated_geometry(self.beside)
        if geometry.variant() is None and stated:
            geometry = transformer_geometry(self.shapes, self.naming, **stated)
        return geometry

    def _stated(self) -> dict[str, Any]:
        """From the weakest to the strongest: our run's configuration, our record, diffusers' config.json."""
        tree = self.beside.config_yaml or self.record.get("config")
        stated: dict[str, Any] = {}
        if isinstance(tree, dict):
            stated |= configs.from_our_config(tree)[self.family == "vae"]
        stated |= self.record.get("network", {})
        if self.naming == "diffusers":
            stated |= self.beside.config_json
        return stated


def plain(name: str) -> str:
    """The name of a weight that LoRA has moved to ``.original``."""
    return name.replace(".original.", ".")
