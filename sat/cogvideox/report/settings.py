"""What was configured, as far as it tells one run from its files, and several runs from each other."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cogvideox.config import ConfigError, config_from_dict, load_config
from cogvideox.config_text import concise_yaml
from cogvideox.report.run_folder import RunFolder
from cogvideox.sampling.sidecar import config_difference, leaves

ABSENT = "—"
OF_THE_RUN = ("run.dir",)
# Keys that differ without a meaning.


def without_defaults(run: RunFolder) -> str | None:
    """The configuration as YAML without what is a default; None where this version does not read it."""
    try:
        return concise_yaml(config_from_dict(run.config))
    except ConfigError:
        return None


def changed_from_files(run: RunFolder) -> tuple[list[str], dict[str, tuple[Any, Any]]] | None:
    """(the YAML files of the last command, key -> (value in them, value of the run)).

    None where the command or its files are not there any more.
    """
    files = yaml_files(run.commands[-1][0]) if run.commands else []
    if not files:
        return None
    try:
        found = dataclasses.asdict(load_config(files))
    except (ConfigError, OSError):
        return None
    return files, config_difference(found, run.config)


def yaml_files(command: str) -> list[str]:
    """The values of ``--base`` in a command line."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    files: list[str] = []
    if "--base" in words:
        for word in words[words.index("--base") + 1 :]:
            if word.startswith("-") or "=" in word:
                break
            files.append(word)
    return files


def differing(
    configs: Sequence[Mapping[str, Any]], ignored: Sequence[str] = ("run.dir",)
) -> dict[str, list[Any]]:
    """Key -> its value in each configuration (``ABSENT`` where it is missing), for the keys that differ."""
    flat = [dict(leaves(dict(config))) for config in configs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    rows = {key: [tree.get(key, ABSENT) for tree in flat] for key in keys if key not in OF_THE_RUN}
    return {key: values for key, values in rows.items() if any(v != values[0] for v in values[1:])}


def shown(value: Any) -> str:
    """As a table shows it: YAML's words for what Python spells otherwise."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
