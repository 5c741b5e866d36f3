"""Expert adaptive layer norm: the time embedding modulates text and video tokens apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sat.model.base_model import BaseMixin, non_conflict
from torch import Tensor, nn

from cogvideox.kernels.add_gated import add_gated
from cogvideox.kernels.norm_modulate import gate_norm_modulate, norm_modulate
from cogvideox.kernels.norm_rotate import Norms, norm_rotate


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts at zero, without the cost of a random initialisation first."""
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, device=torch.get_default_device())
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def takes_head_norms(hook: Callable) -> bool:
    """The hook below norms queries and keys itself: see ``RotaryPosition3D.attention_fn``."""
    return getattr(getattr(hook, "func", hook), "takes_head_norms", False)


class ExpertAdaLN(BaseMixin):
    """The transformer layer of CogVideoX (Yang et al. 2024, section 2.2) and its query/key norm.

    One linear layer per transformer layer makes 12 chunks of width D: shift, scale, gate of the attention and of the
    MLP for video, then the same six for text. Text and video share the layer norms, the attention and the MLP.
    ``qk_ln``: layer norm of every query and key head, before any position embedding.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, time_embed_dim: int, head_dim: int, qk_ln: bool = True
    ):
        super().__init__()
        self.adaLN_modulations = nn.ModuleList(
            nn.Sequential(nn.SiLU(), zero_linear(time_embed_dim, 12 * hidden_size)) for _ in range(num_layers)
        )
        self.qk_ln = qk_ln
        if qk_ln:
            self.query_layernorm_list = nn.ModuleList(
                nn.LayerNorm(head_dim, eps=1e-6) for _ in range(num_layers)
            )
            self.key_layernorm_list = nn.ModuleList(
                nn.LayerNorm(head_dim, eps=1e-6) for _ in range(num_layers)
            )

    def external_parameters(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """(module that uses it, parameter of another that is not called): ZeRO-3 must gather it for the first."""
        for layer_id, layer in enumerate(self.transformer.layers):
            norms = (
                layer.input_layernorm,
                layer.post_attention_layernorm,
                *(self._head_norms(layer_id) or ()),
            )
            yield from ((layer, parameter) for norm in norms for parameter in norm.parameters())

    def of_layer(self, layer_id: int, modulations: Tensor | None = None) -> dict[str, Any]:
        """What is a layer's own, as arguments of the hooks, so that these are the same code for all layers.

        modulations: (layers, B or 1, 12 D), what the linear layers make of the time embedding, where it is known
        (modulation.py).
        """
        return {
            "layer": self.transformer.layers[layer_id],
            "to_modulation": self.adaLN_modulations[layer_id],
            "modulation": None if modulations is None else modulations[layer_id],
            "head_norms": self._head_norms(layer_id),
        }

    def layer_forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        *,
        layer: nn.Module,
        to_modulation: nn.Module,
        modulation: Tensor | None,
        emb: Tensor,
        text_length: int,
        **kw_args,
    ) -> Tensor:
        """hidden_states: (B, S, D), text first; emb: (B or 1, E). Returns (B, S, D).

        layer, to_modulation, modulation, and the ``head_norms`` that ``attention_fn`` takes: see ``of_layer``.
        """
        kw_args |= {"emb": emb, "text_length": text_length}
        modulation = to_modulation(emb) if modulation is None else modulation
        pairs = modulation.unflatten(-1, (2, 6, -1)).unbind(2)  # six (video, text) of (B or 1, 2, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = pairs

        x = norm_modulate(hidden_states, layer.input_layernorm, shift_msa, scale_msa, text_length)
        branch = layer.attention(x, mask, **kw_args)
        norm = layer.post_attention_layernorm
        hidden_states, x = gate_norm_modulate(
            hidden_states, branch, gate_msa, norm, shift_mlp, scale_mlp, text_length
        )
        del branch  # not for the length of the MLP, where memory peaks
        return add_gated(hidden_states, layer.mlp(x, **kw_args), gate_mlp, text_length)

    def _head_norms(self, layer_id: int) -> Norms | None:
        if not self.qk_ln:
            return None
        return self.query_layernorm_list[layer_id], self.key_layernorm_list[layer_id]

    # Mixins added later wrap earlier ones: this one comes after the position embedding, so q and k are normed first.
    @non_conflict
    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args,
        old_impl,
        head_norms: Norms | None,
        **kw_args,
    ) -> Tensor:
        """head_norms: of queries and keys. A hook below that norms and rotates in one step is left both."""
        if head_norms is not None and takes_head_norms(old_impl):
            kw_args["head_norms"] = head_norms
        elif head_norms is not None:
            query, key = norm_rotate(query, key, head_norms)
        return old_impl(query, key, value, *args, **kw_args)
