"""Low-rank adaptation (Hu et al. 2021) of the linear layers inside the transformer's layers.

y = W x + b + alpha / r * cat_i(B_i A_i x): ``query_key_value`` has three independent pairs, other layers one. Keys are
SAT's: ``original.{weight,bias}``, ``matrix_A.i`` (r, in), ``matrix_B.i`` (out / parts, r). B starts at zero, so the
network starts unchanged. ``alpha`` is 1 by default, as in SAT: the scale is 1 / r (peft and diffusers: alpha = r).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = {"query_key_value": 3}
"""Linear layers that hold several products, stacked in their rows; each has its own pair of matrices."""


class LoRALinear(nn.Module):
    """A linear layer plus ``parts`` low-rank products. Matrices take the dtype and device of the layer's weight."""

    def __init__(
        self,
        original: nn.Linear,
        rank: int,
        alpha: float = 1.0,
        parts: int = 1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.original, self.scale = original, alpha / rank
        weight = original.weight
        out_features, in_features = weight.shape
        self.matrix_A = nn.ParameterList(weight.new_empty(rank, in_features) for _ in range(parts))
        self.matrix_B = nn.ParameterList(weight.new_zeros(out_features // parts, rank) for _ in range(parts))
        for matrix in self.matrix_A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        down = torch.cat(tuple(self.matrix_A))  # q, k and v read x once: (parts * r, in)
        low = self.scale * F.linear(x.to(down.dtype), down)
        pairs = zip(low.chunk(len(self.matrix_B), dim=-1), self.matrix_B, strict=True)
        update = torch.cat([F.linear(part, up) for part, up in pairs], dim=-1)
        y = self.original(x)
        return y + update.to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The original layer with the update added to its weight, in place (product and sum in float32 or wider)."""
        weight = self.original.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        pairs = zip(self.matrix_B, self.matrix_A, strict=True)
        update = torch.cat([up.to(wide) @ down.to(wide) for up, down in pairs])
        weight.copy_(weight.to(wide) + self.scale * update)
        return self.original


def inject_lora(
    net: nn.Module,
    rank: int,
    alpha: float | None = None,
    layers: Iterable[str] = ("query_key_value", "dense"),
    transformer_layers: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Wrap the linear layers called ``layers`` in each of ``transformer_layers`` (None: all) of ``net``, in place.

    alpha: None is 1, SAT's default. Returns the names of the wrapped layers. Trains nothing and freezes nothing: see
    ``freeze_base``.
    """
    alpha = 1.0 if alpha is None else alpha
    if rank < 1:
        raise ValueError(f"lora.rank={rank}: expected at least 1")
    if alpha == 0 or not math.isfinite(alpha):
        raise ValueError(f"lora.alpha={alpha}: expected a number other than 0, by which the update is scaled")
    if any(isinstance(module, LoRALinear) for module in net.modules()):
        raise ValueError("the network has LoRA layers already: merge them first (merge_lora)")
    blocks = net.transformer.layers
    chosen = range(len(blocks)) if transformer_layers is None else sorted(set(transformer_layers))
    if outside := [index for index in chosen if not 0 <= index < len(blocks)]:
        raise ValueError(f"lora.transformer_layers={outside}: the network has layers 0 to {len(blocks) - 1}")

    wrapped = []
    for index in chosen:
        linears = {
            name.rpartition(".")[-1]: name
            for name, m in blocks[index].named_modules()
            if isinstance(m, nn.Linear)
        }
        for name in layers:
            if name not in linears:
                near = difflib.get_close_matches(name, linears, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"lora.layers: no linear layer {name!r}; {hint}A layer has {', '.join(linears)}"
                )
            owner = blocks[index].get_submodule(linears[name].rpartition(".")[0])
            original = getattr(owner, name)
            setattr(owner, name, LoRALinear(original, rank, alpha, PARTS.get(name, 1), generator))
            wrapped.append(f"transformer.layers.{index}.{linears[name]}")
    if not wrapped:
        raise ValueError("lora.layers and lora.transformer_layers choose no layer")
    return wrapped


@torch.no_grad()
def attach_lora(net: nn.Module, matrices: Mapping[str, Sequence[tuple[Tensor, Tensor] | None]]) -> None:
    """Wrap linear layers of ``net`` with given low-rank updates ``up @ down``, in place.

    matrices: path of the layer -> (down (r, in), up (out / parts, r)) of each of its parts, None where a part has no
    update. Parts of lower rank are padded with zeros, which add nothing.
    """
    for path, pairs in matrices.items():
        owner, name = net.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        rank = max(len(pair[0]) for pair in pairs if pair is not None)
        # alpha = rank is the scale 1. Its own generator, as the values drawn are not used.
        layer = LoRALinear(getattr(owner, name), rank, rank, len(pairs), torch.Generator().manual_seed(0))
        for pair, down, up in zip(pairs, layer.matrix_A, layer.matrix_B, strict=True):
            down.zero_()
            if pair is not None:
                down[: len(pair[0])].copy_(pair[0])
                up[:, : len(pair[0])].copy_(pair[1])
        setattr(owner, name, layer)


def freeze_base(net: nn.Module) -> None:
    """Leave only the LoRA matrices trainable."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    for _, _, module in _lora_layers(net):
        for parameter in (*module.matrix_A, *module.matrix_B):
            parameter.requires_grad_(True)


def merge_lora(net: nn.Module) -> None:
    """Fold every LoRA layer into its linear layer, in place: the network and its keys are plain again."""
    for owner, name, module in list(_lora_layers(net)):
        setattr(owner, name, module.merged())


def lora_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The LoRA matrices alone, under their keys in ``net.state_dict()``."""
    return {
        key: value for key, value in net.state_dict().items() if ".matrix_A." in key or ".matrix_B." in key
    }


def _lora_layers(net: nn.Module) -> Iterator[tuple[nn.Module, str, LoRALinear]]:
    for owner in net.modules():
        for name, child in owner.named_children():
            if isinstance(child, LoRALinear):
                yield owner, name, child
