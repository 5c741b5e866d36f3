"""How ranks share work of which nobody knows beforehand how long each piece takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _alone(value: Any) -> list[Any]:
    return [value]


def _count() -> Callable[[], int]:
    return itertools.count().__next__


@dataclass(frozen=True)
class Ranks:
    """This rank among all. The default is a process alone.

    gather: every rank's value, in rank order, on every rank; all must call it.
    tickets: makes a counter, ``counter() -> 0, 1, 2 ...``, that gives each number to one rank only; all must call it in
    the same order.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    tickets: Callable[[], Callable[[], int]] = _count

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def merged(self, found: dict) -> dict:
        """The union of all ranks' dicts, the same on every rank."""
        return {key: value for part in self.gather(found) for key, value in part.items()}
