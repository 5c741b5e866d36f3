"""Is a checkpoint as it was written? ``state.json`` lists its files with sizes and SHA-256, and guards itself.

The list is checked before anything is loaded: a file that is missing, cut short or changed by a single bit makes a
checkpoint a damaged one. This finds accidents (disks, copies, full quotas), not forgeries; that no file is unpickled
with code in it is seen to in checkpoint.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STATE = "state.json"
FileFacts = tuple[int, str]
"""Bytes and SHA-256 (hex) of a file."""


class Damaged(OSError):
    """What is wrong with a checkpoint, in words."""


def seal(state: Mapping[str, Any], files: Mapping[str, FileFacts] | None = None) -> str:
    """The text of a ``state.json``: ``state``, the facts of the files beside it, and a digest over both.

    files: None keeps those in ``state``.
    """
    content = {key: value for key, value in state.items() if key != "sha256"}
    if files is not None:
        content["files"] = {name: list(files[name]) for name in sorted(files)}
    return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def facts(path: Path) -> FileFacts:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint. Raises Damaged.

    ValueError for one that was written before checkpoints had a list of their files.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_bytes())
    except OSError as error:
        raise Damaged(f"{STATE} is missing") from error
    except ValueError as error:  # of the decoder, of UTF-8
        raise Damaged(f"{STATE} is not JSON") from error
    if not isinstance(state, dict):
        raise Damaged(f"{STATE} is not JSON of ours")
    if "step" in state and not {"sha256", "files"} & state.keys():
        raise ValueError(
            f"{folder} was written by an earlier version, whose checkpoints do not list their files: start a new run "
            f"from its weights (load.transformer={folder})"
        )
    if state.get("sha256") != _digest({key: value for key, value in state.items() if key != "sha256"}):
        raise Damaged(f"{STATE} has been changed")
    return state


def damages(folder: Path, state: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What is wrong with ``names`` of the files that ``state`` lists, one text each; none where all is well."""
    found = []
    for name in names:
        size, digest = state["files"][name]
        try:
            size_found = (folder / name).stat().st_size
            if size_found != size:
                found.append(f"{name} has {size_found:,} bytes of {size:,}")
            elif facts(folder / name)[1] != digest:
                found.append(f"{name} has been changed (SHA-256)")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
