"""A LoRA step twice: through our trainer, and as a plain PyTorch loop around diffusers' transformer with PEFT.

Both train the same matrices on the same frozen weights, and take the same clip, noise and timestep.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox import dist
from cogvideox.config import Config
from cogvideox.dist import RandomStreams
from cogvideox.engine.optim import PRECISIONS
from cogvideox.engine.trainer import Trainer
from cogvideox.flops import clip_of
from cogvideox.model.lora import inject_lora
from cogvideox.system import VideoDiffusion
from scripts.benchmark.twins import randomise, rotary_of, transformer_twin


class Pair:
    """One system and what is made of it: ``ours`` and ``peft``, each when it is first asked for.

    Weights and adapters are random, none of them zero, frozen and placed as ``train_video.py`` does it.
    """

    def __init__(self, config: Config, *, has_twin: bool = True):
        self.config, self.clip = config, cached_clip(config)
        device, dtype = dist.device(), PRECISIONS[config.train.precision]
        with torch.device(device):
            self.system = VideoDiffusion(config)
        net = randomise(self.system.transformer.to(device, dtype))
        twin = transformer_twin(net) if has_twin else None
        generator = torch.Generator(device).manual_seed(2)
        inject_lora(net, config.lora.rank, config.lora.alpha, config.lora.layers, generator=generator)
        for name, parameter in net.named_parameters():
            if ".matrix_B." in name:
                nn.init.normal_(parameter, std=0.05, generator=generator)
        self.system.prepare_training(device)
        self.peft = Peft(config, self.system, twin, self.clip) if has_twin else None

    def ours(self) -> Ours:
        return Ours(self.config, self.system, self.clip)

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """(ours, PEFT's) of every matrix at step 0. Before ``ours()``: an engine has its own gradients."""
        rng = RandomStreams.at(self.config.seed, 0, device=dist.device())
        self.system(dist.to_device(self.clip, dist.device()), rng)[0].backward()
        self.peft.loss(0).backward()
        pairs = [(ours.grad, theirs.grad) for ours, theirs in self.matrices()]
        for parameter in (*self.system.parameters(), *self.peft.net.parameters()):
            parameter.grad = None
        return pairs

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        return matrix_pairs(self.system.transformer, self.peft.net)


def cached_clip(config: Config) -> dict[str, Any]:
    """A batch as the caches of latents and text give it, on the host."""
    t, clip, generator = config.model.transformer, clip_of(config, config.data), torch.Generator()
    generator.manual_seed(3)
    mean = torch.randn(1, clip.latents, config.vae.z_channels, clip.height, clip.width, generator=generator)
    batch = {
        "moments": torch.cat((mean, torch.full_like(mean, -2.0)), dim=2),  # and a log variance
        "text_features": torch.randn(1, t.text_length, t.text_hidden_size, generator=generator),
    }
    if torch.cuda.is_available():
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {**batch, "caption": ["a clip"]}


def matrix_pairs(net: nn.Module, twin: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(ours, PEFT's) of every adapter's down and up matrix."""
    pairs = []
    for layer, block in zip(net.transformer.layers, twin.transformer_blocks, strict=True):
        ours, theirs = layer.attention, block.attn1
        parts = (
            *((ours.query_key_value, i, getattr(theirs, f"to_{name}")) for i, name in enumerate("qkv")),
            (ours.dense, 0, theirs.to_out[0]),
        )
        for adapter, i, other in parts:
            pairs.append((adapter.matrix_A[i], other.lora_A["default"].weight))
            pairs.append((adapter.matrix_B[i], other.lora_B["default"].weight))
    return pairs


class Ours:
    """Steps of the trainer's own loop over DeepSpeed, without log lines and saves."""

    def __init__(self, config: Config, system: VideoDiffusion, clip: dict[str, Any]):
        self.trunk, self.folder = system.transformer.transformer, tempfile.TemporaryDirectory()
        loader = OneClip(clip)
        self.trainer = Trainer(
            system,
            loader,
            config.train,
            self.folder.name,
            deepspeed_overrides=config.deepspeed,
            seed=config.seed,
        )
        self.batches = loader.iterate(0)

    def step(self, policy: str) -> None:
        """policy: of ``model.transformer.checkpoint_activations``."""
        self.trunk.keep(policy)
        trainer = self.trainer
        with trainer.instruments.step(trainer.step + 1, False):
            trainer._train_step(self.batches)
        trainer.step += 1

    def loss(self) -> float:
        """The mean since it was last asked for."""
        return self.trainer.means.flush()["train/loss"]


class OneClip:
    def __init__(self, batch: dict[str, Any]):
        self.batch = batch

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        while True:
            yield self.batch


class Peft:
    """diffusers' transformer with PEFT's adapters on q, k, v and the output, as its users train it.

    In bfloat16 the adapters are that too and AdamW updates them as they are, which is the least that a loop can do:
    ours has float32 masters. What surrounds the network is ours, so that all inputs are the same numbers.
    """

    def __init__(self, config: Config, system: VideoDiffusion, twin: nn.Module, clip: dict[str, Any]):
        from peft import LoraConfig

        self.config, self.system, self.clip, self.net = config, system, clip, twin.requires_grad_(False)
        twin.add_adapter(
            LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            )
        )
        for ours, theirs in matrix_pairs(system.transformer, twin):
            theirs.data.copy_(ours.data)
        twin.train()
        self.trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, **config.train.optimizer.params)
        self.rope = rotary_of(system.transformer, clip["moments"].to(dist.device()))
        self.steps = 0

    def loss(self, step: int) -> Tensor:
        """Of the step's random numbers, those that the trainer draws."""
        system, device = self.system, dist.device()
        rng = RandomStreams.at(self.config.seed, step, device=device)
        batch = dist.to_device(self.clip, device)
        x0 = system.encode_batch(batch, rng.local)
        tokens = system.conditioner(batch, rng, None, num_latent_frames=x0.shape[1])["tokens"]
        noise = torch.randn(x0.shape, generator=rng.local, device=device)
        t = system.timesteps.sample(len(x0), rng, system.schedule.num_timesteps)
        noisy, target = system.schedule.add_noise(x0, noise, t), system.schedule.velocity(x0, noise, t)
        inputs = noisy.to(self.net.dtype), tokens.to(self.net.dtype), t
        prediction = self.net(*inputs, image_rotary_emb=self.rope, return_dict=False)[0]
        return (prediction.float() - target).square().mean()

    def step(self, has_checkpointing: bool) -> Tensor:
        """Returns the loss."""
        if has_checkpointing != self.net.is_gradient_checkpointing:
            (
                self.net.enable_gradient_checkpointing
                if has_checkpointing
                else self.net.disable_gradient_checkpointing
            )()
        loss = self.loss(self.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.train.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.detach()
