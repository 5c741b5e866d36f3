"""One way to choose by name, for parameter groups, LoRA layers and LoRA ranks. No torch.

A pattern is a glob over a dotted path, or over its end behind a dot: ``dense`` and ``attention.*`` match
``transformer.layers.0.attention.dense``; ``*`` crosses dots. With ``re:`` in front it is a regular expression for the
same: ``re:layers\\.(0|1)\\..*``. Where several patterns match, the first one counts.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

Value = TypeVar("Value")


@lru_cache(maxsize=1024)
def matcher(pattern: str, key: str = "") -> Callable[[str], bool]:
    """A function that tells whether a path matches ``pattern``. ValueError, naming ``key``, for a broken expression."""
    if not pattern:
        raise ValueError(f"{key}: a pattern is empty")
    expression = pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)
    try:
        compiled = re.compile(rf"(?:.*\.)?(?:{expression})", re.DOTALL)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is no regular expression ({error})") from error
    return lambda path: compiled.fullmatch(path) is not None


def value_of(patterns: Mapping[str, Value], path: str, default: Value, key: str = "") -> Value:
    """The value of the first pattern that matches ``path``."""
    return next((value for pattern, value in patterns.items() if matcher(pattern, key)(path)), default)


def check_used(patterns: Iterable[str], paths: Iterable[str], key: str) -> None:
    """ValueError for the first pattern that matches none of ``paths``, with the nearest names."""
    paths = list(paths)
    for pattern in patterns:
        if not any(map(matcher(pattern, key), paths)):
            raise ValueError(f"{key}: {pattern!r} matches nothing; {nearest(pattern, paths)}")


def nearest(pattern: str, paths: Iterable[str]) -> str:
    """``did you mean 'dense'? For example ...``: the ends of paths that look like ``pattern``."""
    paths = list(paths)
    plain = re.sub(r"^re:|[*?\\^$()]", "", pattern).strip(".")
    words = plain.count(".") + 1
    candidates = list(paths)
    for path in paths:  # every run of as many words, so that ``attention.dens`` finds ``attention.dense``
        parts = path.split(".")
        candidates += [".".join(parts[i : i + words]) for i in range(len(parts) - words + 1)]
    near = difflib.get_close_matches(plain, list(dict.fromkeys(candidates)), n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    last = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))
    return f"the names end in {', '.join(last[:8])}{' ...' if len(last) > 8 else ''}"
