"""Bringing frames to the model's size: resize until they cover it, then crop. Pixels stay uint8 until the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CROPS = ("center", "random")
RESIZE_RULE = "cover, antialiased bicubic, uint8"
"""What ``resize_to_cover`` does, for digests of its results: another rule needs another text."""


def cover_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) with the aspect ratio of ``size`` (to a pixel) that covers ``target``."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(round(size[0] * scale), target[0]), max(round(size[1] * scale), target[1])


def resize_to_cover(video: Tensor, target: tuple[int, int]) -> Tensor:
    """Antialiased bicubic; aspect ratio kept; unchanged where the video already fits exactly.

    Channels last in memory, as decoders give them, is a third faster; the result is then laid out like it.

    video: (F, C, h, w) uint8.  Returns (F, C, H', W') uint8 with H' >= target[0], W' >= target[1], one of them equal.
    """
    size = cover_size((video.shape[-2], video.shape[-1]), target)
    if size == tuple(video.shape[-2:]):
        return video
    return F.interpolate(video, size, mode="bicubic", antialias=True, align_corners=False)  # uint8 throughout


def crop_corner(
    size: tuple[int, int],
    target: tuple[int, int],
    how: str = "center",
    generator: torch.Generator | None = None,
) -> tuple[int, int]:
    """(top, left) of the part of ``size`` that is kept. ``how``: "center", or "random", drawn from ``generator``."""
    room = (size[0] - target[0], size[1] - target[1])
    assert min(room) >= 0, (size, target)
    if how == "center":
        return room[0] // 2, room[1] // 2
    if how == "random":
        if generator is None:
            raise ValueError("a random crop needs a generator")
        top, left = (int(torch.randint(r + 1, (), generator=generator)) for r in room)
        return top, left
    raise ValueError(f"crop={how!r}: expected one of {', '.join(CROPS)}")


def crop(
    video: Tensor, target: tuple[int, int], how: str = "center", generator: torch.Generator | None = None
) -> Tensor:
    """Cut (F, C, h, w) down to (F, C, *target). ``how`` and ``generator``: see ``crop_corner``."""
    top, left = crop_corner((video.shape[-2], video.shape[-1]), target, how, generator)
    return video[..., top : top + target[0], left : left + target[1]].contiguous()
