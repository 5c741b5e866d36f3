"""Checkpoints that are whole or absent: ``RUN/checkpoints/STEP/`` in DeepSpeed's layout, ``latest`` written last.

A folder is written as ``STEP.tmp``, every file of it flushed to the disk, then renamed; ``latest`` is replaced after
that. So a process killed at any moment leaves the previous checkpoint valid, and no folder with a numeric name is ever
half written. Beside DeepSpeed's files (only what was trained) stand ``state.json`` (what to resume with, what the
checkpoint fits, and the digests of all files), ``config.yaml`` (the merged configuration) and
``ema_rank_NN.safetensors``.
"""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cogvideox import dist
from cogvideox.engine import checkpoint_folders, durable, integrity, universal
from cogvideox.engine.checkpoint_folders import LATEST, KeepRule, numbered
from cogvideox.engine.ema import EMA, deal, numel
from cogvideox.engine.events import Events
from cogvideox.engine.integrity import STATE, Damaged
from cogvideox.engine.logging import get_logger

_GIB = 2**30


def choose(directory: Path, resume: str, events: Events) -> Path | None:
    """The checkpoint folder to start from, None to start from the beginning. Every rank must call.

    The newest is checked whole, file by file; one that is damaged is put aside (``STEP.damaged``) and the one before
    takes its place, which the console and ``events`` say. Raises ValueError if all are damaged, or the one that
    ``resume`` names is.
    """
    candidates = checkpoint_folders.find(directory, resume)
    if candidates.problem:
        _say_damaged(events, candidates.problem, candidates.folders[0])
    damaged: dict[Path, str] = {}
    for folder in candidates.folders:
        problems = _inspect(folder)
        if problems:
            damaged[folder] = "; ".join(problems[:3]) + (" ..." if len(problems) > 3 else "")
            continue
        for broken, problem in damaged.items() if candidates.are_own else ():
            if dist.is_main():
                aside = checkpoint_folders.put_aside(broken)
                _say_damaged(events, f"{broken} is damaged ({problem}); it is kept as {aside.name}", folder)
        dist.barrier()
        return folder
    if not damaged:
        return None
    listed = "; ".join(f"{folder}: {problem}" for folder, problem in damaged.items())
    if candidates.are_own:
        raise ValueError(
            f"no checkpoint of this run can be used: {listed}. Restore one from a copy, or choose another run.dir"
        )
    raise ValueError(f"train.resume={resume} is damaged: {listed}. Name another checkpoint folder")


def _inspect(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, the same on every rank: each checks a share of the files."""
    found, problems = {}, []
    try:
        state = integrity.read_state(folder)
        sizes = {name: size for name, (size, _) in state["files"].items()}
        share = [name for name, owner in deal(sizes, dist.world_size()).items() if owner == dist.rank()]
        found = {name: text for name in share for text in integrity.damages(folder, state, [name])}
    except Damaged as error:
        problems = [str(error)]
    gathered = dist.gather((problems, found))
    return next((p for p, _ in gathered if p), []) or [text for _, part in gathered for text in part.values()]


def _say_damaged(events: Events, problem: str, folder: Path) -> None:
    get_logger().warning(f"{problem}; going on from {folder}")
    events.write("checkpoint_damaged", problem=problem, going_on_from=str(folder))


def check_fits(folder: Path, fits: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint was written for another precision, ZeRO stage or model than ``fits``.

    fits: "precision", "zero_stage", and "parameters", what is trained: one {name: shape} for each group of the
    optimizer. Another number of ranks fits: universal.py.
    """
    state = integrity.read_state(folder)
    for key, remedy in (
        ("precision", "set train.precision to that"),
        ("zero_stage", "set deepspeed.zero_optimization.stage to that"),
    ):
        if state[key] != fits[key]:
            raise ValueError(
                f"{folder} was written with {key}={state[key]}, this run has {fits[key]}: {remedy}"
            )
    theirs, ours = ({n: s for group in g["parameters"] for n, s in group.items()} for g in (state, fits))
    advice = f"set model.* and lora.* as in {folder / 'config.yaml'}, or choose another run.dir"
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or unexpected:
        raise ValueError(
            f"{folder} does not fit what is trained now: it lacks {len(missing)} parameters "
            f"({', '.join(missing[:2])}) and has {len(unexpected)} too many ({', '.join(unexpected[:2])}); {advice}"
        )
    for name, shape in ours.items():
        if theirs[name] != shape:
            raise ValueError(
                f"{folder} does not fit what is trained now: {name} has the shape {theirs[name]} in it, and {shape} "
                f"in this run (a LoRA's shapes follow from lora.rank); {advice}"
            )
    if [list(group) for group in state["parameters"]] != [list(group) for group in fits["parameters"]]:
        raise ValueError(
            f"{folder}: the parameters are the same, but the optimizer's groups of them are others; set train.* as in "
            f"{folder / 'config.yaml'}"
        )


def trained_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, list[int]]]:
    """Name -> shape of what is trained, by the optimizer's groups and in their order, as DeepSpeed lays it out."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [
        {names[p]: list(getattr(p, "ds_shape", p.shape)) for p in group["params"]}
        for group in optimizer.param_groups
    ]


class Checkpoints:
    """Saves and loads a DeepSpeed engine with everything that a bitwise equal continuation needs."""

    def __init__(
        self,
        engine: Any,
        directory: Path,
        *,
        fits: dict[str, Any],
        keep: KeepRule,
        timeout_minutes: float,
        ema: EMA | None = None,
        config_file: Path | None = None,
    ):
        """fits: see ``check_fits``.  config_file: copied into each checkpoint if it exists."""
        self.engine, self.directory, self.fits = engine, directory, fits
        self.timeout_minutes = timeout_minutes
        self.keep, self.ema, self.config_file = keep, ema, config_file
        self._failures: list[str] = []
        self._files: dict[str, integrity.FileFacts] = {}
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
        self._files.clear()
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
            self._guarded(self._save_average, temporary)
        files = {name: facts for part in dist.gather(self._files) for name, facts in part.items()}
        if dist.is_main():
            records = {"step": step, "world_size": dist.world_size(), **self.fits, **state}
            self._guarded(self._write_records, temporary, records, files)
        self._raise_failures(step, temporary)
        if dist.is_main():
            self._guarded(self._publish, temporary, final)
        self._raise_failures(step, temporary)
        return final

    def note(self, step: int, state: dict[str, Any]) -> None:
        """Add to the ``state.json`` of a saved checkpoint. Every rank must call; errors as in ``save``."""
        if dist.is_main():
            self._guarded(self._add_to_records, self.directory / str(step), state)
        self._raise_failures(step, self.directory / f"{step}.tmp")

    def load(self, folder: Path) -> dict[str, Any]:
        """Put a checkpoint's weights, optimizer and averages into the engine; returns its ``state.json``.

        It may have been written by another number of ranks. Raises ValueError if it is damaged, or cannot be spread
        over this number of ranks.
        """
        state = integrity.read_state(folder)
        if universal.is_needed(state):
            universal.load(
                self.engine,
                folder,
                state,
                workplace=self.directory,
                load_file=_load_file,
                timeout_minutes=self.timeout_minutes,
            )
        else:
            self.engine.load_checkpoint(
                str(folder.parent),
                tag=folder.name,
                custom_load_fn=lambda src, dst: dst.load_state_dict(src, strict=False),
            )
        if self.ema is not None:
            self.ema.load(folder)
        if dist.is_main() and folder.parent.resolve() == self.directory.resolve():
            # Of an older one: those after it are an abandoned branch from here on.
            durable.replace(self.directory / LATEST, folder.name)
        return state

    # ----------------------------------------------------------------------------------- the steps of save, on rank 0

    def _prepare(self, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.tmp"):  # of a killed run
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        existing = numbered(self.directory)
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

    def _write_records(
        self, temporary: Path, state: dict[str, Any], files: dict[str, integrity.FileFacts]
    ) -> None:
        if self.config_file is not None and self.config_file.is_file():
            durable.write(temporary / self.config_file.name, self.config_file.read_text())
        for path in temporary.iterdir():  # that one, and what a DeepSpeed to come may add
            files.setdefault(path.name, integrity.facts(path))
        durable.write(temporary / STATE, integrity.seal(state, files))

    def _add_to_records(self, folder: Path, state: dict[str, Any]) -> None:
        durable.replace(folder / STATE, integrity.seal(integrity.read_state(folder) | state))

    def _publish(self, temporary: Path, final: Path) -> None:
        durable.flush(temporary)
        if final.exists():  # of an abandoned branch: ``latest`` points before it
            durable.remove_folder(final)
        temporary.rename(final)
        durable.replace(self.directory / LATEST, final.name)
        self.keep.prune(self.directory, int(final.name))

    # ------------------------------------------------------------------------------------------------------- failures

    def _save_file(self, state_dict: dict[str, Any], path: str) -> None:
        def write() -> None:
            with durable.HashedWriter(path) as file:
                torch.save(state_dict, file)
            self._files[Path(path).name] = (file.bytes, file.sha256)

        self._guarded(write)

    def _save_average(self, temporary: Path) -> None:
        path = self.ema.save(temporary)
        durable.flush(path)
        self._files[path.name] = integrity.facts(path)

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
        pointer = self.directory / LATEST
        last = (
            f"checkpoint {pointer.read_text().strip()} is whole"
            if pointer.is_file()
            else "there is none before it"
        )
        raise OSError(
            f"could not save step {step} in {self.directory}: {failures[0]}; {last}. Make room (or lower "
            f"train.keep_checkpoints), then run the same command again"
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
            # By this name, which universal.py does not redirect to here.
            return torch.serialization.load(path, map_location=where, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is missing, damaged, or holds more than tensors ({str(error).splitlines()[0]}); "
            f"set train.resume to another checkpoint folder"
        ) from error


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
