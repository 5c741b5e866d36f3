"""Outputs that are whole or absent: written beside their place under another name, renamed when all is there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SPARE_BYTES = 2**20  # configuration files, headers
_MARKS = ("latest", "config.json", "model_index.json", "*.safetensors", "*.pt", "transformer", "vae")


def refuse_existing(output: Path, sources: list[Path], force: bool) -> None:
    """ValueError where ``output`` may not be written: it exists, or it holds one of the sources.

    force: replace a file, or a folder of weights. A folder that holds something else is never replaced.
    """
    for source in sources:
        if output.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"{output} holds {source}, which is being read: choose another output")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise ValueError(f"{output} exists: choose another output, or replace it with --force")
    if output.is_dir() and not any(match for mark in _MARKS for match in output.glob(mark)):
        raise ValueError(
            f"{output} is a folder without weights, which --force does not replace: choose another output"
        )


@contextmanager
def staged(output: Path, needed_bytes: int) -> Iterator[Path]:
    """Gives a path beside ``output`` to write a file or folder to; renames it to ``output`` when the body is through.

    needed_bytes: what will be written; OSError before anything is, where the disk has less. Whatever stops the body
    (an error, a full disk, Ctrl-C), what it wrote is removed, and an older output stays as it was.
    """
    existing = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{output}: not enough space: {_gib(needed_bytes)} needed, {_gib(free)} free; nothing was written",
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    _remove(temporary)  # of a run that was killed
    try:
        yield temporary
        _replace(temporary, output)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"{output}: no space left ({os.strerror(error.errno)}): {_gib(needed_bytes)} needed; "
                f"the partial output was removed",
            ) from error
        raise


def _replace(temporary: Path, output: Path) -> None:
    old = output.with_name(f".{output.name}.old")
    _remove(old)
    if output.exists():
        os.rename(output, old)
    os.rename(temporary, output)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
