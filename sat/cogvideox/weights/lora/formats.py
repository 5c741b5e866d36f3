"""Names of LoRA tensors in every format, both ways: SAT, diffusers (PEFT), kohya, ComfyUI. No torch, no data.

A module has one canonical name, diffusers' path in the transformer without a prefix (see low_rank.py). The formats:

- SAT, and runs of this project: ``...query_key_value.matrix_A.i``; q, k, v are the parts 0, 1, 2 of one layer, norm1
  and norm2 those of ``adaLN_modulations.N.1``. SAT itself adapts the layers inside ``transformer.layers`` alone. Beside
  them a DoRA of this project has ``.magnitude_gain``, one number for each row of the layer.
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

from cogvideox.weights.transformer_keys import RENAMED, SPLIT

FORMATS = ("SAT", "diffusers", "kohya", "ComfyUI")
BY_OPTION = {name.lower(): name for name in FORMATS}
"""As the command line spells them."""

_BLOCK = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
    "norm1.linear": "norm1.linear",
    "norm2.linear": "norm2.linear",
}
"""Linear layers of a block under diffusers' names -> ComfyUI's."""

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

_COMFYUI = {f"transformer_blocks.{{}}.{name}": f"blocks.{{}}.{theirs}" for name, theirs in _BLOCK.items()}
_COMFYUI |= _OUTSIDE


def _sat_places() -> dict[tuple[str, int], str]:
    """(SAT's layer, which of its parts) -> diffusers' module, both with ``{}`` for the number of the block."""
    result = {}
    for ours, theirs in RENAMED.items():
        result[ours.removesuffix(".weight"), 0] = theirs.removesuffix(".weight")
    for ours, parts in SPLIT.items():
        for index, (theirs, _) in enumerate(parts):
            result[ours.removesuffix(".weight"), index] = theirs.removesuffix(".weight")
    return {place: module for place, module in result.items() if module in _COMFYUI}


_SAT = _sat_places()
_PATHS = {name: name for name in _COMFYUI} | {theirs: name for name, theirs in _COMFYUI.items()}
_UNDERSCORED = {
    path.replace(".", "_"): name for path, name in _PATHS.items()
}  # kohya loses which "_" was a "."

_SAT_LAYER = r"(?:.*?\.)?((?:transformer\.layers|mixins|time_embed|ofs_embed)\..+)"
_SAT_KEY = re.compile(rf"{_SAT_LAYER}\.matrix_([AB])\.(\d+)")
_SAT_GAIN = re.compile(rf"{_SAT_LAYER}\.magnitude_gain")
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
    gain: dict[str, str] = field(default_factory=dict)
    # DoRA of this project: the name of the layer's gains, of which the module has its rows.

    @property
    def method(self) -> str:
        return "DoRA" if self.gain else "LoRA"


def is_lora(name: str) -> bool:
    """Whether a tensor's name is that of a LoRA's matrix, alpha or gain, in whatever format."""
    return any(pattern.fullmatch(name) for pattern in (_SAT_KEY, _SAT_GAIN, _PAIR, _ALPHA))


def parse(names: Iterable[str]) -> LoraNames:
    """Sort the names of a file into the modules of a CogVideoX transformer.

    Beside SAT's matrices other names are passed over (a LoRA run of SAT stores the whole model); in the other formats
    every name must be known. Raises ValueError: no LoRA, a method other than LoRA (by its name), unknown names or
    modules (with the nearest known), two formats, a module twice or with one matrix only.
    """
    names = list(names)
    gains = {match[1]: name for name in names if (match := _SAT_GAIN.fullmatch(name))}
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
    if gains:
        result.gain = {m: gains[layer] for m in result.down if (layer := sat_layer(m)[0]) in gains}
        if alone := [module for module in result.down if module not in result.gain]:
            raise ValueError(f"the file is not whole: DoRA's magnitude_gain is missing for {_some(alone)}")
    return result


def tensor_names(module: str, to: str) -> tuple[str, str, str]:
    """The names of (down, up, alpha) of a canonical module in a format; diffusers and SAT have no tensor for alpha."""
    pattern, index = _pattern(module)
    if to == "SAT":
        layer, part = sat_layer(module)
        stem = f"model.diffusion_model.{layer}.matrix_"
        return f"{stem}A.{part}", f"{stem}B.{part}", ""
    if to == "diffusers":
        return f"transformer.{module}.lora_A.weight", f"transformer.{module}.lora_B.weight", ""
    # VideoX-Fun and the CogVideoX wrapper for ComfyUI search the module behind one underscore as behind two.
    stem = f"lora_unet_{module.replace('.', '_')}"
    if to == "ComfyUI":
        stem = f"diffusion_model.{_COMFYUI[pattern].format(index)}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def sat_layer(module: str) -> tuple[str, int]:
    """The path of SAT's linear layer that holds a canonical module, and which of its parts the module is."""
    pattern, index = _pattern(module)
    layer, part = next(place for place, name in _SAT.items() if name == pattern)
    return layer.format(index), part


def _parse_sat(name: str) -> tuple[str, str, str]:
    path, matrix, part = _SAT_KEY.fullmatch(name).groups()
    match = re.fullmatch(r"(transformer\.layers|mixins\.adaln_layer\.adaLN_modulations)\.(\d+)\.(.+)", path)
    layer, index = (f"{match[1]}.{{}}.{match[3]}", match[2]) if match else (path, "")
    known = _SAT.get((layer, int(part)))
    if known is None:
        near = difflib.get_close_matches(layer, [layer for layer, _ in _SAT], n=1, cutoff=0)[0]
        raise ValueError(
            f"{name!r}: not a LoRA of a CogVideoX transformer under SAT names; the nearest layer is "
            f"{near.format(index or 0)}"
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
