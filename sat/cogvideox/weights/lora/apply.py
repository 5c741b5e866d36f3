"""LoRAs onto a network in memory: checked against it, added to its weights, or copied into its adapters.

The network has SAT's names (``transformer.layers.0.attention.query_key_value.weight``); this file knows nothing else of
it. Wrapping its layers is ``model.lora``'s: it takes what ``adapter_matrices`` gives.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.weights.fill import LoadReport
from cogvideox.weights.geometry import shapes_of, transformer_geometry
from cogvideox.weights.lora.file import LoraFile, read_lora
from cogvideox.weights.lora.formats import sat_layer
from cogvideox.weights.lora.low_rank import Lora, add_to, combine, place
from cogvideox.weights.variants import variants_with

logger = logging.getLogger("cogvideox")

Matrices = dict[str, list[tuple[Tensor, Tensor] | None]]
"""Linear layer -> (down, up) of each of its parts (q, k, v of ``query_key_value``); None: that part has no update."""


def read_loras(
    sources: Sequence[tuple[str | Path, float, float | None]], net: nn.Module, *, ema: bool
) -> list[tuple[LoraFile, float]]:
    """LoRAs from (path, strength, alpha or None: the file's own), with their strengths.

    ValueError unless each fits ``net``.
    """
    loras = [(read_lora(path, alpha=alpha, ema=ema), strength) for path, strength, alpha in sources]
    shapes = {name.replace(".original.", "."): shape for name, shape in shapes_of(net.state_dict()).items()}
    for file, _ in loras:
        check_fit(file, shapes)
    return loras


def check_fit(file: LoraFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless every update of the LoRA has its weight among these shapes of a SAT transformer."""
    mine = transformer_geometry(shapes)
    width = file.width or (mine and mine.hidden_size)  # None: no update shows it
    if mine is not None and (width != mine.hidden_size or file.num_layers > mine.num_layers):
        fits = [v.name for v in variants_with(num_layers=file.num_layers, hidden_size=width)]
        raise ValueError(
            f"{file.path}: this is a LoRA for {file.num_layers} layers x {width} (rank {_shown(file.ranks)}"
            f"{', ' + ' or '.join(fits) if fits else ''}); your network has {mine.num_layers} x {mine.hidden_size}: "
            f"use the model it was trained on"
        )
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        absent = [module for module in file.modules if place(module, "SAT").weight not in shapes]
        if absent:
            raise ValueError(
                f"LoRA for {absent[0]}: the network has no {place(absent[0], 'SAT').weight}"
                f"{f' (and {len(absent) - 1} more)' if len(absent) > 1 else ''}: use the model it was trained on"
            )
        add_to(meta, file.modules, "SAT")
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


@torch.no_grad()
def add_to_network(net: nn.Module, lora: Lora) -> None:
    """Add the updates to the weights of a network without adapters, one weight at a time, in place."""
    weights = net.state_dict(keep_vars=True)
    by_weight: dict[str, Lora] = {}
    for module, part in lora.items():
        by_weight.setdefault(place(module, "SAT").weight, {})[module] = part
    for name, parts in by_weight.items():
        weights[name].copy_(add_to({name: weights[name].detach()}, parts, "SAT")[name])


def adapter_matrices(lora: Lora) -> Matrices:
    """The updates by SAT's linear layers, scales folded into ``up``.

    ValueError for a DoRA, which is no update.
    """
    result: Matrices = {}
    for module, part in lora.items():
        if part.gain is not None:
            raise ValueError(
                f"DoRA for {module}: it changes the length of the weights' rows and can only be merged into them: set "
                f"sample.merge_lora=true"
            )
        layer, index = sat_layer(module)
        pairs = result.setdefault(layer, [None] * _parts(module))
        pairs[index] = (part.down, part.up if part.scale == 1 else part.scale * part.up.float())
    return result


def _parts(module: str) -> int:
    """Into how many parts the layer of ``module`` is divided among modules: 3 (q, k, v), 2 (norm1, norm2) or 1."""
    where = place(module, "SAT")
    return where.count // len(where.chunks)


@torch.no_grad()
def start_adapters(
    net: nn.Module, file: LoraFile, strength: float, scales: Mapping[str, float]
) -> LoadReport:
    """Copy a LoRA into the injected adapters of ``net``: the same layers, the same ranks.

    scales: by what the network's own layers multiply their updates. The file's scale times ``strength``, divided by it,
    goes into B, so that the update is the file's.
    """
    targets = net.state_dict(keep_vars=True)
    has_gain = any(name.endswith(".magnitude_gain") for name in targets)
    if (file.method == "DoRA") != has_gain or (has_gain and strength != 1):
        raise ValueError(
            f"load.lora={file.path}: it is a {file.method}, your config has lora.dora={str(has_gain).lower()} and "
            f"strength {strength:g}: a DoRA starts from a DoRA of strength 1 and a LoRA from a LoRA; or merge it into "
            f"the base weights"
        )
    _check_ranks(file, targets)
    matrices = _same_layers(file, scales)
    factors = set()
    for module, part in file.modules.items():
        layer, index = sat_layer(module)
        factor = part.scale * strength / scales[layer]
        factors.add(factor)
        targets[f"{layer}.matrix_A.{index}"].copy_(part.down)
        up = (
            part.up if factor == 1 else factor * part.up.to(torch.promote_types(part.up.dtype, torch.float32))
        )
        targets[f"{layer}.matrix_B.{index}"].copy_(up)
        if part.gain is not None:
            where = place(module, "SAT")
            rows = targets[f"{layer}.magnitude_gain"].chunk(where.count)
            for number, gain in zip(where.chunks, part.gain.chunk(len(where.chunks)), strict=True):
                rows[number].copy_(gain)
    report = _report(file, strength, f"starts the adapters of {len(matrices)} layers")
    if factors != {1.0}:
        shown = ", ".join(f"{factor:g}" for factor in sorted(factors)[:3])
        own = ", ".join(f"{scale:g}" for scale in sorted(set(scales.values()))[:3])
        report.notes.append(f"B times {shown}, for the network's own alpha / rank = {own}")
    logger.info("%s", report)
    return report


def _check_ranks(file: LoraFile, targets: Mapping[str, Tensor]) -> None:
    """ValueError where a layer of both has another rank in the file."""
    for module, part in file.modules.items():
        layer, index = sat_layer(module)
        own = targets.get(f"{layer}.matrix_A.{index}")
        if own is not None and len(own) != part.rank:
            one = len(file.ranks) == 1
            advice = f"use lora.rank={file.ranks[0]}" if one else "use the lora.rank_pattern of its run"
            raise ValueError(
                f"load.lora={file.path}: its LoRA has rank {_shown(file.ranks)}, your config lora.rank={len(own)} for "
                f"{layer}: {advice}, or merge it into the base weights"
            )


def _same_layers(file: LoraFile, wanted: Mapping[str, Any]) -> Matrices:
    plain = {module: replace(part, gain=None) for module, part in file.modules.items()}
    matrices = adapter_matrices(plain)
    hollow = [layer for layer, pairs in matrices.items() if None in pairs]
    if hollow:
        raise ValueError(
            f"load.lora={file.path}: it has no update for a part of {hollow[0]} (q, k, v; norm1, norm2), and adapters "
            f"have all: merge it into the base weights and train on those"
        )
    if matrices.keys() != wanted.keys():
        raise ValueError(
            f"load.lora={file.path}: it updates {_layers(matrices)}; your section lora adapts {_layers(wanted)}: "
            f"set lora.layers and lora.transformer_layers to those of the file"
        )
    return matrices


def _layers(names: Mapping[str, object]) -> str:
    """``query_key_value, dense in layers 0-41``: what lora.layers and lora.transformer_layers say."""
    found = {
        name: re.match(r"(?:transformer\.layers|.+\.adaLN_modulations)\.(\d+)\.", name) for name in names
    }
    numbers = sorted({int(match[1]) for match in found.values() if match})
    # Of adaLN_modulations.7.1 and time_embed.0 the number alone says nothing.
    kinds = dict.fromkeys(
        re.sub(r"(adaLN_modulations)\.\d+", r"\1.*", ".".join(name.split(".")[-3:]))
        if name[-1].isdigit() or not found[name]
        else name.rpartition(".")[2]
        for name in names
    )
    if not numbers:
        return ", ".join(kinds)
    together = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{', '.join(kinds)} in layers {f'{numbers[0]}-{numbers[-1]}' if together else numbers}"


def applied(loras: Sequence[tuple[LoraFile, float]], how: str) -> tuple[Lora, list[LoadReport]]:
    """The sum of the LoRAs, and what to tell the user of each. how: ``merged``, ``kept beside the weights``."""
    reports = [_report(file, strength, how) for file, strength in loras]
    for report in reports:
        logger.info("%s", report)
    return combine([(file.modules, strength) for file, strength in loras]), reports


def _report(file: LoraFile, strength: float, how: str) -> LoadReport:
    source = f"{file.path} ({file.format} {file.method}, rank {_shown(file.ranks)})"
    dtype = str(next(iter(file.modules.values())).down.dtype).removeprefix("torch.")
    report = LoadReport(source, file.tensors, dtype, used_ema=False)
    report.notes = [f"alpha {file.alpha_source}", f"strength {strength:g}", how]
    return report


def _shown(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
