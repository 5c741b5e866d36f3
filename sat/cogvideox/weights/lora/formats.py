"""Names of LoRA tensors in every format, both ways: SAT, diffusers (PEFT), kohya, ComfyUI. No torch, no data.

A module has one canonical name, diffusers' path in the transformer without a prefix (see low_rank.py). The formats:

- SAT, and runs of this project: ``...query_key_value.matrix_A.i``; q, k, v are the parts 0, 1, 2 of one layer.
- diffusers: ``transformer.PATH.lora_A.weight``. PEFT puts ``base_model.model.`` in front and may put an adapter's name
  behind ``lora_A``; before PEFT it was ``PATH.processor.to_q_lora.down.weight``.
- kohya (sd-scripts, VideoX-Fun): ``lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight`` and ``.alpha``; VideoX-Fun writes
  two underscores behind ``lora_unet``.
- ComfyUI: ``diffusion_model.`` before the name in ComfyUI's own model, which is not diffusers'
  (comfy/ldm/cogvideo/model.py: ``blocks.0.q``). Files with diffusers' path behind that prefix are read as well.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

FORMATS = ("SAT", "diffusers", "kohya", "ComfyUI")
BY_OPTION = {name.lower(): name for name in FORMATS}
"""As the command line spells them."""

_BLOCK = {
    "attn1.to_q": ("q", ("attention.query_key_value", 0)),
    "attn1.to_k": ("k", ("attention.query_key_value", 1)),
    "attn1.to_v": ("v", ("attention.query_key_value", 2)),
    "attn1.to_out.0": ("attn_out", ("attention.dense", 0)),
    "ff.net.0.proj": ("ff_proj", ("mlp.dense_h_to_4h", 0)),
    "ff.net.2": ("ff_out", ("mlp.dense_4h_to_h", 0)),
    "norm1.linear": ("norm1.linear", None),
    "norm2.linear": ("norm2.linear", None),
}
"""Linear layers of a block under diffusers' names -> (ComfyUI's name, SAT's layer and part). SAT adapts no other."""

_OUTSIDE = {
    "patch_embed.proj": "patch_embed.proj",  # linear in 1.5 only; merging refuses the convolution of 1.0
    "patch_embed.text_proj": "patch_embed.text_proj",
    "time_embedding.linear_1": "time_embedding_linear_1",
    "time_embedding.linear_2": "time_embedding_linear_2",
    "ofs_embedding.linear_1": "ofs_embedding_linear_1",
    "ofs_embedding.linear_2": "ofs_embedding_linear_2",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "proj_out",
}
"""Linear layers outside of the blocks: diffusers' name -> ComfyUI's."""

_COMFYUI = {
    f"transformer_blocks.{{}}.{name}": f"blocks.{{}}.{theirs}" for name, (theirs, _) in _BLOCK.items()
}
_COMFYUI |= _OUTSIDE
_SAT = {place: f"transformer_blocks.{{}}.{name}" for name, (_, place) in _BLOCK.items() if place}
_PATHS = {name: name for name in _COMFYUI} | {theirs: name for name, theirs in _COMFYUI.items()}
_UNDERSCORED = {
    path.replace(".", "_"): name for path, name in _PATHS.items()
}  # kohya loses which "_" was a "."

_SAT_KEY = re.compile(r"(?:.*\.)?transformer\.layers\.(\d+)\.(.+)\.matrix_([AB])\.(\d+)")
_PAIR = re.compile(
    r"(?P<module>.+?)(?:\.|_(?=lora\.))lora(?:_|\.|_linear_layer\.)(?P<role>A|B|down|up)(?:\.\w+)?\.weight"
)
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_ROLES = {"A": "down", "B": "up", "down": "down", "up": "up"}
_KOHYA_PREFIX = re.compile(r"(lora_(?:unet|transformer)_{1,2}|lycoris_)(?=\w+\.)")
_COMFYUI_PREFIX = re.compile(r"(model\.)?diffusion_model\.")
_DIFFUSERS_PREFIX = re.compile(r"(base_model\.model\.)?(transformer\.)?")
_REFUSED = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "OFT": re.compile(r"\.b?oft_"),
    "LoCon of a convolution": re.compile(r"\.lora_mid\."),
    "LoRA with biases": re.compile(r"\.lora_B(\.\w+)?\.bias$|\.diff_b$"),
    "a difference of whole weights": re.compile(r"\.diff$"),
    "LoRA of the text encoder": re.compile(r"^lora_te\d?_|^text_encoder"),
}


@dataclass
class LoraNames:
    """The tensors of a LoRA file: for each canonical module the names of its matrices, and of its alpha if there."""

    format: str
    down: dict[str, str] = field(default_factory=dict)
    up: dict[str, str] = field(default_factory=dict)
    alpha: dict[str, str] = field(default_factory=dict)


def is_lora(name: str) -> bool:
    """Whether a tensor's name is that of a LoRA's matrix or alpha, in whatever format."""
    return any(pattern.fullmatch(name) for pattern in (_SAT_KEY, _PAIR, _ALPHA))


def parse(names: Iterable[str]) -> LoraNames:
    """Sort the names of a file into the modules of a CogVideoX transformer.

    Beside SAT's matrices other names are passed over (a LoRA run of SAT stores the whole model); in the other formats
    every name must be known. Raises ValueError: no LoRA, a method other than LoRA (by its name), unknown names or
    modules (with the nearest known), two formats, a module twice or with one matrix only.
    """
    names = list(names)
    if sat := [name for name in names if _SAT_KEY.fullmatch(name)]:
        names = sat
    for method, pattern in _REFUSED.items():
        if found := next((name for name in names if pattern.search(name)), None):
            raise ValueError(
                f"{found!r} belongs to {method}, which cannot be read; only LoRA of linear layers can"
            )
    if not any(is_lora(name) for name in names):
        raise ValueError(
            f"there is no LoRA in it, but {len(names)} other tensors ({', '.join(names[:2])} ...)"
        )
    result, errors = LoraNames(""), []
    first: dict[str, str] = {}
    for name in names:
        try:
            found, module, role = _parse_sat(name) if sat else _parse(name)
        except ValueError as error:
            errors.append(str(error))
            continue
        first.setdefault(found, name)
        taken = getattr(result, role)
        if module in taken:
            raise ValueError(f"{module} is there twice: {taken[module]!r} and {name!r}")
        taken[module] = name
    if errors:
        more = f" (and {len(errors) - 1} more unknown names)" if len(errors) > 1 else ""
        raise ValueError(errors[0] + more)
    if len(first) > 1:
        raise ValueError(
            f"names of {' and '.join(first)} in one file: {' and '.join(map(repr, first.values()))}"
        )
    result.format = next(iter(first))
    _check_pairs(result)
    return result


def tensor_names(module: str, to: str) -> tuple[str, str, str]:
    """The names of (down, up, alpha) of a canonical module in a format; diffusers and SAT have no tensor for alpha.

    ValueError for "SAT" where its LoRA has no place for the module.
    """
    pattern, index = _pattern(module)
    if to == "SAT":
        layer, part = _sat_place(module, pattern)
        stem = f"model.diffusion_model.transformer.layers.{index}.{layer}.matrix_"
        return f"{stem}A.{part}", f"{stem}B.{part}", ""
    if to == "diffusers":
        return f"transformer.{module}.lora_A.weight", f"transformer.{module}.lora_B.weight", ""
    # VideoX-Fun and the CogVideoX wrapper for ComfyUI search the module behind one underscore as behind two.
    stem = f"lora_unet_{module.replace('.', '_')}"
    if to == "ComfyUI":
        stem = f"diffusion_model.{_COMFYUI[pattern].format(index)}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def _sat_place(module: str, pattern: str) -> tuple[str, int]:
    place = next((place for place, name in _SAT.items() if name == pattern), None)
    if place is None:
        raise ValueError(
            f"SAT's LoRA has no place for {module}: it adapts {', '.join(sorted({layer for layer, _ in _SAT}))}; "
            f"choose diffusers, kohya or ComfyUI"
        )
    return place


def _parse_sat(name: str) -> tuple[str, str, str]:
    index, layer, matrix, part = _SAT_KEY.fullmatch(name).groups()
    known = _SAT.get((layer, int(part)))
    if known is None:
        near = difflib.get_close_matches(layer, [layer for layer, _ in _SAT], n=1, cutoff=0)[0]
        raise ValueError(
            f"{name!r}: not a LoRA of a CogVideoX transformer under SAT names; the nearest layer is {near}"
        )
    return "SAT", known.format(index), _ROLES[matrix]


def _parse(name: str) -> tuple[str, str, str]:
    """(format, canonical module, "down", "up" or "alpha") of one name in a format other than SAT's."""
    match = _PAIR.fullmatch(name) or _ALPHA.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r}: not the name of a LoRA tensor; expected e.g. {_nearest(name)!r}")
    role = _ROLES[match["role"]] if "role" in match.re.groupindex else "alpha"
    path = match["module"]
    if prefix := _KOHYA_PREFIX.match(name):
        return "kohya", _known(name, path[prefix.end() :], _UNDERSCORED), role
    prefix, format = _COMFYUI_PREFIX.match(path), "ComfyUI"
    if prefix is None:
        prefix, format = _DIFFUSERS_PREFIX.match(path), "diffusers"
    path = re.sub(r"\.processor(?=\.)", "", path[prefix.end() :])
    path = re.sub(r"\.to_out$", ".to_out.0", path)  # the names before PEFT
    return format, _known(name, path, _PATHS), role


def _known(name: str, path: str, known: dict[str, str]) -> str:
    pattern, index = _pattern(path)
    if pattern not in known:
        near = difflib.get_close_matches(pattern, known, n=1, cutoff=0)[0].format(index or 0)
        raise ValueError(
            f"{name!r}: a CogVideoX transformer has no linear layer {path!r}; the nearest is {near!r}"
        )
    return known[pattern].format(index)


def _nearest(name: str) -> str:
    pattern, index = _pattern(_DIFFUSERS_PREFIX.sub("", name, count=1))
    known = [f"transformer.{path}.{end}" for path in _COMFYUI for end in ("lora_A.weight", "lora_B.weight")]
    return difflib.get_close_matches(pattern, known, n=1, cutoff=0)[0].format(index or 0)


def _pattern(path: str) -> tuple[str, str]:
    """('transformer_blocks.{}.attn1.to_q', '7') of 'transformer_blocks.7.attn1.to_q'; with underscores alike."""
    match = re.fullmatch(r"((?:transformer_)?blocks[._])(\d+)([._].+)", path)
    return (f"{match[1]}{{}}{match[3]}", match[2]) if match else (path, "")


def _check_pairs(names: LoraNames) -> None:
    for one, other in (("down", "up"), ("up", "down")):
        if alone := [module for module in getattr(names, one) if module not in getattr(names, other)]:
            raise ValueError(
                f"the file is not whole: the matrix {other!r} is missing beside {one!r} for {_some(alone)}"
            )
    if alone := [module for module in names.alpha if module not in names.down]:
        raise ValueError(f"the file is not whole: there is alpha, but no matrix for {_some(alone)}")


def _some(modules: list[str]) -> str:
    return ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
