"""How a benchmark is run: the same for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """device: "cpu" or "cuda".  rounds, warmups: of each comparison; a budget of time may end it after three rounds.
    compile: also candidates that torch.compile makes.  quick: sizes at which everything runs, and no figure says
    anything.
    """

    device: str = "cpu"
    rounds: int = 9
    warmups: int = 2
    compile: bool = True
    quick: bool = False

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Process CPU time then is the time of one core, whatever else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
