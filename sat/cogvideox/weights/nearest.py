"""Weights that are none of the family: which of its models their names come nearest to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_T5 = re.compile(
    r"shared\.weight|encoder\.final_layer_norm\.weight"
    r"|encoder\.block\.\d+\.layer\.[01]\.(SelfAttention\.(q|k|v|o|relative_attention_bias)"
    r"|DenseReluDense\.(wi_0|wi_1|wo)|layer_norm)\.weight"
)
_MAX_PREFIX = 4  # parts in front of a model's own names: "model.diffusion_model." has two
_FEW = 3


def looks_like(names: Iterable[str]) -> str:
    """One phrase: "looks like a CogVideoX transformer under SAT's names: 300 of 557 keys of CogVideoX-2B", or the
    nearest known name of the first that is none."""
    from cogvideox.weights.transformer_keys import DROPPED, POSITION_TABLE

    names = [name for name in names if not name.endswith((*DROPPED, POSITION_TABLE))]
    counts = {model: _count(names, is_known) for model, is_known in _known_models().items()}
    best = max(counts, key=lambda model: counts[model])
    if not counts[best]:
        return _nearest_name(names)
    stray = len(names) - counts[best]
    total = _total(names, best)
    of = f"{counts[best]} of {total[1]} keys of {total[0]}" if total else f"{counts[best]} keys of it"
    return f"looks like {best}: {of}{f', and {stray} that it does not have' if stray else ''}"


def _known_models() -> dict[str, Callable[[str], bool]]:
    models: dict[str, Callable[[str], bool]] = {}
    for naming, found in _names().items():
        templates = {_template(name) for name in found}
        models[f"a CogVideoX transformer under {naming} names"] = lambda n, t=templates: _template(n) in t
    return models | {
        "a CogVideoX VAE under SAT names": lambda name: _translates(name, "to_diffusers"),
        "a CogVideoX VAE under diffusers names": lambda name: _translates(name, "to_sat"),
        "a T5 encoder": lambda name: _T5.fullmatch(name) is not None,
    }


def _names() -> dict[str, list[str]]:
    """What every published transformer has, by naming; {} stands for the number of a layer."""
    from cogvideox.weights.transformer_keys import POSITION_TABLE, RENAMED, SPLIT

    renamed = {a: b for a, b in RENAMED.items() if not a.startswith("ofs_embed") and a != POSITION_TABLE}
    parts = [name for parts in SPLIT.values() for name, _ in parts]
    return {"SAT": [*renamed, *SPLIT], "diffusers": [*renamed.values(), *parts]}


def _template(name: str) -> str:
    return _NUMBER.sub("{}", name)


def _translates(name: str, function: str) -> bool:
    from cogvideox.weights import vae_keys

    try:
        getattr(vae_keys, function)(name, 4)
    except ValueError:
        return False
    return name.startswith(("encoder.", "decoder."))


def _count(names: list[str], is_known: Callable[[str], bool]) -> int:
    """How many are known, behind the prefix that makes it most."""
    stripped = ([".".join(name.split(".")[skip:]) for name in names] for skip in range(_MAX_PREFIX))
    return max(sum(map(is_known, some)) for some in stripped)


def _total(names: list[str], model: str) -> tuple[str, int] | None:
    """The published transformer with as many layers, and the number of its keys."""
    naming = next((n for n in ("SAT", "diffusers") if model.endswith(f"transformer under {n} names")), None)
    if naming is None:
        return None
    layers = [
        int(m[1]) for name in names if (m := re.search(r"(?:layers|blocks|_list|modulations)\.(\d+)\.", name))
    ]
    variant, count = ("CogVideoX-2B", 30) if max(layers, default=0) < 30 else ("CogVideoX-5B", 42)
    return variant, sum(count if "{}" in name else 1 for name in _names()[naming])


def _nearest_name(names: list[str]) -> str:
    known = [_template(name) for found in _names().values() for name in found]
    for name in names[:_FEW]:
        near = difflib.get_close_matches(_template(name), known, n=1, cutoff=0.6)
        if near:
            return f"{name!r} is not one of its names; the nearest is {near[0]!r}"
    return "none of its names is near one of the family's"
