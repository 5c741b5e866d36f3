"""The transformer's state dict under SAT's and under diffusers' names, as one table.

``{}`` stands for the number of a transformer layer; how many there are is read from the keys. Three kinds of entry:
one key has one counterpart; q|k|v are thirds of one tensor; the 12 adaLN chunks are spread over two tensors.
No model is built, nothing is copied that need not be; the tables alone need no torch.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SAT_PREFIX = "model.diffusion_model."

RENAMED = {
    "mixins.patch_embed.proj.weight": "patch_embed.proj.weight",
    "mixins.patch_embed.proj.bias": "patch_embed.proj.bias",
    "mixins.patch_embed.text_proj.weight": "patch_embed.text_proj.weight",
    "mixins.patch_embed.text_proj.bias": "patch_embed.text_proj.bias",
    "mixins.pos_embed.pos_embedding": "patch_embed.pos_embedding",
    "time_embed.0.weight": "time_embedding.linear_1.weight",
    "time_embed.0.bias": "time_embedding.linear_1.bias",
    "time_embed.2.weight": "time_embedding.linear_2.weight",
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "ofs_embed.0.weight": "ofs_embedding.linear_1.weight",
    "ofs_embed.0.bias": "ofs_embedding.linear_1.bias",
    "ofs_embed.2.weight": "ofs_embedding.linear_2.weight",
    "ofs_embed.2.bias": "ofs_embedding.linear_2.bias",
    "transformer.layers.{}.input_layernorm.weight": "transformer_blocks.{}.norm1.norm.weight",
    "transformer.layers.{}.input_layernorm.bias": "transformer_blocks.{}.norm1.norm.bias",
    "transformer.layers.{}.post_attention_layernorm.weight": "transformer_blocks.{}.norm2.norm.weight",
    "transformer.layers.{}.post_attention_layernorm.bias": "transformer_blocks.{}.norm2.norm.bias",
    "mixins.adaln_layer.query_layernorm_list.{}.weight": "transformer_blocks.{}.attn1.norm_q.weight",
    "mixins.adaln_layer.query_layernorm_list.{}.bias": "transformer_blocks.{}.attn1.norm_q.bias",
    "mixins.adaln_layer.key_layernorm_list.{}.weight": "transformer_blocks.{}.attn1.norm_k.weight",
    "mixins.adaln_layer.key_layernorm_list.{}.bias": "transformer_blocks.{}.attn1.norm_k.bias",
    "transformer.layers.{}.attention.dense.weight": "transformer_blocks.{}.attn1.to_out.0.weight",
    "transformer.layers.{}.attention.dense.bias": "transformer_blocks.{}.attn1.to_out.0.bias",
    "transformer.layers.{}.mlp.dense_h_to_4h.weight": "transformer_blocks.{}.ff.net.0.proj.weight",
    "transformer.layers.{}.mlp.dense_h_to_4h.bias": "transformer_blocks.{}.ff.net.0.proj.bias",
    "transformer.layers.{}.mlp.dense_4h_to_h.weight": "transformer_blocks.{}.ff.net.2.weight",
    "transformer.layers.{}.mlp.dense_4h_to_h.bias": "transformer_blocks.{}.ff.net.2.bias",
    "transformer.final_layernorm.weight": "norm_final.weight",
    "transformer.final_layernorm.bias": "norm_final.bias",
    "mixins.final_layer.adaLN_modulation.1.weight": "norm_out.linear.weight",
    "mixins.final_layer.adaLN_modulation.1.bias": "norm_out.linear.bias",
    "mixins.final_layer.norm_final.weight": "norm_out.norm.weight",
    "mixins.final_layer.norm_final.bias": "norm_out.norm.bias",
    "mixins.final_layer.linear.weight": "proj_out.weight",
    "mixins.final_layer.linear.bias": "proj_out.bias",
}

SPLIT = {
    f"{sat}.{kind}": tuple((f"{name}.{kind}", chunks) for name, chunks in parts)
    for kind in ("weight", "bias")
    for sat, parts in {
        "transformer.layers.{}.attention.query_key_value": (
            ("transformer_blocks.{}.attn1.to_q", (0,)),
            ("transformer_blocks.{}.attn1.to_k", (1,)),
            ("transformer_blocks.{}.attn1.to_v", (2,)),
        ),
        # Video shift, scale, gate of attention and of MLP, then the six of text; diffusers groups by norm.
        "mixins.adaln_layer.adaLN_modulations.{}.1": (
            ("transformer_blocks.{}.norm1.linear", (0, 1, 2, 6, 7, 8)),
            ("transformer_blocks.{}.norm2.linear", (3, 4, 5, 9, 10, 11)),
        ),
    }.items()
}
"""SAT key -> (diffusers key, which equal chunks of the SAT tensor's rows it holds, in order)."""

POSITION_TABLE = "mixins.pos_embed.pos_embedding"

DROPPED = (
    "transformer.position_embeddings.weight",
    "mixins.pos_embed.freqs_sin",
    "mixins.pos_embed.freqs_cos",
)
"""Dead or recomputable values that SAT files may hold; diffusers has no place for them."""


def sat_to_diffusers(
    state_dict: dict[str, Tensor], learned_position: bool | None = None
) -> dict[str, Tensor]:
    """diffusers' ``CogVideoXTransformer3DModel`` state dict of a SAT one, with or without the published prefix.

    learned_position: whether a stored position table is learned (5B-I2V) or the fixed one of 2B, which diffusers does
    not store. None: looked up in its values.
    """
    import torch

    source = {key.removeprefix(SAT_PREFIX): value for key, value in state_dict.items()}
    for key in DROPPED:
        source.pop(key, None)
    if POSITION_TABLE in source:
        table = source[POSITION_TABLE]
        if not (not is_sincos_table(table) if learned_position is None else learned_position):
            del source[POSITION_TABLE]

    result = {}
    for key, value in source.items():
        pattern, index = _pattern(key)
        if pattern in RENAMED:
            result[RENAMED[pattern].format(index)] = value
        elif pattern in SPLIT:
            parts = SPLIT[pattern]
            chunks = value.chunk(sum(len(numbers) for _, numbers in parts))
            for name, numbers in parts:
                result[name.format(index)] = torch.cat([chunks[number] for number in numbers])
        else:
            raise ValueError(_unknown(key, "SAT"))
    return result


def diffusers_to_sat(state_dict: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The SAT state dict of a diffusers one; ``prefix`` goes before each key (published files: ``SAT_PREFIX``)."""
    renamed = {theirs: ours for ours, theirs in RENAMED.items()}
    joined = {name: ours for ours, parts in SPLIT.items() for name, _ in parts}
    result = {}
    for key, value in state_dict.items():
        pattern, index = _pattern(key)
        if pattern in renamed:
            result[prefix + renamed[pattern].format(index)] = value
        elif pattern in joined:
            ours = joined[pattern]
            if prefix + ours.format(index) not in result:
                result[prefix + ours.format(index)] = _join(state_dict, SPLIT[ours], index)
        else:
            raise ValueError(_unknown(key, "diffusers"))
    return result


def is_sincos_table(table: Tensor) -> bool:
    """Whether a position table (1, L + N, D) is the fixed one: zero text rows, then sin 0 = 0 and cos 0 = 1.

    The first video token has time, width and height 0 whatever the size and interpolation.
    """
    import torch

    rows = table[0].float()
    marked = rows.abs().sum(dim=1).nonzero()
    if len(marked) == 0:
        return False  # a learned table before training
    dim = rows.shape[1]
    first = [
        torch.arange(2, device=rows.device).repeat_interleave(part // 2)
        for part in (dim // 4, *[dim // 8 * 3] * 2)
    ]
    first = torch.cat(first)
    return first.shape == rows[0].shape and torch.equal(rows[marked[0, 0]], first.float())


def _join(
    state_dict: dict[str, Tensor], parts: tuple[tuple[str, tuple[int, ...]], ...], index: str
) -> Tensor:
    import torch

    names = [name.format(index) for name, _ in parts]
    if missing := [name for name in names if name not in state_dict]:
        raise ValueError(
            f"the diffusers state dict has no {', '.join(missing)}, but other parts of the same layer"
        )
    chunks: dict[int, Tensor] = {}
    for name, (_, numbers) in zip(names, parts, strict=True):
        chunks |= zip(numbers, state_dict[name].chunk(len(numbers)), strict=True)
    return torch.cat([chunks[number] for number in sorted(chunks)])


def _pattern(key: str) -> tuple[str, str]:
    """'transformer.layers.7.mlp.x' -> ('transformer.layers.{}.mlp.x', '7'): the first number after a list of layers."""
    match = re.match(r"(.*?(?:layers|adaLN_modulations|layernorm_list|transformer_blocks)\.)(\d+)(\..*)", key)
    return (f"{match[1]}{{}}{match[3]}", match[2]) if match else (key, "")


def _unknown(key: str, side: str) -> str:
    hint = " (merge LoRA first)" if ".matrix_" in key or ".original." in key or "lora" in key else ""
    return f"{key!r} is not a key of a CogVideoX transformer under {side} names{hint}"
