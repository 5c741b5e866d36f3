"""The scale of a LoRA's updates: who says what alpha is, in which file, and what it is where nobody says it.

The update of a module is ``scale * up @ down``, and scale is alpha / rank. No two tools keep alpha in the same place:

- this project in the run's ``config.yaml`` (``lora.alpha``; null is 1), or in its own record in a file's metadata
- SAT in its YAML alone (``lora_config.params.lora_alpha``), 1 by default: the scale is 1 / rank
- diffusers in the metadata ``lora_adapter_metadata``, PEFT in ``adapter_config.json``; without it alpha is the rank
- kohya and ComfyUI in a tensor ``.alpha`` for each module; without it alpha is the rank

No torch: ``identify`` asks here too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cogvideox.patterns import value_of
from cogvideox.weights import provenance
from cogvideox.weights.files.headers import Headers, scalars
from cogvideox.weights.files.locate import Source
from cogvideox.weights.lora.formats import LoraNames, sat_layer

Ranks = Mapping[str, int]
Found = tuple[dict[str, float], str]
"""The scale of each module, and one phrase for the user on where it comes from."""

DIFFUSERS_KEY = "lora_adapter_metadata"
_NOT_LORA = {"use_dora": "DoRA", "use_qalora": "QALoRA", "lora_bias": "LoRA with biases"}


def find(names: LoraNames, ranks: Ranks, headers: Headers, source: Source) -> Found:
    """The scales of a LoRA file by the rules of its format. ranks: of each module, all at least 1.

    Raises ValueError where alpha is missing (SAT names without weights or a YAML beside them), where two places differ,
    where only some modules have one, where it is 0 or no number, and for another method than LoRA.
    """
    record = provenance.read(headers.metadata, source.folder)
    # In other cases the format itself tells it, and may have been changed since by another program.
    if names.format == "SAT" or record.get("lora", {}).get("alpha_mode") == "external":
        found = from_record(record, ranks)
        if found is not None:
            return found
    if names.format == "SAT":
        return _find_for_sat(ranks, headers, source)
    found = None
    if names.alpha:
        values = scalars(headers, names.alpha.values())
        found = from_tensors({module: values[name] for module, name in names.alpha.items()}, ranks)
    if config := peft_config(headers.metadata, source.files[0]):
        stated = from_peft(*config, ranks)
        wrong = next(
            (m for m in ranks if found and not math.isclose(found[0][m], stated[0][m], rel_tol=1e-6)), None
        )
        if wrong is not None:
            raise ValueError(
                f"alpha of {wrong} is {found[0][wrong] * ranks[wrong]:g} in its .alpha tensor, "
                f"{stated[0][wrong] * ranks[wrong]:g} in {config[1]}: give alpha"
            )
        found = stated
    return found or rank_rule(names.format, ranks)


def _find_for_sat(ranks: Ranks, headers: Headers, source: Source) -> Found:
    found = from_yaml(source.folder, source.files[0].name.endswith("_model_states.pt"), ranks)
    if found is not None:
        return found
    if any(
        ".original." in name for name in headers.tensors
    ):  # the whole model beside the matrices, as SAT saves it
        return sat_default(ranks)
    raise ValueError(
        "alpha is missing: under SAT names the scale alpha / rank stands in a YAML file, and none lies with these "
        "matrices; put the run's config.yaml beside them, or give alpha (SAT's default is 1, PEFT's is the rank)"
    )


def scales_of(alphas: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """alpha / rank of each module. ValueError for an alpha of 0, NaN or infinity: nothing trains with it."""
    for module, alpha in alphas.items():
        if alpha == 0 or not math.isfinite(alpha):
            raise ValueError(f"alpha of {module} is {alpha:g}: expected a number other than 0")
    return {module: alpha / ranks[module] for module, alpha in alphas.items()}


def alpha_of(scale: float, rank: int) -> float:
    """scale * rank; the whole number where only the rounding of the division stands between."""
    alpha = scale * rank
    return float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def common_alpha(scales: Mapping[str, float], ranks: Ranks) -> float | None:
    """The alpha of all modules, None where it differs."""
    alphas = {alpha_of(scale, ranks[module]) for module, scale in scales.items()}
    return alphas.pop() if len(alphas) == 1 else None


def given(alpha: float, ranks: Ranks) -> Found:
    return scales_of(dict.fromkeys(ranks, alpha), ranks), f"{alpha:g}, as given"


def from_record(record: Mapping[str, Any], ranks: Ranks) -> Found | None:
    """The scale that this project noted for matrices whose format does not tell it (``convert.lora``)."""
    noted = record.get("lora", {}).get("scale")
    if noted is None:
        return None
    scales = dict.fromkeys(ranks, noted) if isinstance(noted, float | int) else dict(noted)
    if missing := [module for module in ranks if module not in scales]:
        raise ValueError(f"the record of alpha in the file's metadata lacks {missing[0]}; give alpha")
    return scales, f"{_shown(scales, ranks)} from the file's metadata (cogvideox)"


def from_tensors(alphas: Mapping[str, float], ranks: Ranks) -> Found:
    """ValueError where some modules have a tensor ``.alpha`` and some have none."""
    if without := [module for module in ranks if module not in alphas]:
        raise ValueError(
            f"{len(without)} of {len(ranks)} modules have no .alpha, the others have one: {', '.join(without[:3])}; "
            f"give one alpha for all"
        )
    scales = scales_of(alphas, ranks)
    return scales, f"{_shown(scales, ranks)} from the file's .alpha tensors"


def rank_rule(format: str, ranks: Ranks) -> Found:
    return dict.fromkeys(ranks, 1.0), f"= rank, the rule of {format} (the file has no alpha)"


def peft_config(metadata: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], str] | None:
    """PEFT's configuration of an adapter and where it stands: in the file's metadata, or beside ``adapter_model.*``.

    diffusers does not look at an ``adapter_config.json``, so beside a file of another name it has no meaning.
    """
    if text := metadata.get(DIFFUSERS_KEY):
        config = {key.removeprefix("transformer."): value for key, value in _json(text, file).items()}
        return config, f"the file's metadata ({DIFFUSERS_KEY})"
    beside = file.parent / "adapter_config.json"
    if file.stem == "adapter_model" and beside.is_file():
        return _json(beside.read_text(), beside), str(beside)
    return None


def from_peft(config: Mapping[str, Any], where: str, ranks: Ranks) -> Found:
    """The scales by PEFT's rules. ValueError for another method than LoRA, or ranks that are not the tensors'."""
    method = config.get("peft_type") or "LORA"
    method = next((name for key, name in _NOT_LORA.items() if config.get(key)), method)
    if method != "LORA":
        raise ValueError(f"{where}: an adapter of type {method}, which cannot be read; only LoRA can")
    scales = {}
    for module, rank in ranks.items():
        stated = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8))
        if stated != rank:
            raise ValueError(f"{where} says rank {stated} for {module}, its matrices have {rank}")
        alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8)))
        scales |= scales_of({module: alpha}, {module: rank})
        if config.get("use_rslora"):  # Kalajdzievski 2023: alpha over the root of the rank
            scales[module] *= math.sqrt(rank)
    kind = " (rsLoRA: alpha over the root of the rank)" if config.get("use_rslora") else ""
    return scales, f"{_shown(scales, ranks)} from {where}{kind}"


def from_yaml(folder: Path, is_checkpoint: bool, ranks: Ranks) -> Found | None:
    """From the YAML of a run of ours or of SAT that lies with the weights; None where there is none.

    is_checkpoint: ``folder`` is one step of a run, so that the run's own files stand above it.
    """
    above = [folder, folder.parent, folder.parent.parent] if is_checkpoint else [folder]
    for path in (directory / "config.yaml" for directory in above):
        section = next((d["lora"] for d in _documents(path) if isinstance(d, dict) and d.get("lora")), None)
        if section is not None:
            return _of_section(section, path, ranks)
    found: dict[float, Path] = {}
    for path in (path for directory in above[:2] for path in sorted(directory.glob("*.yaml"))):
        for params in _sat_sections(_documents(path)):
            _check_ranks(path, dict.fromkeys(ranks, params.get("r")), ranks)
            found.setdefault(float(params.get("lora_alpha", 1)), path)
    if len(found) > 1:
        raise ValueError(f"alpha is {' or '.join(f'{a:g} ({p})' for a, p in found.items())}: give alpha")
    return next((_of_yaml(alpha, path, ranks) for alpha, path in found.items()), None)


def sat_default(ranks: Ranks) -> Found:
    scales = scales_of(dict.fromkeys(ranks, 1.0), ranks)
    return scales, "1, SAT's default (no YAML with lora_config lies with the weights)"


def _of_yaml(alpha: float, path: Path, ranks: Ranks) -> Found:
    return scales_of(dict.fromkeys(ranks, alpha), ranks), f"{alpha:g} from {path}"


def _of_section(section: Mapping[str, Any], path: Path, ranks: Ranks) -> Found:
    """By the section ``lora`` of a run of ours, whose patterns are for SAT's layers."""
    layers = {module: sat_layer(module)[0] for module in ranks}
    alpha = 1.0 if section.get("alpha") is None else float(section["alpha"])
    alphas, stated = section.get("alpha_pattern") or {}, section.get("rank_pattern") or {}
    _check_ranks(path, {m: value_of(stated, layers[m], section.get("rank")) for m in ranks}, ranks)
    scales = scales_of({m: float(value_of(alphas, layers[m], alpha)) for m in ranks}, ranks)
    kind = ""
    if section.get("rslora"):
        scales, kind = {m: s * math.sqrt(ranks[m]) for m, s in scales.items()}, " (rsLoRA)"
    # The alpha that is shown is the file's own, not scale * rank.
    shown = "differing by module" if alphas else f"{alpha:g}"
    return scales, f"{shown} from {path}{kind}"


def _check_ranks(path: Path, stated: Mapping[str, int | None], ranks: Ranks) -> None:
    if wrong := [module for module in ranks if stated[module] not in (None, ranks[module])]:
        have = ", ".join(map(str, sorted({ranks[module] for module in wrong})))
        raise ValueError(
            f"{path} says LoRA rank {stated[wrong[0]]}, the matrices have {have}: is it of another run? Give alpha"
        )


def _sat_sections(node: Any) -> Iterator[dict[str, Any]]:
    """The ``params`` of every ``lora_config``, wherever it stands."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and isinstance(node.get("lora_config"), dict):
        yield node["lora_config"].get("params") or {}
    for child in children:
        yield from _sat_sections(child)


def _documents(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    import yaml

    try:
        return list(yaml.safe_load_all(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}, where alpha might stand, is no YAML ({str(error).splitlines()[0]}); give alpha"
        ) from error


def _json(text: str, where: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: the adapter's configuration is damaged ({error}); give alpha") from error
    if not isinstance(config, dict):
        raise ValueError(f"{where}: the adapter's configuration is no JSON object; give alpha")
    return config


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (peft.utils.other.get_pattern_key): a regular expression for the end of the module's path."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _shown(scales: Mapping[str, float], ranks: Ranks) -> str:
    alpha = common_alpha(scales, ranks)
    return "differing by module" if alpha is None else f"{alpha:g}"
