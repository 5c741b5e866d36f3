"""What the kernels' launches have in common: rows of one item and part, and their strides."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

ROWS = 32
"""Tokens whose sums one program takes: 1 / 32 of the traffic of one tensor is written besides."""


def with_rows(x: Tensor) -> Tensor:
    """``x``, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block_of(width: int) -> tuple[int, int]:
    """The power of two that holds a row, and warps for it."""
    block = triton.next_power_of_2(width)
    return block, max(1, min(16, block // 512))


def blocks_of(tokens: int, text_length: int, rows: int) -> tuple[int, int]:
    """Blocks of ``rows`` tokens: of text, and of text and video. No block holds both."""
    text = triton.cdiv(text_length, rows)
    return text, text + triton.cdiv(tokens - text_length, rows)


def sum_of_blocks(partial: Tensor, text_blocks: int, parts: int) -> Tensor:
    """partial: (B, blocks, D), text first. Returns the sums of video and of text, (B, parts, D)."""
    video = partial[:, text_blocks:].sum(dim=1)
    if parts == 1:
        return video[:, None]
    return torch.stack((video, partial[:, :text_blocks].sum(dim=1)), dim=1)
