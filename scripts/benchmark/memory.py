"""Peak memory of one piece of work, in a process of its own:

    peak_of("scripts.benchmark.vae:decode_case", "ours", "float32", device="cpu")

calls ``decode_case("ours", "float32")`` in a fresh interpreter, which returns the work as a function without
arguments. That is called once so that libraries make their buffers, then once more for its peak: on a CPU the highest
resident memory (RSS), on a GPU what torch allocated and reserved and what the driver gave away.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.benchmark.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
_ONLY = "work"  # the name of one that has none


@dataclass(frozen=True)
class Peak:
    """Bytes.  before: held when the work starts (weights, inputs).  above: the most that was added while it ran.

    reserved, device: on a GPU, torch's reserved memory at the peak, and what the driver had given away then.
    """

    before: int
    above: int
    reserved: int | None = None
    device: int | None = None

    @property
    def total(self) -> int:
        return self.before + self.above

    def by_kind(self) -> dict[str, int]:
        """``Row.memory``: what is known of above, total, reserved and device."""
        kinds = {"above": self.above, "total": self.total, "reserved": self.reserved, "device": self.device}
        return {kind: value for kind, value in kinds.items() if value is not None}


def peak_of(case: str, *arguments: Any, device: str = "cpu") -> Peak:
    """case: "module:function"; arguments: what json can hold. RuntimeError with the output of a process that fails."""
    return peaks_of(case, *arguments, device=device)[_ONLY]


def memory_of(case: str, index: int, candidate: str, settings: Settings) -> dict[str, int]:
    """``Row.memory`` of a case that takes (index, candidate, device, quick)."""
    arguments = index, candidate, settings.device, settings.quick
    return peak_of(case, *arguments, device=settings.device).by_kind()


def peaks_of(case: str, *arguments: Any, device: str = "cpu") -> dict[str, Peak]:
    """The same for a case that returns several pieces of work by name, measured one after the other in one process.

    Work that does not fit into a GPU is left out."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("peak memory of a process is read from /proc, so it needs Linux")
    command = [sys.executable, "-m", "scripts.benchmark.memory", device, case, json.dumps(arguments)]
    # Large tensors are then given back to the system when they die, not kept by the allocator.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "sat"), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}{arguments} failed in its process:\n{done.stdout}{done.stderr}")
    return {name: Peak(**peak) for name, peak in json.loads(done.stdout.splitlines()[-1]).items()}


def _measure(case: str, arguments: list[Any], device: str) -> dict[str, Peak]:
    module, _, name = case.partition(":")
    works = getattr(importlib.import_module(module), name)(*arguments)
    works = works if isinstance(works, dict) else {_ONLY: works}
    peaks = {name: _peak(work, device) for name, work in works.items()}
    return {name: peak for name, peak in peaks.items() if peak is not None}


def _peak(work: Any, device: str) -> Peak | None:
    """None for work that does not fit into the GPU."""
    if device == "cpu":
        work()
        gc.collect()
        return _resident_peak(work)
    import torch

    try:
        work()
        gc.collect()
        return _device_peak(work)
    except torch.OutOfMemoryError:
        return None


def _resident_peak(work: Any) -> Peak:
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    work()
    return Peak(before, max(0, _status_bytes("VmHWM") - before))


def _status_bytes(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _device_peak(work: Any) -> Peak:
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()  # torch keeps what it reserved, so this is what the peak took
    peak = torch.cuda.max_memory_allocated()
    return Peak(before, peak - before, torch.cuda.max_memory_reserved(), total - free)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    used_device, used_case, encoded = sys.argv[1:]
    result = _measure(used_case, json.loads(encoded), used_device)
    print(json.dumps({name: asdict(peak) for name, peak in result.items()}))
