"""Write a LoRA for diffusers, kohya, ComfyUI or this project, so that the strength that was trained is what it gives.

Three ways to hand alpha over, because no place for it is read by every tool:

- ``fold``: alpha / rank is multiplied into ``up``. Strength 1.0 is the trained strength everywhere.
- ``metadata``: ``up`` as trained, alpha where the format keeps it: ``lora_adapter_metadata`` for diffusers (0.34 and
  later read it), a tensor ``.alpha`` for kohya and ComfyUI.
- ``external``: ``up`` as trained, alpha only in this project's record. The user sets the strength (``strength``).

Under SAT names alpha stands in this project's record in every case.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox.convert.staging import refuse_existing, staged
from cogvideox.convert.writer import Entry, write_safetensors
from cogvideox.weights import provenance
from cogvideox.weights.lora.alpha import DIFFUSERS_KEY, alpha_of, scales_of
from cogvideox.weights.lora.file import LoraFile
from cogvideox.weights.lora.formats import FORMATS, tensor_names
from cogvideox.weights.lora.low_rank import Lora, LowRank

logger = logging.getLogger("cogvideox")

ALPHA_MODES = ("fold", "metadata", "external")
_FILE_NAMES = {
    "diffusers": "pytorch_lora_weights.safetensors"
}  # the name that diffusers looks for in a folder


def write_lora(
    lora: LoraFile | Lora,
    output: str | Path,
    to: str,
    *,
    alpha_mode: str = "fold",
    alpha: float | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Path:
    """Write one safetensors file and return its path.

    output: a file, or a folder where the name has no ending ``.safetensors``. to: SAT, diffusers, kohya or ComfyUI.
    alpha: takes the place of the LoRA's own, for all modules. dtype: None keeps the source's. metadata: added to what
    the file says of itself. force: replace an existing file. Raises ValueError for an existing output, a module that
    the format cannot name, scales that one strength cannot stand for (``external``), fp16 too narrow for the fold;
    OSError where there is no room. Nothing is left behind then.
    """
    for key, value, known in (("to", to, FORMATS), ("alpha_mode", alpha_mode, ALPHA_MODES)):
        if value not in known:
            raise ValueError(f"{key}={value!r}: expected one of {', '.join(known)}")
    source = lora if isinstance(lora, LoraFile) else LoraFile(Path(), lora, "", None, "")
    output = _file(Path(output), to)
    refuse_existing(output, list(source.files), force)
    modules = source.modules if alpha is None else _with_alpha(source.modules, alpha)
    if not modules:
        raise ValueError("the LoRA has no modules: there is nothing to write")
    if any(part.gain is not None for part in modules.values()):
        raise ValueError(
            f"a DoRA cannot be written as {to}'s LoRA: the programs that read those add an update, and would drop its "
            f"magnitudes; merge it into its base model (python -m scripts.convert_weights BASE OUT --lora DORA)"
        )
    needed_strength = strength(modules, to, alpha_mode)
    names = {module: tensor_names(module, to) for module in modules}
    fold, with_alpha = alpha_mode == "fold", alpha_mode != "external" and to in ("kohya", "ComfyUI")

    written = {m: dataclasses.replace(part, scale=1.0) if fold else part for m, part in modules.items()}
    entries = []
    for module, part in modules.items():
        down, up, own_alpha = names[module]
        entries.append(Entry(down, tuple(part.down.shape), dtype or part.down.dtype))
        entries.append(Entry(up, tuple(part.up.shape), dtype or part.up.dtype))
        if with_alpha:
            entries.append(Entry(own_alpha, (), torch.float32))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for module, part in modules.items():
            down, up, own_alpha = names[module]
            yield down, part.down.to(dtype or part.down.dtype)
            yield (
                up,
                _folded(module, part, dtype or part.up.dtype) if fold else part.up.to(dtype or part.up.dtype),
            )
            if with_alpha:
                yield own_alpha, torch.tensor(alpha_of(written[module].scale, part.rank))

    head = _stamp(source, written, alpha_mode)
    head |= _metadata(written, to, alpha_mode) | dict(metadata or {})
    with staged(output, sum(entry.nbytes for entry in entries)) as temporary:
        write_safetensors(temporary, entries, tensors(), head)
    logger.info(
        "%s: LoRA for %s, %d tensors, alpha %s; strength %g is the trained strength",
        *(output, to, len(entries), alpha_mode, needed_strength),
    )
    return output


def largest_difference(first: Lora, second: Lora) -> tuple[float, float]:
    """max |update of first - update of second| over all modules, and max |update of first|.

    ValueError where they do not update the same modules.
    """
    if first.keys() != second.keys():
        raise ValueError(f"the LoRAs differ in their modules: {sorted(first.keys() ^ second.keys())[:3]} ...")
    difference = largest = 0.0
    for module, part in first.items():
        update = part.update()
        difference = max(difference, float((update - second[module].update()).abs().max()))
        largest = max(largest, float(update.abs().max()))
    return difference, largest


def strength(modules: Lora, to: str, alpha_mode: str) -> float:
    """What the user of the file has to set for the trained strength: 1.0, but for ``external`` alpha / rank.

    ValueError for ``external`` where alpha / rank differs by module.
    """
    if alpha_mode != "external" or to == "SAT":
        return 1.0
    scales = sorted({part.scale for part in modules.values()})
    if len(scales) > 1:
        raise ValueError(
            f"alpha / rank differs by module ({', '.join(f'{s:g}' for s in scales[:3])}), so no one strength stands "
            f"for it: use --alpha fold or metadata"
        )
    return scales[0]


def _file(output: Path, to: str) -> Path:
    if output.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(
            f"{output}: LoRA files are written as safetensors: name it {output.stem}.safetensors"
        )
    if output.suffix == ".safetensors":
        return output
    return output / _FILE_NAMES.get(to, "lora.safetensors")


def _with_alpha(modules: Lora, alpha: float) -> Lora:
    ranks = {module: part.rank for module, part in modules.items()}
    scales = scales_of(dict.fromkeys(modules, alpha), ranks)
    return {module: dataclasses.replace(part, scale=scales[module]) for module, part in modules.items()}


def _folded(module: str, part: LowRank, dtype: torch.dtype) -> Tensor:
    wide = part.scale * part.up.to(torch.promote_types(part.up.dtype, torch.float32))
    folded = wide.to(dtype)
    # fp16 has no numbers between 0 and 6e-8 and few up to 6e-5, where a trained B over a rank of 256 can lie.
    lost = torch.linalg.norm(wide - folded.to(wide.dtype)) if dtype == torch.float16 else 0
    if lost > 2**-9 * torch.linalg.norm(wide):
        raise ValueError(
            f"{module}: its B times alpha / rank = {part.scale:g} is too small for fp16 (largest value "
            f"{wide.abs().max():.1e}): write bf16 or fp32, or use --alpha metadata"
        )
    return folded


def _stamp(source: LoraFile, written: Lora, alpha_mode: str) -> dict[str, str]:
    """Where it comes from, and the scale of the matrices as they stand in the file: one number, or one by module."""
    scales = {module: part.scale for module, part in written.items()}
    common = set(scales.values())
    record = {"alpha_mode": alpha_mode, "scale": common.pop() if len(common) == 1 else scales}
    return provenance.stamp(source.files, **provenance.inherited(source.provenance), lora=record)


def _metadata(written: Lora, to: str, alpha_mode: str) -> dict[str, str]:
    """What the consumers look for beside the tensors."""
    alphas = {module: alpha_of(part.scale, part.rank) for module, part in written.items()}
    ranks = {module: part.rank for module, part in written.items()}
    if to == "kohya":
        said = {"dim": ranks, "alpha": alphas} if alpha_mode != "external" else {"dim": ranks}
        common = {key: set(values.values()) for key, values in said.items()}
        return {"ss_network_module": "networks.lora"} | {
            # "Dynamic" is what sd-scripts writes for ranks that differ.
            f"ss_network_{key}": f"{values.pop():g}" if len(values) == 1 else "Dynamic"
            for key, values in common.items()
        }
    # Before 0.42, diffusers gave every module the alpha of the first one where ranks differ and no metadata speaks.
    several = alpha_mode == "fold" and len(set(ranks.values())) > 1
    if to == "diffusers" and (alpha_mode == "metadata" or several):
        config = {f"transformer.{key}": value for key, value in _peft_config(alphas, ranks).items()}
        return {DIFFUSERS_KEY: json.dumps(config, indent=2, sort_keys=True)}
    return {}


def _peft_config(alphas: Mapping[str, float], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of ``peft.LoraConfig`` that matter; others are left out because older versions refuse new ones."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: _plain(value) for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
