"""What the transformer's backward pass needs, in tensors of tokens x width ("units"), by what the blocks keep.

Derived from the operations of a block and held against the count of live tensors at full size, forward and backward, on
the meta device (tests/test_planning.py, docs/memory.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from cogvideox.config import Config
from cogvideox.flops import clip_of
from cogvideox.plan import BYTES
from cogvideox.recompute import Recompute, read_recompute

FULL = 20.0
"""A block whose weights train: its input, two modulated tensors, q k v (3), q and k turned, attention's output, both
branches before their gates, the middle, the MLP's hidden layer before and after GELU (8)."""

FROZEN = 12.0
"""A block whose weights are frozen: the same without what only weights and gates need (modulated, GELU's output, the
branches)."""

PRODUCTS = 11.0
"""With ``products``: input, q k v (3), attention, its branch, the MLP's hidden layer (4) and its branch."""

# While a block's gradients are taken, beside what it has kept or computed again: gradients of tensors, of which the
# largest are the hidden layer's. With frozen weights less is kept, and the GELU's gradient needs the room of two.
TRANSIENT_FULL, TRANSIENT_FROZEN = 5.1, 9.0
# The same at the end of the network, where the backward pass begins and no block computes again.
ENDS_FULL, ENDS_FROZEN = 5.2, 8.1


@dataclass(frozen=True)
class Activations:
    """Bytes at two moments of the backward pass, of which the larger counts.

    kept: after the forward pass, by the blocks.
    start: at the last block, when all blocks' kept tensors live and hardly a gradient of a weight.
    end: at the first block, with all gradients of the weights beside it, except ``pending``: its own.
    """

    kept: float
    start: float
    end: float
    pending: float


def units_kept(config: Config) -> dict[str, float]:
    """Units that one block keeps under each policy of ``recompute.KEPT``."""
    t, lora, size = config.model.transformer, config.lora, BYTES[config.train.precision]
    per_head = size * t.hidden_size // t.num_attention_heads
    log_sum = 4 / per_head  # one fp32 number per token and head
    norms = 16 / (size * t.hidden_size)  # mean and deviation of every token at two layer norms
    if lora is None:
        everything = FULL
    else:
        adapted = set(lora.layers)
        low = (3 * ("query_key_value" in adapted) + len(adapted - {"query_key_value"})) * lora.rank
        # An adapter needs the input of its layer; that of ``dense``, attention's output, is kept anyway.
        inputs = {"query_key_value": 1, "dense": 0, "dense_h_to_4h": 1, "dense_4h_to_h": 4}
        everything = FROZEN + sum(inputs.get(name, 1) for name in adapted) + low / t.hidden_size
    return {
        "none": everything + norms + log_sum,
        "products": PRODUCTS + log_sum,
        "selective": 2.0 + log_sum,
        "full": 1.0,
    }


def activations(config: Config) -> Activations:
    """Of one micro-step of ``train.batch_size`` clips. The policy must not be a budget."""
    t = config.model.transformer
    policy = read_recompute(t.checkpoint_activations)
    assert isinstance(policy, Recompute), "resolve the budget first"
    tokens = clip_of(config, config.data).tokens * config.train.batch_size
    size = BYTES[config.train.precision]
    unit = tokens * t.hidden_size * size
    units, frozen = units_kept(config), config.lora is not None
    kept = sum(count * units[what] for what, count in policy.counts(t.num_layers).items())
    transient, ends = (TRANSIENT_FROZEN, ENDS_FROZEN) if frozen else (TRANSIENT_FULL, ENDS_FULL)
    last = policy.of_block(t.num_layers - 1)
    first_gradient = 0 if frozen else 4 * t.hidden_size**2 * size
    if policy.what == "none":
        start = ends
    elif last == policy.what:
        start = units["none"] - units[last] + transient
    else:  # at the block before, computed again once the last one is gone; that one's gradients are there
        start = 1 + transient - units[policy.what]
        first_gradient *= 3
    return Activations(
        kept=kept * unit,
        start=(kept + start) * unit + first_gradient,
        end=(units["none"] + transient) * unit,
        # Its MLP's second product (4 of 12 D^2) has its gradient already.
        pending=0.0 if frozen else (8 * t.hidden_size + 12 * t.time_embed_dim) * t.hidden_size * size,
    )
