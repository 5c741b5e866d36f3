"""Out of memory, said in one line: what is finished stays, and which setting needs less."""

from __future__ import annotations

import torch

from cogvideox.config import Config

_SMALLER = {"fast": "balanced", "balanced": "small"}


class OutOfMemory(ValueError):
    """An error of the user's settings, not of the program: a door shows it without a traceback."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the process: torch reports the latter as a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        phrase in text for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )


def advice(config: Config) -> str:
    """Settings that need less memory, the least harmful first."""
    section, ways = config.sample, []
    if section.batch_size > 1:
        ways.append("sample.batch_size=1")
    if section.memory in _SMALLER:
        ways.append(f"sample.memory={_SMALLER[section.memory]} (now {section.memory})")
    ratio = config.vae.temporal_compression
    frames = (section.num_frames * 2 // 3 - 1) // ratio * ratio + 1
    if frames >= 1:
        ways.append(f"fewer frames (--frames {frames}, now {section.num_frames})")
    return ", or ".join([*ways, f"a smaller size than {section.height}x{section.width} (--size)"])
