"""An opened checkpoint: headers at once, tensors when asked for, out of mapped memory; no code of the file runs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cogvideox.weights.headers import TensorHeader, is_safetensors, read_headers
from cogvideox.weights.identify import describe
from cogvideox.weights.locate import locate


class WeightsReader:
    """The tensors of ``path`` by name. Averaged (EMA) tensors, where wanted and there, replace those of their names.

    Raises ValueError where nothing can be read (locate.py, headers.py), where a pickle asks for more than weights
    need, and where a rank's share of the averaged weights is missing.
    """

    def __init__(self, path: str | Path, component: str, *, ema: bool):
        source = locate(path, component)
        headers = read_headers(source.files)
        if headers.foreign_globals:
            raise ValueError(
                f"{headers.files[0]}: refused: its pickle asks for {', '.join(headers.foreign_globals[:3])}, which "
                f"would run when it is opened, and weights need no such thing; use a safetensors file"
            )
        self.path = source.path
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
            self.tensors.update(read_headers(source.ema_files).tensors)
        self._wrappers = headers.wrappers
        self._opened: dict[Path, Callable[[str], Tensor]] = {}

    def tensor(self, name: str) -> Tensor:
        """On the CPU, in the file's dtype; its bytes are read when they are used."""
        file = self.tensors[name].file
        if file not in self._opened:
            self._opened[file] = _open(file, self._wrappers.get(file))
        return self._opened[file](name)

    def expect(self, family: str) -> None:
        """ValueError unless these are weights of that family (transformer, vae, t5)."""
        if self.info.family != family:
            raise ValueError(f"{self.path}: expected the weights of a {family}, this is {self.info.variant}")


def _open(file: Path, wrapper: str | None) -> Callable[[str], Tensor]:
    if is_safetensors(file):
        from safetensors import safe_open

        return safe_open(file, framework="pt", device="cpu").get_tensor
    with torch.serialization.safe_globals(_numpy_globals()):
        try:
            # The format before torch 1.6 is no zip archive and cannot be mapped.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"{file}: torch.load(weights_only=True) cannot read it: {error}") from error
    return (state[wrapper] if wrapper else state).__getitem__


def _numpy_globals() -> list:
    """What SAT's checkpoints need for numpy's random state, under the names of numpy 1 and 2."""
    import numpy as np

    functions = {"_reconstruct": np.zeros(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    named = [
        (f, f"numpy.{core}.multiarray.{name}") for name, f in functions.items() for core in ("core", "_core")
    ]
    return [*named, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
