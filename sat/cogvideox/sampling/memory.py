"""The one knob for memory, ``sample.memory``: which savings a run takes, why, and how they are applied.

    plan = choose_memory(config, config.sample.memory, device)   # before the weights are read
    system.prepare_sampling(device, place=False)
    apply_memory(system, plan, device)

fast, balanced and small are sets of exact savings; "N GiB" takes the fastest set that fits into N GiB of tensors. Lossy
savings are taken only where they are asked for: ``sample.quantize``, and tiles of the VAE (``vae.tile_latent_height``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.config import Config
from cogvideox.model.modulation import Modulations, has_modulations
from cogvideox.model.quantize import check_method, quantize
from cogvideox.planning.sampling import CHUNK_ROWS, LADDER, NAMES, Savings, savings_for, stage_bytes
from cogvideox.sampling.offload import LayerOffload, Turns, WholeOffload, move_rest, repeated_layers
from cogvideox.system import VideoDiffusion

logger = logging.getLogger("cogvideox")


@dataclass(frozen=True)
class Plan:
    """The chosen savings. memory: as asked for.  peaks: bytes by stage, figures of the planner, not measurements."""

    memory: str
    savings: Savings
    quantize: str | None
    report: bool
    peaks: dict[str, float]

    @property
    def peak(self) -> float:
        return max(self.peaks.values())

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {_gib(count)}" for name, count in self.peaks.items())
        name = "" if self.savings.name == self.memory else f" takes {self.savings.name}"
        lossy = f"; weights in {self.quantize} (changes the video)" if self.quantize else ""
        return f"sample.memory={self.memory}{name}: {self.savings.why}{lossy}. Planned: {stages}"


def choose_memory(config: Config, memory: str | None = None, device: torch.device | None = None) -> Plan:
    """The savings for ``memory`` ("fast", "balanced", "small" or "N GiB"; None: ``sample.memory``), logged with why.

    device: where the run takes place; a plan that is larger than its memory is warned about.  Raises ValueError for
    another word, and for a limit that the smallest set does not meet (it says what would).
    """
    sample = config.sample
    memory = sample.memory if memory is None else memory
    if sample.quantize is not None:
        check_method(sample.quantize)
    savings = savings_for(config, memory)
    plans = [_plan(config, memory, savings) for savings in LADDER]
    if savings is None:
        raise ValueError(_too_little(config, memory, plans[-1]))
    chosen = plans[LADDER.index(savings)]
    if (sample.quantize or "").startswith("torchao") and chosen.savings.transformer != "resident":
        own = sample.quantize.removeprefix("torchao_")
        raise ValueError(
            f"sample.quantize={sample.quantize}: torchao's weights cannot wait in host memory, as "
            f"sample.memory={memory} wants; use sample.quantize={own}, or sample.memory=fast"
        )
    if chosen.savings.transformer == "by layers" and config.model.transformer.compile != "none":
        raise ValueError(
            f"model.transformer.compile={config.model.transformer.compile}: layers that pass through the device one by "
            f"one, as sample.memory={memory} wants, cannot be compiled; set model.transformer.compile=none"
        )
    logger.info("%s", chosen)
    available = _device_bytes(device)
    if available is not None and chosen.peak > available:
        logger.warning(
            "sample.memory=%s plans %s and the device has %s: use sample.memory=%s",
            memory,
            _gib(chosen.peak),
            _gib(available),
            next((p.savings.name for p in plans if p.peak < available and p.savings.name in NAMES), "small"),
        )
    return chosen


def apply_memory(system: VideoDiffusion, plan: Plan, device: torch.device) -> None:
    """Quantize, place and hook the models of a system whose weights lie in host memory (``place=False``).

    Applied once to a system, after its LoRAs are merged or attached. What it hooks runs without gradients.
    """
    net, savings = system.transformer, plan.savings
    if plan.quantize is not None:
        quantize(net, plan.quantize, _probe(system) if plan.report else None)
    if savings.mlp_chunks:
        net.chunk_mlp(CHUNK_ROWS)
    system.vae.slice_batch |= savings.slice_batch
    if savings.transformer == "resident":
        system.to(device)
        system.vae.to(device)
        system.once_per_run = OncePerRun(system)
        return
    turns, apart = Turns(), [net.transformer.layers]
    if savings.modulations:
        adaln = net.mixins["adaln_layer"].adaLN_modulations
        apart.append(adaln)
        system.once_per_run = OncePerRun(system, LayerOffload(adaln, device).free)
    layers = net.transformer.layers
    if savings.transformer == "by layers":
        offload = LayerOffload(layers, device)
        load, park = _nothing, offload.free
    else:
        offload = WholeOffload(layers, device)
        load, park = offload.load, offload.park
    move_rest(net, apart, device)
    evicts = ("text", "vae") if savings.vae == "in turn" else ("text",)
    turns.add("transformer", load, park, at=[net], evicts=evicts)
    _place_vae(system.vae, savings, turns, device)
    for embedder in system.conditioner.embedders:
        _place_condition(embedder, savings, turns, device)


def _place_vae(vae: nn.Module, savings: Savings, turns: Turns, device: torch.device) -> None:
    if savings.vae == "resident":
        vae.to(device)
        return
    offload = WholeOffload([vae.encoder, vae.decoder], device)
    turns.add("vae", offload.load, offload.park, at=[vae.encoder, vae.decoder], evicts=("transformer",))


def _place_condition(embedder: nn.Module, savings: Savings, turns: Turns, device: torch.device) -> None:
    """A text encoder may be read only at its first use, and again after a release: each time it is placed anew."""
    is_encoder = hasattr(embedder, "load") and hasattr(embedder, "transformer")
    if not is_encoder or embedder.is_placed:
        embedder.to(device)
        return
    offloads: dict[int, tuple[nn.Module, LayerOffload]] = {}

    def load() -> None:
        embedder.load()
        encoder = embedder.transformer
        if savings.text_encoder != "by layers":
            encoder.to(device)
            return
        blocks = repeated_layers(encoder)
        if id(encoder) not in offloads:
            offloads.clear()
            offloads[id(encoder)] = (encoder, LayerOffload(blocks, device))
        move_rest(encoder, [blocks], device)

    def park() -> None:
        encoder = embedder.transformer
        for _, offload in offloads.values():
            offload.free()
        if encoder is None:  # released
            offloads.clear()
        elif savings.text_encoder == "by layers":
            move_rest(encoder, [repeated_layers(encoder)], torch.device("cpu"))
        else:
            encoder.to("cpu")

    # The embedder's call, not the encoder's: the others must be gone before the encoder comes.
    turns.add("text", load, park, at=[embedder], evicts=("transformer", "vae"))


class OncePerRun:
    """``VideoDiffusion.once_per_run`` of a network whose weights stay as they are: see there.

    Modulations are computed before the first step and kept for the next run with the same timesteps. ``free`` is called
    after that: the weights that make them are not needed again.
    """

    def __init__(self, system: VideoDiffusion, free: Callable[[], None] = lambda: None):
        self._net, self._free = system.transformer, free
        self._ofs = system.config.model.ofs if self._net.ofs_embed_dim is not None else None
        self._table: Modulations | None = None

    @contextmanager
    def __call__(self, timesteps: Tensor) -> Iterator[None]:
        if has_modulations(self._net):
            if self._table is None or self._table.timesteps != tuple(map(float, timesteps.tolist())):
                self._table = self._net.precompute_modulations(timesteps, self._ofs)
                self._free()
        with self._net.use_modulations(self._table), self._net.project_texts_once():
            yield


def _plan(config: Config, memory: str, savings: Savings) -> Plan:
    sample = config.sample
    peaks = stage_bytes(config, savings, sample.quantize)
    return Plan(memory, savings, sample.quantize, sample.quantize_report, peaks)


def _too_little(config: Config, memory: str, least: Plan) -> str:
    stage = max(least.peaks, key=least.peaks.get)
    ways = [f"sample.memory='{_ceil_gib(least.peak)} GiB' or small"]
    if stage == "decoding" and config.vae.tile_latent_height is None:
        ways.append("decode in tiles (vae.tile_latent_height and tile_latent_width; changes pixels a little)")
    if stage == "denoising" and least.quantize is None:
        ways.append("sample.quantize=int8 (changes the video)")
    if config.sample.batch_size > 1:
        ways.append("sample.batch_size=1")
    ways.append(f"a smaller size than {config.sample.height}x{config.sample.width}")
    return (
        f"sample.memory={memory!r} cannot be met: the least that exact savings need is {_gib(least.peak)}, in "
        f"{stage}. Use {', or '.join(ways)}"
    )


def _ceil_gib(count: float) -> str:
    return f"{-(-count // (2**30 / 10)) / 10:g}"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _device_bytes(device: torch.device | None) -> int | None:
    if device is None or device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def _probe(system: VideoDiffusion) -> dict[str, Any]:
    """Arguments of one forward pass at the middle timestep, of noise: one frame of up to 16 x 16 latents, as the
    weights still lie in host memory, where a clip of full size would take an hour."""
    net, g, frames = system.transformer, system.transformer.geometry, system.patch_t
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = (min(16, g["latent_height"]), min(16, g["latent_width"]))
    arguments: dict[str, Any] = {
        "x": noise(1, frames, net.out_channels, *size),
        "timesteps": torch.tensor([500]),
        "context": noise(1, net.text_length, g["text_hidden_size"]),
    }
    if net.in_channels > net.out_channels:
        arguments["concat_images"] = noise(1, frames, net.in_channels - net.out_channels, *size)
    if net.ofs_embed_dim is not None:
        arguments["ofs"] = system.config.model.ofs
    return arguments


def _nothing() -> None:
    """Layers that pass through the device come as they are called; weights that stay are not freed."""
