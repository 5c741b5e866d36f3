"""A whole pipeline folder from any other: diffusers' layout, or that of SAT's published weights.

diffusers: ``model_index.json``, ``transformer/``, ``vae/``, ``scheduler/``, ``text_encoder/``, ``tokenizer/``. SAT:
``transformer/``, ``vae/3d-vae.pt``, ``t5-v1_1-xxl/``. T5 has the same files on both sides: they are copied or linked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogvideox.convert import diffusers_config as configs
from cogvideox.convert.models import Converted, write_json, write_model
from cogvideox.convert.plan import Plan
from cogvideox.convert.staging import refuse_existing, staged
from cogvideox.weights.files.locate import is_pipeline

COPY_LIMIT = 2**30
"""Bytes of a text encoder up to which it is copied rather than linked."""
_T5_FOLDER = "t5-v1_1-xxl"
_TOKENIZER_FILES = (
    "spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_ENCODER_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@dataclass
class Parts:
    """Where the parts of a pipeline lie. None: there is no such part."""

    transformer: Path
    vae: Path | None = None
    text_encoder: list[Path] | None = None
    tokenizer: list[Path] | None = None
    # Files, not folders: SAT keeps encoder and tokenizer together.
    scheduler: Path | None = None


def find_parts(path: Path, vae: Path | None = None, text_encoder: Path | None = None) -> Parts:
    """The parts in ``path`` (a pipeline, or a transformer alone); vae, text_encoder: those given go before.

    Raises ValueError where a given text encoder is no folder of transformers' with weights and configuration.
    """
    whole = is_pipeline(path)
    parts = Parts(path, vae)
    if whole:
        parts.vae = vae or (path / "vae" if (path / "vae").is_dir() else None)
        scheduler = path / "scheduler" / "scheduler_config.json"
        parts.scheduler = scheduler if scheduler.is_file() else None
    place = text_encoder or (_t5_in(path) if whole else None)
    if place is not None:
        encoder = place / "text_encoder" if (place / "text_encoder").is_dir() else place
        siblings = (encoder, encoder.parent / "tokenizer", encoder / "tokenizer")
        parts.text_encoder = _matching(encoder, _ENCODER_FILES)
        parts.tokenizer = next((files for s in siblings if (files := _matching(s, _TOKENIZER_FILES))), None)
        if not any(file.name == "config.json" for file in parts.text_encoder) or len(parts.text_encoder) < 2:
            raise ValueError(
                f"{encoder}: no text encoder in transformers' format (config.json with *.safetensors or *.bin); give "
                f"its folder with --text-encoder, or download google/t5-v1_1-xxl"
            )
    return parts


def write_pipeline(
    parts: Parts,
    transformer: Plan,
    vae: Plan | None,
    output: Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    link: bool | None = None,
    force: bool = False,
) -> tuple[list[Converted], list[str]]:
    """Write the planned models (``plan_model``) and what belongs to them to the folder ``output``.

    link: symbolic links to the text encoder's files instead of copies; None: copies up to COPY_LIMIT. Returns the
    models' reports and further lines for the user. Raises as ``write_model``; ``output`` is there as a whole or not.
    """
    files = [*(parts.text_encoder or []), *(parts.tokenizer or [])]
    link = sum(file.stat().st_size for file in files) > COPY_LIMIT if link is None else link
    plans = [transformer] if vae is None else [transformer, vae]
    refuse_existing(output, [*files, *(path for plan in plans for path in plan.inputs)], force)
    copied = 0 if link else sum(file.stat().st_size for file in files)
    with staged(output, copied + sum(plan.nbytes for plan in plans)) as folder:
        folder.mkdir()
        results = [
            write_model(plan, folder / plan.model.family, max_shard_bytes=max_shard_bytes) for plan in plans
        ]
        lines = _missing(parts)
        if transformer.to == "diffusers":
            lines += _write_diffusers_files(folder, parts, transformer, link)
        else:
            _place(files, folder / _T5_FOLDER, link)
        if files:
            lines.append(
                f"text_encoder, tokenizer: {'linked to' if link else 'copied from'} {files[0].parent}"
            )
    for result in results:
        result.files = [output / file.relative_to(folder) for file in result.files]
        result.output = output / result.output.relative_to(folder)
    return results, lines


def _write_diffusers_files(folder: Path, parts: Parts, transformer: Plan, link: bool) -> list[str]:
    variant, shift = transformer.variant, transformer.snr_shift
    _place(parts.text_encoder or [], folder / "text_encoder", link)
    _place(parts.tokenizer or [], folder / "tokenizer", link)
    (folder / "scheduler").mkdir()
    target = folder / "scheduler" / "scheduler_config.json"
    if parts.scheduler is not None:
        scheduler = json.loads(parts.scheduler.read_text())
        lines = []
    else:
        scheduler = configs.scheduler_config(variant.scheduler, shift)
        lines = [f"scheduler: {variant.scheduler}, snr_shift_scale {shift:g}, as for {variant.name}"]
    write_json(target, scheduler)
    absent = [None, None]
    index = {
        "_class_name": variant.pipeline,
        "_diffusers_version": configs.DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"] if parts.text_encoder else absent,
        "tokenizer": ["transformers", "T5Tokenizer"] if parts.tokenizer else absent,
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"] if parts.vae is not None else absent,
    }
    write_json(folder / "model_index.json", index)
    return lines


def _missing(parts: Parts) -> list[str]:
    advice = {"vae": "--vae PATH", "text_encoder": "--text-encoder PATH", "tokenizer": "--text-encoder PATH"}
    return [
        f"{name}: none found, left out; {option}"
        for name, option in advice.items()
        if not getattr(parts, name)
    ]


def _place(files: Sequence[Path], folder: Path, link: bool) -> None:
    if files:
        folder.mkdir()
    for file in files:
        if link:
            (folder / file.name).symlink_to(file.resolve())
        else:
            shutil.copyfile(file, folder / file.name)


def _t5_in(path: Path) -> Path | None:
    """``text_encoder/`` of diffusers, or the ``t5-v1_1-xxl/`` beside SAT's transformer."""
    if (path / "text_encoder").is_dir():
        return path
    return next((place for place in sorted(path.glob("t5*")) if place.is_dir()), None)


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
