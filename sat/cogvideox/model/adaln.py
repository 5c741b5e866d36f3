"""Expert adaptive layer norm: the time embedding modulates text and video tokens apart."""

from __future__ import annotations

import torch
from sat.model.base_model import BaseMixin, non_conflict
from torch import Tensor, nn


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts at zero, without the cost of a random initialisation first."""
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, device=torch.get_default_device())
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def modulate(
    x: Tensor, shift: tuple[Tensor, Tensor], scale: tuple[Tensor, Tensor], text_length: int
) -> Tensor:
    """x (1 + scale) + shift, with one (text, video) pair of (B or 1, 1, D) each.  x: (B, S, D), text first."""
    # Split and concatenated, not chosen by a mask: eager forward + backward takes 4 instead of 9 to 12 ms (CPU,
    # 2 x 1186 x 512), the compiled one the same, because inductor fuses either form into one kernel.
    text, video = x.split((text_length, x.shape[1] - text_length), dim=1)
    text = torch.addcmul(shift[0], text, 1 + scale[0])
    video = torch.addcmul(shift[1], video, 1 + scale[1])
    return torch.cat((text, video), dim=1)


def add_gated(x: Tensor, branch: Tensor, gate: tuple[Tensor, Tensor], text_length: int) -> Tensor:
    """x + gate * branch, with a (text, video) pair of gates (B or 1, 1, D).  x, branch: (B, S, D)."""
    sizes = (text_length, x.shape[1] - text_length)
    (x_text, x_video), (text, video) = x.split(sizes, dim=1), branch.split(sizes, dim=1)
    return torch.cat((torch.addcmul(x_text, text, gate[0]), torch.addcmul(x_video, video, gate[1])), dim=1)


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

    def layer_forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        *,
        layer_id: int,
        emb: Tensor,
        text_length: int,
        modulations: Tensor | None = None,
        **kw_args,
    ) -> Tensor:
        """hidden_states: (B, S, D), text first; emb: (B or 1, E). Returns (B, S, D).

        modulations: (layers, B or 1, 12 D), what the linear layers make of ``emb``, where it is known (modulation.py).
        """
        layer = self.transformer.layers[layer_id]
        kw_args |= {"layer_id": layer_id, "emb": emb, "text_length": text_length}
        modulation = self.adaLN_modulations[layer_id](emb) if modulations is None else modulations[layer_id]
        chunks = modulation[:, None].chunk(12, dim=-1)
        pairs = zip(chunks[6:], chunks[:6], strict=True)  # (text, video); the weights hold video first
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = pairs

        x = modulate(layer.input_layernorm(hidden_states), shift_msa, scale_msa, text_length)
        hidden_states = add_gated(hidden_states, layer.attention(x, mask, **kw_args), gate_msa, text_length)
        x = modulate(layer.post_attention_layernorm(hidden_states), shift_mlp, scale_mlp, text_length)
        return add_gated(hidden_states, layer.mlp(x, **kw_args), gate_mlp, text_length)

    # Mixins added later wrap earlier ones: this one comes after the position embedding, so q and k are normed first.
    @non_conflict
    def attention_fn(
        self, query: Tensor, key: Tensor, value: Tensor, *args, old_impl, layer_id: int, **kw_args
    ) -> Tensor:
        if self.qk_ln:
            query = self.query_layernorm_list[layer_id](query)
            key = self.key_layernorm_list[layer_id](key)
            kw_args["may_overwrite"] = True  # new tensors, which nobody else holds
        return old_impl(query, key, value, *args, layer_id=layer_id, **kw_args)
