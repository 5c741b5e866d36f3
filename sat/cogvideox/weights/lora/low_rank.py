"""Low-rank updates of a CogVideoX transformer's weights in one form, whatever the file they came from.

A LoRA is {module: LowRank}; modules have diffusers' path in the transformer, without a prefix
(``transformer_blocks.0.attn1.to_q``), because it is the finest naming: SAT fuses q, k, v into one weight, and norm1,
norm2 into another. Pure torch: no model is built.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideox.weights.transformer_keys import RENAMED, SPLIT


@dataclass(frozen=True)
class LowRank:
    """The update ``scale * up @ down`` of one weight (out, in)."""

    down: Tensor
    # (r, in)
    up: Tensor
    # (out, r)
    scale: float = 1.0
    gain: Tensor | None = None
    # DoRA: (out,), each changed row is given the length (1 + gain) |row of the weight before|. None: LoRA.

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def update(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in), computed in ``dtype``; with ``gain`` not yet all that changes."""
        return self.scale * (self.up.to(dtype) @ self.down.to(dtype))


Lora = dict[str, LowRank]

EXACT_UP_TO = 1024
"""Weights with a smaller side up to this have their singular vectors computed exactly (``extract``)."""


@dataclass(frozen=True)
class Place:
    """Where the weight of a diffusers module lies: in the rows ``chunks`` of ``count`` equal chunks of ``weight``."""

    weight: str
    chunks: tuple[int, ...] = (0,)
    count: int = 1


_PLACES = {name.removesuffix(".weight"): Place(ours) for ours, name in RENAMED.items()} | {
    name.removesuffix(".weight"): Place(ours, chunks, sum(len(c) for _, c in parts))
    for ours, parts in SPLIT.items()
    for name, chunks in parts
}  # biases keep their ending: no module is called so


def place(module: str, naming: str) -> Place:
    """The weight of a module, without prefix, under "SAT" or "diffusers" names.

    Raises ValueError where no CogVideoX transformer has such a module.
    """
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    pattern, index = (f"transformer_blocks.{{}}.{match[2]}", match[1]) if match else (module, "")
    found = _PLACES.get(pattern)
    if found is None or not found.weight.endswith(".weight"):
        near = difflib.get_close_matches(pattern, _PLACES, n=1)
        hint = f"; the nearest is {near[0].format(index)}" if near else ""
        raise ValueError(f"LoRA for {module}: a CogVideoX transformer has no such module{hint}")
    if naming == "diffusers":
        return Place(f"{module}.weight")
    return Place(found.weight.format(index), found.chunks, found.count)


def touched(lora: Lora, naming: str) -> set[str]:
    """The names of the weights, without prefix, that ``add_to`` changes."""
    return {place(module, naming).weight for module in lora}


def add_to(tensors: dict[str, Tensor], lora: Lora, naming: str) -> dict[str, Tensor]:
    """``tensors`` with the updates added: new tensors for weights that ``lora`` touches, the same objects for others.

    tensors: any part of a state dict under ``naming`` ("SAT" or "diffusers"), without prefix; modules whose weights
    are in another part are left for it. The sum is taken in float32 or wider and cast back to the weight's dtype.
    Tensors of the meta device are checked and stay. Raises ValueError for a shape that does not fit, and for a
    convolution.
    """
    by_weight: dict[str, list[tuple[str, Place]]] = {}
    for module in lora:
        where = place(module, naming)
        if where.weight in tensors:
            by_weight.setdefault(where.weight, []).append((module, where))
    result = dict(tensors)
    for name, parts in by_weight.items():
        weight = tensors[name]
        for module, where in parts:
            _check_fit(module, lora[module], weight, where)
        if weight.is_meta:
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(wide, copy=True)
        for module, where in parts:
            rows, before = total.chunk(where.count), weight.chunk(where.count)
            pieces = lora[module].update(wide).to(total.device).chunk(len(where.chunks))
            gain = lora[module].gain
            gains = [None] * len(pieces) if gain is None else gain.to(total).chunk(len(pieces))
            for number, piece, gain in zip(where.chunks, pieces, gains, strict=True):
                rows[number].add_(piece)
                if gain is not None:
                    rows[number].mul_(_lengths(before[number].to(wide), rows[number], gain)[:, None])
        result[name] = total.to(weight.dtype)
    return result


def _lengths(before: Tensor, after: Tensor, gain: Tensor) -> Tensor:
    """What makes the rows of ``after`` (1 + gain) times as long as those of ``before``."""
    return (1 + gain) * before.norm(dim=1) / after.norm(dim=1).clamp(min=torch.finfo(after.dtype).tiny)


def _check_fit(module: str, part: LowRank, weight: Tensor, where: Place) -> None:
    if weight.ndim != 2:
        raise ValueError(
            f"LoRA for {module}: its weight {tuple(weight.shape)} is a convolution's; only linear layers can be "
            f"updated: remove {module} from the LoRA"
        )
    expected = (weight.shape[0] // where.count * len(where.chunks), weight.shape[1])
    given = (part.up.shape[0], part.down.shape[1])
    if given != expected:
        raise ValueError(f"LoRA for {module}: its update is {given}, the weight of the network {expected}")


def combine(loras: Sequence[tuple[Lora, float]]) -> Lora:
    """The sum of several LoRAs, each times its strength, as one: ranks add up, scale and strength go into ``up``.

    Matrices of the result are float32 (or wider) and its scales 1. A LoRA of strength 0 leaves no trace. ValueError for
    a DoRA, which is no sum, with another or with a strength.
    """
    active = [(lora, strength) for lora, strength in loras if strength != 0]
    if any(part.gain is not None for lora, _ in active for part in lora.values()):
        if len(active) > 1 or active[0][1] != 1:
            raise ValueError(
                "a DoRA sets lengths of the weights and adds nothing, so it has no strength but 1 and no sum with "
                "other LoRAs: merge it into its model first (python -m scripts.convert_weights), then use the result"
            )
        return active[0][0]
    parts: dict[str, list[tuple[LowRank, float]]] = {}
    for lora, strength in loras:
        if strength != 0:
            for module, part in lora.items():
                parts.setdefault(module, []).append((part, strength))
    return {
        module: LowRank(
            torch.cat([_wide(part.down) for part, _ in several]),
            torch.cat([part.scale * strength * _wide(part.up) for part, strength in several], dim=1),
        )
        for module, several in parts.items()
    }


def extract(base: Tensor, tuned: Tensor, rank: int) -> tuple[LowRank, float]:
    """The best update of ``rank`` for ``tuned - base`` (Eckart and Young 1936) and its relative Frobenius error.

    base, tuned: (out, in), any float dtype; 1 <= rank <= min(out, in). Returns float32 matrices and
    ||difference - update|| / ||difference||, measured, and 0 where nothing differs. Exact up to a side of 1024; beyond
    by subspace iteration, as the eigenvectors of one 3072 x 3072 matrix take 5 seconds and a 5B has 168 of them.
    """
    if base.ndim != 2 or not 1 <= rank <= min(base.shape):
        raise ValueError(
            f"rank {rank}: a weight {tuple(base.shape)} has updates of rank 1 to {min(base.shape)}"
        )
    if base.shape[0] > base.shape[1]:
        flipped, error = extract(base.T, tuned.T, rank)
        return LowRank(flipped.up.T.contiguous(), flipped.down.T.contiguous()), error
    exact = base.shape[0] <= EXACT_UP_TO
    dtype = torch.float64 if exact else torch.float32
    difference = tuned.to(dtype) - base.to(dtype)
    up = (_left_vectors if exact else _nearly_left_vectors)(difference, rank)
    down = up.T @ difference
    norm = torch.linalg.norm(difference)
    error = float(torch.linalg.norm(difference - up @ down) / norm) if norm > 0 else 0.0
    # The singular values are shared between both, so that neither leaves the range of fp16. Those that are rounding
    # noise (a difference of lower rank) are held above 0, which is divided by.
    values = torch.linalg.norm(down, dim=1)
    root = values.clamp(min=max(float(values.max()) * torch.finfo(dtype).eps, 1e-30)).sqrt()
    return LowRank((down / root[:, None]).float(), (up * root).float()), error


def _left_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors (out, rank), as eigenvectors of the smaller Gram matrix.

    In float64, because the Gram matrix squares the singular values.
    """
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)


def _nearly_left_vectors(matrix: Tensor, rank: int, steps: int = 6) -> Tensor:
    """The same by randomised subspace iteration (Halko et al. 2011, alg. 4.4), from a fixed start: no run differs."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    columns = min(rank + max(rank // 2, 16), matrix.shape[0])
    start = torch.randn(
        matrix.shape[1], columns, generator=generator, device=matrix.device, dtype=matrix.dtype
    )
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(steps):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    return basis @ _left_vectors((basis.T @ matrix).double(), rank).to(matrix.dtype)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
