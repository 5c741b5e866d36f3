"""Low-rank adaptation (Hu et al. 2021) of the transformer's linear layers, and DoRA (Liu et al. 2024).

y = W x + b + alpha / r * cat_i(B_i A_i x): ``query_key_value`` has three independent pairs, the modulations of a layer
two, other layers one. Keys are SAT's: ``original.{weight,bias}``, ``matrix_A.i`` (r, in), ``matrix_B.i``
(out / parts, r). B starts at zero, so the network starts unchanged. ``alpha`` is 1 by default, as in SAT: the scale is
1 / r (peft and diffusers: alpha = r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox.model.linear import is_frozen
from cogvideox.model.lora_product import adapted_product
from cogvideox.model.quantize import QuantizedLinear
from cogvideox.patterns import check_used, matcher, value_of

PARTS = {
    "attention.query_key_value": ((0,), (1,), (2,)),
    # diffusers' norm1.linear and norm2.linear: shift, scale and gate for video and text of the attention, of the MLP.
    "adaLN_modulations.*.1": ((0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11)),
}
"""Linear layers that hold several products: each has its own pair of matrices, for these equal chunks of the rows."""

Chunks = Sequence[Sequence[int]]


class LoRALinear(nn.Module):
    """A linear layer plus low-rank products. Matrices take the dtype and device of the layer's weight.

    parts: how many products, of the rows in order, or which chunks of the rows each has. scale: of the update; None:
    alpha / rank. dropout: of the products' input, in training.
    dora: the rows of W + update are given lengths of their own, (1 + g_i) |W_i|, and g, ``magnitude_gain`` (out,), is
    trained; the gradient does not run through the length of W + update (section 4.3). The paper trains (1 + g) |W|
    itself: the same functions, but bfloat16 holds small g finely and lengths near 1 in steps of 2^-8.
    """

    def __init__(
        self,
        original: nn.Linear | QuantizedLinear,
        rank: int,
        alpha: float = 1.0,
        parts: int | Chunks = 1,
        generator: torch.Generator | None = None,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        dora: bool = False,
    ):
        super().__init__()
        chunks = [[i] for i in range(parts)] if isinstance(parts, int) else parts
        self.original, self.scale = original, alpha / rank if scale is None else scale
        self.dropout = dropout
        # Where the rows of each chunk come from among those of all parts, one after the other.
        order = [index for part in chunks for index in part]
        self._order = order if order != sorted(order) else None
        is_quantized = isinstance(original, QuantizedLinear)
        like = {
            "device": original.device if is_quantized else original.weight.device,
            "dtype": original.compute_dtype if is_quantized else original.weight.dtype,
        }
        count, size = len(chunks), original.out_features // len(order)
        self.matrix_A = nn.ParameterList(
            torch.empty(rank, original.in_features, **like) for _ in range(count)
        )
        self.matrix_B = nn.ParameterList(torch.zeros(size * len(part), rank, **like) for part in chunks)
        self.magnitude_gain = nn.Parameter(torch.zeros(original.out_features, **like)) if dora else None
        for matrix in self.matrix_A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)

    @property
    def weight(self) -> Tensor:
        """Of the adapted layer: its dtype and device are those of the input."""
        return self.original.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        if self._is_one_operation(x):
            base = self.original
            matrices = tuple(self.matrix_A), tuple(self.matrix_B)
            return adapted_product(x, base.weight, base.bias, *matrices, self.scale)
        down = torch.cat(tuple(self.matrix_A))  # q, k and v read x once: (parts * r, in)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        low = self.scale * F.linear(dropped.to(down.dtype), down)
        pairs = zip(low.chunk(len(self.matrix_B), dim=-1), self.matrix_B, strict=True)
        update = self._to_rows(torch.cat([F.linear(part, up) for part, up in pairs], dim=-1), dim=-1)
        y = self.original(x)
        if self.magnitude_gain is None:
            return y + update.to(y.dtype)
        # Written as a change of y, so that it is none at the start: ratio is exactly 1.
        lengths = self._lengths_ratio()
        ratio = (1 + self.magnitude_gain.to(lengths.dtype)) * lengths
        product = y if self.original.bias is None else y - self.original.bias.to(y.dtype)
        return y + (ratio - 1).to(y.dtype) * product + ratio.to(y.dtype) * update.to(y.dtype)

    def _is_one_operation(self, x: Tensor) -> bool:
        """Training on a frozen linear layer, in its dtype, with nothing between the products."""
        base = self.original
        return (
            torch.is_grad_enabled()
            and not torch.compiler.is_compiling()  # which fuses what follows a product by itself
            and is_frozen(base)
            and x.dtype == base.weight.dtype == self.matrix_A[0].dtype
            and self.magnitude_gain is None
            and self._order is None
            and not (self.dropout and self.training)
        )

    @torch.no_grad()
    def _lengths_ratio(self) -> Tensor:
        """|W_i| / |W_i + s B_i A| of every row: (out,) float32 or wider, without ever holding B A.

        |W_i + s B_i A|^2 = |W_i|^2 + 2 s B_i (A W_i^T) + s^2 B_i (A A^T) B_i^T.
        """
        wide = torch.promote_types(self.matrix_A[0].dtype, torch.float32)
        before = self._row_lengths(wide).square()
        added = []
        sizes = [len(up) for up in self.matrix_B]
        for index, (down, up) in enumerate(zip(self.matrix_A, self.matrix_B, strict=True)):
            image = self._from_rows(self._image(down), dim=1).split(sizes, dim=1)[index].to(wide)
            down, up = down.to(wide), up.to(wide)  # image: (r, out / parts)
            added.append(self.scale * ((2 * image.T + self.scale * up @ (down @ down.T)) * up).sum(dim=1))
        after = (before + self._to_rows(torch.cat(added), dim=0)).clamp(min=torch.finfo(wide).tiny)
        return (before / after).sqrt()

    def _row_lengths(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.original, QuantizedLinear):
            return self.original.dequantised().norm(dim=1)
        return torch.linalg.vector_norm(self.original.weight, dim=1, dtype=dtype)

    def _image(self, down: Tensor) -> Tensor:
        """A W^T: (r, out)."""
        if isinstance(self.original, QuantizedLinear):
            return self.original.product(down)
        return F.linear(down, self.original.weight)

    def _to_rows(self, parts: Tensor, dim: int) -> Tensor:
        """From the order of the parts to that of the layer's rows."""
        if self._order is None:
            return parts
        chunks = parts.chunk(len(self._order), dim=dim)
        return torch.cat([chunks[self._order.index(i)] for i in range(len(chunks))], dim=dim)

    def _from_rows(self, rows: Tensor, dim: int) -> Tensor:
        if self._order is None:
            return rows
        chunks = rows.chunk(len(self._order), dim=dim)
        return torch.cat([chunks[i] for i in self._order], dim=dim)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The original layer with the update added to its weight, in place (product and sum in float32 or wider)."""
        if isinstance(self.original, QuantizedLinear):
            raise ValueError(
                "a LoRA on eight-bit weights is merged into the weights that they were made from: load both, "
                "load.transformer and load.lora"
            )
        weight = self.original.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        pairs = zip(self.matrix_B, self.matrix_A, strict=True)
        update = self._to_rows(torch.cat([up.to(wide) @ down.to(wide) for up, down in pairs]), dim=0)
        total = weight.to(wide) + self.scale * update
        if self.magnitude_gain is not None:
            lengths = weight.to(wide).norm(dim=1) / total.norm(dim=1).clamp(min=torch.finfo(wide).tiny)
            total = ((1 + self.magnitude_gain.to(wide)) * lengths)[:, None] * total
        weight.copy_(total)
        return self.original


def inject_lora(
    net: nn.Module,
    rank: int,
    alpha: float | None = None,
    layers: Iterable[str] = ("query_key_value", "dense"),
    transformer_layers: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    dora: bool = False,
) -> list[str]:
    """Wrap the linear layers of ``net`` whose path matches one of ``layers`` (patterns.py), in place.

    transformer_layers: of the layers inside the transformer's layers, those of these indices; None: of all. alpha: None
    is 1, SAT's default. rank_pattern, alpha_pattern: by path, the first that matches. rslora: the scale is alpha /
    sqrt(rank). Returns the paths of the wrapped layers. Trains nothing and freezes nothing: see ``freeze_base``.
    """
    alpha = 1.0 if alpha is None else alpha
    rank_pattern, alpha_pattern = rank_pattern or {}, alpha_pattern or {}
    _check_numbers(rank, alpha, rank_pattern, alpha_pattern, dropout)
    wrapped = adapted_layers(net, list(layers), transformer_layers, rank_pattern, alpha_pattern)
    for path in wrapped:
        owner, name = net.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        own_rank, own_alpha = value_of(rank_pattern, path, rank), value_of(alpha_pattern, path, alpha)
        adapter = LoRALinear(
            getattr(owner, name),
            own_rank,
            parts=value_of(PARTS, path, 1),
            generator=generator,
            scale=own_alpha / (math.sqrt(own_rank) if rslora else own_rank),
            dropout=dropout,
            dora=dora,
        )
        setattr(owner, name, adapter)
    return wrapped


def _check_numbers(
    rank: int,
    alpha: float,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
    dropout: float,
) -> None:
    for key, value in (
        ("lora.rank", rank),
        *((f"lora.rank_pattern.{p}", r) for p, r in rank_pattern.items()),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value}: expected at least 1")
    for key, value in (
        ("lora.alpha", alpha),
        *((f"lora.alpha_pattern.{pattern}", own) for pattern, own in alpha_pattern.items()),
    ):
        if value == 0 or not math.isfinite(value):
            raise ValueError(f"{key}={value}: expected a number other than 0, by which the update is scaled")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora.dropout={dropout}: expected a number in [0, 1)")


def adapted_layers(
    net: nn.Module,
    layers: Sequence[str],
    transformer_layers: Iterable[int] | None = None,
    rank_pattern: Iterable[str] = (),
    alpha_pattern: Iterable[str] = (),
) -> list[str]:
    """The paths of the linear layers that ``inject_lora`` would adapt, in the network's order.

    Raises ValueError, with the nearest names, for a pattern that chooses nothing.
    """
    if any(isinstance(module, LoRALinear) for module in net.modules()):
        raise ValueError("the network has LoRA layers already: merge them first (merge_lora)")
    linears = [name for name, m in net.named_modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    check_used(layers, linears, "lora.layers")
    count = len(net.transformer.layers)
    indices = None if transformer_layers is None else set(transformer_layers)
    if outside := sorted(index for index in indices or () if not 0 <= index < count):
        raise ValueError(f"lora.transformer_layers={outside}: the network has layers 0 to {count - 1}")
    chosen = [
        path
        for path in linears
        if any(matcher(pattern)(path) for pattern in layers)
        and (indices is None or (index := layer_index(path)) is None or index in indices)
    ]
    if not chosen:
        raise ValueError("lora.layers and lora.transformer_layers choose no layer")
    check_used(rank_pattern, chosen, "lora.rank_pattern")
    check_used(alpha_pattern, chosen, "lora.alpha_pattern")
    return chosen


def layer_index(path: str) -> int | None:
    """The number of the transformer layer that a linear layer belongs to; None outside of them."""
    match = re.match(r"(?:transformer\.layers|mixins\.adaln_layer\.adaLN_modulations)\.(\d+)\.", path)
    return int(match[1]) if match else None


@torch.no_grad()
def attach_lora(net: nn.Module, matrices: Mapping[str, Sequence[tuple[Tensor, Tensor] | None]]) -> None:
    """Wrap linear layers of ``net`` with given low-rank updates ``up @ down``, in place.

    matrices: path of the layer -> (down (r, in), up (out / parts, r)) of each of its parts (``PARTS``), None where a
    part has no update. Parts of lower rank are padded with zeros, which add nothing.
    """
    for path, pairs in matrices.items():
        owner, name = net.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        rank = max(len(pair[0]) for pair in pairs if pair is not None)
        # alpha = rank is the scale 1. Its own generator, as the values drawn are not used.
        parts = value_of(PARTS, path, len(pairs))
        layer = LoRALinear(getattr(owner, name), rank, rank, parts, torch.Generator().manual_seed(0))
        for pair, down, up in zip(pairs, layer.matrix_A, layer.matrix_B, strict=True):
            down.zero_()
            if pair is not None:
                down[: len(pair[0])].copy_(pair[0])
                up[:, : len(pair[0])].copy_(pair[1])
        setattr(owner, name, layer)


def freeze_base(net: nn.Module) -> None:
    """Leave only the adapters trainable."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    for _, _, module in _lora_layers(net):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not name.startswith("original."))


def merge_lora(net: nn.Module) -> None:
    """Fold every LoRA layer into its linear layer, in place: the network and its keys are plain again."""
    for owner, name, module in list(_lora_layers(net)):
        setattr(owner, name, module.merged())


def lora_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, under their keys in ``net.state_dict()``."""
    own = (".matrix_A.", ".matrix_B.", ".magnitude_gain")
    return {key: value for key, value in net.state_dict().items() if any(part in key for part in own)}


def lora_scales(net: nn.Module) -> dict[str, float]:
    """Path of each adapted layer -> what it multiplies its update with."""
    return {name: module.scale for name, module in net.named_modules() if isinstance(module, LoRALinear)}


def _lora_layers(net: nn.Module) -> Iterator[tuple[nn.Module, str, LoRALinear]]:
    for owner in net.modules():
        for name, child in owner.named_children():
            if isinstance(child, LoRALinear):
                yield owner, name, child
