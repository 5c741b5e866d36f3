"""The json beside a video: what was asked, with which configuration, and what came out. It makes the video again.

No torch: ``--from`` answers to a wrong file at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cogvideox.config import ConfigError
from cogvideox.sampling.complete import complete_or_absent
from cogvideox.sampling.prompts import Request


def write(path: Path, record: dict[str, Any]) -> None:
    """Complete or absent. It is written after the files that it describes."""
    with complete_or_absent(path) as partial:
        partial.write_text(json.dumps(record, indent=1))


def read(path: str | Path) -> dict[str, Any]:
    """The record. ConfigError where the file is none that this project wrote."""
    try:
        record = json.loads(Path(path).expanduser().read_text())
        return {key: record[key] for key in ("config", "prompt", "seed")} | record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--from {path}: not a sidecar that sample_video.py wrote ({error!r})") from error


def read_if_any(path: Path) -> dict[str, Any] | None:
    """The record, or None where there is no file, or something else, under that name."""
    try:
        return read(path) if path.is_file() else None
    except ConfigError:
        return None


def request_record(request: Request) -> dict[str, Any]:
    """What was asked, for json: texts, seed, and the absolute paths of its files."""
    texts = {"prompt": request.prompt, "seed": request.seed, "source_prompt": request.source_prompt}
    return texts | request.files()


def request_of(record: dict[str, Any], seed: int | None = None) -> Request:
    """The request of a record, as number 0. seed: another one. ConfigError where an input file is gone."""
    # In the first sidecars, which had no `files`, `video` was the name of the result.
    known = record if "files" in record else {**record, "video": None}
    request = Request.from_sidecar(known, seed)
    for name, path in request.files().items():
        if path and not Path(path).is_file():
            raise ConfigError(f"--from: its {name.replace('_', ' ')} {path} is not there any more")
    return request


def comparison(then: dict[str, Any], now: dict[str, Any]) -> str:
    """One sentence: whether two records are of the same pixels, and what else differs where they are not."""
    before, after = then.get("pixels_sha256"), now.get("pixels_sha256")
    if before is None or after is None:
        return "no record of the pixels to compare with"
    if before == after:
        return "the same pixels"
    differences = [
        f"{key} then: {then.get(key)}, now: {now.get(key)}"
        for key in ("device", "attention", "versions")
        if then.get(key) != now.get(key)
    ]
    changed = config_difference(then["config"], now["config"])
    differences += [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]
    return "NOT the same pixels" + (f" ({'; '.join(differences)})" if differences else "")


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``key.path`` -> (value in ``old``, value in ``new``) wherever nested mappings differ; what is missing is None."""
    flat = [dict(leaves(tree)) for tree in (old, new)]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    return {k: (flat[0].get(k), flat[1].get(k)) for k in keys if flat[0].get(k) != flat[1].get(k)}


def leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(``key.path``, value) of nested mappings and lists; an empty one is a value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        return [(prefix, tree)]
    return [leaf for key, value in items for leaf in leaves(value, f"{prefix}.{key}" if prefix else str(key))]
