"""What a run will need, in closed form from the configuration: parameters, tokens, FLOPs, memory per GPU.

Nothing is built and torch is not imported, so ``--dry-run`` answers at once. Parameters, tokens and FLOPs are exact
for the parts of this project; memory is exact for weights and optimizer states, and an estimate for activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cogvideox.config import Config, DataConfig, SampleConfig, TransformerConfig, VAEConfig
from cogvideox.flops import clip_of, forward_flops, step_flops

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

# Estimates, in tensors of tokens x width per layer that the backward pass keeps. Counted on diffusers' graph at full
# shape (22.2 for full fine-tuning, 13.4 with frozen weights); fused kernels keep fewer.
SAVED_TENSORS_FULL = 22.2
SAVED_TENSORS_LORA = 13.4
# Tensors of the VAE's first level alive at the peak of an encoding in one pass (13.8 GB for 49 x 480 x 720 in bf16).
VAE_LIVE_TENSORS = 3.2
# The same for decoding a chunk of 9 frames (5.9 GB at 480 x 720), and the network's own peak in tokens x width. All
# three are counted: tests/test_vae_memory.py, tests/test_transformer_memory.py.
VAE_DECODE_LIVE_TENSORS = 7.4
NETWORK_LIVE_TENSORS = 11.1


# --------------------------------------------------------------------------------------------------- parameters


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


def lora_parameters(config: Config) -> int:
    """A and B of every adapted linear layer; query_key_value holds three pairs."""
    lora, d = config.lora, config.model.transformer.hidden_size
    sizes = {
        "query_key_value": 3 * (d + d),
        "dense": d + d,
        "dense_h_to_4h": d + 4 * d,
        "dense_4h_to_h": 4 * d + d,
    }
    layers = (
        config.model.transformer.num_layers
        if lora.transformer_layers is None
        else len(lora.transformer_layers)
    )
    return layers * lora.rank * sum(sizes[name] for name in lora.layers)


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


# -------------------------------------------------------------------------------------------------------- memory


def training_memory(config: Config, world_size: int) -> dict[str, float]:
    """Bytes per GPU by kind. Entries that end in "(estimate)" are estimates, the others follow from the method."""
    train, size = config.train, BYTES[config.train.precision]
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 2)
    trained, total = trained_parameters(config), network_parameters(config)
    text = text_encoder(config)
    if text and text.trained:
        total += text.parameters
    shard = {level: world_size if stage >= level else 1 for level in (1, 2, 3)}
    result = {
        "weights": total * size / shard[3],
        "gradients": trained * size / shard[2],
        # ZeRO keeps its own fp32 copy of what it updates, in fp32 runs too.
        "fp32 masters": trained * 4 / shard[1] if stage or size < 4 else 0.0,
        "optimizer states": trained * 4 * _optimizer_states(train.optimizer.target) / shard[1],
        "averaged weights (EMA)": trained * 4 / world_size if train.ema_decay else 0.0,
    }
    if config.model.transformer is None:
        return result
    data = config.data
    if text and not text.trained and not (data and data.text_cache):
        result["text encoder, frozen"] = float(text.parameters * text.bytes_per_weight)
    needs_vae = data is None or data.latent_cache is None or config.model.has_image_condition
    if config.vae and needs_vae:
        result["VAE, frozen"] = float(vae_parameters(config.vae) * BYTES[config.vae.precision])
    if data and config.vae:
        result["activations (estimate)"] = activation_bytes(config)
        if data.latent_cache is None:
            result["VAE encoding, for a moment (estimate)"] = encode_bytes(config)
    return result


def sampling_memory(config: Config) -> dict[str, float]:
    """Bytes per GPU by kind while sampling; the text encoder is freed once the prompts are encoded."""
    sample, vae = config.sample, config.vae
    size, clip, text = (
        BYTES[sample.precision or "bf16"],
        clip_of(config, sample),
        sampling_text_encoder(config),
    )
    width = config.model.transformer.hidden_size
    return {
        "text encoder, freed after the prompts": float(text.parameters * text.bytes_per_weight)
        if text
        else 0.0,
        "transformer": float(network_parameters(config) * size),
        "VAE": float(vae_parameters(vae) * BYTES[vae.precision]),
        # Twice the batch: the prompt and its unconditional twin.
        "activations (estimate)": 2.0 * sample.batch_size * NETWORK_LIVE_TENSORS * clip.tokens * width * size,
        "VAE decoding, at the end (estimate)": decode_bytes(config),
    }


def decode_bytes(config: Config) -> float:
    """Peak of decoding one batch of videos: that of a chunk of its frames."""
    sample, vae = config.sample, config.vae
    frames = min(sample.num_frames, 2 * vae.temporal_compression + 1)
    pixels = sample.batch_size * frames * sample.height * sample.width
    return VAE_DECODE_LIVE_TENSORS * (pixels * vae.channels * BYTES[vae.precision])


def activation_bytes(config: Config) -> float:
    """What the backward pass keeps, by the estimates above: every layer, or the layers' inputs and one layer."""
    t, clip = config.model.transformer, clip_of(config, config.data)
    one = clip.tokens * t.hidden_size * BYTES[config.train.precision] * config.train.batch_size
    if t.checkpoint_activations:
        return one * (t.num_layers + SAVED_TENSORS_FULL)
    return one * t.num_layers * (SAVED_TENSORS_LORA if config.lora else SAVED_TENSORS_FULL)


def encode_bytes(config: Config) -> float:
    """Peak of encoding one batch of clips: it passes before the network's activations are alive."""
    vae, data = config.vae, config.data
    frames = data.num_frames if vae.encode_frames_per_pass is None else vae.encode_frames_per_pass + 1
    pixels = min(frames, data.num_frames) * data.height * data.width * config.train.batch_size
    return VAE_LIVE_TENSORS * pixels * vae.channels * BYTES[vae.precision]


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


def _optimizer_states(target: str) -> int:
    name = target.rpartition(".")[2].lower()
    return 1 if name in ("sgd", "lion", "muon") else 2


# ------------------------------------------------------------------------------------------------------- the text


def describe(config: Config, world_size: int = 1, *, sampling: bool | None = None) -> str:
    """The plan as a table: parameters, tokens per clip, FLOPs, memory per GPU.

    sampling: the plan of sample_video.py instead of train_video.py's. None: where there is no section ``train``.
    """
    sampling = config.train is None if sampling is None else sampling
    rows = [("" if i else "parameters", name, f"{n:,}") for i, (name, n) in enumerate(_counts(config))]
    section = config.sample if sampling else config.data
    if config.model.transformer and config.vae and section:
        rows += _work(config, section)
    if sampling and config.model.transformer and config.vae and section:
        memory = sampling_memory(config)
        largest = _peak(memory, *(name for name in memory if name not in ("transformer", "VAE")))
        rows += _memory_rows(
            memory, f"largest at a time: {config.sample.precision or 'as stored'} (estimate)", largest
        )
    elif config.train and not sampling:
        memory = training_memory(config, world_size)
        stage = config.deepspeed.get("zero_optimization", {}).get("stage", 2)
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        method = f"ZeRO-{stage} on {ranks}, {config.train.precision}, batch {config.train.batch_size}"
        if config.model.transformer and config.data and config.vae:
            largest = _peak(memory, "activations (estimate)", "VAE encoding, for a moment (estimate)")
            rows += _memory_rows(memory, f"largest at a time: {method} (estimate)", largest)
        else:
            rows += _memory_rows(memory, f"without activations: {method}", sum(memory.values()))
    width = max((len(name) for _, name, _ in rows), default=0)
    return "\n".join(f"{kind:<16}{name:<{width}}  {value:>16}".rstrip() for kind, name, value in rows)


def _peak(memory: dict[str, float], *in_turn: str) -> float:
    """The sum where those named ``in_turn`` are never alive together."""
    turns = [memory[name] for name in in_turn if name in memory]
    return sum(memory.values()) - sum(turns) + max(turns, default=0.0)


def _memory_rows(memory: dict[str, float], total: str, largest: float) -> list[tuple[str, str, str]]:
    rows = [("", name, _size(count)) for name, count in memory.items() if count] + [
        ("", total, _size(largest))
    ]
    return [("memory per GPU", *rows[0][1:]), *rows[1:]]


def _counts(config: Config) -> list[tuple[str, int]]:
    counts: list[tuple[str, int]] = []
    if t := config.model.transformer:
        compression = config.vae.temporal_compression if config.vae else 4
        name = f"transformer, {t.num_layers} layers x {t.hidden_size}, {t.num_attention_heads} heads"
        counts.append((name, transformer_parameters(t, compression)))
    if config.vae:
        counts.append(("VAE", vae_parameters(config.vae)))
    if text := text_encoder(config):
        counts.append(("text encoder" + (", trained" if text.trained else ""), text.parameters))
    if config.lora and config.model.transformer:
        counts.append((f"LoRA, rank {config.lora.rank}", lora_parameters(config)))
    if config.train:
        counts.append(("trained in all", trained_parameters(config)))
    return counts


def _work(config: Config, section: DataConfig | SampleConfig) -> list[tuple[str, str, str]]:
    clip = clip_of(config, section)
    flops = forward_flops(config.model.transformer, clip)
    size = f"{section.num_frames} frames {section.height}x{section.width} at {section.fps:g} fps"
    rows = [
        ("clip", size, f"{section.num_frames / section.fps:.1f} s"),
        ("", f"latents, {clip.latents} x {clip.height} x {clip.width}", f"{clip.video_tokens:,} tokens"),
        ("", "with the text", f"{clip.tokens:,} tokens"),
        (
            "work",
            f"one forward pass, {flops.attention / flops.forward:.0%} attention",
            _operations(flops.forward),
        ),
    ]
    if section is config.data:
        rows.append(
            (
                "",
                "one training step, per clip",
                _operations(step_flops(config, clip, lora_parameters(config) if config.lora else 0)),
            )
        )
    else:
        rows.append(
            ("", f"{section.steps} steps with guidance", _operations(2 * section.steps * flops.forward))
        )
    return rows


def _operations(flops: float) -> str:
    unit, scale = ("GFLOP", 1e9) if flops < 1e12 else ("TFLOP", 1e12) if flops < 1e16 else ("PFLOP", 1e15)
    return f"{flops / scale:,.1f} {unit}"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"
