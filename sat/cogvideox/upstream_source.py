"""A mapping of upstream's configuration from which every key must be taken, with what became of the others."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from cogvideox.config_merge import ConfigError
from cogvideox.upstream_rules import IMPOSSIBLE, SECTIONS, UNREAD, UPSTREAM_MODULES


class UpstreamSource:
    """Upstream's mapping, addressed by dotted paths. ``take`` removes what is understood.

    ``ignore`` removes a key without effect and keeps the reason; ``only`` and ``target`` remove a key that must hold
    one of the values that this project implements; ``report`` tells all of that, and what is left, at once.
    """

    def __init__(self, tree: dict[str, Any]):
        self.tree = _lists_as_mappings(tree)
        self.problems: list[str] = []
        self._without_effect: dict[str, list[str]] = {}  # reason -> paths
        self._acting_otherwise: dict[str, list[str]] = {}
        self._asked: set[str] = set()

    def get(self, path: str, default: Any = None) -> Any:
        names = path.split(".")
        self._asked.update(".".join(names[:n]) for n in range(1, len(names) + 1))
        node: Any = self.tree
        for name in names:
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

    def take_number(self, path: str, default: float | None = None) -> Any:
        """``take`` for a number that may be written as a text: ``1e-8`` is one to a YAML 1.1 reader."""
        value = self.take(path, default)
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            self.problems.append(f"{path}={value!r}: expected a number")
            return default

    def check_kinds(self, kinds: dict[str, type | int]) -> None:
        """Raise ConfigError where a value has another kind than the translation calculates with."""
        for path, kind in kinds.items():
            value = self.get(path)
            if value is not None and not _is_kind(value, kind):
                names = {dict: "a section", bool: "true or false", int: "a whole number", float: "a number"}
                expected = names[kind] if isinstance(kind, type) else f"a list of {kind or 'values'}"
                raise ConfigError(f"{path}={value!r}: expected {expected}")

    def ignore(self, path: str, reason: str) -> None:
        if self.get(path, ...) is not ...:
            self.take(path)
            self.note(path, reason)

    def note(self, path: str, reason: str) -> None:
        """``path`` has no effect here."""
        self._without_effect.setdefault(reason, []).append(path)

    def note_difference(self, path: str, what: str) -> None:
        """``path`` is translated, but into something that acts otherwise in some respect."""
        self._acting_otherwise.setdefault(what, []).append(path)

    def only(self, path: str, *allowed: Any, why: str) -> None:
        """Take a key that must hold one of the values that this project implements (or be absent)."""
        value = self.take(path, allowed[0])
        if value not in allowed:
            self.problems.append(f"{path}={value!r}: {why}")

    def target(self, path: str, *known: str) -> str | None:
        """Take ``path.target``: the class name where it is a known one of upstream's.

        Any other is a problem, which its whole part shares: the part is removed.
        """
        value = self.take(f"{path}.target")
        if value is None:
            return None
        name = str(value).rpartition(".")[2]
        ours = str(value).split(".")[0] in UPSTREAM_MODULES | {"sat", "torch"}
        if ours and name in known:
            return name
        why = f"; {IMPOSSIBLE[name]}" if ours and name in IMPOSSIBLE else ""
        self.problems.append(f"{path}.target={value}: no equivalent here (known: {', '.join(known)}){why}")
        self.get(path).clear()
        return None

    def left(self, path: str) -> Iterator[tuple[str, Any]]:
        """(path, value) of everything below ``path`` that was not taken."""
        node = self.get(path)
        return _leaves(node, f"{path}.") if isinstance(node, dict) else iter(())

    def report(self, own_sections: set[str]) -> str:
        """What has no effect and what acts otherwise, grouped by reason; "" for nothing of either.

        own_sections: names of this project's sections, which a file of upstream's must not hold.
        Raises ConfigError for everything that cannot be translated.
        """
        for path, value in _leaves(self.tree):
            self._judge(path, value, own_sections)
        if self.problems:
            raise ConfigError(
                "this YAML of CogVideo's sat/ folder has keys that cannot be translated; remove them or write the "
                "file anew (docs/configuration.md):\n  " + "\n  ".join(self.problems)
            )
        lines = []
        for heading, notes in (
            ("Without effect here", self._without_effect),
            ("With another effect here", self._acting_otherwise),
        ):
            lines += [f"{heading}:"] if notes else []
            lines += [f"  {', '.join(dict.fromkeys(paths))}: {reason}" for reason, paths in notes.items()]
        return "\n".join(lines)

    def _judge(self, path: str, value: Any, own_sections: set[str]) -> None:
        """A key that nobody took. Inside a part it is an argument, which would change the result; upstream's code looks
        the others up by name, and so never saw this one."""
        section, *names = path.split(".")
        if section not in SECTIONS:
            if section in own_sections:
                self.problems.append(
                    f"{path}={value!r}: a section of this project's; put it into a file of its own"
                )
            else:
                self.note(path, UNREAD)
            return
        parent, _, name = path.rpartition(".")
        siblings = {p.rpartition(".")[2]: p for p in self._asked if p.rpartition(".")[0] == parent}
        near = difflib.get_close_matches(name, siblings.keys() - {name}, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        in_a_part = section in ("model", "data") and f"{section}.{names[0]}" in self._asked and len(names) > 1
        if in_a_part:
            self.problems.append(f"{path}={value!r}: not known{'; ' if hint else ''}{hint}")
        else:
            self.note(f"{path} ({hint})" if hint else path, UNREAD)


def _is_kind(value: Any, kind: type | int) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(kind, int):
        return isinstance(value, list) and kind in (0, len(value))
    allowed = dict if kind is dict else (int, kind)
    return isinstance(value, allowed) and not isinstance(value, bool)


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
