"""Parameter groups: which parameters have a learning rate or weight decay of their own, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from cogvideox.config import GroupConfig
from cogvideox.patterns import check_used, matcher

KEY = "train.groups"


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    rules: Sequence[GroupConfig],
    lr: float | None,
    decay_norms_and_biases: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(groups for a torch optimizer, each with its ``names``; one line for the log on what each rule chose).

    named: the trainable parameters. rules: the first that matches a name counts. lr: the optimizer's own, which
    ``lr_scale`` multiplies. Parameters that no rule matches come first, and in each group matrices before those of
    fewer than two dimensions, which go without weight decay unless ``decay_norms_and_biases`` or a rule says another:
    pulling a norm's gain to 0 does not regularise, it shrinks the layer's output.
    Raises ValueError for a rule that matches nothing (with the nearest names) or contradicts itself.
    """
    named = dict(named)
    for index, rule in enumerate(rules):
        _check(rule, f"{KEY}.{index}", lr)
    check_used([rule.pattern for rule in rules], named, f"{KEY} pattern")
    members: dict[tuple[int, bool], list[str]] = {}
    chosen: dict[int, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        index = next((i for i, rule in enumerate(rules) if matcher(rule.pattern)(name)), -1)
        is_vector = parameter.ndim < 2 and not decay_norms_and_biases
        members.setdefault((index, is_vector), []).append(name)
        chosen.setdefault(index, []).append(parameter)
    if taken := next((rule for i, rule in enumerate(rules) if i not in chosen), None):
        raise ValueError(
            f"{KEY}: every parameter of the pattern {taken.pattern!r} is chosen by a group before it: put it first"
        )
    groups = []
    for (index, is_vector), names in sorted(members.items()):
        group: dict[str, Any] = {"params": [named[name] for name in names], "names": names}
        rule = rules[index] if index >= 0 else None
        if rule is not None and rule.lr is not None:
            group["lr"] = rule.lr
        elif rule is not None and rule.lr_scale is not None:
            group["lr"] = lr * rule.lr_scale
        if rule is not None and rule.weight_decay is not None:
            group["weight_decay"] = rule.weight_decay
        elif is_vector:
            group["weight_decay"] = 0.0
        groups.append(group)
    return groups, [_line(rule, i, chosen[i], len(named)) for i, rule in enumerate(rules)]


def split_by_blocks(groups: list[dict[str, Any]], block: int) -> list[dict[str, Any]]:
    """Each group as two: parameters of whole blocks, then the others.

    ZeRO lays the parameters of a group end to end and gives each rank an equal slice. torchao's low-bit states need
    slices of whole blocks, and one parameter with a remainder would leave the states of its whole group in 32 bits.
    block: numbers in a block, times the ranks.
    """
    result = []
    for group in groups:
        for is_whole in (True, False):
            pairs = zip(group["names"], group["params"], strict=True)
            chosen = [(name, p) for name, p in pairs if (p.numel() % block == 0) == is_whole]
            if chosen:
                result.append({**group, "names": [n for n, _ in chosen], "params": [p for _, p in chosen]})
    return result


def _check(rule: GroupConfig, key: str, lr: float | None) -> None:
    if rule.lr is not None and rule.lr_scale is not None:
        raise ValueError(f"{key}: lr={rule.lr} and lr_scale={rule.lr_scale}; give one of them")
    if rule.lr_scale is not None and lr is None:
        raise ValueError(
            f"{key}.lr_scale={rule.lr_scale} needs train.optimizer.params.lr, which it multiplies"
        )
    for name in ("lr", "lr_scale", "weight_decay"):
        value = getattr(rule, name)
        if value is not None and value < 0:
            raise ValueError(f"{key}.{name}={value}: expected at least 0")


def _line(rule: GroupConfig, index: int, members: list[nn.Parameter], of: int) -> str:
    said = [
        f"{name} {getattr(rule, name):g}"
        for name in ("lr", "lr_scale", "weight_decay")
        if getattr(rule, name) is not None
    ]
    return (
        f"{KEY}.{index}: {rule.pattern!r} has {len(members)} of {of} parameters, "
        f"{sum(p.numel() for p in members):,} numbers{': ' if said else ''}{', '.join(said)}"
    )
