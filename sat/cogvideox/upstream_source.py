"""A mapping of upstream's configuration from which every key must be taken, with what became of the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from cogvideox.config_merge import ConfigError
from cogvideox.upstream_rules import UPSTREAM_MODULES

logger = logging.getLogger("cogvideox")


class UpstreamSource:
    """Upstream's mapping, addressed by dotted paths. ``take`` removes what is understood.

    ``ignore`` removes a key without effect and keeps the reason; ``only`` and ``target`` remove a key that must hold
    one of the values that this project implements; ``finish`` reports all of that, and what is left, at once.
    """

    def __init__(self, tree: dict[str, Any]):
        self.tree = _lists_as_mappings(tree)
        self.problems: list[str] = []
        self.notes: dict[str, list[str]] = {}

    def get(self, path: str, default: Any = None) -> Any:
        node: Any = self.tree
        for name in path.split("."):
            if not isinstance(node, dict) or name not in node:
                return default
            node = node[name]
        return node

    def has(self, path: str) -> bool:
        return self.get(path) is not None

    def take(self, path: str, default: Any = None) -> Any:
        value = self.get(path, default)
        parent, _, name = path.rpartition(".")
        node = self.get(parent) if parent else self.tree
        if isinstance(node, dict):
            node.pop(name, None)
        return value

    def check_kinds(self, kinds: dict[str, type | int]) -> None:
        """Raise ConfigError where a value has another kind than the translation calculates with."""
        for path, kind in kinds.items():
            value = self.get(path)
            if value is None:
                continue
            if isinstance(kind, int):
                right, expected = (
                    isinstance(value, list) and kind in (0, len(value)),
                    f"a list of {kind or 'values'}",
                )
            elif kind is dict:
                right, expected = isinstance(value, dict), "a section"
            else:
                right, expected = (
                    isinstance(value, (int, kind)),
                    "a whole number" if kind is int else "a number",
                )
            if not right or isinstance(value, bool):
                raise ConfigError(f"{path}={value!r}: expected {expected}")

    def ignore(self, path: str, reason: str) -> None:
        if self.get(path, ...) is not ...:
            self.take(path)
            self.note(path, reason)

    def note(self, path: str, reason: str) -> None:
        self.notes.setdefault(reason, []).append(path)

    def only(self, path: str, *allowed: Any, why: str) -> None:
        """Take a key that must hold one of the values that this project implements (or be absent)."""
        value = self.take(path, allowed[0])
        if value not in allowed:
            self.problems.append(f"{path}={value!r}: {why}")

    def target(self, path: str, *known: str) -> str | None:
        """Take ``path.target``: the class name where it is a known one of upstream's; a problem otherwise."""
        value = self.take(f"{path}.target")
        if value is None:
            return None
        name = str(value).rpartition(".")[2]
        ours = str(value).split(".")[0] in UPSTREAM_MODULES | {"sat", "torch"}
        if not ours or name not in known:
            self.problems.append(f"{path}.target={value}: no equivalent here (known: {', '.join(known)})")
            return None
        return name

    def left(self, path: str) -> Iterator[tuple[str, Any]]:
        """(path, value) of everything below ``path`` that was not taken."""
        node = self.get(path)
        return _leaves(node, f"{path}.") if isinstance(node, dict) else iter(())

    def finish(self) -> None:
        left = [f"{path}={value!r}: not known" for path, value in _leaves(self.tree)]
        if problems := self.problems + left:
            raise ConfigError(
                "this YAML of CogVideo's sat/ folder has keys that cannot be translated; remove them or write the "
                "file anew (docs/configuration.md):\n  " + "\n  ".join(problems)
            )
        if self.notes:
            lines = [f"{reason}: {', '.join(paths)}" for reason, paths in self.notes.items()]
            logger.warning(
                "CogVideo's YAML translated; these keys have no effect here:\n  %s", "\n  ".join(lines)
            )


def _lists_as_mappings(node: Any) -> Any:
    """Lists of mappings become mappings from "0", "1", ... so that a path reaches into them."""
    if isinstance(node, list) and node and all(isinstance(item, dict) for item in node):
        node = {str(index): item for index, item in enumerate(node)}
    return {k: _lists_as_mappings(v) for k, v in node.items()} if isinstance(node, dict) else node


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value
