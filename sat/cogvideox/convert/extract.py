"""A LoRA out of the difference of two checkpoints of one model, streamed layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cogvideox.weights.geometry import Geometry, shapes_of, transformer_geometry
from cogvideox.weights.lora.low_rank import Lora, LowRank, extract
from cogvideox.weights.reader import WeightsReader
from cogvideox.weights.transformer_keys import sat_to_diffusers

LAYERS = {
    "query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "dense": ("attn1.to_out.0",),
    "dense_h_to_4h": ("ff.net.0.proj",),
    "dense_4h_to_h": ("ff.net.2",),
}
"""``lora.layers`` -> modules of a transformer block: what SAT's LoRA can hold, and most consumers load."""

_BLOCK = re.compile(r"(?:layers|adaLN_modulations|layernorm_list|transformer_blocks)\.(\d+)\.")


@dataclass
class Extraction:
    lora: Lora = field(default_factory=dict)
    squares: dict[str, list[float]] = field(default_factory=dict)
    # Kind of layer -> [squared norm of what the LoRA misses, squared norm of the difference].
    left_out: list[str] = field(default_factory=list)
    # Tensors that differ and are not in the LoRA: biases, norms, layers that were not chosen.

    def error(self, kind: str | None = None) -> float:
        """||difference - update|| / ||difference|| (Frobenius) over a kind of layer; None: over all of the LoRA."""
        missed, whole = map(sum, zip(*([self.squares[kind]] if kind else self.squares.values()), strict=True))
        return (missed / whole) ** 0.5


def open_pair(base: str, tuned: str, *, ema: bool = True) -> tuple[WeightsReader, WeightsReader]:
    """Both checkpoints; ValueError unless they hold the same network, without a LoRA of their own."""
    readers = [WeightsReader(path, "transformer", ema=ema) for path in (base, tuned)]
    for reader in readers:
        reader.expect("transformer")
        if reader.info.lora_rank:
            raise ValueError(
                f"{reader.path} is {reader.info.variant}: its LoRA is there already, export it with "
                f"scripts.convert_weights instead"
            )
    first, second = map(_geometry, readers)
    if first != second:
        raise ValueError(f"{base} is {first}, but {tuned} is {second}: both must be one model")
    return readers[0], readers[1]


def extract_lora(
    base: WeightsReader,
    tuned: WeightsReader,
    rank: int,
    modules: Iterable[str] | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = lambda blocks: blocks,
) -> Extraction:
    """The best LoRA of ``rank`` for ``tuned - base``. One layer of each is in memory at a time.

    modules: endings of diffusers' paths ("attn1.to_q"); None: every linear layer. Modules that do not differ are left
    out. progress: wraps the list of layers. Raises ValueError: a rank larger than a layer, nothing differs, NaN or inf.
    """
    result = Extraction()
    theirs = _names_by_block(tuned)
    blocks = _names_by_block(base)
    if missing := blocks.keys() ^ theirs.keys():
        raise ValueError(
            f"only one of {base.path} and {tuned.path} has the layers {', '.join(sorted(missing))}"
        )
    for block in progress(blocks):
        before, after = _canonical(base, blocks[block]), _canonical(tuned, theirs[block])
        for name in sorted(before.keys() | after.keys()):
            if name not in before or name not in after:
                result.left_out.append(name)
            elif not torch.equal(before[name].float(), after[name].float()):
                _one(result, name, before[name], after[name], rank, modules)
    if not result.lora:
        found = (
            f"they differ in {len(result.left_out)} tensors, none of them a chosen layer (first "
            f"{result.left_out[0]}): choose others with --layers"
            if result.left_out
            else "there is no difference to extract"
        )
        raise ValueError(f"{base.path} and {tuned.path} hold the same weights in every chosen layer; {found}")
    return result


def _one(
    result: Extraction, name: str, before: Tensor, after: Tensor, rank: int, modules: Iterable[str] | None
) -> None:
    module = name.removesuffix(".weight")
    if module == name or before.ndim != 2 or not (modules is None or module.endswith(tuple(modules))):
        result.left_out.append(name)
        return
    square = float((after.double() - before.double()).square().sum())
    if not square < float("inf"):
        raise ValueError(
            f"{name}: NaN or inf in one of the checkpoints; scripts.inspect_weights --check finds them"
        )
    try:
        part, error = extract(before, after, rank)
    except ValueError as problem:
        raise ValueError(f"{module}: {problem}") from problem
    result.lora[module] = LowRank(part.down, part.up)
    kind = re.sub(r"^transformer_blocks\.\d+\.", "", module)
    sums = result.squares.setdefault(kind, [0.0, 0.0])
    sums[0] += error**2 * square
    sums[1] += square


def _names_by_block(reader: WeightsReader) -> dict[str, list[str]]:
    """Names in the file by the number of their transformer layer; "" for those outside."""
    blocks: dict[str, list[str]] = {}
    for name in reader.tensors:
        if name.startswith(reader.info.prefix):
            found = _BLOCK.search(name)
            blocks.setdefault(found[1] if found else "", []).append(name)
    return blocks


def _canonical(reader: WeightsReader, names: list[str]) -> dict[str, Tensor]:
    """These tensors under diffusers' names."""
    tensors = {name.removeprefix(reader.info.prefix): reader.tensor(name) for name in names}
    if reader.info.naming == "diffusers":
        return tensors
    return sat_to_diffusers(tensors, learned_position=reader.info.learned_table)


def _geometry(reader: WeightsReader) -> Geometry | None:
    geometry = transformer_geometry(shapes_of(reader.tensors, reader.info.prefix), reader.info.naming)
    # SAT stores the fixed position table of 2B, diffusers does not.
    return geometry and replace(geometry, table_tokens=None)


def modules_of(layers: Iterable[str]) -> Iterator[str]:
    """Endings of diffusers' paths for names of either kind: ``query_key_value``, ``to_q``, ``attn1.to_q``."""
    known = {module: module for modules in LAYERS.values() for module in modules}
    known |= {module.partition(".")[2]: module for module in known}  # to_q, to_out.0, net.2
    known |= {"norm1.linear": "norm1.linear", "norm2.linear": "norm2.linear"}
    for layer in layers:
        if layer not in LAYERS and layer not in known:
            raise ValueError(f"--layers {layer}: expected all, or some of {', '.join([*LAYERS, *known])}")
        yield from LAYERS.get(layer) or (known[layer],)
