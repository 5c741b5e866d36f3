"""Where figures were measured: what a result file says of its machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Cores, memory, system, GPU and the versions of Python, torch and ``packages``."""
    import torch

    found: dict[str, Any] = {"cpu": _cpu_model(), "cpu_cores": os.cpu_count()}
    if (memory := _memory_gb()) is not None:
        found["memory_gb"] = memory
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found |= {"system": platform.system(), "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", *packages)}


def _cpu_model() -> str:
    """Its name, and whether it multiplies in bfloat16: without that, bf16 is slower than float32."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    has_bf16 = {"avx512_bf16", "amx_bf16", "bf16"} & set(
        values.get("flags", values.get("Features", "")).split()
    )
    name = values.get("model name", platform.machine())
    return f"{name}, {'with' if has_bf16 else 'without'} bf16 instructions"


def _memory_gb() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    line = next(x for x in lines if x.startswith("MemTotal"))
    return round(int(line.split()[1]) * 1024 / 1e9)
