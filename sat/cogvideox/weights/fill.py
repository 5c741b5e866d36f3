"""Copy a checkpoint's tensors into a module: all of them or none, one at a time, every difference named."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cogvideox.weights.geometry import OPTIONAL_KEYS, shapes_of
from cogvideox.weights.reader import WeightsReader

logger = logging.getLogger("cogvideox")


@dataclass
class LoadReport:
    """What a load did. Every difference that is not listed here was an error."""

    source: str
    # The path and what it is.
    loaded: int
    # Tensors of the network that were filled.
    dtype: str
    # Of the file; the network keeps its own.
    used_ema: bool
    missing: list[str] = field(default_factory=list)
    # Names of the network that the file may lack: recomputable buffers, LoRA matrices that have their own load.
    unexpected: list[str] = field(default_factory=list)
    # Names of the file that belong to another part (a T5 decoder).
    skipped_optional: list[str] = field(default_factory=list)
    # Names of the file that are known to be of no use.
    notes: list[str] = field(default_factory=list)
    # What else was decided, such as the scale of a LoRA.

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded ({self.dtype}{', averaged' if self.used_ema else ''})"]
        for title in ("missing", "unexpected", "skipped_optional"):
            names = getattr(self, title)
            parts += [f"{len(names)} {title.replace('_', ' ')}, as allowed ({names[0]} ...)"] if names else []
        parts += self.notes
        return f"{self.source}: {'; '.join(parts)}"


def _never(name: str) -> bool:
    return False


@torch.no_grad()
def fill(
    module: nn.Module,
    reader: WeightsReader,
    groups: Iterable[list[str]],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    *,
    may_miss: Callable[[str], bool] = _never,
    may_skip: Callable[[str], bool] = _never,
    other_part: Callable[[str], bool] = _never,
) -> LoadReport:
    """Copy groups of the reader's tensors, each group through ``convert``, into the tensors of the module.

    groups: names in the file; a group is what has to be converted together. convert: {name in the file: tensor} ->
    {name in the module: tensor}; it is first called with tensors of the meta device, so that nothing is changed unless
    everything fits. may_miss: names of the module that the file may lack; may_skip: names of the file without use;
    other_part: names of the file for another load. Raises ValueError with all differences, grouped by module.
    """
    groups = list(groups)
    targets = module.state_dict(keep_vars=True)
    assert not any(target.is_meta for target in targets.values()), (
        "build the module on a real device before filling it"
    )
    arriving: dict[str, tuple[int, ...]] = {}
    for group in groups:
        shells = {name: torch.empty(reader.tensors[name].shape, device="meta") for name in group}
        try:
            arriving |= shapes_of(convert(shells))
        except ValueError as error:
            raise ValueError(f"{reader.path}: {error}") from error

    reached = {id(targets[name]) for name in arriving if name in targets}  # tied tensors have two names
    absent = [name for name in targets if id(targets[name]) not in reached]
    left_over = [name for name in arriving if name not in targets]
    info = reader.info
    report = LoadReport(f"{reader.path} ({info.variant}, {info.layout})", 0, info.dtype, reader.used_ema)
    computed = {name for name, _ in module.named_buffers() if OPTIONAL_KEYS.fullmatch(name)}
    report.missing = [name for name in absent if may_miss(name) or name in computed]
    report.unexpected = [name for name in left_over if other_part(name)]
    report.skipped_optional = [name for name in left_over if may_skip(name) and not other_part(name)]
    _refuse_differences(
        report.source,
        missing=[name for name in absent if name not in report.missing],
        unexpected=[name for name in left_over if not other_part(name) and not may_skip(name)],
        reshaped=[
            f"{name} is {shape} in the file, {tuple(targets[name].shape)} in the network"
            for name, shape in arriving.items()
            if name in targets and tuple(targets[name].shape) != shape
        ],
    )
    for group in groups:
        for name, value in convert({name: reader.tensor(name) for name in group}).items():
            if name in targets:
                targets[name].copy_(value)
                report.loaded += 1
    logger.info("%s", report)
    return report


def _refuse_differences(
    source: str, *, missing: list[str], unexpected: list[str], reshaped: list[str]
) -> None:
    if not (missing or unexpected or reshaped):
        return
    lines = [f"{source} does not fit the network; nothing was loaded"]
    lines += [f"  missing in the file: {line}" for line in _by_module(missing)]
    lines += [f"  unknown to the network: {line}" for line in _by_module(unexpected)]
    lines += [f"  another shape: {line}" for line in reshaped[:5]]
    if len(reshaped) > 5:
        lines.append(f"  another shape: {len(reshaped) - 5} more")
    raise ValueError("\n".join(lines))


def _by_module(names: list[str], limit: int = 8) -> Iterator[str]:
    """``60 in transformer.layers.N.attention.dense, first transformer.layers.0.attention.dense.weight``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".N", name).rpartition(".")[0], []).append(name)
    for module, members in list(groups.items())[:limit]:
        yield f"{len(members)} in {module or 'the top level'}, first {members[0]}"
    if len(groups) > limit:
        yield f"{sum(len(members) for members in list(groups.values())[limit:])} more in other modules"
