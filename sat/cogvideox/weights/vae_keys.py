"""Names of the VAE's parameters: SAT (`3d-vae.pt`, this project) <-> diffusers (`AutoencoderKLCogVideoX`).

Shapes are the same on both sides; only names differ. diffusers counts the decoder's levels in the order in which they
run, SAT from the finest: `up.3` of four levels is `up_blocks.0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Beginnings of names, SAT <-> diffusers; what follows them is the same on both sides. {i}: a level of the encoder;
# {u}: a level of the decoder, counted from the other end; {j}: a block; {m}: a middle block, from 1 in SAT, from 0 in
# diffusers.
PREFIXES = [
    ("encoder.down.{i}.block.{j}.nin_shortcut.", "encoder.down_blocks.{i}.resnets.{j}.conv_shortcut."),
    ("encoder.down.{i}.block.{j}.", "encoder.down_blocks.{i}.resnets.{j}."),
    ("encoder.down.{i}.downsample.", "encoder.down_blocks.{i}.downsamplers.0."),
    ("encoder.mid.block_{m}.", "encoder.mid_block.resnets.{m}."),
    ("decoder.up.{u}.block.{j}.nin_shortcut.", "decoder.up_blocks.{u}.resnets.{j}.conv_shortcut."),
    ("decoder.up.{u}.block.{j}.", "decoder.up_blocks.{u}.resnets.{j}."),
    ("decoder.up.{u}.upsample.", "decoder.up_blocks.{u}.upsamplers.0."),
    ("decoder.mid.block_{m}.", "decoder.mid_block.resnets.{m}."),
    *[
        (f"{half}.{name}.",) * 2
        for half in ("encoder", "decoder")
        for name in ("conv_in", "norm_out", "conv_out")
    ],
]


def to_diffusers(key: str, num_levels: int) -> str:
    """The diffusers name of a SAT name. num_levels: `len(channel_multipliers)`, 4 in the published VAE."""
    return _translate(key, _FROM_SAT, num_levels, middle_offset=-1)


def to_sat(key: str, num_levels: int) -> str:
    """The SAT name of a diffusers name."""
    return _translate(key, _FROM_DIFFUSERS, num_levels, middle_offset=+1)


def sat_to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a SAT state dict; `loss.*` (LPIPS and discriminator of the original training) is left out."""
    kept = {key: value for key, value in state_dict.items() if not key.startswith("loss.")}
    num_levels = count_levels(kept)
    return {to_diffusers(key, num_levels): value for key, value in kept.items()}


def diffusers_to_sat(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a diffusers state dict."""
    num_levels = count_levels(state_dict)
    return {to_sat(key, num_levels): value for key, value in state_dict.items()}


def count_levels(keys: Iterable[str]) -> int:
    """Number of resolution levels, read from either side's names. ValueError if they are no VAE's."""
    levels = [
        int(match[1]) for key in keys if (match := re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.", key))
    ]
    if not levels:
        raise ValueError(
            "no `encoder.down.*` (SAT) or `encoder.down_blocks.*` (diffusers): not the weights of a VAE"
        )
    return max(levels) + 1


def _compile(source: str, target: str) -> tuple[re.Pattern[str], str]:
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(source))), target


_FROM_SAT = [_compile(sat, diffusers) for sat, diffusers in PREFIXES]
_FROM_DIFFUSERS = [_compile(diffusers, sat) for sat, diffusers in PREFIXES]


def _translate(
    key: str, rules: list[tuple[re.Pattern[str], str]], num_levels: int, middle_offset: int
) -> str:
    for pattern, target in rules:
        if match := pattern.match(key):
            found = {name: int(number) for name, number in match.groupdict().items()}
            if "u" in found:
                found["u"] = num_levels - 1 - found["u"]
            if "m" in found:
                found["m"] += middle_offset
            return target.format(**found) + key[match.end() :]
    raise ValueError(f"{key!r} is not a parameter of the CogVideoX VAE")
