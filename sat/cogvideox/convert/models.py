"""One model from any format to any other: a transformer or a VAE, under SAT's or diffusers' names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cogvideox.convert.plan import Plan, plan_transformer, plan_vae
from cogvideox.convert.source import Model
from cogvideox.convert.staging import refuse_existing, staged
from cogvideox.convert.writer import write_safetensors, write_sharded, write_torch
from cogvideox.weights import provenance
from cogvideox.weights.lora.file import LoraFile, read_lora
from cogvideox.weights.lora.low_rank import Lora, combine

FORMATS = ("sat", "diffusers", "safetensors")
TAG = "1"
STATES = f"{TAG}/mp_rank_00_model_states.pt"


@dataclass
class Converted:
    """What was written. ``files`` lie under ``output``."""

    component: str
    output: Path
    files: list[Path]
    size_bytes: int
    num_parameters: int
    summary: str
    notes: list[str] = field(default_factory=list)
    # What was left out, computed, substituted.

    @property
    def lines(self) -> list[str]:
        """The report: one line, then one for each note."""
        size = (
            f"{self.size_bytes / 1e9:.2f} GB" if self.size_bytes >= 1e8 else f"{self.size_bytes / 1e6:.2f} MB"
        )
        files = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        head = f"{self.component}: {self.summary}, {files}, {size}: {self.output}"
        return [head, *(f"  {note}" for note in self.notes)]


def convert_model(
    source: Path,
    output: Path,
    to: str,
    *,
    component: str,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
    **arguments: Any,
) -> Converted:
    """Write the transformer or VAE of ``source`` to ``output``; see ``plan_model`` and ``write_model``."""
    plan = plan_model(source, to, component=component, **arguments)
    return write_model(plan, output, max_shard_bytes=max_shard_bytes, force=force)


def plan_model(
    source: Path,
    to: str,
    *,
    component: str,
    dtype: torch.dtype | None = None,
    ema: bool = True,
    loras: Sequence[tuple[LoraFile, float]] = (),
    merge: bool = False,
    alpha: float | None = None,
    known: Mapping[str, Any] | None = None,
    transformer: Plan | None = None,
) -> Plan:
    """What converting the transformer or VAE of ``source`` to the format ``to`` (FORMATS) will write.

    source: whatever ``WeightsReader`` opens. component: transformer or vae. dtype: None keeps each tensor's own
    (averaged weights: the checkpoint's). ema: take averaged weights where there are some. loras: added with these
    strengths. merge: add the LoRA inside a SAT checkpoint, with ``alpha`` if given; without it such a checkpoint is
    refused. known: keys of diffusers' config.json that go before what lies beside the source. transformer: of a VAE,
    the plan of its pipeline's. Raises ValueError: nothing to read, another model, tensors missing or unknown, a LoRA
    that does not fit, a configuration that nothing tells.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: expected {', '.join(FORMATS)}")
    model = Model(source, component, ema=ema, dtype=dtype, known=known or {})
    if component == "vae":
        return plan_vae(model, to, dtype, transformer)
    if model.lora_names:
        if not merge:
            raise ValueError(
                f"{source} is {model.reader.info.variant}: its LoRA would be lost. Give --merge to add it to the "
                f"weights, or --component lora to write the LoRA alone"
            )
        loras = [(read_lora(source, alpha=alpha, ema=ema), 1.0), *loras]
    elif merge:
        raise ValueError(f"--merge: there is no LoRA in {source}, it is {model.reader.info.variant}")
    plan = plan_transformer(model, to, dtype, _combined(loras))
    plan.loras = list(loras)
    plan.notes += [f"merged: {_described(lora, strength)}" for lora, strength in loras]
    return plan


def write_model(
    plan: Plan, output: Path, *, max_shard_bytes: int = 5 * 10**9, force: bool = False
) -> Converted:
    """Write what is planned. output: a folder; "safetensors" also takes FILE.safetensors (one file), "sat" FILE.pt.

    force: replace an existing output. Raises ValueError or OSError before anything is written where the output exists
    or the disk has too little space; whatever fails later, the partial output is removed.
    """
    refuse_existing(output, plan.inputs, force)
    with staged(output, plan.nbytes) as temporary:
        files = _write(plan, temporary, output.suffix, _metadata(plan), max_shard_bytes)
        size = sum(file.stat().st_size for file in files)
    return Converted(
        component=plan.model.family,
        output=output,
        files=[output / file.relative_to(temporary) for file in files],
        size_bytes=size,
        num_parameters=plan.num_parameters,
        summary=_summary(plan),
        notes=plan.notes,
    )


def parse_size(text: str) -> int:
    """``5GB``, ``500MB`` (powers of ten, as in diffusers), ``4GiB`` -> bytes."""
    units = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3}
    unit = next((unit for unit in units if text.upper().endswith(unit)), None)
    try:
        size = int(float(text[: -len(unit)]) * units[unit]) if unit else int(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise ValueError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return size


def _combined(loras: Sequence[tuple[LoraFile, float]]) -> Lora:
    return combine([(lora.modules, strength) for lora, strength in loras]) if loras else {}


def _described(lora: LoraFile, strength: float) -> str:
    ranks = "/".join(map(str, lora.ranks))
    return f"{lora.path} (rank {ranks}, alpha {lora.alpha_source}), strength {strength:g}"


def _summary(plan: Plan) -> str:
    info = plan.model.reader.info
    written = "/".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in plan.entries}))
    change = info.dtype if info.dtype == written else f"{info.dtype} to {written}"
    return f"{info.variant} ({info.layout}) to {plan.to}, {change}"


def _metadata(plan: Plan) -> dict[str, str]:
    merged = [{"path": str(lora.path), "strength": strength} for lora, strength in plan.loras]
    return provenance.stamp(
        files=plan.inputs,
        **_training_facts(plan),
        ema=True if plan.model.reader.used_ema else None,
        merged=merged or None,
        network=plan.network or None,
    )


def _training_facts(plan: Plan) -> dict[str, Any]:
    """Of the run whose result the written weights are. A preview rendered with other weights is none of theirs."""
    if not plan.loras:
        return provenance.inherited(plan.model.record)
    lora, strength = plan.loras[0]
    if len(plan.loras) == 1 and strength == 1 and "config" in lora.provenance:
        return provenance.inherited(lora.provenance)
    return {k: v for k, v in provenance.inherited(plan.model.record).items() if k != "preview"}


def _write(plan: Plan, path: Path, suffix: str, metadata: dict[str, str], max_shard_bytes: int) -> list[Path]:
    """In the layout of the format. suffix: of the final output, which says whether it is a file."""
    with tqdm(total=plan.nbytes, desc=plan.model.family, unit="B", unit_scale=True, disable=None) as bar:
        if plan.to == "sat":
            return _write_sat(plan, path, suffix, metadata, bar)
        if suffix == ".safetensors" and plan.to == "safetensors":
            return [write_safetensors(path, plan.entries, plan.tensors(), metadata, progress=bar.update)]
        path.mkdir()
        stem = "diffusion_pytorch_model" if plan.to == "diffusers" else "model"
        shards = (plan.entries, plan.tensors(), metadata, max_shard_bytes)
        files = write_sharded(path, stem, *shards, progress=bar.update)
        if plan.to == "diffusers":
            write_json(path / "config.json", plan.config)
        return files


def _write_sat(plan: Plan, path: Path, suffix: str, metadata: dict[str, str], bar: tqdm) -> list[Path]:
    transformer = plan.model.family == "transformer"
    wrapper, name = ("module", STATES) if transformer else ("state_dict", "3d-vae.pt")
    file = path if suffix == ".pt" else path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if transformer and file != path:
        (path / "latest").write_text(TAG)
    beside = {provenance.KEY: metadata[provenance.KEY]}
    return [write_torch(file, wrapper, plan.entries, plan.tensors(), beside, progress=bar.update)]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
