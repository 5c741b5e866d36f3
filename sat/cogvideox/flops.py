"""Tokens and floating-point operations in closed form: of a clip, of a forward pass, of a training step.

A multiply-add is two operations. Counted are matrix products and attention; norms, activations and the time embedding
(once per clip, not per token) are left out. Two counts of a training step:

* ``model_flops``: every product of the mathematics once, and nothing that is computed a second time. What utilisation
  (MFU) is measured with: an implementation cannot raise it by working more.
* ``step_flops``: what is executed, with the recomputation of checkpointed layers and of attention scores. What the
  time of a step is predicted with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cogvideox.config import Config, DataConfig, SampleConfig, TransformerConfig, latent_frames
from cogvideox.patterns import matcher
from cogvideox.recompute import Budget, read_recompute


@dataclass(frozen=True)
class Clip:
    """A clip as the network sees it."""

    latents: int  # latent frames, padded to the temporal patch
    height: int
    width: int
    video_tokens: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text_tokens


def clip_of(config: Config, section: DataConfig | SampleConfig) -> Clip:
    t, side = config.model.transformer, config.vae.spatial_compression
    frames, height, width = (
        latent_frames(section.num_frames, config),
        section.height // side,
        section.width // side,
    )
    tokens = frames * height * width // math.prod(t.patch_size)
    return Clip(frames, height, width, tokens, t.text_length)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass for one clip; a multiply-add is 2."""

    matmul: float
    attention: float

    @property
    def forward(self) -> float:
        return self.matmul + self.attention


def forward_flops(t: TransformerConfig, clip: Clip) -> Flops:
    s, n, text, d = clip.tokens, clip.video_tokens, clip.text_tokens, t.hidden_size
    patch = math.prod(t.patch_size)
    layer = 24 * s * d * d + 2 * t.time_embed_dim * 12 * d  # qkv 6, out 2, MLP 16; one modulation per clip
    ends = 2 * text * t.text_hidden_size * d + 2 * n * patch * (t.in_channels + t.out_channels) * d
    return Flops(t.num_layers * layer + ends, t.num_layers * 4 * s * s * d)


def model_flops(config: Config, clip: Clip, adapters: int = 0) -> float:
    """FLOPs of one training step for one clip that the mathematics asks for: 3 x the forward pass.

    adapters: parameters of the LoRA, with ``lora`` set; the frozen weights then have no gradients, so their products
    cost 2 x the forward's. Attention costs 2 x its forward in the backward pass either way (PaLM's convention,
    Chowdhery et al. 2022, app. B): the scores that flash attention computes again are recomputation.
    """
    flops = forward_flops(config.model.transformer, clip)
    matmul = (2 if config.lora else 3) * flops.matmul
    return matmul + 3 * flops.attention + 3 * _adapter_flops(clip, adapters)


def step_flops(config: Config, clip: Clip, adapters: int = 0) -> float:
    """FLOPs of one training step for one clip, recomputation included. adapters: parameters of the LoRA.

    The backward pass costs 2 x the forward's products (1 x where weights are frozen) and 2.5 x its attention, which
    is recomputed block by block (Dao 2023, FlashAttention-2).
    """
    flops, adapted = forward_flops(config.model.transformer, clip), _adapter_flops(clip, adapters)
    backward = (1 if config.lora else 2) * flops.matmul + 2.5 * flops.attention + 2 * adapted
    return flops.forward + adapted + backward + recomputed_flops(config, clip, adapters).forward


def recomputed_flops(config: Config, clip: Clip, adapters: int = 0) -> Flops:
    """What blocks compute a second time under ``model.transformer.checkpoint_activations``; a budget: nothing yet."""
    t, policy = config.model.transformer, read_recompute(config.model.transformer.checkpoint_activations)
    if isinstance(policy, Budget) or policy.what == "none":
        return Flops(0.0, 0.0)
    blocks = policy.counts(t.num_layers)[policy.what]
    s, d = clip.tokens, t.hidden_size
    adapted = _adapter_flops(clip, adapters) / t.num_layers
    if policy.what == "products":
        return Flops(blocks * adapted, 0.0)
    # A block is computed again as far as it saved something: without the MLP's second product, where that is frozen.
    again = 24 if config.lora is None or adapts(config, "mlp.dense_4h_to_h") else 16
    layer = again * s * d * d + 2 * t.time_embed_dim * 12 * d
    attention = blocks * 4.0 * s * s * d if policy.what == "full" else 0.0
    return Flops(blocks * (layer + adapted), attention)


def adapts(config: Config, name: str) -> bool:
    """Whether the LoRA has this linear layer of the blocks."""
    return any(matcher(pattern)(f"transformer.layers.0.{name}") for pattern in config.lora.layers)


def _adapter_flops(clip: Clip, adapters: int) -> float:
    """Every token passes every adapter once."""
    return 2.0 * clip.tokens * adapters
