"""Dimensions of a model, read off the names and shapes of its tensors. Files and networks are compared by them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cogvideox.weights.lora import formats as lora_formats
from cogvideox.weights.variants import Variant, variants_with

Shapes = Mapping[str, tuple[int, ...]]

# A name that only this kind of model has; what stands in front of it is the prefix of the whole model.
_ANCHORS = {
    ("transformer", "SAT"): "mixins.final_layer.linear.weight",
    ("transformer", "diffusers"): "time_embedding.linear_1.weight",
    ("vae", "SAT"): "decoder.mid.block_1.conv1.conv.weight",
    ("vae", "diffusers"): "decoder.mid_block.resnets.0.conv1.conv.weight",
    ("t5", "transformers"): "encoder.block.0.layer.0.SelfAttention.q.weight",
}
OPTIONAL_KEYS = re.compile(
    r"transformer\.position_embeddings\.weight"  # unused by rope models
    r"|mixins\.pos_embed\.freqs_(sin|cos)"  # the rotary table, recomputable
)
TABLE_KEYS = (
    "mixins.pos_embed.pos_embedding",
    "patch_embed.pos_embedding",
)  # optional where it is not learned
T5_ALIAS = "encoder.embed_tokens.weight"  # the same tensor as shared.weight


@dataclass(frozen=True)
class Geometry:
    """The dimensions of an expert transformer. None: the names do not tell."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int | None
    patch_size: tuple[int, int, int]
    in_channels: int
    out_channels: int
    time_embed_dim: int
    text_hidden_size: int
    ofs_embed_dim: int | None
    learned_table: bool
    table_tokens: int | None  # rows of a position table, learned or not

    def variant(self) -> Variant | None:
        keys = ("num_layers", "hidden_size", "patch_size", "in_channels", "learned_table", "ofs_embed_dim")
        return next(iter(variants_with(**{key: getattr(self, key) for key in keys})), None)

    def __str__(self) -> str:
        """``CogVideoX-5B (42 layers x 3072, patch 1x2x2, 16 channels in)``."""
        variant = self.variant()
        details = [
            f"{self.num_layers} layers x {self.hidden_size}",
            f"patch {'x'.join(map(str, self.patch_size))}",
        ]
        details.append(f"{self.in_channels} channels in")
        details += ["ofs"] if self.ofs_embed_dim else []
        details += ["learned position table"] if self.learned_table else []
        return (
            f"{variant.name if variant else 'an unpublished CogVideoX-type network'} ({', '.join(details)})"
        )


def shapes_of(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """name -> shape of the tensors (or headers) under a prefix, which is taken off."""
    return {name[len(prefix) :]: tuple(t.shape) for name, t in tensors.items() if name.startswith(prefix)}


def find_model(names: Iterable[str], family: str) -> tuple[str, str] | None:
    """(prefix, naming) of the model of a family among these names, or None."""
    names = list(names)
    for (of, naming), anchor in _ANCHORS.items():
        if of == family:
            for name in names:
                if name == anchor or name.endswith("." + anchor):
                    return name.removesuffix(anchor), naming
    return None


def transformer_geometry(
    shapes: Shapes,
    naming: str = "SAT",
    *,
    patch_size: tuple[int, int, int] | None = None,
    learned_table: bool | None = None,
) -> Geometry | None:
    """Read the dimensions off a transformer's shapes (prefix taken off). None where a part of it is missing.

    patch_size: of a linear patch embedding, whose shape tells only the product with the channels; None: 2x2x2, as
    published. learned_table: whether a position table is trained; None: by the rule below.
    """
    sat = naming == "SAT"
    patch_embed = "mixins.patch_embed." if sat else "patch_embed."
    blocks = "transformer.layers." if sat else "transformer_blocks."
    query_norm = "mixins.adaln_layer.query_layernorm_list.0." if sat else "transformer_blocks.0.attn1.norm_q."
    try:
        projection, text = shapes[patch_embed + "proj.weight"], shapes[patch_embed + "text_proj.weight"]
        out = shapes["mixins.final_layer.linear.weight" if sat else "proj_out.weight"][0]
        time = shapes["time_embed.0.weight" if sat else "time_embedding.linear_1.weight"][0]
    except KeyError:
        return None
    hidden = projection[0]
    # 1.0 embeds patches by a 2D convolution; 1.5 by a linear layer over 2x2x2, the only published temporal patch.
    patch = (1, *projection[2:]) if len(projection) == 4 else patch_size or (2, 2, 2)
    volume = patch[0] * patch[1] * patch[2]
    in_channels = projection[1] if len(projection) == 4 else projection[1] // volume
    head_dim = shapes.get(query_norm + "weight", (0,))[0]
    ofs = shapes.get("ofs_embed.0.weight" if sat else "ofs_embedding.linear_1.weight")
    table = shapes.get(TABLE_KEYS[0] if sat else TABLE_KEYS[1])
    # The fixed table of 2B has the same name as the learned one of 5B-I2V, which comes with rotary keys or image input.
    rotary = any(OPTIONAL_KEYS.fullmatch(name) for name in shapes)
    trained = rotary or in_channels != out // volume
    return Geometry(
        num_layers=1
        + max((int(m[1]) for name in shapes if (m := re.match(rf"{blocks}(\d+)\.", name))), default=-1),
        hidden_size=hidden,
        num_attention_heads=hidden // head_dim if head_dim else None,
        patch_size=patch,
        in_channels=in_channels,
        out_channels=out // volume,
        time_embed_dim=time,
        text_hidden_size=text[1],
        ofs_embed_dim=ofs[1] if ofs else None,
        learned_table=table is not None and (learned_table if learned_table is not None else trained),
        table_tokens=table[1] if table else None,
    )


def vae_geometry(shapes: Shapes, naming: str = "SAT") -> dict[str, Any]:
    """channels, channel_multipliers, num_res_blocks, z_channels, in_channels of a VAE (prefix taken off)."""
    level, block = ("down", "block") if naming == "SAT" else ("down_blocks", "resnets")
    pattern = re.compile(rf"encoder\.{level}\.(\d+)\.{block}\.(\d+)\.conv1\.conv\.weight")
    widths = {(int(m[1]), int(m[2])): shapes[name][0] for name in shapes if (m := pattern.fullmatch(name))}
    channels, in_channels = shapes["encoder.conv_in.conv.weight"][:2]
    return {
        "channels": channels,
        "channel_multipliers": tuple(widths[i, 0] // channels for i in sorted({i for i, _ in widths})),
        "num_res_blocks": 1 + max(j for _, j in widths),
        "z_channels": shapes["decoder.conv_in.conv.weight"][1],
        "in_channels": in_channels,
    }


@dataclass(frozen=True)
class LoraGeometry:
    """What the names and shapes of a LoRA's matrices tell."""

    names: lora_formats.LoraNames
    ranks: dict[str, int]
    # By module, under its canonical name.
    num_layers: int
    # 1 + the last transformer layer that it touches.
    hidden_size: int | None
    # None: none of its modules shows the width of the network.


def has_lora(names: Iterable[str]) -> bool:
    """Whether there are matrices of a LoRA, of whatever model, among these names."""
    return any(lora_formats.is_lora(name) and not name.endswith(".alpha") for name in names)


def lora_geometry(shapes: Shapes) -> LoraGeometry:
    """Read a LoRA's dimensions. ValueError: none of a CogVideoX transformer, or not whole (lora_formats.parse)."""
    names = lora_formats.parse(shapes)
    layers = [int(m[1]) for name in names.down if (m := re.match(r"transformer_blocks\.(\d+)\.", name))]
    sides = ((module, shapes[names.down[module]], shapes[names.up[module]]) for module in names.down)
    return LoraGeometry(
        names=names,
        ranks={module: shapes[name][0] for module, name in names.down.items()},
        num_layers=1 + max(layers, default=-1),
        hidden_size=next((width for side in sides if (width := lora_width(*side))), None),
    )


def lora_width(module: str, down: tuple[int, ...], up: tuple[int, ...]) -> int | None:
    """hidden_size of the network, from the shapes (r, in) and (out, r) of a module's matrices; None: not in them."""
    if re.fullmatch(r".+\.attn1\..+|.+\.ff\.net\.0\.proj|proj_out|time_embedding\.linear_1", module):
        return down[1]
    if re.fullmatch(r".+\.ff\.net\.2|patch_embed\..+", module):
        return up[0]
    chunks = (
        6 if re.fullmatch(r".+\.norm[12]\.linear", module) else 2 if module == "norm_out.linear" else None
    )
    return up[0] // chunks if chunks else None


def is_optional(name: str, learned_table: bool) -> bool:
    """A SAT or diffusers transformer key that may be absent or left over (CONVENTIONS section 2)."""
    return bool(OPTIONAL_KEYS.fullmatch(name)) or (name in TABLE_KEYS and not learned_table)
