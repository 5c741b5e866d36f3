"""Full self-attention over the joint [text | video] sequence."""

from __future__ import annotations

from functools import partial

from einops import rearrange
from sat.model.base_model import replacable
from torch import Tensor, nn

from cogvideox.execution import AUTO
from cogvideox.model.attention_backends import attend
from cogvideox.model.linear import Linear
from cogvideox.model.reference import attend_with_reference


@replacable
def attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attention_dropout=None,
    *,
    backend: str = AUTO,
    reference_items: int = 0,
    text_length: int = 0,
    **_,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, over all tokens: padded text is attended, as in training.

    query, key, value: (B, heads, S, head_dim); attention_mask: None (full attention), or what torch's function takes.
    backend: the kernel, of ``attention_backends``.
    reference_items: how many items of the batch are references of the others, see ``reference.ReferenceAttention``.
    Returns the shape of query. Mixins wrap it (``non_conflict``) or replace it.
    """
    # SAT's default compares the mask with a triangle on every call: a device sync and a graph break per layer.
    one = partial(attend, backend, attn_mask=attention_mask)
    if reference_items:
        return attend_with_reference(one, query, key, value, reference_items, text_length)
    return one(query, key, value)


class SelfAttention(nn.Module):
    """One q|k|v product, attention, one output product, under SAT's names and hooks.

    ``hooks`` is the dictionary of the whole network: ``attention_forward`` replaces this forward, ``attention_fn``
    the part between the two products.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, hooks: dict):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.query_key_value = Linear(hidden_size, 3 * hidden_size)
        self.dense = Linear(hidden_size, hidden_size)
        self.hooks = hooks

    def forward(self, hidden_states: Tensor, mask: Tensor | None, **kw_args) -> Tensor:
        """hidden_states: (B, S, D). Returns (B, S, D)."""
        if "attention_forward" in self.hooks:
            return self.hooks["attention_forward"](hidden_states, mask, **kw_args)
        qkv = self.query_key_value(hidden_states)
        # Unbound before heads and tokens change places: so their gradients meet in the product's order, without a copy.
        rows = rearrange(qkv, "b s (three n d) -> b s three n d", three=3, n=self.num_attention_heads)
        query, key, value = (part.transpose(1, 2) for part in rows.unbind(2))  # (B, heads, S, d)
        attended = self.hooks["attention_fn"](query, key, value, mask, None, **kw_args)
        return self.dense(rearrange(attended, "b n s d -> b s (n d)"))
