"""Muon (Jordan et al. 2024) for matrices and AdamW for the rest, in one optimizer that ZeRO 1 and 2 may divide.

Muon steps along the orthogonalised momentum of a whole matrix. Under ZeRO 1 and 2 each rank holds a slice of all the
matrices of a group laid end to end, whose borders may cut a matrix. Momentum is linear, so it lives in the slices; only
a matrix that a border cuts is put together from its ranks, at most one per border, and the others cost no
communication. DeepSpeed's own Muon orthogonalises before it measures and clips the gradient's norm, which then clips
the step itself; here clipping comes first, where the scale of a gradient means nothing to Muon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from cogvideox import dist
from cogvideox.patterns import matcher

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic iteration: singular values end near 1, between about 0.7 and 1.2, after five steps."""


class Muon(torch.optim.Optimizer):
    """Takes named groups; its own groups are those, each split in matrices for Muon and the rest for AdamW.

    Muon is for hidden matrices: parameters of another number of dimensions than 2, and those whose name matches a
    pattern of ``exclude``, are trained by AdamW with ``betas`` and ``eps``.
    adjust_lr: "match_rms_adamw" multiplies the step by 0.2 sqrt(larger side), the size of AdamW's, so that its learning
    rates serve (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2); "original": by
    sqrt(max(1, rows / columns)).
    """

    needs_names = True

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: str = "match_rms_adamw",
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        exclude: Sequence[str] = ("*embed*", "*final_layer*"),
    ):
        if adjust_lr not in ("match_rms_adamw", "original"):
            raise ValueError(
                f"train.optimizer.params.adjust_lr={adjust_lr!r}: expected match_rms_adamw or original"
            )
        excluded = [matcher(pattern, "train.optimizer.params.exclude") for pattern in exclude]
        groups = []
        for group in params:
            named = list(zip(group["names"], group["params"], strict=True))
            options = {key: value for key, value in group.items() if key not in ("names", "params")}
            hidden = [p for name, p in named if p.ndim == 2 and not any(match(name) for match in excluded)]
            chosen = set(map(id, hidden))
            others = [p for _, p in named if id(p) not in chosen]
            if hidden:
                shapes = [list(p.shape) for p in hidden]
                groups.append({**options, "params": hidden, "orthogonal": True, "shapes": shapes})
            if others:
                groups.append({**options, "params": others, "orthogonal": False})
        if not any(group["orthogonal"] for group in groups):
            raise ValueError(
                f"train.optimizer=muon: no matrix to train is left besides those of exclude={list(exclude)}; use adamw"
            )
        own = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
        }
        self._adamw = torch.optim.AdamW(
            [nn.Parameter(torch.zeros(()))], lr=lr, weight_decay=weight_decay, betas=tuple(betas), eps=eps
        )
        super().__init__(groups, self._adamw.defaults | own)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        # Loading a checkpoint replaces groups and state: they are looked up each time.
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["orthogonal"]]
        self._adamw.step()
        for group in self.param_groups:
            if group["orthogonal"]:
                flat = len(group["params"]) == 1 and group["params"][0].ndim == 1
                (self._step_slice if flat else self._step_matrices)(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.grad is not None:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(_step(self._momentum(p, group), group))

    def _step_slice(self, group: dict[str, Any]) -> None:
        """One flat tensor: this rank's share of the group's matrices, end to end, with zeros behind the last."""
        (p,) = group["params"]
        if p.grad is None:
            return
        update = self._momentum(p, group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        here = (dist.rank() * len(p), (dist.rank() + 1) * len(p))
        for (rows, columns), first, last in _matrices(group["shapes"]):
            low, high = max(first, here[0]), min(last, here[1])
            mine = slice(low - here[0], high - here[0]) if low < high else slice(0, 0)
            if first // len(p) != (last - 1) // len(p):  # every rank sees the same borders
                whole = p.new_zeros(last - first)
                whole[max(low - first, 0) : max(high - first, 0)] = update[mine]
                torch_dist.all_reduce(whole)
            elif low < high:
                whole = update[mine]
            if low < high:
                step = _step(whole.view(rows, columns), group).flatten()
                p[mine].sub_(step[low - first : high - first])

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(average, group["momentum"]) if group["nesterov"] else average


def _matrices(shapes: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[int], int, int]]:
    """(shape, first, last) of each matrix in the flat group; last is one past its end."""
    first = 0
    for shape in shapes:
        yield shape, first, first + math.prod(shape)
        first += math.prod(shape)


def _step(update: Tensor, group: dict[str, Any]) -> Tensor:
    rows, columns = update.shape
    ratio = math.sqrt(max(1.0, rows / columns))
    if group["adjust_lr"] == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    return group["lr"] * ratio * orthogonalised(update, group["ns_steps"]).to(update.dtype)


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """U V^T of the singular value decomposition U S V^T, nearly: Newton-Schulz iteration in bfloat16.

    matrix: (rows, columns).  Returns bfloat16; its singular values are near 1.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
