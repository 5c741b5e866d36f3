"""Shared fixtures. Reference material beside a developer's checkout is optional: tests that use it skip."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

if TYPE_CHECKING:
    from workers.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of numeric fixtures from the published code (`shared/reference` beside the checkout)."""
    path = ROOT.parent / "shared" / "reference"
    if not path.is_dir():
        pytest.skip(
            "needs ../shared/reference (fixtures of the published code), which is not part of the project"
        )
    return path


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Starts runs in processes of their own without the seconds that imports take; see ``workers/fork_server.py``."""
    from workers.fork_server import ForkServer

    with ForkServer() as server:
        yield server


@pytest.fixture
def fused_attention() -> Iterator[None]:
    """On the meta device the kernel that a GPU picks, see ``scripts.benchmark.full_size``."""
    from scripts.benchmark.full_size import fused_attention

    with fused_attention():
        yield


@pytest.fixture(autouse=True)
def _linear_as_it_was() -> Iterator[None]:
    """A ZeRO-3 engine replaces it for the whole process, by one that other kernels run in."""
    yield
    if "torch" in sys.modules:
        functional = sys.modules["torch"].nn.functional
        functional.linear = sys.modules["torch"]._C._nn.linear


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """A door takes the project's logger for itself; the next test may want to read it."""
    yield
    logger = logging.getLogger("cogvideox")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
