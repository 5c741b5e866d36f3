"""The system: where network, VAE, conditions and diffusion meet. A batch in, a loss out; prompts in, a video out."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cogvideox import dist
from cogvideox.build import build, factory
from cogvideox.conditioning.conditioner import Conditioner
from cogvideox.config import Config, ConfigError, Part
from cogvideox.data.latent_cache import LatentCache, weights_fingerprint
from cogvideox.diffusion.denoiser import GuidedDenoiser
from cogvideox.diffusion.samplers import noise_source
from cogvideox.dist import RandomStreams
from cogvideox.model.lora import attach_lora, freeze_base, inject_lora, merge_lora
from cogvideox.model.transformer import ExpertTransformer
from cogvideox.vae.autoencoder import CausalVAE, posterior_mode, sample_posterior
from cogvideox.vae.training import VAETraining, pixels_to_float
from cogvideox.weights import load
from cogvideox.weights.files.hub import resolve
from cogvideox.weights.fill import LoadReport
from cogvideox.weights.identify import WeightsInfo, identify
from cogvideox.weights.lora import apply as apply_lora
from cogvideox.weights.lora.file import LoraFile

logger = logging.getLogger("cogvideox")

Conditions = tuple[dict[str, Tensor], dict[str, Tensor]]
"""(conditional, unconditional) inputs of the network, each with ``tokens`` and maybe ``concat``."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_transformer(
    config: Config, *, device: torch.device | str | None = None, skip_init: bool = False
) -> ExpertTransformer:
    """The network of ``model.transformer`` with random weights. ``device="meta"`` allocates nothing.

    skip_init leaves the weights uninitialised: for a checkpoint that is loaded next.
    """
    if config.model.transformer is None:
        raise ConfigError("model.transformer is missing: add a model file such as configs/cogvideox_2b.yaml")
    section = config.model.transformer
    arguments = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    for name in ("position", "patch_embed", "adaln", "final_layer"):
        arguments[name] = factory(arguments[name])
    return ExpertTransformer(**arguments, device=device, skip_init=skip_init)


def build_vae(config: Config, *, device: torch.device | str | None = None) -> CausalVAE:
    """The VAE of the section ``vae`` with random weights. Its latents are unscaled: see ``vae.scale_factor``."""
    if config.vae is None:
        raise ConfigError("vae is missing: add a model file such as configs/cogvideox_2b.yaml")
    arguments = {f.name: getattr(config.vae, f.name) for f in dataclasses.fields(config.vae)}
    del arguments["scale_factor"], arguments["precision"]
    with torch.device(device or "cpu"):
        return CausalVAE(**arguments)


def pad_front(latents: Tensor, patch_t: int) -> Tensor:
    """Repeat the first latent in front until the temporal patch divides T: (B, T, C, H, W) -> (B, T', C, H, W).

    The one rule for training, image conditions and sampling (CogVideoX 1.5: 21 latents become 22).
    """
    missing = -latents.shape[1] % patch_t
    return torch.cat([latents[:, :1]] * missing + [latents], dim=1) if missing else latents


class VideoDiffusion(nn.Module):
    """Text- or image-to-video diffusion in the latent space of a VAE.

    ``forward(batch, rng)`` is the training loss; ``sample(prompts, ...)`` is the whole way back to pixels.

    What trains is registered under the names of the published checkpoints (``model.diffusion_model.*``,
    ``conditioner.embedders.N.*``). The VAE and frozen text encoders are held outside the module tree, so that the
    engine neither casts them, nor keeps master weights of them, nor stores them.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        net = build_transformer(config, skip_init=config.load.transformer is not None)
        self.patch_t = net.patch_size[0]
        self.model = nn.ModuleDict({"diffusion_model": net})
        self.conditioner = Conditioner(build(_condition(part, config)) for part in config.model.conditions)
        self._vae = (build_vae(config).requires_grad_(False).eval(),)  # a tuple hides it from registration
        self.schedule = build(config.model.schedule)
        self.timesteps = build(config.model.timesteps)
        self.loss = build(config.model.loss)
        self.guidance = build(config.guidance)
        self.sampler = build(config.sampler)

    @property
    def transformer(self) -> nn.Module:
        return self.model["diffusion_model"]

    @property
    def vae(self) -> CausalVAE:
        return self._vae[0]

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    # ------------------------------------------------------------------------------------------- weights, phases

    def load_weights(self) -> list[LoadReport]:
        """Load what ``load`` names. Errors name the file, what it holds and what was expected; see ``weights.load``."""
        section, reports = self.config.load, []
        infos = {}  # headers are read and compared first, heavy work comes after
        if section.transformer:
            infos["transformer"] = load.check_transformer(
                self.transformer, section.transformer, ema=section.ema
            )
        if section.vae:
            infos["vae"] = identify(section.vae, "vae")
        self._check_constants(infos)
        self._settle_precision(infos.get("transformer"))
        loras = self._read_loras(infos.get("transformer"))
        if section.transformer:
            reports.append(
                load.load_transformer(self.transformer, section.transformer, ema=section.ema, base_only=True)
            )
        if section.vae:
            reports.append(load.load_vae(self.vae, section.vae, ema=section.ema))
        if section.text_encoder:
            for index, embedder in enumerate(self.conditioner.embedders):
                # A pretrained folder is read by the condition itself, at its first use.
                if getattr(embedder, "transformer", None) is not None:
                    encoder = embedder.transformer
                    reports.append(
                        load.load_text_encoder(encoder, section.text_encoder, index=index, ema=section.ema)
                    )
        self._warn_about_random_weights()
        return reports + self._apply_loras(loras)

    def _read_loras(self, info: WeightsInfo | None) -> list[tuple[LoraFile, float]]:
        """Those of ``load.lora`` and, first, that of a full checkpoint with LoRA in ``load.transformer``."""
        section = self.config.load
        sources = [(source.path, source.strength, source.alpha) for source in section.loras]
        named = [Path(path).expanduser() for path, *_ in sources]
        if info is not None and info.lora_rank and Path(section.transformer).expanduser() not in named:
            sources.insert(0, (section.transformer, 1.0, None))
        return apply_lora.read_loras(sources, self.transformer, ema=section.ema)

    def _apply_loras(self, loras: list[tuple[LoraFile, float]]) -> list[LoadReport]:
        """Without the section ``lora``: into the weights, or beside them. With it, the last one starts the adapters."""
        section, start = self.config.lora, None
        if section is not None and loras:
            *loras, start = loras
        merge = section is not None or self.config.sample is None or self.config.sample.merge_lora
        total, reports = apply_lora.applied(loras, "merged" if merge else "kept beside the weights")
        if merge:
            apply_lora.add_to_network(self.transformer, total)
        else:
            attach_lora(self.transformer, apply_lora.adapter_matrices(total))
        if section is not None:
            generator = torch.Generator().manual_seed(self.config.seed)
            inject_lora(
                self.transformer,
                section.rank,
                section.alpha,
                section.layers,
                section.transformer_layers,
                generator,
            )
        if start is not None:
            file, strength = start
            scale = section.alpha / section.rank
            reports.append(apply_lora.start_adapters(self.transformer, file, strength, scale))
        return reports

    def _check_constants(self, infos: dict[str, WeightsInfo]) -> None:
        """The latent scale and the SNR shift belong to published weights; another value trains and samples garbage."""
        force, schedule = self.config.load.force_constants, factory(self.config.model.schedule)
        for info in infos.values():
            scale = self.config.vae.scale_factor
            load.check_constant(info, "vae.scale_factor", scale, info.latent_scale, force=force)
        shift = inspect.signature(schedule).parameters.get("snr_shift")  # its default is what params say
        if "transformer" in infos and shift is not None:
            info, key = infos["transformer"], "model.schedule.params.snr_shift"
            load.check_constant(info, key, shift.default, info.snr_shift, force=force)

    def _settle_precision(self, info: WeightsInfo | None) -> None:
        """Put the checkpoint's own precision where ``sample.precision`` is null; refuse one that overflows."""
        sample, force = self.config.sample, self.config.load.force_fp16
        if sample is not None and sample.precision is None:
            sample.precision = "fp32" if info is None else load.own_precision(info, "sample.precision")
            source = "the network's random weights" if info is None else info.path
            logger.info("sample.precision is null: %s, as %s", sample.precision, source)
        for name in ("train", "sample") if info is not None else ():
            section = getattr(self.config, name)
            if section is not None:
                load.check_precision(info, section.precision, f"{name}.precision", force=force)

    def _warn_about_random_weights(self) -> None:
        section = self.config.load
        for name in ("transformer", "vae"):
            if getattr(section, name) is None:
                logger.warning("load.%s is not set: the %s starts from random weights", name, name)

    def prepare_training(self, device: torch.device) -> None:
        """Freeze all but the adapters where ``lora`` is set; move everything to ``device``."""
        if self.config.lora is not None:
            freeze_base(self.transformer)
        else:
            merge_lora(self.transformer)  # of load.lora: everything trains, so it belongs to the weights
        self._place(device)
        self.train()

    def prepare_sampling(self, device: torch.device) -> None:
        """Merge LoRA if asked, cast to ``sample.precision``, move to ``device``."""
        precision = self.config.sample.precision
        if precision == "fp16" and device.type == "cpu" and not self.config.load.force_fp16:
            raise ValueError(
                "sample.precision=fp16 needs a GPU and this machine has none; use fp32 or bf16 (load.force_fp16=true "
                "overrides)"
            )
        if self.config.sample.merge_lora:
            merge_lora(self.transformer)
        self.transformer.to(DTYPES[precision])
        self._place(device)
        self.eval().requires_grad_(False)

    def _place(self, device: torch.device) -> None:
        self.to(device)
        self.vae.to(device, DTYPES[self.config.vae.precision])

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that is empty or does not fit, before anything heavy runs."""
        negative = self.config.sample.negative_prompt
        for embedder in self.conditioner.embedders:
            if hasattr(embedder, "tokenize"):
                embedder.tokenize([*prompts, negative] if negative else list(prompts))

    # ------------------------------------------------------------------------------------------------ training

    def forward(
        self, batch: dict[str, Any], rng: RandomStreams | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of one batch.

        batch: ``video`` (B, F, 3, H, W), uint8 or in [-1, 1], or ``moments`` (B, T, 2C, h, w) from the latent cache;
        ``caption`` list of B. rng: the step's random streams (None: those of step 0, for notebooks).
        Returns (loss, metrics), 0-d tensors.
        """
        rng = rng or RandomStreams.at(self.config.seed, 0, device=self.device)
        x0 = self.encode_batch(batch, rng.local)  # (B, T, C, h, w)
        encode = partial(self.encode_pixels, generator=rng.local)
        condition = self.conditioner(batch, rng, encode, num_latent_frames=x0.shape[1])
        noise = self._noise(x0, rng.local)
        t = self.timesteps.sample(len(x0), rng, self.schedule.num_timesteps)  # (B,)
        prediction = self.predict(self.schedule.add_noise(x0, noise, t), t, condition)
        return self.loss(prediction.float(), self.schedule.velocity(x0, noise, t), t, self.schedule)

    def predict(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The network's v-prediction: x (B, T, C, h, w), t (B,), condition with ``tokens`` and maybe ``concat``."""
        concat = condition.get("concat")
        has_ofs = self.transformer.ofs_embed_dim is not None
        return self.transformer(
            x,
            t,
            condition["tokens"],
            # A condition that follows the clip frame by frame is padded as the clip is; an image's has its length.
            concat_images=None if concat is None else pad_front(concat, self.patch_t),
            ofs=self.config.model.ofs if has_ofs else None,
        )

    def _noise(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        if self.config.model.offset_noise:
            offset = torch.randn(len(x0), generator=generator, device=x0.device)
            noise = noise + self.config.model.offset_noise * offset[:, None, None, None, None]
        return noise

    # ------------------------------------------------------------------------------------------------- latents

    def _padded_latents(self, num_frames: int) -> int:
        """Latent frames of a clip as the network sees them (``pad_front``)."""
        frames = self.vae.num_latents(num_frames)
        return frames + -frames % self.patch_t

    @torch.no_grad()
    def encode_batch(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Scaled latents (B, T, C, h, w) of a batch, from cached moments where it has them; padded in front."""
        if "moments" in batch:
            moments = batch["moments"].to(self.device).float()
        else:
            moments = self.vae_moments(batch["video"])
        latents = sample_posterior(moments, generator=generator) * self.config.vae.scale_factor
        return pad_front(latents, self.patch_t)

    @torch.no_grad()
    def vae_moments(self, video: Tensor) -> Tensor:
        """video (B, F, 3, H, W), uint8 or in [-1, 1] -> moments (B, T, 2C, h, w), float32, unscaled."""
        pixels = pixels_to_float(video.to(self.device))
        return self.vae.encode(pixels.to(DTYPES[self.config.vae.precision])).float()

    def with_latent_cache(self, dataset: Dataset) -> LatentCache:
        """``dataset`` with the VAE's moments in place of videos, computed once over all ranks and kept on disk."""
        section = self.config.data
        fingerprint = weights_fingerprint(
            self.vae.state_dict(), self.config.vae.encode_frames_per_pass, self.config.vae.precision
        )
        cache = LatentCache(dataset, section.latent_cache, fingerprint, section.cache_in_memory_gib)
        batch_size = self.config.train.batch_size
        cache.fill(self.vae_moments, dist.rank(), dist.world_size(), batch_size, show_progress=dist.is_main())
        dist.barrier()
        cache.load()
        return cache

    def encode_pixels(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """pixels (B, F, 3, H, W) in [-1, 1] -> scaled latents (B, T, C, h, w): what image conditions are given.

        generator: draws from the posterior; None takes its mean, so that an image always gives the same video.
        """
        moments = self.vae_moments(pixels)
        latents = (
            posterior_mode(moments) if generator is None else sample_posterior(moments, generator=generator)
        )
        return latents * self.config.vae.scale_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Scaled latents (B, T, C, h, w) -> chunks of pixels (B, f, 3, H, W), float32 in [-1, 1], as they come."""
        latents = (latents / self.config.vae.scale_factor).to(DTYPES[self.config.vae.precision])
        for chunk in self.vae.decode_stream(latents):
            yield chunk.float().clamp_(-1.0, 1.0)

    # ------------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        images: Tensor | None = None,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Tensor:
        """Videos (B, F, 3, H, W) in [-1, 1] for B prompts.

        seeds: one per prompt (None: 0, 1, ...); item i of a batch gets the same noise as alone. images: (B, 3, H, W),
        uint8 or in [-1, 1], the first frames of image-to-video. Sizes and steps default to the section ``sample``.
        callback: called after every step, see ``diffusion.samplers``.
        """
        section = self.config.sample
        num_frames = num_frames or section.num_frames
        conditions = self.encode_prompts(prompts, images, negative_prompt, num_frames)
        latents = self.sample_latents(
            conditions,
            seeds=list(range(len(prompts)) if seeds is None else seeds),
            num_frames=num_frames,
            height=height or section.height,
            width=width or section.width,
            steps=steps or section.steps,
            callback=callback,
        )
        return torch.cat(list(self.decode(latents)), dim=1)

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: Sequence[str],
        images: Tensor | None = None,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
    ) -> Conditions:
        """What guidance steers towards and away from. Once it is made, ``conditioner.release()`` may free the T5."""
        section = self.config.sample
        return self.conditioner.for_sampling(
            prompts,
            images=None if images is None else images.to(self.device),
            num_latent_frames=self._padded_latents(num_frames or section.num_frames),
            negative_prompt=section.negative_prompt if negative_prompt is None else negative_prompt,
            unconditional=section.unconditional,
            image_latent_scale=section.image_latent_scale,
            scale_factor=self.config.vae.scale_factor,
            encode=self.encode_pixels,
            device=self.device,
        )

    @torch.no_grad()
    def sample_latents(
        self,
        conditions: Conditions,
        *,
        seeds: Sequence[int],
        num_frames: int,
        height: int,
        width: int,
        steps: int,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Tensor:
        """Denoise to scaled latents (B, T, C, h, w), one item per seed."""
        frames, padded = self.vae.num_latents(num_frames), self._padded_latents(num_frames)
        side = self.vae.spatial_compression
        shape = (len(seeds), padded, self.config.vae.z_channels, height // side, width // side)
        noise = noise_source(seeds, device=self.device)
        x = noise(torch.empty(shape, device=self.device))
        denoise = GuidedDenoiser(self.predict, self.schedule, steps, self.guidance, *conditions)
        x0 = self.sampler(denoise, x, self.schedule, steps=steps, noise=noise, callback=callback)
        return x0[:, padded - frames :]


class VAESystem(VAETraining):
    """Training of the VAE alone, as a system: the sections ``vae`` and ``model.loss`` of the configuration."""

    def __init__(self, config: Config):
        super().__init__(build_vae(config), build(config.model.loss))
        self.config = config

    def load_weights(self) -> list[LoadReport]:
        """Load ``load.vae`` where it is set: fine-tuning."""
        section = self.config.load
        return [load.load_vae(self.first_stage_model, section.vae, ema=section.ema)] if section.vae else []

    def prepare_training(self, device: torch.device) -> None:
        self.to(device).train()


def _condition(part: Part, config: Config) -> Part:
    """A condition's part with what other sections say of it: where its weights are, and that LoRA freezes it."""
    params = dict(part.params)
    if params.get("model") is None and params.get("config") is None and part.target.endswith("TextCondition"):
        path = config.load.text_encoder
        params["model"] = path and str(resolve(path, "text_encoder"))
    if config.lora is not None and "trainable" in params:
        params["trainable"] = False
    return Part(part.target, params)
