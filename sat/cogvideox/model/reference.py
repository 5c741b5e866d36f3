"""Reference attention: the edited items of a batch look at the video tokens of reference items beside them.

As in MasaCtrl (Cao et al. 2023), FateZero (Qi et al. 2023) and the reference keys of diffusers' CogVideoX inversion
pipeline: a source clip is run at the same timestep, and its keys and values lead the edit to the source's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cogvideox.model.transformer import ExpertTransformer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class ReferenceAttention:
    """Lets ``net`` attend to reference items, in the chosen layers, while it is entered.

        attention = ReferenceAttention(net, layers=range(10, 30))
        with attention(len(reference)):
            v = net(torch.cat([reference, x]), ...)[len(reference):]

    Inside, the first ``items`` items of each batch are references, which see nothing but themselves; item j of the
    others also attends to the video tokens of reference j mod items. Both are in one batch, so that no keys are kept
    from layer to layer. Parameters are untouched; gradients flow as in any attention.

    layers: indices from 0. None: all.  ValueError for a layer that does not exist, for none at all, and for a network
    in which a mixin has replaced the innermost attention.
    """

    def __init__(self, net: ExpertTransformer, layers: Sequence[int] | None = None):
        count = net.geometry["num_layers"]
        layers = range(count) if layers is None else layers
        missing = sorted(layer for layer in layers if not 0 <= layer < count)
        if missing or not layers:
            found = f"layer {missing[0]} does not exist" if missing else "no layer is named"
            raise ValueError(
                f"sample.reference_layers: {found}; this network has the layers 0-{count - 1} (null: all of them)"
            )
        origin = net.hook_origins["attention_fn"]
        if origin.split(" -> ")[-1] != "model":
            raise ValueError(
                f"the attention of this network comes from the mixin {origin}, which knows no reference: set "
                "sample.reference_steps=0, or remove the mixin"
            )
        self.net, self.layers = net, frozenset(layers)

    @contextmanager
    def __call__(self, items: int) -> Iterator[None]:
        # The outermost hook: what it adds passes the norm and the rotation of q and k, down to attention.attention_fn.
        before = self.net.hooks["attention_fn"]
        self.net.hooks["attention_fn"] = partial(_hook, before, self.layers, items)
        try:
            yield
        finally:
            self.net.hooks["attention_fn"] = before


def _hook(
    inner: Callable[..., Tensor], layers: frozenset[int], items: int, *args, layer_id: int, **kw_args
) -> Tensor:
    return inner(*args, layer_id=layer_id, reference_items=items if layer_id in layers else 0, **kw_args)


def attend_with_reference(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, items: int, text_length: int
) -> Tensor:
    """``attend`` of each reference item to itself, and of each other one to itself and to its reference.

    query, key, value: (B, heads, S, head_dim), normed and rotated, references first. Returns the shape of query.
    """
    edited = len(query) - items
    if edited <= 0 or edited % items:
        raise ValueError(
            f"a batch of {len(query)} with {items} reference items: the {max(edited, 0)} others must be a multiple of "
            "them, and at least as many"
        )
    alone = attend(query[:items], key[:items], value[:items])
    longer = (_with_reference(tokens, items, text_length) for tokens in (key, value))
    return torch.cat([alone, attend(query[items:], *longer)])


def _with_reference(tokens: Tensor, items: int, text_length: int) -> Tensor:
    """(B, heads, S, d) -> (B - items, heads, 2 S, d): own text and video, own text again, the reference's video.

    The second half is the reference's sequence under the item's own text. Text counts twice as video does, so that the
    balance of the two stays, and a reference equal to the item changes nothing: softmax weights over all keys twice.
    """
    reference, own = tokens.split((items, len(tokens) - items))
    video = reference[:, :, text_length:].repeat(len(own) // items, 1, 1, 1)
    return torch.cat([own, own[:, :, :text_length], video], dim=2)
