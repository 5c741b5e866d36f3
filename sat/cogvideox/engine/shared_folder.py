"""A run folder that every rank sees: checkpoints are written by all ranks into one folder, and named by rank 0."""

from __future__ import annotations

import platform
import uuid
from pathlib import Path

from cogvideox import dist


def check_shared(folder: str | Path) -> None:
    """Raise ValueError on every rank where some do not see what rank 0 writes into ``folder``. All ranks must call.

    On several machines that is a folder of one machine's own disk: its checkpoints would lack the others' parts, which
    nobody notices before the run is resumed.
    """
    if dist.world_size() == 1:
        return
    folder = Path(folder)
    name = dist.gather(f".seen-by-all-{uuid.uuid4().hex}")[0]
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    dist.barrier()
    seen = dist.gather(((folder / name).exists(), platform.node()))
    if dist.is_main():
        (folder / name).unlink()
    dist.barrier()
    blind = [f"rank {rank} on {host}" for rank, (is_there, host) in enumerate(seen) if not is_there]
    if blind:
        others = " and others" if len(blind) > 3 else ""
        raise ValueError(
            f"run.dir={folder}: {', '.join(blind[:3])}{others} cannot see what rank 0 on {seen[0][1]} writes there, "
            "and every rank writes its part of a checkpoint: name a folder on a file system that all nodes share"
        )
