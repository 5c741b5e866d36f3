"""Encode and decode in tiles of a frame that overlap and are blended: a fraction of the memory, for other numbers.

Lossy: each group norm sees one tile instead of the frame. The constants and the blending are those of diffusers
(`AutoencoderKLCogVideoX.enable_tiling`): a tile overlaps the one above it by 1/6 of its height and the one to its left
by 1/5 of its width; the last row and column of tiles are what remains of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

OVERLAP_PARTS = {"height": 6, "width": 5}


@dataclass(frozen=True)
class Tiling:
    """height, width: of a tile, in latents; multiples of 6 and 5 (diffusers for 480x720: 30 and 45). None: the frame's.

    A frame that fits into one tile in both directions is not tiled.
    """

    height: int | None
    width: int | None

    def __post_init__(self) -> None:
        for axis, parts in OVERLAP_PARTS.items():
            size = getattr(self, axis)
            if size is not None and (size < parts or size % parts):
                low = max(size // parts, 1) * parts
                nearest = f"{low} or {low + parts}" if size > parts else f"{parts}"
                raise ValueError(
                    f"vae.tile_latent_{axis}={size}: tiles overlap by 1/{parts} of it, so it must be a positive "
                    f"multiple of {parts}, or null; the nearest is {nearest}"
                )

    def cuts(self, height: int, width: int) -> bool:
        """Whether latents of this size are tiled at all."""
        return height > (self.height or height) or width > (self.width or width)

    def run(
        self, operation: Callable[[Tensor], Iterable[Tensor]], x: Tensor, *, cell_in: int, cell_out: int
    ) -> Iterator[Tensor]:
        """Tile by tile `operation`, (B, T, C, H, W) -> the chunks of (B, F, C', H', W') in time; yields the same
        chunks of the whole frame.

        cell_in, cell_out: pixels per latent in `x` and in the output (decode: 1 and 8).
        A tile goes through all of its chunks before the next one starts: the caches of only one tile are alive (those
        of all tiles are 4 GB at 480x720), and what waits for its neighbours is pixels, 0.1 GB.
        """
        height, width = x.shape[-2] // cell_in, x.shape[-1] // cell_in
        tile_h, tile_w = self.height or height, self.width or width
        overlap_h = tile_h // OVERLAP_PARTS["height"] if self.height else 0
        overlap_w = tile_w // OVERLAP_PARTS["width"] if self.width else 0
        rows = [
            [
                list(
                    operation(
                        x[..., i * cell_in : (i + tile_h) * cell_in, j * cell_in : (j + tile_w) * cell_in]
                    )
                )
                for j in range(0, width, tile_w - overlap_w)
            ]
            for i in range(0, height, tile_h - overlap_h)
        ]
        while rows[0][0]:
            yield blend(
                [[chunks.pop(0) for chunks in row] for row in rows],
                overlap=(overlap_h * cell_out, overlap_w * cell_out),
                keep=((tile_h - overlap_h) * cell_out, (tile_w - overlap_w) * cell_out),
            )


def blend(rows: list[list[Tensor]], overlap: tuple[int, int], keep: tuple[int, int]) -> Tensor:
    """Join tiles (..., h, w), faded over `overlap` pixels and cut to the first `keep`, (height, width) each.

    Overwrites the tiles: a tile's lower and right edges, already faded at their other ends, fade into its neighbours.
    """
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                _fade_in(tile, rows[i - 1][j], overlap[0], dim=-2)
            if j > 0:
                _fade_in(tile, row[j - 1], overlap[1], dim=-1)
    return torch.cat(
        [torch.cat([tile[..., : keep[0], : keep[1]] for tile in row], dim=-1) for row in rows], dim=-2
    )


def _fade_in(tile: Tensor, before: Tensor, extent: int, dim: int) -> None:
    extent = min(extent, tile.shape[dim], before.shape[dim])
    start = tile.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    precise = torch.promote_types(tile.dtype, torch.float32)
    ramp = torch.arange(extent, device=tile.device, dtype=precise) / max(extent, 1)
    ramp = ramp.unsqueeze(-1) if dim == -2 else ramp
    start.copy_(end * (1 - ramp) + start * ramp)


def difference(whole: Iterable[Tensor], tiled: Iterable[Tensor]) -> dict[str, float]:
    """What tiling changed, from the chunks of two decodes of the same latents.

    max, rms: of the difference, in the units of video in [-1, 1];  psnr_db: for that range (peak-to-peak 2).
    """
    largest, squares, count = 0.0, 0.0, 0
    for a, b in zip(whole, tiled, strict=True):
        error = a.float().clamp(-1, 1) - b.float().clamp(-1, 1)
        largest = max(largest, error.abs().max().item())
        squares += error.square().sum(dtype=torch.float64).item()
        count += error.numel()
    mse = squares / count
    return {
        "max": largest,
        "rms": math.sqrt(mse),
        "psnr_db": 10 * math.log10(4 / mse) if mse else math.inf,
    }
