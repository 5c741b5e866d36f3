"""Operations, bytes and live memory at the published sizes, counted on the meta device: exact, the same everywhere.

    python -m scripts.benchmark counted

Ours, diffusers' classes at the same size, and what was known before of either. Layers are alike, so that a transformer
is counted with few of them and continued in a straight line to all (tests/test_counted.py counts all of them, too).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cogvideox.config import Config
from cogvideox.flops import clip_of
from cogvideox.recompute import Recompute, read_recompute
from cogvideox.system import build_transformer, build_vae
from scripts.benchmark.counting import Counts, counting
from scripts.benchmark.full_size import METHODS, MODELS, Forward, config_of, load, loss_of, network
from scripts.benchmark.results import Row
from scripts.benchmark.settings import Settings
from scripts.benchmark.twins import rotary_of, transformer_twin, vae_twin

OURS, DIFFUSERS = "ours", "diffusers"
DEPTHS = (3, 4)
TEXT_226 = ("model.transformer.text_length=226", "model.conditions.0.params.max_length=226")
"""1.5 with the text of diffusers, as its known counts have it; 224 tokens in SAT."""


def inference_config(model: str) -> Config:
    return load(MODELS[model], overrides=TEXT_226 if model == "1.5-5B" else ())


def training_config(model: str, method: str, policy: str) -> Config:
    return config_of(model, method, policy, *(TEXT_226 if model == "1.5-5B" else ()))


def at_depth(config: Config, layers: int) -> Config:
    transformer = replace(config.model.transformer, num_layers=layers)
    return replace(config, model=replace(config.model, transformer=transformer))


def continued(config: Config, count: Callable[[Config], Counts]) -> tuple[Counts, Counts]:
    """``count`` of the whole depth of ``config`` and of one layer, from those of DEPTHS."""
    shallow, deep = (vars(count(at_depth(config, layers))) for layers in DEPTHS)
    layer = {name: (deep[name] - shallow[name]) / (DEPTHS[1] - DEPTHS[0]) for name in deep}
    further = config.model.transformer.num_layers - DEPTHS[0]
    return Counts(**{name: shallow[name] + further * layer[name] for name in deep}), Counts(**layer)


def unit(config: Config, tokens: int) -> int:
    """Bytes of a bf16 tensor of tokens x width."""
    return tokens * config.model.transformer.hidden_size * 2


# ---------------------------------------------------------------------------------------------------- transformer


def forward_pass(config: Config, candidate: str, batch: int) -> Counts:
    """Without gradients, as in sampling."""
    clip, t = clip_of(config, config.sample), config.model.transformer
    net = network(config, "meta")
    with torch.device("meta"):
        x = torch.empty(batch, clip.latents, t.in_channels, clip.height, clip.width, dtype=torch.bfloat16)
        context = torch.empty(batch, t.text_length, t.text_hidden_size, dtype=torch.bfloat16)
        steps = torch.zeros(batch)
    forward = net if candidate == OURS else as_forward(transformer_twin(net), net, x)
    with torch.no_grad(), counting() as counter:
        forward(x, steps, context)
    return counter.counts()


def training_pass(config: Config, candidate: str) -> Counts:
    """Forward and backward pass of one clip; ``kept`` is what lives between them."""
    if candidate == OURS:
        forward = network(config, "meta")
    else:
        forward = diffusers_training(config)
    with counting() as counter:
        loss = loss_of(config, forward, "meta")
        counter.note_kept()
        loss.backward()
    return counter.counts()


def diffusers_training(config: Config) -> Forward:
    """diffusers' network with PEFT's adapters of the same rank on q, k, v and out, or all weights training."""
    plain = build_transformer(replace(config, lora=None), device="meta", skip_init=True).to(torch.bfloat16)
    twin = transformer_twin(plain)
    if config.lora:
        from peft import LoraConfig

        twin.requires_grad_(False)
        with torch.device("meta"):
            twin.add_adapter(
                LoraConfig(r=config.lora.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
            )
        nn.Module.to(twin, torch.bfloat16)  # as ours: a float32 adapter would keep its input in float32, too
    if read_recompute(config.model.transformer.checkpoint_activations) != Recompute("none"):
        twin.enable_gradient_checkpointing()
    clip = clip_of(config, config.data)
    return as_forward(twin, plain, torch.empty(1, clip.latents, 1, clip.height, clip.width, device="meta"))


def as_forward(twin: nn.Module, net: nn.Module, x: Tensor) -> Forward:
    """diffusers' network under our arguments; its rotary table is made once, as its pipeline does."""
    rope = rotary_of(net, x)

    def forward(x: Tensor, steps: Tensor, context: Tensor) -> Tensor:
        return twin(x.to(torch.bfloat16), context, steps, image_rotary_emb=rope, return_dict=False)[0]

    return forward


# ------------------------------------------------------------------------------------------------------------ VAE


def vae_pass(config: Config, candidate: str, direction: str, frames_per_pass: int | None) -> Counts:
    """Of one clip in bf16: "encode", in passes of so many frames (None: one), or "decode", in its chunks."""
    vae = build_vae(config, device="meta").to(torch.bfloat16)
    s = config.sample
    latent = ((s.num_frames - 1) // 4 + 1, 16, s.height // 8, s.width // 8)
    shape = (1, *latent) if direction == "decode" else (1, s.num_frames, 3, s.height, s.width)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    if candidate == OURS:
        work = vae.decode if direction == "decode" else lambda video: vae.encode(video, frames_per_pass)
    else:
        twin = vae_twin(vae)
        x = x.transpose(1, 2)
        work = twin._decode if direction == "decode" else twin._encode
    with torch.no_grad(), counting() as counter:
        work(x)
    return counter.counts()


# ------------------------------------------------------------------------------------------------------- the rows

SIZES = {"2B": "49x480x720", "5B": "49x480x720", "1.5-5B": "81x768x1360"}


def forward_case(model: str) -> str:
    return f"{model} forward, batch 2, {SIZES[model]}"


def training_case(model: str, method: str, policy: str) -> str:
    kept = {"none": "everything kept", "full": "checkpointed"}[policy]
    return f"{model} training step, {method}, {kept}, {SIZES[model]}"


def vae_case(model: str, direction: str, frames_per_pass: int | None) -> str:
    if direction == "decode":
        return f"VAE decode, {SIZES[model]}"
    return f"VAE encode, {SIZES[model]}, {frames_per_pass or 'all'} frames a pass"


# From notes on the published code, counted on meta tensors at these sizes before there was code of ours. A layer's
# passes were counted with one reading of the tokens for q, k and v, where diffusers has three products: two less than
# here. Of what a layer keeps, one unit less was counted.
KNOWN = "known of "
KNOWN_COUNTS: dict[str, dict[str, dict[str, float]]] = {
    forward_case("2B"): {
        "diffusers": {"TFLOP per clip": 119.996, "live GB": 1.64, "passes per layer": 61.0},
        "SAT": {"live GB": 2.05, "passes per layer": 67.0},
        "a fused layer": {"live GB": 1.1, "passes per layer": 38.6},
    },
    forward_case("5B"): {
        "diffusers": {"TFLOP per clip": 332.2, "live GB": 2.82, "passes per layer": 118.7},
        "SAT": {"live GB": 3.28, "passes per layer": 93.1},
        "a fused layer": {"live GB": 1.7, "passes per layer": 39.0},
    },
    forward_case("1.5-5B"): {"diffusers": {"TFLOP per clip": 1479.2}},
    training_case("2B", "full", "none"): {
        "diffusers": {"TFLOP": 396, "kept GB": 45.4, "units kept per layer": 22.2}
    },
    training_case("2B", "full", "full"): {"diffusers": {"TFLOP": 516}},
    training_case("2B", "LoRA", "none"): {
        "diffusers": {"TFLOP": 355, "kept GB": 27.5, "units kept per layer": 13.4}
    },
    training_case("2B", "LoRA", "full"): {"diffusers": {"TFLOP": 478}},
    training_case("5B", "full", "none"): {
        "diffusers": {"TFLOP": 1078, "kept GB": 101.6, "units kept per layer": 22.2}
    },
    training_case("5B", "full", "full"): {"diffusers": {"TFLOP": 1410}},
    training_case("5B", "LoRA", "none"): {
        "diffusers": {"TFLOP": 923, "kept GB": 61.1, "units kept per layer": 13.3}
    },
    training_case("5B", "LoRA", "full"): {"diffusers": {"TFLOP": 1260}},
    training_case("1.5-5B", "full", "none"): {"diffusers": {"TFLOP": 4963}},
    training_case("1.5-5B", "full", "full"): {"diffusers": {"TFLOP": 6442}},
    training_case("1.5-5B", "LoRA", "none"): {"diffusers": {"TFLOP": 4569}},
    training_case("1.5-5B", "LoRA", "full"): {"diffusers": {"TFLOP": 6060}},
    vae_case("5B", "decode", None): {
        "diffusers": {"TFLOP": 315.0, "live GB": 15.8, "moved GB": 1304},
        "exact identities": {"TFLOP": 290.2, "live GB": 7.6, "moved GB": 995},
    },
    vae_case("5B", "encode", 8): {
        "diffusers": {"TFLOP": 149.0, "live GB": 6.6, "moved GB": 403},
        "exact identities": {"live GB": 4.8},
    },
    vae_case("5B", "encode", None): {"SAT": {"TFLOP": 149.0, "live GB": 30.6}},
    vae_case("1.5-5B", "decode", None): {"diffusers": {"TFLOP": 1574}},
}


def run(settings: Settings) -> list[Row]:
    """quick: the 2B alone."""
    models = ["2B"] if settings.quick else list(MODELS)
    rows = [row for model in models for row in forward_rows(model)]
    for model in models:
        for method in METHODS:
            for policy in ("none", "full"):
                rows += training_rows(model, method, policy)
    for model, direction, frames in (
        ("5B", "decode", None),
        ("5B", "encode", 8),
        ("5B", "encode", None),
        ("1.5-5B", "decode", None),
        ("1.5-5B", "encode", 8),
    ):
        if not settings.quick:
            rows += vae_rows(model, direction, frames)
    return rows


def forward_rows(model: str) -> list[Row]:
    return _with_known(forward_case(model), {who: forward_numbers(model, who) for who in (OURS, DIFFUSERS)})


def forward_numbers(model: str, candidate: str) -> dict[str, float]:
    config, batch = inference_config(model), 2
    whole, layer = continued(config, lambda part: forward_pass(part, candidate, batch))
    size = batch * unit(config, clip_of(config, config.sample).tokens)
    return {
        "TFLOP per clip": whole.flops / batch / 1e12,
        "live GB": whole.peak / 1e9,
        "passes per layer": layer.moved / size,
        "passes between products": layer.between / size,
    }


def training_rows(model: str, method: str, policy: str) -> list[Row]:
    # diffusers' 1.5 would only repeat what its 5B says, in more tokens.
    candidates = (OURS,) if model == "1.5-5B" else (OURS, DIFFUSERS)
    numbers = {who: training_numbers(model, method, policy, who) for who in candidates}
    return _with_known(training_case(model, method, policy), numbers)


def training_numbers(model: str, method: str, policy: str, candidate: str) -> dict[str, float]:
    config = training_config(model, method, policy)
    whole, layer = continued(config, lambda part: training_pass(part, candidate))
    return {
        "TFLOP": whole.flops / 1e12,
        "live GB": whole.peak / 1e9,
        "kept GB": whole.kept / 1e9,
        "units kept per layer": layer.kept / unit(config, clip_of(config, config.data).tokens),
    }


def vae_rows(model: str, direction: str, frames_per_pass: int | None) -> list[Row]:
    # diffusers' encode always goes through a clip 8 frames at a time.
    has_twin = model == "5B" and (direction == "decode" or frames_per_pass)
    candidates = (OURS, DIFFUSERS) if has_twin else (OURS,)
    numbers = {who: vae_numbers(model, who, direction, frames_per_pass) for who in candidates}
    return _with_known(vae_case(model, direction, frames_per_pass), numbers)


def vae_numbers(model: str, candidate: str, direction: str, frames_per_pass: int | None) -> dict[str, float]:
    counts = vae_pass(inference_config(model), candidate, direction, frames_per_pass)
    return {"TFLOP": counts.flops / 1e12, "live GB": counts.peak / 1e9, "moved GB": counts.moved / 1e9}


def _with_known(case: str, numbers: dict[str, dict[str, float]]) -> list[Row]:
    known = {KNOWN + who: values for who, values in KNOWN_COUNTS.get(case, {}).items()}
    return [Row("counted", case, who, counted=values) for who, values in (numbers | known).items()]
