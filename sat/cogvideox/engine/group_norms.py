"""Gradient norm and update/weight ratio by group of parameters, in the steps that are logged.

The optimizer itself is asked: its hooks see the gradients right before an update and the weights on both sides of it,
in full precision and where ZeRO keeps them, in pieces on every rank. Nothing is gathered, and the device is waited for
only when the numbers are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox import dist

# Weights of one piece that the ratio is taken from: with all of them a copy of every master weight would be needed.
_MOST_SAMPLES = 2**16


class GroupNorms:
    """Between ``watch(True)`` and ``read()`` lies one step of ``optimizer``."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, group_of: Callable[[str], str]):
        """group_of: parameter name -> the name of its group."""
        self._engine, self._group_of = engine, group_of
        self._watching = False
        self._pieces: dict[int, list[tuple[str, int, int]]] = {}
        # (group, norms of a piece: gradient, update, weights; the factor of the last two for their samples)
        self._found: list[tuple[str, list[Tensor], float]] = []
        self._before: list[Tensor] = []
        self.hooks = (
            optimizer.register_step_pre_hook(self.note_gradients),
            optimizer.register_step_post_hook(self.note_updates),
        )

    def watch(self, is_logged: bool) -> None:
        """Before a step: whether it will be read."""
        self._watching = is_logged
        self._found.clear()
        if is_logged:
            self._pieces = {}
            for name, tensor, start, count in pieces(self._engine):
                self._pieces.setdefault(id(tensor), []).append((self._group_of(name), start, count))

    def read(self, gradient_norm: float) -> dict[str, float]:
        """``train/grad_norm/<group>`` and ``train/update_ratio/<group>`` of the step watched. Every rank must call.

        gradient_norm: that of all gradients before they were clipped. The optimizer sees them clipped, by one factor
        for all, so it says by which. NaN for the groups of a step that was skipped.
        """
        self._watching = False
        names = {group for held in self._pieces.values() for group, _, _ in held}
        squares = {group: [0.0, 0.0, 0.0] for group in names}
        device = self._engine.device  # some of ZeRO-3's slices may be elsewhere
        found = [norm.to(device) for _, three, _ in self._found for norm in three]
        norms = torch.stack(found).tolist() if found else []
        for index, (group, _, factor) in enumerate(self._found):
            gradient, update, weight = norms[3 * index : 3 * index + 3]
            squares[group][0] += gradient**2
            squares[group][1] += factor * update**2
            squares[group][2] += factor * weight**2
        self._found.clear()
        squares = _summed(dist.gather(squares) if _is_split(self._engine) else [squares])
        clipped = math.sqrt(sum(three[0] for three in squares.values()))
        factor = gradient_norm / clipped if clipped else 0.0 if gradient_norm == 0.0 else math.nan
        result = {}
        for group, (gradient, _, _) in sorted(squares.items()):
            result[f"train/grad_norm/{group}"] = factor * math.sqrt(gradient)
        for group, (_, update, weight) in sorted(squares.items()):
            result[f"train/update_ratio/{group}"] = math.sqrt(update / weight) if weight else math.nan
        return result

    @torch.no_grad()
    def note_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The optimizer's hook before an update."""
        if not self._watching or self._before:  # a step that calls that of its base class is one step
            return
        held = list(self._held(optimizer))
        gradients = [tensor.grad.view(-1)[start : start + count] for _, tensor, start, count in held]
        self._before = [_sample(*piece).clone() for _, *piece in held]
        for (group, _, _, count), norm, before in zip(held, _norms(gradients), self._before, strict=True):
            self._found.append((group, [norm], count / before.numel()))

    @torch.no_grad()
    def note_updates(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The optimizer's hook after an update."""
        if not self._watching or not self._before:
            return
        after = [_sample(*piece) for _, *piece in self._held(optimizer)]
        updates = torch._foreach_sub(after, self._before)
        for (_, norms, _), update, weight in zip(
            self._found[-len(after) :], _norms(updates), _norms(self._before), strict=True
        ):
            norms += [update, weight]
        self._before = []

    def _held(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, int, int]]:
        """(group, tensor, start, count) of what this call of the optimizer updates: ZeRO calls it part by part."""
        for parameters in optimizer.param_groups:
            for tensor in parameters["params"]:
                if tensor.grad is not None:
                    for group, start, count in self._pieces.get(id(tensor), ()):
                        yield group, tensor, start, count


def pieces(engine: Any) -> Iterator[tuple[str, Tensor, int, int]]:
    """Where the optimizer of a DeepSpeed engine holds each trained parameter on this rank.

    (name, tensor among the optimizer's own, first element, number of elements); nothing for a parameter that lies on
    other ranks alone.
    """
    zero, trained = engine.optimizer, _trained(engine.module)
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for name, parameter in trained.items():
            part, start, count = zero.grad_position[zero.get_param_id(parameter)]
            # The last slice is padded with memory that nobody has written.
            count = min(count, parameter.ds_numel - parameter.ds_zero_partition_rank * count)
            if count > 0:
                yield name, zero.fp32_partitioned_groups_flat[part], start, count
    elif hasattr(
        zero, "fp16_groups"
    ):  # stage 0 with a copy in full precision: its own tensors, or one flat one
        names = {id(parameter): name for name, parameter in trained.items()}
        for index, group in enumerate(zero.fp16_groups):
            start = 0
            for place, parameter in enumerate(group):
                if hasattr(zero, "fp32_groups_flat"):
                    yield names[id(parameter)], zero.fp32_groups_flat[index], start, parameter.numel()
                    start += parameter.numel()
                else:
                    yield names[id(parameter)], zero.fp32_groups[index][place], 0, parameter.numel()
    elif zero is engine.basic_optimizer:  # stage 0 in full precision
        for name, parameter in trained.items():
            yield name, parameter, 0, parameter.numel()
    else:  # ZeRO-1 and 2, one flat tensor per group of the optimizer
        for name, parameter in trained.items():
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
                address = mapping.get_hp_fragment_address()
                yield name, flat, address.start, address.numel


def first_part(name: str) -> str:
    """The group of a parameter whose module names none: the part of the network it is in."""
    return name.partition(".")[0]


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _is_split(engine: Any) -> bool:
    """Whether ranks hold different pieces; at stage 0 each holds all of them."""
    zero = engine.optimizer
    return (
        hasattr(zero, "fp32_partitioned_groups_flat")
        or hasattr(zero, "bit16_groups")
        or hasattr(zero, "bf16_groups")
    )


def _sample(tensor: Tensor, start: int, count: int) -> Tensor:
    """At most ``_MOST_SAMPLES`` of the elements, evenly spread; all where they are few. A view."""
    stride = max(-(-count // _MOST_SAMPLES), 1)
    while math.gcd(stride, 210) != 1:  # else it could see the same columns of every row
        stride += 1
    return tensor.detach().view(-1)[start : start + count : stride]


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(tensors, 2, torch.float32)) if tensors else []


def _summed(ranks: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    groups = dict.fromkeys(group for rank in ranks for group in rank)
    return {
        group: [
            math.fsum(column)
            for column in zip(*(rank[group] for rank in ranks if group in rank), strict=True)
        ]
        for group in groups
    }
