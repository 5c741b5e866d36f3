"""Ranks, the device, the process group and the random streams.

Besides ``environment.py`` the only reader of environment variables.
One code path for ``python``, ``torchrun`` on a CPU and ``torchrun`` on many GPUs: ``init()`` always makes a process
group (of one rank where no launcher set the variables), so nothing above needs to ask whether it runs alone.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch.distributed import distributed_c10d

from cogvideox import environment

# Before SAT and DeepSpeed are imported anywhere: both chatter while they are.
environment.quieten_libraries(has_gpu=torch.cuda.is_available())


def init(timeout_minutes: float = 30.0, *, model_parallel: bool = True) -> None:
    """Join (or make) the process group; a second call keeps the first one's group.

    timeout_minutes: a collective that waits longer than this ends the run.
    model_parallel: also initialise SAT's mpu with size 1, which SAT's layers ask for when they are built; False saves
    the seconds that importing SAT takes.
    """
    if not torch_dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
            # CPU tensors (flags, logged values) go through gloo, so that exchanging them never waits for the GPU.
            backend = "cpu:gloo,cuda:nccl"
        if environment.is_launched():
            torch_dist.init_process_group(backend, timeout=timeout)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
            store = torch_dist.HashStore()  # in this process: no port, no file
            torch_dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    if model_parallel:
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")  # SAT guesses 8 and says so where it is missing
        from sat import mpu

        if not mpu.model_parallel_is_initialized():
            mpu.initialize_model_parallel(1)
    set_timeout(timeout_minutes)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch alike on every rank: what is built from random weights is the same each time.

    The steps themselves draw from ``RandomStreams``.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def shutdown() -> None:
    """Leave the process group; does nothing where there is none."""
    if not torch_dist.is_initialized():
        return
    if "sat.mpu" in sys.modules:
        sys.modules["sat.mpu"].destroy_model_parallel()
    if "deepspeed" in sys.modules:
        # DeepSpeed keeps a copy of the world group, which must not outlive it.
        sys.modules["deepspeed"].utils.groups._WORLD_GROUP = None
    torch_dist.destroy_process_group()


def set_timeout(minutes: float) -> None:
    """Give every group of this process the timeout: those that DeepSpeed and SAT make come with torch's default."""
    timeout = datetime.timedelta(minutes=minutes)
    for group in list(distributed_c10d._world.pg_map):
        if group is not torch_dist.GroupMember.NON_GROUP_MEMBER:
            distributed_c10d._set_pg_timeout(timeout, group)


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    """Rank 0: the one that writes files and speaks."""
    return rank() == 0


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", environment.local_rank())
    return torch.device("cpu")


def to_device(batch: Any, target: torch.device) -> Any:
    """Tensors of nested dicts, lists and tuples on ``target``; everything else as it is."""
    if isinstance(batch, torch.Tensor):
        return batch.to(target, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, target) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, target) for value in batch)
    return batch


def barrier() -> None:
    if world_size() > 1:
        torch_dist.barrier()


def any_rank(flag: bool) -> bool:
    """True on every rank where it is true on one. Every rank must call it. One CPU integer; no GPU sync."""
    if world_size() == 1:
        return flag
    agreed = torch.tensor([flag], dtype=torch.int32)
    torch_dist.all_reduce(agreed, op=torch_dist.ReduceOp.MAX)
    return bool(agreed)


def any_rank_of_each(*flags: bool) -> list[bool]:
    """``any_rank`` of several flags in one exchange."""
    if world_size() == 1:
        return list(flags)
    agreed = torch.tensor(flags, dtype=torch.int32)
    torch_dist.all_reduce(agreed, op=torch_dist.ReduceOp.MAX)
    return [bool(flag) for flag in agreed]


def store(name: str, timeout: datetime.timedelta) -> torch_dist.Store:
    """The key-value store through which the ranks met, with keys under ``name`` and a connection of its own.

    So a thread may wait in it while another uses it, and it works while every collective hangs.
    """
    own = torch_dist.PrefixStore(name, distributed_c10d._get_default_store().clone())
    own.set_timeout(timeout)
    return own


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, or did not answer in time."""
    if isinstance(error, torch_dist.DistError):
        return True
    return type(error) is RuntimeError and any(
        text in str(error)
        for text in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    )


def gather(value: Any) -> list[Any]:
    """Every rank's picklable ``value``, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def ticket_counter() -> Callable[[], int]:
    """A counter over all ranks, ``counter() -> 0, 1, 2 ...``, that gives each number once.

    Every rank must call it, and in the same order as its other calls. The numbers come from the group's store, so a
    rank that takes one waits for no other rank.
    """
    if world_size() == 1:
        return itertools.count().__next__
    key = f"cogvideox/tickets/{next(_ticket_counters)}"
    store = distributed_c10d._get_default_store()
    return lambda: store.add(key, 1) - 1


_ticket_counters = itertools.count()


def import_deepspeed() -> ModuleType:
    """DeepSpeed, quiet and without compiling anything."""
    os.environ.setdefault(
        "TORCH_EXTENSIONS_DIR", os.path.join(tempfile.gettempdir(), f"cogvideox-{os.getuid()}")
    )
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # On a CPU its init would build a shared-memory all-reduce with g++ for 40 s; gloo does the same work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Names of torch's that DeepSpeed still uses.
    warnings.filterwarnings(
        "ignore", message=r".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning
    )
    return deepspeed


@dataclass(frozen=True)
class RandomStreams:
    """The random streams of one micro-step: a function of (seed, step, micro_step, rank), so none is ever saved.

    local: differs between ranks (noise, crops, dropout of captions).
    shared: the same on every rank (decisions that ranks must take alike without talking).
    """

    local: torch.Generator
    shared: torch.Generator
    rank: int
    world_size: int
    global_seed: int

    @classmethod
    def at(
        cls,
        seed: int,
        step: int,
        micro_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> RandomStreams:
        """seed, step, micro_step >= 0; the generators live on ``device``."""

        def draw(*key: int) -> int:
            sequence = np.random.SeedSequence(seed, spawn_key=(step, micro_step, *key))
            return int(sequence.generate_state(1, np.uint64)[0])

        return cls(
            local=torch.Generator(device).manual_seed(draw(0, rank)),
            shared=torch.Generator(device).manual_seed(draw(1)),
            rank=rank,
            world_size=world_size,
            global_seed=draw(2, rank),
        )

    def seed_global(self) -> None:
        """Seed torch's global generators (every device), from which ``nn.Dropout`` draws, for this micro-step."""
        torch.manual_seed(self.global_seed)
