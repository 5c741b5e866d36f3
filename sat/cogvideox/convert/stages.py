"""What the parts of two models put out for one input: recorded by hooks, compared, shown as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Largest difference per unit of max(1, |value|): float32 sums in another order (5B: 5e-7 at the 38th of 42 blocks)."""

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """The output of one part of the model, in both formats."""

    name: str
    max_difference: float
    largest: float
    # The largest |value| on the original's side.
    known: float = 0.0
    # The part of the difference that has a known reason, which ``note`` gives.
    note: str = ""

    @property
    def limit(self) -> float:
        return TOLERANCE * max(1.0, self.largest) + self.known

    @property
    def passed(self) -> bool:
        return self.max_difference <= self.limit  # NaN does not pass


def first_failure(stages: Sequence[Stage]) -> Stage | None:
    """The first stage that differs by more than its limit; those after it only pass that on."""
    return next((stage for stage in stages if not stage.passed), None)


def format_stages(stages: Sequence[Stage], limit: int = 16) -> str:
    """The verdict, then a table; of more than ``limit`` stages the unnumbered ones, the noted and the worst."""
    failed = first_failure(stages)
    worst = max(stages, key=lambda stage: (stage.max_difference - stage.known) / (stage.limit - stage.known))
    head = f"{len(stages)} stages in float32: "
    if failed is None:
        apart = max(worst.max_difference - worst.known, 0.0)
        head += f"they agree, at most {apart:.1e} apart ({worst.name}: values up to {worst.largest:.3g})"
    else:
        head += f"DIFFERENT from '{failed.name}' on: {failed.max_difference:.1e} apart, expected {failed.limit:.1e}"
    shown = [
        stage
        for stage in stages
        if len(stages) <= limit
        or stage in (failed, worst)
        or stage.note
        or not any(character.isdigit() for character in stage.name)
    ]
    width = max(len(stage.name) for stage in shown)
    rows = [head, f"  {'stage':<{width}}  max |difference|  max |value|"]
    for stage in shown:
        row = f"  {stage.name:<{width}}  {stage.max_difference:16.1e}  {stage.largest:11.4g}"
        row += f"  {stage.known:.1e} of it known*" if stage.note else ""
        rows.append(row if stage.passed else f"{row}  DIFFERENT")
    return "\n".join(rows + [f"  * {note}" for note in dict.fromkeys(s.note for s in shown if s.note)])


def record(
    net: nn.Module, modules: Mapping[str, tuple[str, str]], into: Outputs, join: Callable[[Any], Tensor]
) -> None:
    """From now on, what ``net`` computes goes ``into`` a dict, stage -> value; calls are joined in time (dim 2).

    modules: stage -> (name of the module, "input" or "output"). join: one tensor of what a module takes or puts out.
    """

    def keep(stage: str, value: Any) -> None:
        # A copy: some activations work in place on what they are given.
        tensor = join(value).detach().float().clone()
        into[stage] = torch.cat((into[stage], tensor), dim=2) if stage in into else tensor

    for stage, (name, side) in modules.items():
        module = net.get_submodule(name)
        if side == "input":
            module.register_forward_pre_hook(lambda _, args, stage=stage: keep(stage, args[0]))
        else:
            module.register_forward_hook(lambda _, args, output, stage=stage: keep(stage, output))


def compute_in_float32(net: nn.Module) -> None:
    """Widen the weights of each module while it runs, one module at a time; what ``net`` stores stays as it is."""
    stored: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = stored.pop(parameter)

    for module in net.modules():
        if any(parameter.dtype != torch.float32 for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)
