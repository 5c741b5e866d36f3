"""What is known about a weight file: ``WeightsInfo``, as a table for people and as a dictionary for programs."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DIGITS = 16  # of a hash, for people; --json has all
_LOAD_KEYS = {
    "transformer": "load.transformer", "vae": "load.vae", "t5": "load.text_encoder", "lora": "load.lora",
}  # fmt: skip


@dataclass
class WeightsInfo:
    """What ``identify`` found. ``str(info)`` is a table, ``info.as_dict()`` goes into json. None: does not apply."""

    path: Path
    family: str
    # transformer, vae, t5, lora or unknown: the main thing in the file.
    variant: str
    # "CogVideoX-5B", "CogVideoX-2B, fine-tuned", "unknown CogVideoX-type", "CogVideoX VAE", "LoRA for CogVideoX-2B" ...
    layout: str
    # In what files: "SAT folder", "diffusers folder, 2 safetensors shards", "one torch file" ...
    naming: str
    # Whose names the keys carry: SAT, diffusers, transformers, kohya, ComfyUI.
    prefix: str
    dtype: str
    # Of most parameters.
    num_tensors: int
    num_parameters: int
    # Of this family alone, without LoRA and optional keys.
    size_bytes: int
    format: str = "unknown"
    # SAT, DeepSpeed run, diffusers, transformers, safetensors, torch; or {PEFT, diffusers, kohya, ComfyUI, SAT} LoRA.
    base: str | None = None
    # The published model (variants.py) that this is, or is made from or for. None: unpublished, or several fit.
    num_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    patch_size: tuple[int, int, int] | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    time_embed_dim: int | None = None
    text_hidden_size: int | None = None
    ofs_embed_dim: int | None = None
    learned_table: bool | None = None
    table_tokens: int | None = None
    channels: int | None = None
    channel_multipliers: tuple[int, ...] | None = None
    num_res_blocks: int | None = None
    z_channels: int | None = None
    latent_scale: float | None = None
    snr_shift: float | None = None
    published_dtype: str | None = None
    # The precision the published model was trained in.
    config: str | None = None
    # The configuration file that fits; of a run of ours its own.
    lora_rank: int | None = None
    # The largest, where they differ (lora_ranks).
    lora_ranks: list[int] = field(default_factory=list)
    lora_alpha: float | None = None
    # The update is scaled by alpha / rank. None: not in the file, or it differs by module (lora_alpha_source).
    lora_alpha_source: str | None = None
    lora_targets: list[str] = field(default_factory=list)
    lora_layers: int | None = None
    lora_tensors: int | None = None
    # Matrices, A and B: 240 for 2B, 336 for 5B with the usual four targets.
    optional_keys: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    # Further models in the same file or folder, by name.
    components: dict[str, WeightsInfo] = field(default_factory=dict)
    # Of a pipeline folder: what ``others`` names, in full.
    has_ema: bool = False
    has_optimizer: bool = False
    zero_stage: int | None = None
    step: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    # Where it comes from (provenance.py): version, source, source_sha256, config, step, seed, dataset.
    notes: list[str] = field(default_factory=list)
    # Contradictions, and what had to be taken from a file beside the weights.
    refused_globals: list[str] = field(default_factory=list)
    # Names in the pickle for which loading refuses the file.

    @property
    def use(self) -> str | None:
        """How to give it to the doors: ``--base configs/cogvideox_2b.yaml load.transformer=PATH``."""
        inside = [self.family, *self.others, *(part.family for part in self.components.values())]
        keys = dict.fromkeys(_LOAD_KEYS.get(family) for family in inside)
        # The tokenizer lies beside the text encoder's weights.
        place = self.path.parent if self.family == "t5" and self.path.is_file() else self.path
        loads = [shlex.quote(f"{key}={place}") for key in keys if key]
        return " ".join([*([f"--base {self.config}"] if self.config else []), *loads]) if loads else None

    def as_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {name: part.as_dict() for name, part in self.components.items()}
        return {**fields, "path": str(self.path), "components": parts, "use": self.use}

    def __str__(self) -> str:
        return "\n".join(f"{label:<16}{text}" for label, text in _rows(self) if text)


def _rows(info: WeightsInfo) -> Iterator[tuple[str, str]]:
    """Label and text of each line; lines without text are left out."""
    yield "this is", info.variant
    yield "path", str(info.path)
    yield "format", info.layout if info.format in info.layout else f"{info.format}, {info.layout}"
    yield "names", f"{info.naming}{f', behind {info.prefix}' if info.prefix else ''}"
    yield "size", ", ".join(_size(info))
    yield "network", ", ".join(_network(info))
    yield "constants", ", ".join(_constants(info))
    yield "LoRA", ", ".join(_lora(info))
    yield "  targets", ", ".join(info.lora_targets)
    yield "training", ", ".join(_training(info))
    yield "optional", _first(info.optional_keys, "keys that may be absent: ")
    for name, what in info.others.items():
        part = info.components.get(name)
        yield name, f"{what}; {_summary(part)}" if part else what
    yield "config", info.config or ""
    yield "use", info.use or ""
    yield from _origin(info.provenance)
    for note in info.notes:
        yield "note", note
    yield "REFUSED", _first(info.refused_globals, "its pickle asks for ")


def _size(info: WeightsInfo) -> Iterator[str]:
    yield _bytes(info.size_bytes)
    yield info.dtype
    yield f"{info.num_parameters:,} parameters"
    yield f"{info.num_tensors} tensors"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:.2f} MiB"


def _network(info: WeightsInfo) -> Iterator[str]:
    if info.num_layers is not None:
        yield f"{info.num_layers} layers x {info.hidden_size}"
    if info.num_attention_heads:
        yield f"{info.num_attention_heads} heads"
    if info.patch_size:
        yield f"patch {'x'.join(map(str, info.patch_size))} (t, h, w)"
        yield f"{info.in_channels} channels in, {info.out_channels} out"
        yield f"text {info.text_hidden_size}"
        yield f"ofs {info.ofs_embed_dim}" if info.ofs_embed_dim else "no ofs"
    if info.table_tokens:
        yield f"{'learned' if info.learned_table else 'fixed'} position table of {info.table_tokens} tokens"
    if info.channels:
        levels = " ".join(str(info.channels * m) for m in info.channel_multipliers or ())
        yield f"channels {levels}, {info.num_res_blocks} blocks per level, {info.z_channels} latent channels"


def _constants(info: WeightsInfo) -> Iterator[str]:
    if info.latent_scale is not None:
        yield (
            f"latent scale {info.latent_scale:g}"
            if info.latent_scale < 1
            else f"latent scale {info.latent_scale}"
        )
    if info.snr_shift is not None:
        yield f"SNR shift {info.snr_shift:g}"
    if info.published_dtype:
        yield f"trained in {info.published_dtype}"


def _lora(info: WeightsInfo) -> Iterator[str]:
    if info.lora_rank is None:
        return
    yield f"rank {' or '.join(map(str, info.lora_ranks))}"
    unknown = info.lora_alpha is None and not (info.lora_alpha_source or "").startswith("differing")
    yield f"alpha {'unknown: ' if unknown else ''}{info.lora_alpha_source or ''}"
    if info.lora_alpha is not None and info.lora_rank and len(info.lora_ranks) == 1:
        yield f"scale {info.lora_alpha / info.lora_rank:g}"
    yield f"{info.lora_tensors} matrices in {info.lora_layers} layers"


def _training(info: WeightsInfo) -> Iterator[str]:
    if info.step is not None:
        yield f"step {info.step}"
    if info.zero_stage is not None:
        yield f"ZeRO stage {info.zero_stage}"
    if info.has_optimizer:
        yield "optimizer state"
    if info.has_ema:
        yield "averaged weights (EMA)"


def _origin(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of a record of provenance; the configuration and the preview in it are for --json."""
    if not record:
        return
    yield "made by", f"version {record.get('version', 'unknown')} of this project"
    if "source" in record:
        yield "made from", _hashed(record["source"], record.get("source_sha256"))
    facts = [f"{key} {record[key]}" for key in ("step", "seed") if key in record]
    facts += [f"dataset {str(record['dataset'])[:_DIGITS]}"] if record.get("dataset") else []
    yield "run", ", ".join(facts)
    for name, source in (record.get("sources") or {}).items():
        what = source.get("variant") or source.get("error")
        yield f"  {name}", f"{what}, {_hashed(source.get('path'), source.get('sha256'))}"
    for lora in record.get("merged") or ():
        yield "merged", f"{lora['path']} with strength {lora['strength']:g}"
    yield "command", record.get("command") or ""


def _hashed(path: Any, digest: Any) -> str:
    return f"{path} (sha256 {str(digest)[:_DIGITS]})" if digest else str(path)


def _summary(part: WeightsInfo) -> str:
    scale = f", latent scale {part.latent_scale}" if part.latent_scale is not None else ""
    return f"{part.layout}, {part.dtype}, {_bytes(part.size_bytes)}{scale}"


def _first(names: list[str], before: str, count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{before}{', '.join(names[:count])}{more}" if names else ""
