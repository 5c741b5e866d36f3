"""Which part of a step is communication: DeepSpeed's collectives as the phase ``communication``.

Counted is what a step waits for. Each rank measures for itself, so the wait for a slower rank counts, as it does for
the step. Where reduction or gathering overlap with computation (on GPUs), only what is left of them counts: the time in
which the main stream stands still for them. DeepSpeed's own log of collectives waits for the device at each of them,
which would stop the overlap that is to be measured.
"""

from __future__ import annotations

from typing import Any

from cogvideox import dist
from cogvideox.phases import Phases

PHASE = "communication"

# Of DeepSpeed's backend: all that the engine and the ZeRO optimizers call in a step.
_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "inference_all_reduce",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_base",
    "all_gather_coalesced",
    "all_to_all_single",
    "all_to_all",
    "barrier",
)


def time_communication(engine: Any, phases: Phases) -> None:
    """Let ``phases`` see the communication of this DeepSpeed engine. One rank has none: its copies are not counted.

    The backend is one object for the whole process: a later call takes it over from an earlier one.
    """
    if dist.world_size() == 1:
        return
    backend = dist.import_deepspeed().comm.comm.cdb
    for name in _COLLECTIVES:
        method = getattr(type(backend), name, None)
        if method is not None:
            setattr(backend, name, _timed_collective(method.__get__(backend), phases))
    if engine.device.type == "cpu":
        return
    # What is started in other streams is waited for here: the end of the reduction, and ZeRO-3's parameters.
    engine.allreduce_gradients = phases.timed(engine.allreduce_gradients, PHASE)
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is not None:
        coordinator = offload.get_param_coordinator()
        coordinator.fetch_sub_module = phases.timed(coordinator.fetch_sub_module, PHASE)


def _timed_collective(method: Any, phases: Phases) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with phases(PHASE):
            work = method(*args, **kwargs)
        return _Work(work, phases) if hasattr(work, "wait") else work

    return call


class _Work:
    """The handle of a collective that runs on: waiting for it is communication too."""

    def __init__(self, work: Any, phases: Phases):
        self._work, self._phases = work, phases

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._phases(PHASE):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
