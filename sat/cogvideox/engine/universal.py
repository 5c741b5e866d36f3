"""A checkpoint of another number of ranks: DeepSpeed's universal checkpoint, made when it is needed and then removed.

ZeRO cuts the fp32 masters and the optimizer's moments into as many slices as there are ranks. DeepSpeed's own
``ds_to_universal`` joins them into files of one parameter each, from which any number of ranks takes what it needs.
It knows the two moments of the Adam family and no other optimizer state. Where ZeRO cuts nothing (stage 0) every rank
reads the same file and nothing is converted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cogvideox import dist
from cogvideox.engine.logging import get_logger

_GIB = 2**30
_CONVERSION_MINUTES = 24 * 60.0
_MOMENTS = {"exp_avg", "exp_avg_sq", "step"}
_Load = Callable[..., Any]


def is_needed(state: dict[str, Any]) -> bool:
    """Whether a checkpoint with this ``state.json`` is cut into another number of slices than there are ranks."""
    return state["world_size"] != dist.world_size() and state["zero_stage"] > 0


def load(
    engine: Any,
    folder: Path,
    state: dict[str, Any],
    *,
    workplace: Path,
    load_file: _Load,
    timeout_minutes: float,
) -> None:
    """Put a checkpoint of another number of ranks into the engine. Every rank must call.

    Rank 0 converts, into a folder ``*.tmp`` in ``workplace``, while the others wait.  load_file(path, map_location)
    unpickles without running code.  timeout_minutes: that of the collectives from then on. Raises ValueError for an
    optimizer that DeepSpeed cannot convert, or without room.
    """
    converted, problem = workplace / f"{folder.name}.universal.tmp" / folder.name, None
    with _patience(timeout_minutes):
        if dist.is_main():
            get_logger().info(
                f"{folder} was written by {state['world_size']} ranks, this run has {dist.world_size()}: converting it"
            )
            try:
                _convert(folder, converted, state["zero_stage"], load_file)
            except (ValueError, OSError, RuntimeError) as error:
                problem = (
                    f"{folder} was written by {state['world_size']} ranks and cannot be spread over "
                    f"{dist.world_size()}: {error}. Start as many ranks as wrote it (torchrun --nproc_per_node)"
                )
        problem = next((text for text in dist.gather(problem) if text), None)
    if problem:
        _remove(converted.parent)
        raise ValueError(problem)
    groups = [{k: v for k, v in group.items()} for group in engine.basic_optimizer.param_groups]
    with _inert(load_file), _universal(engine):
        engine.load_checkpoint(str(converted.parent), tag=converted.name)
    if state["zero_stage"] == 3:
        # DeepSpeed gives every group the settings of the first: weight decay of norms and biases.
        for group, mine in zip(engine.basic_optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in mine.items() if key != "params"})
    _load_buffers(engine, folder, load_file)
    dist.barrier()
    _remove(converted.parent)


def _convert(folder: Path, converted: Path, stage: int, load_file: _Load) -> None:
    from deepspeed.checkpoint import ds_to_universal

    optimizer_files = sorted(folder.glob("*_optim_states.pt"))
    _check_optimizer(optimizer_files[0], stage, load_file)
    _remove(converted.parent)
    converted.mkdir(parents=True)
    # The slices of each parameter, and the parameters joined from them, stand beside each other for a while.
    needed = 2 * sum(p.stat().st_size for p in optimizer_files)
    needed += sum(p.stat().st_size for p in folder.glob("*_model_states.pt"))
    free = shutil.disk_usage(converted).free
    if free < needed:
        raise OSError(
            f"{free / _GIB:.2f} GiB free in {converted.parent.parent}, the conversion takes {needed / _GIB:.2f} GiB"
        )
    # One process each: forking the pools that it would use is unsafe beside gloo's and CUDA's threads.
    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(converted),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    chatter = io.StringIO()
    with _inert(load_file), contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
        ds_to_universal.main(arguments)


def _check_optimizer(path: Path, stage: int, load_file: _Load) -> None:
    """Raise ValueError unless the optimizer's state is what DeepSpeed can convert: Adam's."""
    state = load_file(str(path), map_location="cpu")["optimizer_state_dict"]
    base = state["optimizer_state_dict"] if stage == 3 else state["base_optimizer_state"]
    found = {key for entry in base["state"].values() for key in entry}
    if not {"exp_avg", "exp_avg_sq"} <= found <= _MOMENTS:
        raise ValueError(
            f"DeepSpeed's universal checkpoint holds the two moments of Adam, and this optimizer keeps "
            f"{', '.join(sorted(found)) or 'nothing'}"
        )


def _load_buffers(engine: Any, folder: Path, load_file: _Load) -> None:
    """The module's buffers, which a universal checkpoint leaves out."""
    names = {name for name, _ in engine.module.named_buffers()} & engine.module.state_dict().keys()
    if names:
        path = min(folder.glob("*_model_states.pt"))
        module = load_file(str(path), map_location="cpu")["module"]
        engine.module.load_state_dict({n: module[n] for n in names & module.keys()}, strict=False)


@contextlib.contextmanager
def _patience(timeout_minutes: float) -> Iterator[None]:
    """Collectives may wait long inside the block: rank 0 reads and writes the whole checkpoint twice."""
    dist.set_timeout(_CONVERSION_MINUTES)
    try:
        yield
    finally:
        dist.set_timeout(timeout_minutes)


@contextlib.contextmanager
def _inert(load_file: _Load) -> Iterator[None]:
    """DeepSpeed's own ``torch.load`` of these files would run code that is pickled in them."""
    original = torch.load
    torch.load = lambda path, map_location=None, **_: load_file(path, map_location=map_location)
    try:
        yield
    finally:
        torch.load = original


@contextlib.contextmanager
def _universal(engine: Any) -> Iterator[None]:
    engine._config.load_universal_checkpoint = True  # what its setting checkpoint.load_universal sets
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def _remove(folder: Path) -> None:
    if dist.is_main():
        shutil.rmtree(folder, ignore_errors=True)
