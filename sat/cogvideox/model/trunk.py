"""The trunk of a SAT model: plain transformer layers whose parts mixins may take over.

SAT's own trunk (``sat.model.transformer.BaseTransformer``) needs a process group to be built and in every backward,
reseeds the random generators, creates embeddings that CogVideoX never uses, and breaks a compiled graph in every
layer. This one keeps its names, hooks and keys, at model-parallel size 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.kernels.gelu import linear_gelu
from cogvideox.model.attention import SelfAttention
from cogvideox.model.checkpointing import Checkpointing
from cogvideox.model.compiled_blocks import run_layer
from cogvideox.model.frozen_mlp import frozen_mlp
from cogvideox.model.linear import Linear, is_frozen

CPU_ROWS = 512
"""Tokens that a CPU's MLP takes at a time, unless another number is set. The C library gets the memory of a larger
hidden layer from the system anew at every call, and the page faults cost up to a tenth of the MLP."""


class MLP(nn.Module):
    """Linear, GELU (tanh form), linear.

    ``chunk_rows``: without gradients, that many tokens at a time (None: all): the hidden layer, 4 D wide, is the
    largest tensor of the network, and no token sees another.
    ``is_computed_again``: the hidden layer is not kept for the backward pass (set by ``Trunk.keep``).
    """

    def __init__(self, hidden_size: int, hooks: dict):
        super().__init__()
        self.chunk_rows: int | None = None
        self.is_computed_again = False
        self.dense_h_to_4h = Linear(hidden_size, 4 * hidden_size)
        self.dense_4h_to_h = Linear(4 * hidden_size, hidden_size)
        self.hooks = hooks

    def forward(self, hidden_states: Tensor, **kw_args) -> Tensor:
        if "mlp_forward" in self.hooks:
            return self.hooks["mlp_forward"](hidden_states, **kw_args)
        # A compiler finds out by itself what has to be computed again, and one graph shall serve all layers.
        if not torch.compiler.is_compiling() and self._is_made_in_pieces(hidden_states):
            return frozen_mlp(hidden_states, self.dense_h_to_4h, self.dense_4h_to_h)
        rows = self._rows_at_a_time(hidden_states)
        if rows is None:
            return self._tokens(hidden_states)
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        chunks = hidden_states.flatten(0, -2).split(rows), out.flatten(0, -2).split(rows)
        for chunk, place in zip(*chunks, strict=True):
            place.copy_(self._tokens(chunk))
        return out

    def _is_made_in_pieces(self, hidden_states: Tensor) -> bool:
        is_differentiated = torch.is_grad_enabled() and hidden_states.requires_grad
        if not self.is_computed_again or not is_differentiated:
            return False
        return is_frozen(self.dense_h_to_4h, self.dense_4h_to_h)

    def _rows_at_a_time(self, hidden_states: Tensor) -> int | None:
        if torch.is_grad_enabled():
            return None
        is_cpu = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        return self.chunk_rows or (CPU_ROWS if is_cpu else None)

    def _tokens(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(linear_gelu(self.dense_h_to_4h, hidden_states))


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer: the modules, and their plain order where no mixin has another."""

    def __init__(self, layer_id: int, hidden_size: int, num_attention_heads: int, hooks: dict):
        super().__init__()
        self.layer_id = layer_id
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.attention = SelfAttention(hidden_size, num_attention_heads, hooks)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.mlp = MLP(hidden_size, hooks)
        self.hooks = hooks

    def forward(self, hidden_states: Tensor, mask: Tensor | None, **kw_args) -> Tensor:
        kw_args["layer_id"] = self.layer_id
        if "layer_forward" in self.hooks:
            return self.hooks["layer_forward"](hidden_states, mask, **kw_args)
        hidden_states = hidden_states + self.attention(self.input_layernorm(hidden_states), mask, **kw_args)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), **kw_args)


class Trunk(nn.Module):
    """What ``BaseModel`` calls ``transformer``: embed, the layers, the last layer norm, and out.

    ``hooks`` maps SAT's hook names to the mixins' methods; every module of the trunk holds the same dictionary.
    ``checkpoint_activations``: what each layer keeps for the backward pass, see recompute.py.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, num_attention_heads: int, checkpoint_activations: Any = False
    ):
        super().__init__()
        self.hooks: dict[str, Callable] = {}  # filled by BaseModel.forward
        self.run_layer = run_layer
        self.layers = nn.ModuleList(
            TransformerLayer(i, hidden_size, num_attention_heads, self.hooks) for i in range(num_layers)
        )
        self.final_layernorm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.keep(checkpoint_activations)

    def keep(self, checkpoint_activations: Any) -> None:
        """What each layer keeps for the backward pass from now on."""
        self.checkpointing = Checkpointing(checkpoint_activations)
        for index, layer in enumerate(self.layers):
            layer.mlp.is_computed_again = self.checkpointing.policy.of_block(index) in ("selective", "full")

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 1 / width), and the products that end a residual branch smaller by sqrt(2 layers).

        The standard deviation is within 15 % of SAT's fixed 0.02 at the published widths (0.023 at 1920, 0.018 at
        3072). At the width of a tiny network 0.02 would leave attention uniform for hundreds of steps.
        """
        std = self.final_layernorm.normalized_shape[0] ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_branch = name.endswith((".dense", ".dense_4h_to_h"))
                module.weight.normal_(std=std / (2 * len(self.layers)) ** 0.5 if ends_branch else std)
                module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        of_layer: Callable[[int], dict[str, Any]] = lambda index: {},
        **kw_args,
    ):
        """of_layer: further arguments of the hooks that differ from layer to layer."""
        # Unlike in SAT, what the embedding hooks leave in `output_cross_layer` reaches every layer.
        cross_layer: dict[str, Any] = {}
        hidden_states = self.hooks["word_embedding_forward"](
            input_ids, output_cross_layer=cross_layer, **kw_args
        )  # (B, S, D)
        if "position_embedding_forward" in self.hooks:
            position = self.hooks["position_embedding_forward"](
                position_ids, output_cross_layer=cross_layer, **kw_args
            )
            if position is not None:
                hidden_states = hidden_states + position.to(hidden_states.dtype)
                del position  # float32 and as large as the tokens: not for the length of the forward pass
        kw_args |= cross_layer
        for index, layer in enumerate(self.layers):
            # Without gradients nothing is kept: then all blocks are one graph, whatever the policy.
            what = self.checkpointing.policy.of_block(index) if torch.is_grad_enabled() else "none"
            own = kw_args | of_layer(index)
            hidden_states = self.run_layer(
                self.checkpointing, what, layer, hidden_states, attention_mask, own
            )
        return self.hooks["final_forward"](self.final_layernorm(hidden_states), **kw_args)
