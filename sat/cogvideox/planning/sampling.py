"""What each stage of sampling needs on the device, in bytes of tensors, for a set of savings.

Weights are exact; activations are peaks counted at full size (tests/test_transformer_memory.py) or the planner's. Not
in it: the driver's own context and kernels' workspaces, about half a GiB on a GPU.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from cogvideox import plan
from cogvideox.config import Config
from cogvideox.flops import clip_of

LIVE_TENSORS = 8.2
"""The network's peak in tensors of tokens x width, counted: at the attention, whether the MLP runs in chunks or not."""

LIVE_TENSORS_UNFUSED = 11.1
"""The same where the GELU is not in its product's epilogue and the MLP runs whole: in the MLP."""

CHUNK_ROWS = 8192
"""Tokens of an MLP chunk: as many rows as a matrix product needs to keep a large GPU busy."""


# Tensors of the VAE's first level alive while it decodes a chunk of 9 frames (5.9 GB at 480 x 720), counted:
# tests/test_vae_memory.py.
VAE_DECODE_LIVE_TENSORS = 7.4


@dataclass(frozen=True)
class Savings:
    """One set. ``text_encoder``, ``transformer``: resident, in turn or by layers; ``vae``: resident or in turn.

    in turn: on the device only for its own stage.  by layers: two layers at a time.
    modulations: the weights that make them in host memory; they are computed once per schedule in all sets.
    mlp_chunks: the MLP in pieces of CHUNK_ROWS tokens.
    slice_batch: the VAE takes the clips of a batch one after the other.
    """

    name: str
    why: str
    modulations: bool = True
    mlp_chunks: bool = True
    slice_batch: bool = True
    text_encoder: str = "in turn"
    transformer: str = "in turn"
    vae: str = "resident"


LADDER = (
    Savings(
        "fast",
        "all models stay on the device, nothing is recomputed or moved",
        modulations=False,
        mlp_chunks=False,
        slice_batch=False,
        text_encoder="resident",
        transformer="resident",
    ),
    Savings(
        "balanced",
        "the text encoder first and the transformer after it, adaLN modulations once per schedule, the MLP in chunks; "
        "costs seconds per run",
    ),
    Savings(
        "balanced, text encoder by layers",
        "as balanced, and the text encoder passes through the device layer by layer; costs seconds per prompt",
        text_encoder="by layers",
    ),
    Savings(
        "one model at a time",
        "the transformer and the VAE wait for each other in host memory too; costs seconds per video",
        text_encoder="by layers",
        vae="in turn",
    ),
    Savings(
        "small",
        "text encoder and transformer pass through the device layer by layer, copied while the layer before computes; "
        "costs time in every step where a layer computes faster than it is copied",
        text_encoder="by layers",
        transformer="by layers",
        vae="in turn",
    ),
)
"""From fastest to smallest. All of them are exact: no pixel changes beyond rounding."""

NAMES = ("fast", "balanced", "small")
"""Those that ``sample.memory`` names; it also takes a limit."""


def memory_limit(memory: str) -> float:
    """Bytes of a limit such as "12 GiB". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*GiB\s*", str(memory))
    if not match or not float(match[1]):
        raise ValueError(
            f"sample.memory={memory!r}: expected fast, balanced, small, or a size such as '12 GiB'"
        )
    return float(match[1]) * 2**30


def savings_for(config: Config, memory: str) -> Savings | None:
    """The set that a word names, or the fastest that fits into a limit; None where none does."""
    if memory in NAMES:
        return next(savings for savings in LADDER if savings.name == memory)
    limit, quantize = memory_limit(memory), config.sample.quantize
    return next((s for s in LADDER if max(stage_bytes(config, s, quantize).values()) <= limit), None)


def stage_bytes(config: Config, savings: Savings, quantize: str | None = None) -> dict[str, float]:
    """Peak bytes of the stages ``text``, ``denoising`` and ``decoding``."""
    text, network, vae = text_bytes(config), network_bytes(config, quantize), vae_bytes(config, savings)
    text_here = text["by layers" if savings.text_encoder == "by layers" else "whole"]
    adaln = 0.0 if savings.modulations else network["adaln"]
    table = network["table"]
    layers = network["two layers" if savings.transformer == "by layers" else "layers"]
    transformer_here = network["ends"] + table + adaln + layers
    # The ends stay; the layers are gone from the other stages where they come in turn.
    transformer_after = transformer_here if savings.vae == "resident" else network["ends"] + table
    transformer_before = transformer_here if savings.transformer == "resident" else network["ends"]
    left_over = text["kept"] if savings.text_encoder == "resident" else 0.0
    vae_besides = vae["weights"] if savings.vae == "resident" else 0.0
    vae_for_images = vae["weights"] if _has_image_condition(config) else 0.0
    return {
        "text": text_here + transformer_before + max(vae_besides, vae_for_images),
        "denoising": transformer_here + activation_bytes(config, savings, quantize) + vae_besides + left_over,
        "decoding": transformer_after + vae["weights"] + vae["decoding"] + left_over,
    }


def activation_bytes(config: Config, savings: Savings, quantize: str | None = None) -> float:
    """Of a guidance pair per prompt of the batch, and the cast copy of an eight-bit weight at its product.

    An edit with ``sample.reference_steps`` has the reference as a third item of the pair.
    """
    sample, t = config.sample, config.model.transformer
    unfused = quantize is not None and not savings.mlp_chunks
    per_item = LIVE_TENSORS_UNFUSED if unfused else LIVE_TENSORS
    live, size = 2 * per_item, plan.BYTES[sample.precision or "bf16"]
    if sample.invert and sample.reference_steps:
        # At the attention, with the pair's keys and values again, twice as long: 2 x 2 x 2 tensors of one item.
        live = max(3 * per_item, 3 * LIVE_TENSORS + 8)
    tokens = sample.batch_size * clip_of(config, sample).tokens
    cast = 4 * t.hidden_size**2 * size if quantize else 0
    return live * tokens * t.hidden_size * size + cast


def network_bytes(config: Config, quantize: str | None = None) -> dict[str, float]:
    """Of the transformer: ``layers`` without adaLN, ``two layers``, ``adaln``, ``ends`` (the rest), and ``table``."""
    t, sample = config.model.transformer, config.sample
    d, size = t.hidden_size, plan.BYTES[sample.precision or "bf16"]
    adaln = t.num_layers * plan.linear(t.time_embed_dim, 12 * d)
    matrices = 12 * d * d  # q k v, the output of attention, and the MLP
    others = 9 * d + 2 * 2 * d  # their biases and two layer norms
    layer = matrices * (1 if quantize else size) + others * size + (9 * d * 4 if quantize else 0)  # scales
    ends = plan.network_parameters(config) - adaln - t.num_layers * (matrices + others)
    return {
        "layers": float(t.num_layers * layer),
        "two layers": 2.0 * layer,
        "adaln": float(adaln * size),
        "ends": float(ends * size),
        "table": float(sample.steps * (t.num_layers * 12 + 2) * d * size),
    }


def text_bytes(config: Config) -> dict[str, float]:
    """Of the text encoder: ``whole``, ``by layers`` (embedding and two layers), ``kept`` (after the prompts, fast)."""
    encoder = plan.sampling_text_encoder(config)
    if encoder is None:
        return {"whole": 0.0, "by layers": 0.0, "kept": 0.0}
    part = next(p for p in config.model.conditions if p.target.endswith(".TextCondition"))
    t5 = part.params.get("config") or plan.T5_V1_1_XXL
    embedding = t5.get("vocab_size", 32128) * t5.get("d_model", 512)
    layer = (encoder.parameters - embedding) / t5.get("num_layers", 6)
    size = encoder.bytes_per_weight
    whole = float(encoder.parameters * size)
    # A pretrained encoder is freed once the prompts are encoded; one of random weights could not be read again.
    kept = whole if part.params.get("config") else 0.0
    return {"whole": whole, "by layers": min(whole, (embedding + 2 * layer) * size), "kept": kept}


def vae_bytes(config: Config, savings: Savings) -> dict[str, float]:
    """Of the VAE: ``weights``, and the peak of ``decoding`` besides them, in tiles where ``vae`` asks for them."""
    vae, sample = config.vae, config.sample
    side = vae.spatial_compression
    height = min(sample.height, (vae.tile_latent_height or sample.height) * side)
    width = min(sample.width, (vae.tile_latent_width or sample.width) * side)
    batch = 1 if savings.slice_batch else sample.batch_size
    tile = dataclasses.replace(sample, height=height, width=width, batch_size=batch)
    tile = dataclasses.replace(config, sample=tile)
    decoding = decode_bytes(tile)
    if (height, width) != (sample.height, sample.width):
        # All tiles of a clip are kept until they are blended, and the blended clip beside them.
        pixels = batch * sample.num_frames * sample.height * sample.width * vae.in_channels
        decoding += 2 * pixels * plan.BYTES[vae.precision]
    return {"weights": plan.vae_parameters(vae) * float(plan.BYTES[vae.precision]), "decoding": decoding}


def decode_bytes(config: Config) -> float:
    """Peak of decoding one batch of videos: that of a chunk of its frames."""
    sample, vae = config.sample, config.vae
    frames = min(sample.num_frames, 2 * vae.temporal_compression + 1)
    pixels = sample.batch_size * frames * sample.height * sample.width
    return VAE_DECODE_LIVE_TENSORS * (pixels * vae.channels * plan.BYTES[vae.precision])


def _has_image_condition(config: Config) -> bool:
    return any("FirstFrame" in part.target for part in config.model.conditions)
