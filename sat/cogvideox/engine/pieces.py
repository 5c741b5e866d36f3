"""An optimizer's groups cut into pieces, so that a step of ZeRO needs little memory of its own.

ZeRO-1 and 2 update one group after the other, and for each make a flat copy of its gradient, that gradient in fp32, and
what the optimizer itself needs on the way: 12 bytes per parameter with torch's AdamW, 20 GB for CogVideoX-2B if all of
its matrices are one group. Each parameter is updated alone either way, so nothing else changes.
"""

from __future__ import annotations

from typing import Any

PIECE_ELEMENTS = 200_000_000
"""Parameters of a piece: 2.4 GB on the way at most, and few enough pieces that their launches cost nothing."""


def cut_groups(groups: list[dict[str, Any]], most: int = PIECE_ELEMENTS) -> list[dict[str, Any]]:
    """``groups`` as an optimizer takes them, those of more than ``most`` elements as several alike, in order.

    A parameter larger than ``most`` is a piece of its own. ``names``, where a group has them, go with its parameters.
    """
    cut = []
    for group in groups:
        pieces, elements = [[]], 0
        for index, parameter in enumerate(group["params"]):
            if pieces[-1] and elements + parameter.numel() > most:
                pieces.append([])
                elements = 0
            pieces[-1].append(index)
            elements += parameter.numel()
        lists = [key for key in ("params", "names") if key in group]
        cut += [{**group, **{key: [group[key][i] for i in piece] for key in lists}} for piece in pieces]
    return cut
