"""Dimensions of a model, read off the names and shapes of its tensors. Files and networks are compared by them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
_LORA_DOWN = {
    "SAT": re.compile(r"layers\.(?P<layer>\d+)\.(?P<target>.+)\.matrix_A\.\d+$"),
    "diffusers": re.compile(
        r"transformer_blocks\.(?P<layer>\d+)\.(?P<target>.+?)(\.processor)?\.lora(_A|_down|\.down)(\.\w+)?\.weight$"
    ),
    "kohya": re.compile(r"transformer_blocks_(?P<layer>\d+)_(?P<target>.+)\.lora_down\.weight$"),
}
LORA_KEY = re.compile(r"\.matrix_[AB]\.\d+$|\.lora(_[AB]|_down|_up|\.down|\.up)(\.\w+)?\.weight$|\.alpha$")
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


def transformer_geometry(shapes: Shapes, naming: str = "SAT") -> Geometry | None:
    """Read the dimensions off a transformer's shapes (prefix taken off). None where a part of it is missing."""
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
    patch = (1, *projection[2:]) if len(projection) == 4 else (2, 2, 2)
    volume = patch[0] * patch[1] * patch[2]
    in_channels = projection[1] if len(projection) == 4 else projection[1] // volume
    head_dim = shapes.get(query_norm + "weight", (0,))[0]
    ofs = shapes.get("ofs_embed.0.weight" if sat else "ofs_embedding.linear_1.weight")
    table = shapes.get(TABLE_KEYS[0] if sat else TABLE_KEYS[1])
    # The fixed table of 2B has the same name as the learned one of 5B-I2V, which comes with rotary keys or image input.
    rotary = any(OPTIONAL_KEYS.fullmatch(name) for name in shapes)
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
        learned_table=table is not None and (rotary or in_channels != out // volume),
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


def lora_geometry(shapes: Shapes) -> dict[str, Any] | None:
    """naming, rank, targets, number of layers and width of the LoRA matrices among these shapes, or None."""
    for naming, pattern in _LORA_DOWN.items():
        found = [(m["layer"], m["target"], shapes[name]) for name in shapes if (m := pattern.search(name))]
        if found:
            ranks = sorted({shape[0] for *_, shape in found})
            return {
                "naming": naming,
                "ranks": ranks,
                "targets": sorted({target for _, target, _ in found}),
                "layers": 1 + max(int(layer) for layer, *_ in found),
                "width": min(shape[1] for *_, shape in found),
            }
    return None


def is_optional(name: str, learned_table: bool) -> bool:
    """A SAT or diffusers transformer key that may be absent or left over (CONVENTIONS section 2)."""
    return bool(OPTIONAL_KEYS.fullmatch(name)) or (name in TABLE_KEYS and not learned_table)
