"""A run folder as it is read for a report: whatever is there, and what is there but cannot be read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cogvideox.engine.events import read_events
from cogvideox.engine.logging import read_metrics
from cogvideox.report.series import Records, last
from cogvideox.weights import provenance


@dataclass(frozen=True)
class RunFolder:
    path: Path
    records: Records
    # Of metrics.jsonl.
    events: list[dict[str, Any]]
    config: dict[str, Any]
    # Of config.yaml, nested mappings.
    commands: list[tuple[str, str]]
    # Each command that worked on the run, and its ranks and versions.
    quarantine: list[dict[str, Any]]
    summary: dict[str, Any]
    # Of summary.json, which a run writes at its end.
    state: dict[str, Any]
    # state.json of the newest checkpoint.
    unreadable: list[str]
    # Files that are there and cannot be read, with the reason.

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """The last step of which something is known."""
        return max([record["step"] for record in self.records] + [self.state.get("step", 0)])

    @property
    def steps(self) -> int | None:
        """train.steps."""
        return (self.config.get("train") or {}).get("steps")

    @property
    def dataset(self) -> Any:
        """The fingerprint of its clips."""
        record = self.state.get(provenance.KEY) or {}
        return self.summary.get("dataset") or record.get("dataset")

    @property
    def restarts(self) -> list[int]:
        """The steps at which the run went on after an end, ascending."""
        starts = [event for event in self.events if event.get("kind") in ("started", "resumed")]
        return sorted({event["step"] for event in starts if event.get("step")})

    @property
    def skipped_steps(self) -> int:
        counted = self.summary.get("skipped_steps", last(self.records, "train/skipped_steps"))
        return int(counted or self.state.get("skipped_steps", 0))

    @property
    def versions(self) -> str:
        return self.commands[-1][1] if self.commands else ""


def read_run(path: str | Path) -> RunFolder:
    """Everything known of a run, also of one that is being trained. ValueError where the folder holds none."""
    path = Path(path).expanduser()
    if not any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        found = "is not there" if not path.exists() else "holds neither config.yaml nor metrics.jsonl"
        raise ValueError(f"{path} {found}: expected a run folder that train_video.py wrote (run.dir)")
    unreadable: list[str] = []

    def read(name: str, reader: Any, missing: Any) -> Any:
        try:
            return reader(path / name) if (path / name).is_file() else missing
        except (OSError, ValueError, yaml.YAMLError) as error:
            unreadable.append(f"{name}: {str(error).splitlines()[0]}")
            return missing

    state = _newest_state(path)
    return RunFolder(
        path=path,
        records=read("metrics.jsonl", read_metrics, []),
        events=read_events(path),
        config=read("config.yaml", lambda file: yaml.safe_load(file.read_text()) or {}, {}),
        commands=read("command.txt", _commands, []),
        quarantine=read("quarantine.json", lambda file: _entries(_json(file)), []),
        summary=read("summary.json", _json, {}),
        state={} if state is None else read(state, _json, {}),
        unreadable=unreadable,
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _newest_state(run: Path) -> str | None:
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    newest = max(found, key=lambda p: int(p.name), default=None)
    return None if newest is None else f"checkpoints/{newest.name}/state.json"


def _commands(path: Path) -> list[tuple[str, str]]:
    """A command, and below it, indented, its ranks and versions."""
    pairs: list[tuple[str, str]] = []
    for line in path.read_text().splitlines():
        if line.startswith("  ") and pairs:
            pairs[-1] = (pairs[-1][0], line.strip())
        elif line.strip():
            pairs.append((line, ""))
    return pairs


def _entries(content: Any) -> list[dict[str, Any]]:
    """A list of mappings; of a mapping, its items, each with its key as ``clip``."""
    items = content.get("clips", content) if isinstance(content, dict) else content
    if isinstance(items, dict):
        items = [
            {"clip": key, **(value if isinstance(value, dict) else {"reason": value})}
            for key, value in items.items()
        ]
    return [item if isinstance(item, dict) else {"clip": item} for item in items]
