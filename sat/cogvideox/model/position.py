"""Position embeddings of video tokens on a (T, H, W) grid of patches.

A position mixin adds a table to the tokens (``position_embedding_forward``) or changes queries and keys
(``attention_fn``), or both. What it computes once per forward it leaves in ``output_cross_layer`` for all layers.
``grid`` is (T, H, W) in patches: at construction the configured one, in the hooks the one of the input at hand.
"""

from __future__ import annotations

import torch
from sat.model.base_model import BaseMixin, non_conflict
from torch import Tensor, nn

from cogvideox.kernels.norm_rotate import Norms, Rope, norm_rotate

Grid = tuple[int, int, int]


def sincos_1d(length: int, dim: int, interpolation: float, device: torch.device | None) -> Tensor:
    """[sin | cos] of (i / interpolation) / 10000^(2k / dim), i < length: (length, dim).

    Computed in float64, as in the published code, then rounded to float32.
    """
    frequencies = 1.0 / 10_000 ** (torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim / 2))
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] / interpolation * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def sincos_3d(grid: Grid, dim: int, interpolation: tuple[float, float, float], device=None) -> Tensor:
    """Rows [time D/4 | width 3D/8 | height 3D/8] for tokens ordered (t h w): (T * H * W, D), float32.

    The width comes before the height: numpy's ``meshgrid(w, h)`` of the published code.
    """
    (frames, height, width), (over_t, over_h, over_w) = grid, interpolation
    parts = (
        sincos_1d(frames, dim // 4, over_t, device)[:, None, None].expand(-1, height, width, -1),
        sincos_1d(width, dim // 8 * 3, over_w, device)[None, None].expand(frames, height, -1, -1),
        sincos_1d(height, dim // 8 * 3, over_h, device)[None, :, None].expand(frames, -1, width, -1),
    )
    return torch.cat(parts, dim=-1).flatten(0, 2)


def rotary_3d(
    grid: Grid,
    head_dim: int,
    theta: float,
    text_length: int,
    device=None,
    trained: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation of each pair of channels: two (L + T * H * W, head_dim / 2), float32.

    The channels are split time 1/4, height 3/8, width 3/8 over an integer grid. Text rows are not rotated
    (cos 1, sin 0), so that one product serves the joint sequence.  trained: (H, W) onto which the rows and columns
    are resized (``resized_region``); None leaves them whole numbers.
    """
    spans = [
        (0, grid[0]),
        *(((0, n) for n in grid[1:]) if trained is None else resized_region(grid[1:], trained)),
    ]
    angles = []
    for axis, (length, dim) in enumerate(zip(grid, (head_dim // 4, *[head_dim // 8 * 3] * 2), strict=True)):
        frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        start, stop = spans[axis]
        # diffusers' end: from a start other than 0, the last step falls short of one spacing. Whole numbers from 0.
        places = torch.linspace(start, stop * (length - 1) / length, length, device=device)
        angle = places[:, None] * frequencies
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        angles.append(angle.view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    angle = torch.nn.functional.pad(angle, (0, 0, text_length, 0))
    return angle.cos(), angle.sin()


def resized_region(size: tuple[int, int], trained: tuple[int, int]) -> list[tuple[int, int]]:
    """(start, stop) of rows and of columns: the largest centred region of ``trained`` (H, W) in the shape of ``size``.

    The rule of diffusers for CogVideoX 1.0 (``get_resize_crop_region_for_grid``): it fits height or width and rounds
    the other. A stop beyond the trained grid cannot occur; a start is 0 on one axis.
    """
    (height, width), (most_h, most_w) = size, trained
    if height / width > most_h / most_w:
        rows, columns = most_h, round(most_h / height * width)
    else:
        rows, columns = round(most_w / width * height), most_w
    top, left = round((most_h - rows) / 2), round((most_w - columns) / 2)
    return [(top, top + rows), (left, left + columns)]


def slice_learned_table(table: Tensor, table_grid: Grid, grid: Grid, text_length: int) -> Tensor:
    """The rows of the text and of the corner [:T, :H, :W] of a table on ``table_grid``: (1, L + T * H * W, D)."""
    if any(size > limit for size, limit in zip(grid, table_grid, strict=True)):
        raise ValueError(
            f"a learned position table of {'x'.join(map(str, table_grid))} patches (t x h x w) has no rows for "
            f"{'x'.join(map(str, grid))}: ask for fewer frames or a smaller size, or train with a larger "
            "model.transformer.num_frames, latent_height, latent_width"
        )
    text, video = table.split((text_length, table.shape[1] - text_length), dim=1)
    frames, height, width = grid
    video = video.unflatten(1, table_grid)[:, :frames, :height, :width].flatten(1, 3)
    return torch.cat((text, video), dim=1)


class SincosPosition3D(BaseMixin):
    """Fixed sines and cosines added to the video tokens (CogVideoX-2B). Nothing is learned, nothing is stored.

    ``*_interpolation``: how many patches one step of the trained grid spans (2B: 1.875 in height and width).
    """

    def __init__(
        self,
        hidden_size: int,
        grid: Grid,
        text_length: int,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
        time_interpolation: float = 1.0,
    ):
        super().__init__()
        if hidden_size % 16:
            raise ValueError(
                f"model.transformer.hidden_size={hidden_size}: the sincos position embedding splits the width "
                "1/4, 3/8, 3/8 into sines and cosines, which needs a multiple of 16"
            )
        self.hidden_size, self.grid, self.text_length = hidden_size, grid, text_length
        self.interpolation = (time_interpolation, height_interpolation, width_interpolation)
        self.register_load_state_dict_pre_hook(_check_and_drop_stored_table)

    def table(self, grid: Grid, text_length: int, device: torch.device | None = None) -> Tensor:
        """(1, L + T * H * W, D) float32; the text rows are zero."""
        table = sincos_3d(grid, self.hidden_size, self.interpolation, device)
        return torch.nn.functional.pad(table, (0, 0, text_length, 0))[None]

    def position_embedding_forward(
        self, position_ids, *, grid: Grid, text_length: int, emb: Tensor, **_
    ) -> Tensor:
        return self.table(grid, text_length, emb.device)


class LearnedPosition3D(BaseMixin):
    """A learned row per text token and per patch of the configured grid; smaller inputs take its corner."""

    def __init__(self, hidden_size: int, grid: Grid, text_length: int):
        super().__init__()
        self.grid = grid
        self.pos_embedding = _learned_table(hidden_size, grid, text_length)

    def position_embedding_forward(self, position_ids, *, grid: Grid, text_length: int, **_) -> Tensor:
        return slice_learned_table(self.pos_embedding, self.grid, grid, text_length)


class RotaryPosition3D(BaseMixin):
    """Rotary embedding of queries and keys (Su et al. 2021) over time, height and width: CogVideoX-5B and 1.5.

    ``learned_table`` adds a learned table to the tokens besides (5B-I2V).
    ``other_sizes``: where the patches of a size that was not trained stand. "slice": on whole numbers from 0, as SAT
    and CogVideoX1.5; "resize": on fractions, over the part of the trained grid that has their shape, as diffusers does
    for 1.0 (``resized_region``). Equal at the configured size.
    """

    def __init__(
        self,
        head_dim: int,
        hidden_size: int,
        grid: Grid,
        text_length: int,
        theta: float = 10_000.0,
        learned_table: bool = False,
        other_sizes: str = "slice",
    ):
        super().__init__()
        if other_sizes not in ("slice", "resize"):
            raise ValueError(
                f"model.transformer.position.params.other_sizes={other_sizes!r}: expected slice (whole numbers, as "
                "SAT) or resize (onto the trained grid, as diffusers does for CogVideoX 1.0)"
            )
        if head_dim % 16:
            raise ValueError(
                f"a head of {head_dim} channels (model.transformer.hidden_size / num_attention_heads) cannot be split "
                "1/4, 3/8, 3/8 into pairs for the rotary position embedding: it needs a multiple of 16"
            )
        self.head_dim, self.theta, self.grid, self.other_sizes = head_dim, theta, grid, other_sizes
        self.pos_embedding = _learned_table(hidden_size, grid, text_length) if learned_table else None
        self.register_load_state_dict_pre_hook(_drop_stored_frequencies)

    def position_embedding_forward(
        self, position_ids, *, output_cross_layer: dict, grid: Grid, text_length: int, emb: Tensor, **_
    ) -> Tensor | None:
        trained = self.grid[1:] if self.other_sizes == "resize" else None
        output_cross_layer["rope"] = rotary_3d(
            grid, self.head_dim, self.theta, text_length, emb.device, trained
        )
        if self.pos_embedding is None:
            return None
        return slice_learned_table(self.pos_embedding, self.grid, grid, text_length)

    @non_conflict
    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args,
        old_impl,
        rope: Rope,
        head_norms: Norms | None = None,
        **kw_args,
    ) -> Tensor:
        """head_norms: of queries and keys, where the mixin above leaves them to this one: both in one pass."""
        query, key = norm_rotate(query, key, head_norms, rope)
        return old_impl(query, key, value, *args, **kw_args)

    attention_fn.takes_head_norms = True


def _learned_table(hidden_size: int, grid: Grid, text_length: int) -> nn.Parameter:
    frames, height, width = grid
    return nn.Parameter(torch.zeros(1, text_length + frames * height * width, hidden_size))


def _drop_stored_frequencies(module: RotaryPosition3D, state_dict: dict, prefix: str, *_) -> None:
    """CogVideoX-5B files may carry cos and sin as buffers; they are recomputed here for every size."""
    state_dict.pop(f"{prefix}freqs_cos", None)
    state_dict.pop(f"{prefix}freqs_sin", None)


def _check_and_drop_stored_table(
    module: SincosPosition3D,
    state_dict: dict,
    prefix: str,
    metadata,
    strict,
    missing,
    unexpected,
    errors: list,
) -> None:
    """CogVideoX-2B files carry the fixed table; it is recomputed here, and must be what the file was trained with."""
    stored = state_dict.pop(f"{prefix}pos_embedding", None)
    if stored is None or stored.is_meta:
        return
    expected = module.table(module.grid, module.text_length, stored.device)
    # Files hold the table in half precision: entries lie in [-1, 1], and bfloat16 rounds by at most 2^-9.
    if stored.shape == expected.shape and not torch.allclose(stored.float(), expected, rtol=0.0, atol=2**-8):
        errors.append(
            f"{prefix}pos_embedding is not the sincos table of this network: largest difference "
            f"{(stored.float() - expected).abs().max():.3g}. Check model.transformer.position (interpolation)"
        )
