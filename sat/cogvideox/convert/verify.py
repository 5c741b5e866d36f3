"""One seeded forward through a model and through its conversion, compared stage by stage.

Weights under SAT names run in this project's network, a diffusers folder in diffusers' own class, which goes by its own
config.json: a wrong flag there shows like a wrong tensor. The arithmetic is float32 whatever type the weights have, one
module widened at a time, and one side runs after the other.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.convert import probe as probing
from cogvideox.convert.probe import Probe
from cogvideox.convert.stages import (
    Outputs,
    Stage,
    compute_in_float32,
    first_failure,
    format_stages,
    record,
)
from cogvideox.model.position import slice_learned_table
from cogvideox.vae.blocks import ResBlock
from cogvideox.vae.causal_conv import CausalConv3d
from cogvideox.weights import transformer_keys, vae_keys
from cogvideox.weights.geometry import Geometry, shapes_of, transformer_geometry, vae_geometry
from cogvideox.weights.lora.low_rank import Lora, add_to, combine
from cogvideox.weights.reader import WeightsReader

__all__ = ["Stage", "first_failure", "format_stages", "verify"]

logger = logging.getLogger("cogvideox")

EPS_NOTE = "the final norm's eps is {:g} in diffusers, {:g} in the published code"


def verify(
    original: str | Path,
    converted: str | Path,
    component: str,
    *,
    ema: bool = True,
    masters: bool = False,
    loras: Sequence[tuple[Any, float]] = (),
) -> list[Stage]:
    """The stages in the order in which they run; ``first_failure`` says whether both sides agree.

    component: "transformer" or "vae". ema, masters: whether it was the averaged weights of ``original``, or the
    optimizer's fp32 masters, that were converted.
    loras: what was merged on the way (``LoraFile`` or ``Lora``, strength); it is added to the original.
    Raises ValueError: no such component on a side, another model, keys that do not fit, diffusers missing.
    """
    runs = {"transformer": _run_transformers, "vae": _run_vaes}
    if component not in runs:
        raise ValueError(f"verify: there is no component {component!r}; expected {' or '.join(runs)}")
    sides = _Side(original, component, ema, masters), _Side(converted, component, ema)
    lora = combine([(getattr(lora, "modules", lora), strength) for lora, strength in loras])
    if sides[0].reader.info.lora_rank and not lora:
        raise ValueError(
            f"{original} is {sides[0].reader.info.variant}: verify compares merged weights, so it needs to be told "
            f"which LoRA was merged (loras)"
        )
    sides[0].round_to = _shorter_type(*sides)
    with torch.no_grad():
        before, after, known = runs[component](*sides, lora)
    return [
        Stage(
            name,
            float((value - after[name]).abs().max()),
            float(value.abs().max()),
            *known.get(name, (0.0, "")),
        )
        for name, value in before.items()
    ]


class _Side:
    """One of the two: its headers, and its config.json where diffusers is to open it."""

    def __init__(self, path: str | Path, component: str, ema: bool, masters: bool = False):
        self.path, self.reader = Path(path), WeightsReader(path, component, ema=ema, masters=masters)
        self.reader.expect(component)
        self.prefix, self.naming = self.reader.info.prefix, self.reader.info.naming
        self.shapes = shapes_of(self.reader.tensors, self.prefix)
        self.dtypes = {getattr(torch, self.reader.tensors[self.prefix + name].dtype) for name in self.shapes}
        self.round_to: torch.dtype | None = None
        self.folder = self.reader.source.folder
        file, self.config = self.folder / "config.json", None
        if self.naming == "diffusers" and file.is_file():
            self.config = json.loads(file.read_text())
        elif self.naming == "diffusers":
            logger.info("%s has no config.json: this project's network runs it, not diffusers", self.path)

    def fill(self, net: nn.Module, keys: Any, lora: Lora) -> nn.Module:
        """Put the file's mapped tensors in the place of those of our network (meta device). Strict."""
        tensors = {}
        for name in self.shapes:
            if ".matrix_" not in name:  # a LoRA, which is added below
                tensor = self.reader.tensor(self.prefix + name)
                tensors[name.replace(".original.", ".")] = tensor.to(self.round_to or tensor.dtype)
        if self.naming == "diffusers":
            tensors = keys.diffusers_to_sat(tensors)
        try:
            net.load_state_dict(add_to(tensors, lora, "SAT") if lora else tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{self.path} does not fit the network of its shapes: {error}") from error
        compute_in_float32(net)
        return net.eval()

    def open_diffusers(self, class_name: str, lora: Lora) -> nn.Module:
        """``from_pretrained`` of diffusers' class. Strict."""
        try:
            import diffusers
        except ImportError as error:
            raise ValueError(
                f"{self.path}: verifying it runs diffusers, which is not installed: `pip install diffusers`, or skip "
                f"this with --no-verify"
            ) from error
        dtype = self.round_to or max(self.dtypes, key=lambda dtype: dtype.itemsize)
        try:
            net, info = getattr(diffusers, class_name).from_pretrained(
                self.folder, torch_dtype=dtype, output_loading_info=True, local_files_only=True
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"{self.folder}: diffusers' {class_name} does not open it: {error}") from error
        for kind in ("missing", "unexpected", "mismatched"):
            if names := sorted(info[f"{kind}_keys"]):
                raise ValueError(
                    f"{self.folder}: {len(names)} {kind} keys for diffusers' {class_name}, first {names[0]}"
                )
        if lora:
            net.load_state_dict(add_to(net.state_dict(), lora, "diffusers"), assign=True)
        compute_in_float32(net)
        return net.eval()


def _shorter_type(first: _Side, second: _Side) -> torch.dtype | None:
    """The type that the conversion rounded to: the original is rounded as well, so that no limit has to cover it."""
    finest = min(torch.finfo(dtype).eps for dtype in first.dtypes)
    coarsest = max(second.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    if first.dtypes == second.dtypes or torch.finfo(coarsest).eps <= finest:
        return None
    logger.info("%s is compared as rounded to %s", first.path, str(coarsest).removeprefix("torch."))
    return coarsest


# ------------------------------------------------------------------------------------------------------- transformer

_OURS = {
    "text projection": ("mixins.patch_embed.text_proj", "output"),
    "patch projection": ("mixins.patch_embed.proj", "output"),
    "tokens and positions": ("transformer.layers.0", "input"),
    "time embedding": ("time_embed", "output"),
    "ofs embedding": ("ofs_embed", "output"),
    "block {}": ("transformer.layers.{}", "output"),
    "final norm": ("transformer.final_layernorm", "output"),
    "final modulation": ("mixins.final_layer.linear", "input"),
}
_DIFFUSERS = {
    "text projection": ("patch_embed.text_proj", "output"),
    "patch projection": ("patch_embed.proj", "output"),
    "tokens and positions": ("patch_embed", "output"),
    "time embedding": ("time_embedding", "output"),
    "ofs embedding": ("ofs_embedding", "output"),
    "block {}": ("transformer_blocks.{}", "output"),
    "final norm": ("norm_final", "output"),
    "final modulation": ("proj_out", "input"),
}
Known = dict[str, tuple[float, str]]
"""stage -> how much of its difference has a reason, and which."""


def _run_transformers(first: _Side, second: _Side, lora: Lora) -> tuple[Outputs, Outputs, Known]:
    geometry = _common_geometry(first, second)
    config = first.config or second.config
    probe = probing.probe_transformer(geometry, {*first.shapes, *second.shapes}, config)
    outputs, known = [], {}
    for side, merged in ((first, lora), (second, {})):
        if side.config is None:
            results, known = _run_ours(side, geometry, probe, merged, config)
        else:
            results = _run_diffusers(side, geometry, probe, merged)
        outputs.append(results)
    return *outputs, known


def _common_geometry(first: _Side, second: _Side) -> Geometry:
    found = []
    for side in (first, second):
        found.append(transformer_geometry(side.shapes, side.naming))
        if found[-1] is None or found[-1].num_attention_heads is None:
            raise ValueError(f"{side.path}: {side.reader.info.variant}: verify needs all of a transformer")
    # A fixed table may be stored or not, and it takes the keys of SAT to know that a table is learned.
    one, other = (dataclasses.replace(g, learned_table=False, table_tokens=None) for g in found)
    learned = [g for g in found if g.learned_table]
    if one != other or (learned and found[0].table_tokens != found[1].table_tokens):
        raise ValueError(
            f"not two forms of one model: {first.path} is {found[0]}; {second.path} is {found[1]}"
        )
    return learned[0] if learned else found[0]


def _stages(table: dict[str, tuple[str, str]], geometry: Geometry) -> dict[str, tuple[str, str]]:
    """The table with one row per block, without a row for what the network does not have."""
    rows = {}
    for stage, (name, side) in table.items():
        count = geometry.num_layers if "{}" in stage else 1
        if stage != "ofs embedding" or geometry.ofs_embed_dim:
            rows |= {stage.format(i): (name.format(i), side) for i in range(count)}
    return rows


def _run_ours(
    side: _Side, geometry: Geometry, probe: Probe, lora: Lora, config: dict[str, Any] | None
) -> tuple[Outputs, Known]:
    net = side.fill(probing.build_transformer(geometry, probe), transformer_keys, lora)
    net.time_embed.float()  # the network computes in this type, diffusers in that of its input
    recorded: Outputs = {}
    record(net, _stages(_OURS, geometry), recorded, lambda value: value)
    inputs = dict(probe.inputs)
    x = inputs.pop("x")
    noisy, image = x[:, :, : geometry.out_channels], x[:, :, geometry.out_channels :]
    output = net(noisy, concat_images=image if image.shape[2] else None, **inputs)
    outputs = recorded | {"output": output}
    tokens = outputs["final norm"]
    outputs["final norm"] = tokens[:, probe.text_length :]  # diffusers norms the video alone
    return outputs, {} if config is None else _known(net, outputs, recorded, tokens, probe, config)


def _known(
    net: nn.Module, outputs: Outputs, recorded: Outputs, tokens: Tensor, probe: Probe, config: dict[str, Any]
) -> Known:
    """What diffusers' eps of the final norm changes, found by giving it to our final layer."""
    layer, eps = net.mixins["final_layer"], config.get("norm_eps", 1e-5)
    published, layer.norm_final.eps = layer.norm_final.eps, eps
    recorded.clear()
    emb = net.embed_time(probe.inputs["timesteps"], probe.inputs.get("ofs"))
    output = layer.final_forward(tokens, emb=emb, text_length=probe.text_length, grid=probe.grid)
    changed = {"final modulation": recorded["final modulation"], "output": output}
    note = EPS_NOTE.format(eps, published)
    return {stage: (float((value - outputs[stage]).abs().max()), note) for stage, value in changed.items()}


def _run_diffusers(side: _Side, geometry: Geometry, probe: Probe, lora: Lora) -> Outputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    net = side.open_diffusers("CogVideoXTransformer3DModel", lora)
    if geometry.learned_table:
        _crop_table(net.patch_embed, probe, geometry)
    outputs: Outputs = {}
    record(net, _stages(_DIFFUSERS, geometry), outputs, _text_first)
    rope, (frames, *size) = None, probe.grid
    if net.config.use_rotary_positional_embeddings:
        rope = get_3d_rotary_pos_embed(
            net.config.attention_head_dim, None, tuple(size), frames, grid_type="slice", max_size=tuple(size)
        )
    x, context, timesteps = (probe.inputs[name] for name in ("x", "context", "timesteps"))
    try:
        output = net(x, context, timesteps, ofs=probe.inputs.get("ofs"), image_rotary_emb=rope).sample
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{side.folder}: diffusers opens it but cannot run it: {error}") from error
    return outputs | {"output": output}


def _text_first(value: Any) -> Tensor:
    """diffusers' blocks give (video, text), ours the joint sequence."""
    return torch.cat(value[::-1], dim=1) if isinstance(value, tuple) else value


def _crop_table(patch_embed: nn.Module, probe: Probe, geometry: Geometry) -> None:
    """diffusers takes a learned table at its whole size only (at others it refuses, or puts sines in its place)."""
    pt, ph, pw = geometry.patch_size
    frames, height, width = probe.grid
    table = slice_learned_table(patch_embed.pos_embedding, probe.table_grid, probe.grid, probe.text_length)
    patch_embed.pos_embedding = table
    patch_embed.sample_frames = (frames * pt - 1) * probe.temporal_compression + 1
    patch_embed.sample_height, patch_embed.sample_width = height * ph, width * pw


# --------------------------------------------------------------------------------------------------------------- VAE


def _run_vaes(first: _Side, second: _Side, lora: Lora) -> tuple[Outputs, Outputs, Known]:
    if lora:
        raise ValueError("a LoRA changes the transformer: verify the VAE without it (loras)")
    one, other = (vae_geometry(side.shapes, side.naming) for side in (first, second))
    if one != other:
        raise ValueError(f"not two forms of one VAE: {first.path} has {one}; {second.path} has {other}")
    config = first.config or second.config
    outputs = []
    for side in (first, second):
        vae = probing.build_vae(one, config)
        names = [name for name, module in vae.named_modules() if isinstance(module, CausalConv3d | ResBlock)]
        # Residual blocks, and the convolutions outside them.
        names = [name for name in names if not name.endswith((".conv1", ".conv2", ".conv_y", ".conv_b"))]
        video, latents = probing.vae_inputs(vae)
        recorded: Outputs = {}
        if side.config is None:
            net = side.fill(vae, vae_keys, {})
            record(net, {name: (name, "output") for name in names}, recorded, lambda value: value)
            moments, decoded = net.encode(video), net.decode(latents)
        else:
            net = side.open_diffusers("AutoencoderKLCogVideoX", {})
            levels = len(one["channel_multipliers"])
            places = {name: (vae_keys.to_diffusers(f"{name}.", levels)[:-1], "output") for name in names}
            record(net, places, recorded, lambda value: value[0] if isinstance(value, tuple) else value)
            moments = net.encode(video.transpose(1, 2)).latent_dist.parameters.transpose(1, 2)
            decoded = net.decode(latents.transpose(1, 2)).sample.transpose(1, 2)
        outputs.append(recorded | {"encode: moments": moments, "decode: video": decoded})
    return *outputs, {}
