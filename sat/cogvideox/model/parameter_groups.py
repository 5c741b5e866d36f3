"""Which part of the model a parameter belongs to, by its name: for norms that are logged by group."""

from __future__ import annotations

import re

# The first that fits. Norms count to what they are the input of.
_GROUPS = (
    ("lora", r"\.(matrix_[AB]|magnitude)\b|lora"),
    ("text_encoder", r"^conditioner\."),
    ("final", r"\.final_layer"),  # with the trunk's last norm
    ("attention", r"\.attention\.|\.(query|key)_layernorm"),
    ("mlp", r"\.mlp\."),
    ("adaln", r"\.adaln_layer\.|\.(input|post_attention)_layernorm\."),
    ("embeddings", r"\.(patch_embed|pos_embed|time_embed|ofs_embed)[._]"),
)


def parameter_group(name: str) -> str:
    """``...transformer.layers.3.mlp.dense_h_to_4h.weight`` -> ``mlp``; ``other`` where no pattern fits."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name)), "other")
