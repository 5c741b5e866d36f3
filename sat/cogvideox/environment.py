"""What the launcher (torchrun) says in environment variables, known before any process group and without torch."""

from __future__ import annotations

import os
import platform
from importlib import metadata

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether a launcher started this process. ValueError where it set only some of its variables."""
    found = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if {"RANK", "WORLD_SIZE"} & set(found) and missing:
        raise ValueError(
            f"environment variables {', '.join(found)} are set but {', '.join(missing)} are not: "
            f"start several ranks with torchrun, or unset them to run alone"
        )
    return not missing


def versions() -> str:
    """``python 3.11.7, torch 2.13.0, ...``, read from package metadata without importing anything."""
    found = [f"python {platform.python_version()}"]
    for package in ("cogvideox", "torch", "SwissArmyTransformer", "deepspeed", "transformers"):
        found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def quieten_libraries(has_gpu: bool) -> None:
    """Defaults that keep SAT and DeepSpeed from chatting while they are imported. What the user set stays."""
    os.environ.setdefault("SAT_LOGLEVEL", "WARNING")
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns that it guessed so
