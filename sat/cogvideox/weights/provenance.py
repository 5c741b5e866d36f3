"""Where weights come from: one JSON object that travels inside every file this project writes.

safetensors files carry it in their metadata under ``cogvideox``, SAT's ``.pt`` files beside ``module`` under the same
key, checkpoints of a run in their ``state.json``. Nothing in it depends on the clock: the same input
gives the same record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import Any

KEY = "cogvideox"
INHERITED = ("config", "step", "seed", "dataset", "preview")
"""What a file made from another one takes over from it: facts of the training run."""


def record(files: Iterable[Path] = (), **known: Any) -> dict[str, Any]:
    """The object itself. files: the sources, hashed whole. known: ``config``, ``step``, ``seed``, ..."""
    files = list(files)
    made: dict[str, Any] = {"version": packages.version("cogvideox")}
    if files:
        made["source"] = str(files[0] if len(files) == 1 else files[0].parent)
        made["source_sha256"] = sha256(files)
    return made | {key: value for key, value in known.items() if value is not None}


def stamp(files: Iterable[Path] = (), **known: Any) -> dict[str, str]:
    """``record`` as a safetensors metadata mapping."""
    return {"format": "pt", KEY: json.dumps(record(files, **known), sort_keys=True)}


def read(metadata: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """The record in a file's metadata, or in the ``state.json`` of a checkpoint ``folder``; empty if there is none."""
    text = metadata.get(KEY)
    if text is None and folder is not None and (folder / "state.json").is_file():
        text = (folder / "state.json").read_text()
        return dict(json.loads(text).get(KEY, {}))
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def inherited(source: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the training run in a source's record, for the stamp of what is made from it."""
    return {key: source[key] for key in INHERITED if key in source}


def sha256(files: Iterable[Path]) -> str:
    """Of one file, its SHA-256; of several, the SHA-256 over theirs in the order of their names."""
    digests = []
    for path in sorted(files):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
