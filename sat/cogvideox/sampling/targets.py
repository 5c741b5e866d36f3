"""Which files a list of requests asks for, and which of them are there already. No torch: it is known at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox.config import Config, ConfigError
from cogvideox.sampling import sidecar
from cogvideox.sampling.prompts import FILES, Request
from cogvideox.weights.files import hub
from cogvideox.weights.files.headers import read_headers
from cogvideox.weights.files.locate import locate
from cogvideox.weights.provenance import sha256

OUTPUTS = {"mp4": ".mp4", "gif": ".gif", "frames": "", "latents": ".safetensors", "sheet": ".sheet.png"}
"""Kind of output -> what its file adds to the video's name. ``frames`` is a folder."""

# Keys of the section sample that change no pixel: where the files go, which, and how much memory it takes.
WITHOUT_EFFECT = ("output_dir", "prompt_file", "batch_size", "outputs", "gallery", "preview_every", "memory",
    "quantize_report", "text_encoder_device")  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One video to make: ``folder / name`` with the suffixes of its outputs."""

    request: Request
    folder: Path
    name: str
    outputs: tuple[str, ...] = ("mp4",)
    fingerprint: str | None = None
    # Of everything that decides its pixels; None: not known, it is never taken for finished.

    def path(self, output: str) -> Path:
        return self.folder / (self.name + OUTPUTS[output])

    @property
    def files(self) -> list[Path]:
        return [self.path(output) for output in self.outputs]

    @property
    def sidecar(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def preview(self) -> Path:
        return self.folder / f"{self.name}.preview.png"


def name_of(request: Request) -> str:
    """``0003-a-cat-rides-a-skateboard``: the number and the first 60 letters of the prompt."""
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:60].strip("-")
    return f"{request.index:04d}-{slug}"


def in_order(paths: Iterable[Path]) -> list[Path]:
    """By name, numbers by value: ``0000-cat``, ``0000-cat-2``, ``0000-cat-10``."""

    def key(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name.partition(".")[0])
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    return sorted(paths, key=key)


def plan(
    config: Config, requests: Sequence[Request], *, overwrite: bool = False, resume: bool = True
) -> tuple[list[Target], list[Target]]:
    """(what there is to make, what is there already), both in the order of ``requests``.

    A video is there where its sidecar has the same fingerprint and its files exist. Nothing of another fingerprint is
    replaced: the name gets a number, ``NAME-2``.  overwrite: replace whatever has the name.  resume=False: make
    everything again, beside what is there.
    """
    outputs, folder = checked_outputs(config), Path(config.sample.output_dir).expanduser()
    settings = settings_fingerprint(config)
    todo, there = [], []
    for request in requests:
        wanted = Target(request, folder, name_of(request), outputs, fingerprint(settings, request))
        target, is_there = (wanted, False) if overwrite else _free_or_finished(wanted, resume)
        (there if is_there else todo).append(target)
    return todo, there


def _free_or_finished(wanted: Target, resume: bool) -> tuple[Target, bool]:
    number, target = 1, wanted
    while True:
        # The sidecar is written last: without it, whatever lies there is of a run that was cut off.
        record = sidecar.read_if_any(target.sidecar)
        if record is None:
            return target, False
        if resume and record.get("fingerprint") == wanted.fingerprint:
            files = {kind: target.folder / name for kind, name in record.get("files", {}).items()}
            if all(kind in files and files[kind].exists() for kind in target.outputs):
                return target, True
            # Its other files are made again with it, so that one sidecar describes them all.
            kinds = dict.fromkeys([*target.outputs, *(kind for kind in files if kind in OUTPUTS)])
            return dataclasses.replace(target, outputs=tuple(kinds)), False
        number += 1
        target = dataclasses.replace(wanted, name=f"{wanted.name}-{number}")


def checked_outputs(config: Config) -> tuple[str, ...]:
    """``sample.outputs``, each once. ConfigError for an unknown one, none, or a ``sample.preview_every`` below 1."""
    outputs, every = config.sample.outputs, config.sample.preview_every
    if every is not None and every < 1:
        raise ConfigError(f"sample.preview_every={every}: expected a number of steps, 1 or more, or null")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        found = f"{unknown[0]!r} is none of" if unknown else "expected at least one of"
        raise ConfigError(f"sample.outputs (--output): {found} {', '.join(OUTPUTS)}")
    return tuple(dict.fromkeys(outputs))


def check_writable(folder: str | Path) -> None:
    """ConfigError where files could not be written into ``folder``, which may not exist yet. Makes nothing."""
    folder = Path(folder).expanduser()
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    reason = None
    if not existing.is_dir():
        reason = f"{existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = f"no permission to write in {existing}"
    if reason:
        raise ConfigError(
            f"sample.output_dir={folder} is not writable: {reason}; name another one: --output-dir DIR"
        )


# ------------------------------------------------------------------------------------------------------ fingerprints


def fingerprint(settings: str, request: Request) -> str:
    """SHA-256 of what decides the pixels of one video: settings, texts, seed and the content of its files."""
    known: dict[str, Any] = {"settings": settings}
    for name, value in sidecar.request_record(request).items():
        known[name] = sha256([Path(value)]) if name in FILES and value else value
    return _digest(known)


def settings_fingerprint(config: Config) -> str:
    """SHA-256 of the configuration as far as it matters for pixels, and of which weight files it names.

    Weight files count by name, size and time, as hashing a 5B model takes longer than loading it.
    """
    tree = dataclasses.asdict(config)
    for key in ("run", "data", "train", "deepspeed"):
        del tree[key]
    for key in WITHOUT_EFFECT:
        tree["sample"].pop(key, None)
    load = config.load
    sources = [(load.transformer, "transformer"), (load.vae, "vae"), (load.text_encoder, "text_encoder")]
    sources += [(lora.path, None) for lora in load.loras]
    tree["files"] = [_files(path, component) for path, component in sources if path]
    if config.sample.text_features:
        tree["files"].append(_encoder_of(Path(config.sample.text_features).expanduser()))
    return _digest(tree)


def _encoder_of(features: Path) -> str:
    """What identifies the encoder of text features: prompts that are added to them change no finished video."""
    files = sorted(features.glob("[!.]*.safetensors")) if features.is_dir() else [features]
    try:
        return _digest(json.loads(read_headers(files[:1]).metadata["text_features"])["encoder"])
    except (ValueError, OSError, KeyError, TypeError):
        return str(features)  # loading it is where this becomes an error


def _files(path: str, component: str | None) -> list[Any]:
    if hub.is_address(path):
        return [path]
    try:
        source = locate(path, component)
        stats = [(str(file), file.stat()) for file in (*source.files, *source.ema_files)]
    except (ValueError, OSError):
        return [path]  # loading it is where this becomes an error
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _digest(known: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
