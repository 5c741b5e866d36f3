"""Checkpoints that are whole or absent: ``RUN/checkpoints/STEP/`` in DeepSpeed's layout, ``latest`` written last.

A folder is written as ``STEP.tmp``, every file of it flushed to the disk, then renamed; ``latest`` is replaced after
that. So a process killed at any moment leaves the previous checkpoint valid, and no folder with a numeric name is ever
half written. Beside DeepSpeed's files (only what was trained) stand ``state.json`` (what to resume with, and what the
checkpoint fits), ``config.yaml`` (the merged configuration) and ``ema_rank_NN.safetensors``.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cogvideox import dist
from cogvideox.engine.ema import EMA, numel

_GIB = 2**30


def find(directory: Path, resume: str) -> Path | None:
    """The checkpoint folder to start from, None to start from the beginning.

    directory: ``RUN/checkpoints``.  resume: "auto" (where ``latest`` points, if anywhere), "never" (ValueError if the
    run folder has checkpoints), or the path of a run folder, a checkpoints folder or one checkpoint.
    """
    newest = _latest(directory)
    if resume == "auto":
        return newest
    if resume == "never":
        if newest is not None:
            raise ValueError(
                f"train.resume=never but {directory} holds checkpoints (the last: {newest.name}): "
                f"choose another run.dir, or train.resume=auto to go on from there"
            )
        return None
    path = Path(resume)
    for candidate in (
        path if (path / "state.json").is_file() else None,
        _latest(path),
        _latest(path / "checkpoints"),
    ):
        if candidate is not None:
            return candidate
    raise ValueError(
        f"train.resume={resume}: expected auto, never, a run folder, or a checkpoint (a folder with state.json)"
    )


def _latest(directory: Path) -> Path | None:
    pointer = directory / "latest"
    if not pointer.is_file():
        return None
    folder = directory / pointer.read_text().strip()
    if not (folder / "state.json").is_file():
        whole = [p.name for p in _numbered(directory) if (p / "state.json").is_file()]
        raise ValueError(
            f"{pointer} names {folder.name}, which is not there; "
            + (f"set train.resume={directory / whole[-1]}" if whole else f"delete {pointer} to start anew")
        )
    return folder


def _numbered(directory: Path) -> list[Path]:
    return sorted(
        (p for p in directory.iterdir() if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name)
    )


class Checkpoints:
    """Saves and loads a DeepSpeed engine with everything that a bitwise equal continuation needs."""

    def __init__(
        self,
        engine: Any,
        directory: Path,
        *,
        precision: str,
        keep: int | None = None,
        ema: EMA | None = None,
        config_file: Path | None = None,
    ):
        """keep: number of checkpoints kept, None for all.  config_file: copied into each checkpoint if it exists."""
        self.engine, self.directory = engine, directory
        self.keep, self.ema, self.config_file = keep, ema, config_file
        self.fits = {
            "world_size": dist.world_size(),
            "precision": precision,
            "zero_stage": int(engine.zero_optimization_stage()),
        }
        self._failures: list[str] = []
        # Our own files: flushed to the disk, failures told to every rank, and read back without running pickled code.
        engine.checkpoint_engine.save = self._save_file
        engine.checkpoint_engine.load = _load_file
        # It copies its zero_to_fp32.py on rank 0 alone, where a full disk would leave the other ranks waiting.
        engine._copy_recovery_script = lambda save_path: None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Every rank must call.  state: JSON values, the same on every rank.  Returns the checkpoint's folder.

        Raises OSError on every rank if there is no room or a write fails on any; what was written is removed, and the
        checkpoints before this one stay as they were.
        """
        final, temporary = self.directory / str(step), self.directory / f"{step}.tmp"
        self._failures.clear()
        if dist.is_main():
            self._guarded(self._prepare, step)
        self._raise_failures(step, temporary)
        self.engine.save_checkpoint(
            str(self.directory),
            tag=temporary.name,
            client_state={"iteration": step},  # where SAT's loader looks for it
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        if self.ema is not None:
            self._guarded(self.ema.save, temporary)
        if dist.is_main():
            self._guarded(self._write_records, temporary, {"step": step, **self.fits, **state})
        self._raise_failures(step, temporary)
        if dist.is_main():
            self._guarded(self._publish, temporary, final)
        self._raise_failures(step, temporary)
        return final

    def note(self, step: int, state: dict[str, Any]) -> None:
        """Add to the ``state.json`` of a saved checkpoint. Every rank must call; errors as in ``save``."""
        if dist.is_main():
            self._guarded(self._add_to_records, self.directory / str(step) / "state.json", state)
        self._raise_failures(step, self.directory / f"{step}.tmp")

    def load(self, folder: Path) -> dict[str, Any]:
        """Put a checkpoint's weights, optimizer and averages into the engine; returns its ``state.json``.

        Raises ValueError if it was written with another number of ranks, precision or ZeRO stage, if it holds other
        parameters than are trained now, or if a file is damaged.
        """
        state = json.loads((folder / "state.json").read_text())
        for key, remedy in (
            (
                "world_size",
                "start as many ranks (torchrun --nproc_per_node), or begin a new run from its weights",
            ),
            ("precision", "set train.precision to that"),
            ("zero_stage", "set deepspeed.zero_optimization.stage to that"),
        ):
            if state[key] != self.fits[key]:
                raise ValueError(
                    f"{folder} was written with {key}={state[key]}, this run has {self.fits[key]}: {remedy}"
                )
        self.engine.load_checkpoint(
            str(folder.parent),
            tag=folder.name,
            custom_load_fn=lambda src, dst: _load_trained(src, dst, folder),
        )
        if self.ema is not None:
            self.ema.load(folder)
        if dist.is_main() and folder.parent.resolve() == self.directory.resolve():
            self._point_latest_to(
                folder
            )  # of an older one: those after it are an abandoned branch from here on
        return state

    # ----------------------------------------------------------------------------------- the steps of save, on rank 0

    def _prepare(self, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.tmp"):  # of a killed run
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        existing = _numbered(self.directory)
        needed = _size(existing[-1]) if existing else self._estimated_size()
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{free / _GIB:.2f} GiB free, a checkpoint takes about {needed / _GIB:.2f} GiB",
            )

    def _estimated_size(self) -> int:
        """Weights in their dtype, fp32 masters, two fp32 moments, and the average."""
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        fp32_copies = 3 if self.ema is None else 4
        return sum(numel(p) * (p.element_size() + 4 * fp32_copies) for p in trained)

    def _write_records(self, temporary: Path, state: dict[str, Any]) -> None:
        _write_durably(temporary / "state.json", json.dumps(state, indent=1) + "\n")
        if self.config_file is not None and self.config_file.is_file():
            _write_durably(temporary / self.config_file.name, self.config_file.read_text())

    def _add_to_records(self, path: Path, state: dict[str, Any]) -> None:
        partial = path.with_suffix(".tmp")
        _write_durably(partial, json.dumps(json.loads(path.read_text()) | state, indent=1) + "\n")
        os.replace(partial, path)
        _flush_folder(path.parent)

    def _publish(self, temporary: Path, final: Path) -> None:
        _flush_folder(temporary)
        if final.exists():  # of an abandoned branch: ``latest`` points before it
            _remove(final)
        os.rename(temporary, final)
        self._point_latest_to(final)
        if self.keep is not None:
            others = [p for p in _numbered(self.directory) if p != final]
            others.sort(key=lambda p: int(p.name) < int(final.name))  # an abandoned branch goes first
            for old in others[: max(len(others) - (self.keep - 1), 0)]:
                _remove(old)

    def _point_latest_to(self, folder: Path) -> None:
        _write_durably(self.directory / "latest.tmp", folder.name)
        os.replace(self.directory / "latest.tmp", self.directory / "latest")
        _flush_folder(self.directory)

    # ------------------------------------------------------------------------------------------------------- failures

    def _save_file(self, state_dict: dict[str, Any], path: str) -> None:
        def write() -> None:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())

        self._guarded(write)

    def _guarded(self, write: Callable[..., Any], *args: Any) -> None:
        """Note a failed write instead of raising: the other ranks are on their way to the next barrier."""
        try:
            write(*args)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch.save and safetensors report a full disk as RuntimeErrors
            self._failures.append(str(error))

    def _raise_failures(self, step: int, temporary: Path) -> None:
        failures = [text for texts in dist.gather(self._failures) for text in texts]
        if not failures:
            return
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        pointer = self.directory / "latest"
        last = (
            f"checkpoint {pointer.read_text().strip()} is whole"
            if pointer.is_file()
            else "there is none before it"
        )
        raise OSError(
            f"could not save step {step} in {self.directory}: {failures[0]}; {last}. Make room (or lower "
            f"train.keep_checkpoints), then run the same command again"
        )


def _load_trained(source: dict[str, Any], module: nn.Module, folder: Path) -> None:
    """Load what a checkpoint holds (trained parameters and buffers); the frozen rest is loaded by who built it."""
    result = module.load_state_dict(source, strict=False)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    missing, unexpected = sorted(trained & set(result.missing_keys)), sorted(result.unexpected_keys)
    if missing or unexpected:
        raise ValueError(
            f"{folder} does not fit what is trained now: it lacks {len(missing)} parameters "
            f"({', '.join(missing[:2])}) and has {len(unexpected)} too many ({', '.join(unexpected[:2])}); "
            f"use the configuration saved in it, or another run.dir"
        )


def _load_file(path: str, map_location: Any = None) -> Any:
    """A file of DeepSpeed's, unpickled with only the classes that DeepSpeed itself puts there."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):
            # DeepSpeed's map_location is a function for "cpu"; torchao's optimizer states take no function.
            where = "cpu" if callable(map_location) else map_location
            return torch.load(path, map_location=where, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is missing, damaged, or holds more than tensors ({str(error).splitlines()[0]}); "
            f"set train.resume to another checkpoint folder"
        ) from error


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut, as fsync does for the contents of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill on the way leaves no half of it under its numeric name."""
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
