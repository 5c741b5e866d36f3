"""Memory of a training run per GPU, by kind in each phase of a step: what is never alive together is not added up.

Not in it: the driver's own context and kernels' workspaces (``RESERVE``).
"""

from __future__ import annotations

from cogvideox import plan
from cogvideox.config import Config
from cogvideox.lora_sizes import quantized_base
from cogvideox.optimizer_names import known_optimizer
from cogvideox.planning import states
from cogvideox.planning.activations import activations
from cogvideox.planning.states import Method

RESERVE = 1.0 * 2**30
"""What a GPU must have free beside the tensors (estimate): the driver's context, workspaces, fragments."""

# Tensors of the VAE's first level alive at the peak of an encoding (13.8 GB for 49 x 480 x 720 in one pass, in bf16),
# counted: tests/test_vae_memory.py.
VAE_LIVE_TENSORS = 3.2

# The same of one of several passes (4.2 GB for 9 frames): with the frames that its convolutions keep for the next.
VAE_LIVE_TENSORS_IN_PASSES = 5.3

Phases = dict[str, dict[str, float]]
"""Phase -> kind -> bytes."""


def zero_section(config: Config) -> dict:
    return config.deepspeed.get("zero_optimization", {})


def method_of(config: Config, ranks: int) -> Method:
    """How this run updates its weights on each of ``ranks``."""
    train, zero = config.train, zero_section(config)
    size, stage = plan.BYTES[train.precision], zero.get("stage", 2)
    trained, total = plan.trained_parameters(config), plan.network_parameters(config)
    text = plan.text_encoder(config)
    if text and text.trained:
        total += text.parameters
    offload = (zero.get("offload_optimizer") or {}).get("device") == "cpu" or bool(zero.get("cpu_offload"))
    quantized, _ = quantized_base(config)
    states_bytes, temporaries = optimizer_bytes(train.optimizer.target, train.optimizer.params)
    return Method(
        trained=trained,
        frozen=total - trained - quantized,
        size=size,
        states=states_bytes,
        temporaries=temporaries,
        stage=stage,
        ranks=ranks,
        offload=offload and stage > 0,
        accumulation=train.gradient_accumulation_steps,
        bucket=zero.get("reduce_bucket_size", states.BUCKET_ELEMENTS),
        overlaps=zero.get("overlap_comm", True),
        shadow=4 if train.ema_decay else 0,
    )


def optimizer_bytes(target: str, params: dict) -> tuple[float, float]:
    """Bytes per trained parameter of an optimizer's states, and of its temporaries during the update."""
    name = target.rpartition(".")[2].lower()
    states = known_optimizer(target).state_bytes
    if name == "sgd" and not params.get("momentum"):
        states = 0.0
    fused = params.get("fused") or "fused" in name or "bitsandbytes" in target
    return states, 0.0 if fused or states == 0 else 8.0


def training_phases(config: Config, ranks: int) -> Phases:
    """Bytes per GPU in each phase; without a transformer (a run that trains the VAE) of its states only."""
    method = method_of(config, ranks)
    kept = {kind: count for kind, count in states.resident(method).items() if count}
    if config.lora and config.lora.quantize_base:
        kept["frozen base in eight bits"] = float(quantized_base(config)[1])  # buffers: no stage divides them
    kept |= _frozen_models(config)
    # Between micro-steps the gradients of those before wait for the others.
    waiting = {"gradients": states.gradients(method)} if method.accumulation > 1 else {}
    phases: Phases = {}
    known = config.model.transformer is not None and config.data is not None and config.vae is not None
    if known and config.data.latent_cache is None:
        phases["encoding"] = kept | waiting | {"VAE at work": encode_bytes(config)}
    if known:
        needed = activations(config)
        made = states.gradients(method) - (0.0 if waiting else min(needed.pending, states.gradients(method)))
        start, end = needed.start + sum(waiting.values()), needed.end + made
        grads = made if end >= start else sum(waiting.values())
        phases["forward and backward"] = kept | {
            "gradients": grads,
            "buckets": states.buckets(method),
            "activations": needed.end if end >= start else needed.start,
        }
    phases["update"] = kept | {"gradients": states.gradients(method), "update at work": states.update(method)}
    return phases


def peak(phases: Phases) -> tuple[str, float]:
    """The phase that needs most, and how much."""
    sums = {phase: sum(kinds.values()) for phase, kinds in phases.items()}
    phase = max(sums, key=sums.get)
    return phase, sums[phase]


def training_peak(config: Config, ranks: int) -> float:
    return peak(training_phases(config, ranks))[1]


def _frozen_models(config: Config) -> dict[str, float]:
    """VAE and text encoder, as far as latents and text features do not come from the caches."""
    if config.model.transformer is None:
        return {}
    text, data, result = plan.text_encoder(config), config.data, {}
    if text and not text.trained and not (data and data.text_cache):
        result["text encoder"] = float(text.parameters * text.bytes_per_weight)
    if config.vae and (data is None or data.latent_cache is None or config.model.has_image_condition):
        result["VAE"] = float(plan.vae_parameters(config.vae) * plan.BYTES[config.vae.precision])
    return result


def encode_bytes(config: Config) -> float:
    """Peak of encoding one batch of clips: it passes before the network's activations are alive."""
    vae, data = config.vae, config.data
    frames = data.num_frames if vae.encode_frames_per_pass is None else vae.encode_frames_per_pass + 1
    side = vae.spatial_compression
    height = min(data.height, (vae.tile_latent_height or data.height) * side)
    width = min(data.width, (vae.tile_latent_width or data.width) * side)
    clips = 1 if vae.slice_batch else config.train.batch_size
    pixels = min(frames, data.num_frames) * height * width * clips
    live = VAE_LIVE_TENSORS if frames >= data.num_frames else VAE_LIVE_TENSORS_IN_PASSES
    return live * pixels * vae.channels * plan.BYTES[vae.precision]
