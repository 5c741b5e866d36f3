"""Parameters of everything a run holds, in closed form from the configuration: exact for the parts of this project.

Nothing is built and torch is not imported, so ``--dry-run`` answers at once. What follows from them, memory and time,
is planning/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cogvideox.config import Config, TransformerConfig, VAEConfig
from cogvideox.lora_sizes import lora_parameters

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# The text encoder that all published models use; assumed where the configuration names no smaller one.
T5_V1_1_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def transformer_parameters(t: TransformerConfig, temporal_compression: int = 4) -> int:
    """Parameters of the network: weights that a checkpoint must hold, without tables that can be recomputed."""
    d, e, head = t.hidden_size, t.time_embed_dim, t.hidden_size // t.num_attention_heads
    patch = math.prod(t.patch_size)
    attention = linear(d, 3 * d) + linear(d, d) + 2 * 2 * head  # with the norms of queries and keys
    mlp = linear(d, 4 * d) + linear(4 * d, d)
    layer = attention + mlp + 2 * 2 * d + linear(e, 12 * d)  # two layer norms, one modulation of 12 chunks
    embeddings = (
        linear(t.in_channels * patch, d) + linear(t.text_hidden_size, d) + linear(d, e) + linear(e, e)
    )
    if t.ofs_embed_dim:
        embeddings += 2 * linear(t.ofs_embed_dim, t.ofs_embed_dim)
    final = 2 * 2 * d + linear(e, 2 * d) + linear(d, patch * t.out_channels)
    return t.num_layers * layer + embeddings + final + _learned_table(t, temporal_compression)


def _learned_table(t: TransformerConfig, temporal_compression: int) -> int:
    name, params = t.position.target.rpartition(".")[2], t.position.params
    if name != "LearnedPosition3D" and not params.get("learned_table"):
        return 0
    frames = math.ceil(((t.num_frames - 1) // temporal_compression + 1) / t.patch_size[0])
    grid = frames * (t.latent_height // t.patch_size[1]) * (t.latent_width // t.patch_size[2])
    return (t.text_length + grid) * t.hidden_size


def vae_parameters(v: VAEConfig) -> int:
    """Encoder and decoder; the decoder's norms are modulated by the latent (two 1x1x1 convolutions each)."""
    widths = [v.channels * m for m in v.channel_multipliers]

    def conv(inputs: int, outputs: int, taps: int = 27) -> int:
        return taps * inputs * outputs + outputs

    def norm(width: int, decoder: bool) -> int:
        return 2 * width + (2 * linear(v.z_channels, width) if decoder else 0)

    def block(inputs: int, outputs: int, decoder: bool) -> int:
        shortcut = linear(inputs, outputs) if inputs != outputs else 0
        norms = norm(inputs, decoder) + norm(outputs, decoder)
        return norms + conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    def levels(order: list[int], blocks: int, decoder: bool) -> int:
        total, width = 0, order[0] if decoder else v.channels
        for index, out in enumerate(order):
            total += block(width, out, decoder) + (blocks - 1) * block(out, out, decoder)
            if index < len(order) - 1:
                total += conv(out, out, taps=9)  # downsampling or upsampling: 3x3 in space
            width = out
        return total

    inner = widths[-1]
    encoder = conv(v.in_channels, v.channels) + levels(widths, v.num_res_blocks, False)
    encoder += 2 * block(inner, inner, False) + norm(inner, False) + conv(inner, 2 * v.z_channels)
    decoder = conv(v.z_channels, inner) + 2 * block(inner, inner, True)
    decoder += levels(widths[::-1], v.num_res_blocks + 1, True) + norm(widths[0], True)
    return encoder + decoder + conv(widths[0], v.in_channels)


def t5_encoder_parameters(config: dict[str, Any]) -> int:
    """A T5 v1.1 encoder with the keys of transformers' ``T5Config`` (its defaults where a key is absent)."""
    d, ff = config.get("d_model", 512), config.get("d_ff", 2048)
    layers, heads = config.get("num_layers", 6), config.get("num_heads", 8)
    inner = heads * config.get("d_kv", 64)
    gates = 2 if str(config.get("feed_forward_proj", "relu")).startswith("gated") else 1
    layer = 4 * d * inner + (gates + 1) * d * ff + 2 * d
    positions = config.get("relative_attention_num_buckets", 32) * heads
    return config.get("vocab_size", 32128) * d + layers * layer + positions + d


@dataclass(frozen=True)
class TextEncoder:
    parameters: int
    trained: bool
    bytes_per_weight: int


def text_encoder(config: Config) -> TextEncoder | None:
    """The T5 encoder of the text condition; None without one."""
    for part in config.model.conditions:
        if part.target.endswith(".TextCondition"):
            count = t5_encoder_parameters(part.params.get("config") or T5_V1_1_XXL)
            size = BYTES[part.params.get("dtype", "fp32")]
            trained = part.params.get("trainable", False) and config.lora is None  # LoRA freezes it
            return TextEncoder(count, trained, size)
    return None


def sampling_text_encoder(config: Config) -> TextEncoder | None:
    """That which sampling puts on its device: none with ``sample.text_features`` or ``sample.text_encoder_device``."""
    sample = config.sample
    is_elsewhere = sample is not None and (sample.text_features or sample.text_encoder_device)
    return None if is_elsewhere else text_encoder(config)


def network_parameters(config: Config) -> int:
    """The network that the run trains or adapts: the transformer with its adapters, or else the VAE."""
    if config.model.transformer is None:
        return vae_parameters(config.vae)
    compression = config.vae.temporal_compression if config.vae else 4
    adapters = lora_parameters(config) if config.lora else 0
    return transformer_parameters(config.model.transformer, compression) + adapters


def trained_parameters(config: Config) -> int:
    if config.lora and config.model.transformer:
        return lora_parameters(config)
    text = text_encoder(config)
    return network_parameters(config) + (text.parameters if text and text.trained else 0)
