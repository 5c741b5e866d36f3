"""Parameters of adapters and bytes of an eight-bit base, from the configuration alone. No torch.

For the parts of this project; a part of one's own may have other linear layers, which are not counted.
"""

from __future__ import annotations

import math
import re

from cogvideox.config import Config, TransformerConfig
from cogvideox.patterns import check_used, matcher, value_of

Size = tuple[int, int, int]
"""Inputs, outputs, and how many pairs of matrices adapt the layer."""


def linear_layers(t: TransformerConfig) -> dict[str, Size]:
    """Every linear layer of the network by its path."""
    d, e, patch = t.hidden_size, t.time_embed_dim, math.prod(t.patch_size)
    layers = {"time_embed.0": (d, e, 1), "time_embed.2": (e, e, 1)}
    if t.ofs_embed_dim:
        layers |= {f"ofs_embed.{i}": (t.ofs_embed_dim, t.ofs_embed_dim, 1) for i in (0, 2)}
    if t.patch_size[0] > 1:  # a convolution in 1.0
        layers["mixins.patch_embed.proj"] = (t.in_channels * patch, d, 1)
    layers |= {
        "mixins.patch_embed.text_proj": (t.text_hidden_size, d, 1),
        "mixins.final_layer.linear": (d, patch * t.out_channels, 1),
        "mixins.final_layer.adaLN_modulation.1": (e, 2 * d, 1),
    }
    for index in range(t.num_layers):
        inside = f"transformer.layers.{index}."
        layers |= {
            f"{inside}attention.query_key_value": (d, 3 * d, 3),
            f"{inside}attention.dense": (d, d, 1),
            f"{inside}mlp.dense_h_to_4h": (d, 4 * d, 1),
            f"{inside}mlp.dense_4h_to_h": (4 * d, d, 1),
            f"mixins.adaln_layer.adaLN_modulations.{index}.1": (e, 12 * d, 2),
        }
    return layers


def lora_parameters(config: Config) -> int:
    """All that the section ``lora`` trains: A, B, and DoRA's gains. ValueError for a pattern that matches nothing."""
    lora, layers = config.lora, linear_layers(config.model.transformer)
    is_known = _is_ours(config.model.transformer)
    if is_known:
        check_used(lora.layers, layers, "lora.layers")
    chosen = {
        path: size
        for path, size in layers.items()
        if any(matcher(pattern)(path) for pattern in lora.layers) and _is_in(path, lora.transformer_layers)
    }
    for key in ("rank_pattern", "alpha_pattern") if is_known else ():
        check_used(getattr(lora, key), chosen, f"lora.{key}")
    return sum(
        value_of(lora.rank_pattern, path, lora.rank) * (parts * inputs + outputs)
        + (outputs if lora.dora else 0)
        for path, (inputs, outputs, parts) in chosen.items()
    )


def _is_ours(t: TransformerConfig) -> bool:
    """Whether ``linear_layers`` knows them all."""
    return all(
        part.target.startswith("cogvideox.") for part in (t.position, t.patch_embed, t.adaln, t.final_layer)
    )


def _is_in(path: str, transformer_layers: list[int] | None) -> bool:
    index = re.search(r"(?:transformer\.layers|adaLN_modulations)\.(\d+)\.", path)
    return transformer_layers is None or index is None or int(index[1]) in transformer_layers


def quantized_base(config: Config) -> tuple[int, int]:
    """(parameters that ``lora.quantize_base`` stores in eight bits, the bytes that they take): 1 each, 4 for a row."""
    if config.lora is None or config.lora.quantize_base is None:
        return 0, 0
    inside = [size for path, size in linear_layers(config.model.transformer).items() if ".layers." in path]
    weights, rows = (
        sum(inputs * outputs for inputs, outputs, _ in inside),
        sum(outputs for _, outputs, _ in inside),
    )
    return weights, weights + 4 * rows
