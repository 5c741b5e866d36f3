"""An optimizer's groups cut into pieces, so that a step of ZeRO needs little memory of its own.

ZeRO-1 and 2 update one group after the other, and for each make a flat copy of its gradient, that gradient in fp32, and
what the optimizer itself needs on the way: 14 bytes per parameter with torch's AdamW, 24 GB for CogVideoX-2B if all of
its matrices are one group. Each parameter is updated alone either way, so nothing else changes.
"""

from __future__ import annotations

import torch

PIECE_ELEMENTS = 200_000_000
"""Parameters of a piece: 2.8 GB on the way at most, and few enough pieces that their launches cost nothing."""


def cut_groups(optimizer: torch.optim.Optimizer, most: int = PIECE_ELEMENTS) -> torch.optim.Optimizer:
    """``optimizer``, its groups of more than ``most`` elements replaced by several with the same settings, in order.

    A parameter larger than ``most`` is a piece of its own. The optimizer must not have taken a step.
    """
    groups = []
    for group in optimizer.param_groups:
        pieces, elements = [[]], 0
        for parameter in group["params"]:
            if pieces[-1] and elements + parameter.numel() > most:
                pieces.append([])
                elements = 0
            pieces[-1].append(parameter)
            elements += parameter.numel()
        groups += [{**group, "params": piece} for piece in pieces]
    optimizer.param_groups[:] = groups
    return optimizer
