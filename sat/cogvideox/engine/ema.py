"""Exponential moving average of the weights: fp32 copies of the trained parameters, each held by one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as torch_dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cogvideox import dist
from cogvideox.engine.stop import Abandoned


class EMA:
    """shadow <- d shadow + (1 - d) weight after each update, with d = min(decay, (1 + n) / (10 + n)) in update n.

    The ramp (n counts from 1) lets the average leave the initial weights, as in latent-diffusion's LitEma. Parameters
    are dealt over the ranks by size, so that a rank holds 4 / world_size bytes per trained parameter and no update
    communicates (ZeRO-3 gathers each parameter first). The weights averaged are the network's own: in bf16 training
    these are the fp32 masters rounded to bf16, and the average is exact to within that rounding.
    """

    def __init__(self, module: nn.Module, decay: float):
        """module: as DeepSpeed holds it, on its device and in its dtype."""
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.owners = deal({name: numel(p) for name, p in self.parameters.items()}, dist.world_size())
        self.shadow: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            with _gathered(parameter):
                if self._is_mine(name):
                    self.shadow[name] = parameter.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Once after every applied optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.parameters.items():
            with _gathered(parameter):
                if self._is_mine(name):
                    self.shadow[name].lerp_(parameter.float(), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights in the network inside the block, the trained ones, bit for bit, after it.

        Every rank must enter. They are put back after ``Abandoned``, which every rank raises alike, and after no other
        exception: the run is over then, and the communication that it takes would wait for ranks that never come.
        """
        trained = {
            name: torch.empty_like(shadow, dtype=torch.float32) for name, shadow in self.shadow.items()
        }
        self._swap(take=trained, put=self.shadow)
        try:
            yield
        except Abandoned:
            self._swap(take=None, put=trained)
            raise
        self._swap(take=None, put=trained)

    @torch.no_grad()
    def _swap(self, take: dict[str, Tensor] | None, put: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            owner = self.owners[name]
            with _gathered(parameter, modified_by=owner):
                if self._is_mine(name):
                    if take is not None:
                        take[name].copy_(parameter)
                    parameter.copy_(put[name])
                if not _is_partitioned(parameter) and dist.world_size() > 1:
                    torch_dist.broadcast(parameter.data, src=owner)

    def _is_mine(self, name: str) -> bool:
        return self.owners[name] == dist.rank()

    # ------------------------------------------------------------------------------------------------ checkpoint

    def save(self, folder: Path) -> Path:
        """This rank's share as ``ema_rank_00.safetensors`` (fp32, the network's parameter names)."""
        metadata = {"format": "pt", "updates": str(self.updates), "decay": str(self.decay)}
        tensors = {name: shadow.contiguous().cpu() for name, shadow in self.shadow.items()}
        path = folder / f"ema_rank_{dist.rank():02d}.safetensors"
        save_file(tensors, path, metadata=metadata)
        return path

    def load(self, folder: Path) -> None:
        """Take up this rank's share from a checkpoint, written with any number of ranks.

        Raises ValueError if the checkpoint holds no average, or one of other parameters.
        """
        paths = sorted(folder.glob("ema_rank_*.safetensors"))
        if not paths:
            raise ValueError(
                f"{folder} holds no averaged weights (ema_rank_*.safetensors) but train.ema_decay={self.decay}: the "
                f"run that wrote it had none; set train.ema_decay=null, or start in another run.dir"
            )
        found: set[str] = set()
        for path in paths:
            with safe_open(path, framework="pt") as file:
                self.updates = int(file.metadata()["updates"])
                found |= set(file.keys())
                for name in self.shadow.keys() & set(file.keys()):
                    self.shadow[name].copy_(file.get_tensor(name))
        if found != self.parameters.keys():
            different = sorted(found ^ self.parameters.keys())
            raise ValueError(f"{folder} averages other parameters than are trained now: {different[0]}, ...")


def deal(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """Name -> rank: the largest first, each to the rank with the least so far. The same on every rank."""
    held = [0] * ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = held.index(min(held))
        held[owners[name]] += sizes[name]
    return owners


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds only a slice of it on each rank."""
    return hasattr(parameter, "ds_id")


def numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 holds a slice."""
    return parameter.ds_numel if _is_partitioned(parameter) else parameter.numel()


def _gathered(parameter: nn.Parameter, modified_by: int | None = None) -> AbstractContextManager:
    """Under ZeRO-3 the whole parameter on every rank (and the change made on one rank spread); else nothing to do."""
    if not _is_partitioned(parameter):
        return nullcontext()
    return dist.import_deepspeed().zero.GatheredParameters(parameter, modifier_rank=modified_by)
