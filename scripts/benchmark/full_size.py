"""The networks at their published sizes, for counts on the meta device, where a true full size costs nothing:

    with fused_attention(), LiveMemory() as memory:
        loss_of(config, network(config, "meta"), "meta").backward()

The same functions on a GPU are what is measured there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cogvideox.build import build
from cogvideox.config import Config, load_config
from cogvideox.flops import clip_of
from cogvideox.model.lora import freeze_base, inject_lora
from cogvideox.system import build_transformer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = {"2B": "cogvideox_2b", "5B": "cogvideox_5b", "1.5-5B": "cogvideox1.5_5b"}
METHODS = {"full": "sft", "LoRA": "lora"}
CACHED = ("data.latent_cache=cache", "data.text_cache=cache")


def load(*names: str, overrides: tuple[str, ...] = ()) -> Config:
    return load_config([CONFIGS / f"{name}.yaml" for name in names], overrides)


def config_of(model: str, method: str, policy: str, *overrides: str) -> Config:
    """Of a training run with cached latents and text.  policy: ``model.transformer.checkpoint_activations``."""
    setting = f"model.transformer.checkpoint_activations={policy}"
    return load(MODELS[model], METHODS[method], overrides=(*CACHED, setting, *overrides))


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """The kernel that a GPU picks: on the meta device torch would take the unfused one, with a table of S x S."""
    before = nn.functional.scaled_dot_product_attention

    def flash(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: None = None,
        is_causal: bool = False,
        **_: object,
    ) -> Tensor:
        assert attn_mask is None and not is_causal, "the networks attend over everything"
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    nn.functional.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = before


def network(config: Config, device: str) -> nn.Module:
    """What trains, with uninitialised weights, as the engine holds it."""
    net = build_transformer(config, device=device, skip_init=True).to(torch.bfloat16)
    if config.lora:
        inject_lora(net, config.lora.rank, config.lora.alpha, config.lora.layers)
        freeze_base(net)
    return net


Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents, timesteps, text features) -> velocity."""


def loss_of(config: Config, net: Forward, device: str) -> Tensor:
    """The steps of ``VideoDiffusion.forward`` after the latents and the text features."""
    clip, t, batch = clip_of(config, config.data), config.model.transformer, config.train.batch_size
    shape = (batch, clip.latents, t.out_channels, clip.height, clip.width)
    schedule, loss = build(config.model.schedule), build(config.model.loss)
    x0, noise = torch.empty(shape, device=device), torch.empty(shape, device=device)
    context = torch.empty(batch, t.text_length, t.text_hidden_size, device=device, dtype=torch.bfloat16)
    if device == "meta":  # the schedule's table is read on the CPU
        noisy, target, steps = torch.empty_like(x0), torch.empty_like(x0), torch.zeros(batch, device=device)
        prediction = net(noisy, steps, context)
        return (prediction.float() - target).square().mean()
    steps = torch.full((batch,), 500, device=device)
    prediction = net(schedule.add_noise(x0, noise, steps), steps, context)
    return loss(prediction.float(), schedule.velocity(x0, noise, steps), steps, schedule)[0]
