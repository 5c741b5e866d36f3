"""How long a training step takes, by part: a roofline from counted operations, bytes and rates. Estimates throughout.

The rates are fractions of a data sheet's, stated here with their source; a measured run replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogvideox import plan
from cogvideox.config import Config
from cogvideox.flops import clip_of, forward_flops, recomputed_flops
from cogvideox.gpus import GPU
from cogvideox.planning.communication import Cluster, exposed_seconds
from cogvideox.planning.memory import method_of
from cogvideox.recompute import Recompute, read_recompute

MATMUL = 0.68
"""Matrix products: 650 to 700 of 989 TFLOP/s on an H100 or H200 at widths of 1920 and 3072 (shared PERFORMANCE notes,
a model of published kernel rates, not measured by this project)."""

ATTENTION_HOPPER, ATTENTION = 0.33, 0.60
"""Attention with heads of 64 channels: FlashAttention-2, which torch chooses, reaches 324 of 989 TFLOP/s on Hopper (FA3
paper, Shah et al. 2024, fig. 5); about 190 of 312 on an A100 (FA2 paper, Dao 2023, fig. 5)."""

CONVOLUTION = 0.33
"""The VAE's 3D convolutions: 250 to 400 of 989 TFLOP/s."""

BANDWIDTH = 0.90
"""Of the memory's rate in element-wise kernels: 4.3 of 4.8 TB/s measured on an H200."""

PASSES = 70
"""Times a block reads or writes a tensor of tokens x width in its element-wise operations, unfused; forward."""

UPDATE_BYTES = 28
"""Read and written by a fused AdamW for a parameter: gradient 4, master 8, two averages 16; and what copies to and from
bf16 takes (6 more); an optimizer that is not fused goes over them several times."""

HOST_GB_S, PCIE_GB_S = 50.0, 25.0
"""Of the host's memory for one rank, and of its way to the GPU, where the optimizer is offloaded."""

ENCODE_FLOPS_PER_PIXEL = 149.0e12 / (49 * 480 * 720)
"""The published VAE (128 channels), counted; other widths by the square."""


@dataclass(frozen=True)
class StepTime:
    """Seconds per optimizer step, by part."""

    text: float
    vae: float
    forward: float
    backward: float
    recomputation: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        return (
            self.text
            + self.vae
            + self.forward
            + self.backward
            + self.recomputation
            + self.update
            + self.communication
        )


def step_time(config: Config, cluster: Cluster, ranks: int) -> StepTime:
    """Of one rank; all do the same. The policy of ``config`` must not be a budget."""
    gpu, t, train = cluster.gpu, config.model.transformer, config.train
    clips = train.batch_size * train.gradient_accumulation_steps
    clip = clip_of(config, config.data)
    rates = Rates.of(gpu)
    method = method_of(config, ranks)

    adapters = plan.lora_parameters(config) if config.lora else 0
    flops, adapted = forward_flops(t, clip), 2.0 * clip.tokens * adapters
    elementwise = PASSES * t.num_layers * clip.tokens * t.hidden_size * plan.BYTES[train.precision]
    passing = elementwise / rates.memory
    forward = (flops.matmul + adapted) / rates.matmul + flops.attention / rates.attention + passing
    products = (1 if config.lora else 2) * flops.matmul + 2 * adapted
    backward = products / rates.matmul + 2.5 * flops.attention / rates.attention + 2 * passing
    again = recomputed_flops(config, clip, adapters)
    policy = read_recompute(t.checkpoint_activations)
    assert isinstance(policy, Recompute), "resolve the budget first"
    part = policy.counts(t.num_layers).get(policy.what, 0) / t.num_layers if policy.what != "none" else 0.0
    recomputation = again.matmul / rates.matmul + again.attention / rates.attention + part * passing

    text, data, encoder = 0.0, config.data, plan.text_encoder(config)
    if encoder and (encoder.trained or data.text_cache is None):
        text = 2.0 * encoder.parameters * t.text_length * (3 if encoder.trained else 1) / rates.matmul
    # An image condition encodes its first frame in every step, also beside cached latents.
    frames = (data.num_frames if data.latent_cache is None else 0) + config.model.has_image_condition
    work = ENCODE_FLOPS_PER_PIXEL * frames * data.height * data.width * (config.vae.channels / 128) ** 2
    vae = work / rates.convolution
    return StepTime(
        text=clips * text,
        vae=clips * vae,
        forward=clips * forward,
        backward=clips * backward,
        recomputation=clips * recomputation,
        update=_update_seconds(method, rates),
        communication=exposed_seconds(method, cluster, clips * forward, clips * (backward + recomputation)),
    )


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s that a GPU is expected to reach."""

    matmul: float
    attention: float
    convolution: float
    memory: float

    @classmethod
    def of(cls, gpu: GPU) -> Rates:
        sheet, is_hopper = gpu.bf16_tflops * 1e12, gpu.name.startswith(("H", "B"))
        return cls(
            matmul=MATMUL * sheet,
            attention=(ATTENTION_HOPPER if is_hopper else ATTENTION) * sheet,
            convolution=CONVOLUTION * sheet,
            memory=BANDWIDTH * gpu.memory_gb_s * 1e9,
        )


def _update_seconds(method, rates: Rates) -> float:
    mine = method.on_gpu(method.trained, 1)
    per_parameter = UPDATE_BYTES - 16 + 2 * method.states + 6 + 2 * method.temporaries
    if not method.offload:
        return mine * per_parameter / rates.memory
    moved = mine * 2 * method.size / (PCIE_GB_S * 1e9)  # gradients down, weights up
    return moved + mine * per_parameter / (HOST_GB_S * 1e9)
