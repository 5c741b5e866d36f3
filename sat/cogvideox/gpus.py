"""What GPUs can do, from their makers' data sheets: for plans, and for the utilisation (MFU) of a measured run.

``bf16_tflops`` is the dense rate with float32 accumulation. Rates are decimal (10^12, 10^9), memory is in GiB as the
driver reports it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    name: str
    memory_gib: float
    bf16_tflops: float
    memory_gb_s: float
    # Of its own memory.
    link_gb_s: float
    # To a neighbour in the same machine, in one direction: NVLink, or PCIe where there is none.


GPUS = (
    GPU("B200", 179.0, 2250.0, 8000.0, 900.0),
    GPU("H200", 139.8, 989.0, 4800.0, 450.0),
    GPU("H100", 79.6, 989.0, 3350.0, 450.0),
    GPU("H100 PCIe", 79.6, 756.0, 2000.0, 64.0),
    GPU("A100-80GB", 79.3, 312.0, 2039.0, 300.0),
    GPU("A100-40GB", 39.4, 312.0, 1555.0, 300.0),
    GPU("L40S", 44.5, 362.0, 864.0, 32.0),
    GPU("RTX A6000", 47.5, 154.8, 768.0, 32.0),
    GPU("RTX 4090", 23.5, 165.2, 1008.0, 32.0),
    GPU("RTX 3090", 23.5, 71.0, 936.0, 32.0),
    GPU("L4", 22.5, 121.0, 300.0, 32.0),
)


def gpu_named(name: str) -> GPU:
    """The entry for a short name ("h200") or for a driver's ("NVIDIA H100 80GB HBM3").

    Raises ValueError with the known names for anything else; ``find`` returns None instead.
    """
    found = find(name)
    if found is None:
        near = difflib.get_close_matches(name.upper(), [gpu.name for gpu in GPUS], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"no data of a GPU called {name!r}; {hint}Known are {', '.join(gpu.name for gpu in GPUS)}"
        )
    return found


def find(name: str) -> GPU | None:
    """As ``gpu_named``, with None for an unknown name: what a driver calls a GPU that has no entry."""
    words = _words(name)
    fitting = [gpu for gpu in GPUS if _words(gpu.name) <= words]
    if not fitting and "A100" in words:  # "NVIDIA A100-SXM4-40GB" has its size, a plain "A100" has not
        return next(gpu for gpu in GPUS if gpu.name == "A100-80GB")
    return max(fitting, key=lambda gpu: len(_words(gpu.name)), default=None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[A-Z0-9]+", name.upper()))
