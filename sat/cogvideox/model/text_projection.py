"""The text's projection to the network's width, once per prompt of a sampling run instead of once per step.

It depends on nothing else. Of a full-size step it is 0.002 % of the work, of a picture's or a small network's a few per
cent (226 x 4096 numbers are projected whatever the size of the video).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cogvideox.model.patch_embed import PatchEmbed

if TYPE_CHECKING:
    from cogvideox.model.transformer import ExpertTransformer

KEPT = 4
"""Texts of a run: a guidance pair, its conditional half for steps without guidance, and those of an inverted clip."""


class ProjectedTexts:
    """``of(context)`` is ``project(context)``, remembered for the last ``KEPT`` tensors.

    A text is known again by being the same tensor, not by its values: comparing those would wait for the device. Each
    is projected as it comes, in its own batch, so that a run gets the bits that it would get without this.
    """

    def __init__(self, project: Callable[[Tensor], Tensor]):
        self._project = project
        # The text itself is held beside its projection: an id is unique only among objects that are alive.
        self._known: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    @classmethod
    def of_network(cls, net: ExpertTransformer) -> ProjectedTexts | None:
        """None where the network's patch embedding is not ours, so that its way with the text is its own."""
        embed = net.mixins["patch_embed"]
        if not isinstance(embed, PatchEmbed):
            return None
        return cls(lambda context: embed.text_proj(context.to(net.time_embed[0].weight.dtype)))

    @torch.no_grad()
    def of(self, context: Tensor) -> Tensor:
        """context: (B, L, text width). Returns (B, L, D)."""
        if id(context) not in self._known:
            self._known[id(context)] = (context, self._project(context))
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(id(context))
        return self._known[id(context)][1]
