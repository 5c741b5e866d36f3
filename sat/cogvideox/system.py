"""The system: where network, VAE, conditions and diffusion meet. A batch in, a loss out; prompts in, a video out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox import dist
from cogvideox.build import build, factory
from cogvideox.conditioning.conditioner import Conditioner
from cogvideox.config import Config, ConfigError, reference_count
from cogvideox.diffusion.bands import band_names, band_of
from cogvideox.diffusion.constraints import KeepRegion
from cogvideox.diffusion.denoiser import GuidedDenoiser
from cogvideox.diffusion.guidance import ConstantGuidance
from cogvideox.diffusion.inversion import ddim_invert
from cogvideox.diffusion.loss import losses_by_item
from cogvideox.diffusion.noise import training_noise
from cogvideox.diffusion.partial import TailSchedule, noised_start
from cogvideox.diffusion.reference import ReferenceTrajectory
from cogvideox.diffusion.samplers import ddim, noise_source
from cogvideox.dist import RandomStreams
from cogvideox.model.attention_backends import activate
from cogvideox.model.lora import freeze_base, merge_lora
from cogvideox.model.parameter_groups import parameter_group
from cogvideox.model.patch_embed import pad_front
from cogvideox.model.reference import ReferenceAttention
from cogvideox.model.transformer import ExpertTransformer
from cogvideox.phases import untimed
from cogvideox.planning.choices import resolve_budget
from cogvideox.planning.memory import training_peak
from cogvideox.system_sampling import (
    DEFAULT_STRENGTH,
    Progress,
    StageReport,
    Start,
    as_generator,
    in_stage,
    kept_latents,
)
from cogvideox.system_text import build_conditions
from cogvideox.system_vae import DTYPES, FrozenVAE, build_vae
from cogvideox.system_validation import losses_at
from cogvideox.system_weights import load_weights
from cogvideox.vae.autoencoder import CausalVAE, posterior_mode, sample_posterior
from cogvideox.vae.training import VAETraining
from cogvideox.weights import load
from cogvideox.weights.fill import LoadReport

logger = logging.getLogger("cogvideox")

Conditions = tuple[dict[str, Tensor], dict[str, Tensor]]
"""(conditional, unconditional) inputs of the network, each with ``tokens`` and maybe ``concat``."""


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
    # A memory budget becomes the policy that this run takes for it.
    run = resolve_budget(config, dist.world_size())
    arguments["checkpoint_activations"] = run.model.transformer.checkpoint_activations
    if run is not config and config.train is not None:
        logger.info(
            "model.transformer.checkpoint_activations=%s takes %s, planned to need %.1f GiB",
            section.checkpoint_activations,
            run.model.transformer.checkpoint_activations,
            training_peak(run, dist.world_size()) / 2**30,
        )
    return ExpertTransformer(**arguments, device=device, skip_init=skip_init)


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
        self.conditioner = Conditioner(build_conditions(config))
        self.frozen_vae = FrozenVAE(config)
        self.schedule = build(config.model.schedule)
        self.timesteps = build(config.model.timesteps)
        self.loss = build(config.model.loss)
        self.guidance = build(config.guidance)
        self.sampler = build(config.sampler)
        self.phases = untimed  # a trainer gives its own
        self.once_per_run: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
        # Entered around a sampling run, with its timesteps. Where weights stay as they are, sampling/memory.py gives it
        # what computes modulations and text projections once.

    parameter_group = staticmethod(parameter_group)

    @property
    def transformer(self) -> nn.Module:
        return self.model["diffusion_model"]

    @property
    def vae(self) -> CausalVAE:
        """On the meta device where it is late (``FrozenVAE``): for sizes then, not for encoding."""
        return self.frozen_vae.module

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    # ------------------------------------------------------------------------------------------- weights, phases

    def use_attention(self, backend: str) -> None:
        """Let the network compute attention with a kernel that ``system_attention.settle_attention`` has made ready."""
        self.transformer.attention_backend = backend

    def load_weights(self) -> list[LoadReport]:
        """Load what ``load`` names. Errors name the file, what it holds and what was expected; see ``weights.load``."""
        return load_weights(self)

    def prepare_training(self, device: torch.device) -> None:
        """Freeze all but the adapters where ``lora`` is set; move everything to ``device``."""
        if self.config.sample is not None and self.config.sample.text_features is not None:
            raise ValueError(
                "sample.text_features is for sampling, training encodes its captions: set it to null"
            )
        if self.config.lora is not None:
            freeze_base(self.transformer)
        else:
            merge_lora(self.transformer)  # of load.lora: everything trains, so it belongs to the weights
        self._place(device)
        self.train()

    def prepare_sampling(self, device: torch.device, *, place: bool = True) -> None:
        """Merge LoRA if asked, cast to ``sample.precision``, move to ``device`` (place=False: stay where they are)."""
        precision = self.config.sample.precision
        if precision == "fp16" and device.type == "cpu" and not self.config.load.force_fp16:
            raise ValueError(
                "sample.precision=fp16 needs a GPU and this machine has none; use fp32 or bf16 (load.force_fp16=true "
                "overrides)"
            )
        if self.config.sample.merge_lora:
            merge_lora(self.transformer)
        self.frozen_vae.stay()
        self.transformer.to(DTYPES[precision])
        for embedder in self.conditioner.embedders if self.config.sample.text_encoder_device else ():
            if hasattr(embedder, "stay_on"):
                embedder.stay_on(torch.device(self.config.sample.text_encoder_device))
        if place:
            self._place(device)
        else:
            self.vae.to(DTYPES[self.config.vae.precision])
        self.eval().requires_grad_(False)

    def _place(self, device: torch.device) -> None:
        activate(self.transformer.attention_backend, device)
        self.to(device)
        self.frozen_vae.place(device)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that is empty or does not fit, before anything heavy runs.

        With ``sample.text_features``, for a prompt, or the negative or empty one, that is not there.
        Where ``on_long: cut`` allows a long one, its lost words are reported, each time.
        """
        negative, unconditional = self.config.sample.negative_prompt, self.config.sample.unconditional
        prompts = list(dict.fromkeys([*prompts, negative] if negative else prompts))
        for embedder in self.conditioner.embedders:
            if getattr(embedder, "features", None) is not None:
                empty = [""] if negative is None and unconditional == "empty_prompt" else []
                embedder.features.check([*prompts, *empty])
            elif hasattr(embedder, "tokenize"):
                cached = getattr(embedder, "cached", None) or ()
                new = [prompt for prompt in prompts if prompt not in cached]
                if new:
                    embedder.tokenize(new)
                    for position, words in embedder.cut_words(new).items():
                        logger.warning("the prompt %r is too long; lost: %r", new[position][:60], words)

    # ------------------------------------------------------------------------------------------------ training

    def forward(
        self, batch: dict[str, Any], rng: RandomStreams | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of one batch.

        batch: ``video`` (B, F, 3, H, W), uint8 or in [-1, 1], or ``moments`` (B, T, 2C, h, w) from the latent cache;
        ``caption`` list of B. rng: the step's random streams (None: those of step 0, for notebooks).
        Returns (loss, metrics), 0-d tensors, and in metrics also one value per clip.
        """
        rng = rng or RandomStreams.at(self.config.seed, 0, device=self.device)
        x0 = self.encode_batch(batch, rng.local)  # (B, T, C, h, w)
        encode = partial(self.encode_pixels, generator=rng.local)
        with self.phases("text"):
            condition = self.conditioner(batch, rng, encode, num_latent_frames=x0.shape[1])
        noise = training_noise(x0, rng.local, self.config.model.offset_noise)
        t = self.timesteps.sample(len(x0), rng, self.schedule.num_timesteps)  # (B,)
        prediction, target = self.denoised(x0, condition, t, noise)
        loss, metrics = self.loss(prediction, target, t, self.schedule)
        return loss, {**metrics, **self._losses_by_band(prediction, target, t)}

    @torch.no_grad()
    def _losses_by_band(self, prediction: Tensor, target: Tensor, t: Tensor) -> dict[str, Tensor]:
        """``loss_by_t/0000-0249`` ...: (B,), the losses of the clips in this band of timesteps; NaN for the others."""
        bands, steps = (
            self.config.train.timestep_bands if self.config.train else 0,
            self.schedule.num_timesteps,
        )
        if not bands:
            return {}
        losses = losses_by_item(self.loss, prediction, target, t, self.schedule)  # (B,)
        band, names = band_of(t, steps, bands), band_names(steps, bands)
        return {
            f"loss_by_t/{name}": torch.where(band == k, losses, torch.nan) for k, name in enumerate(names)
        }

    def denoised(
        self, x0: Tensor, condition: dict[str, Tensor], t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(predicted velocity, true velocity) of x0 (B, T, C, h, w) diffused to t (B,) with ``noise``, float32."""
        prediction = self.predict(self.schedule.add_noise(x0, noise, t), t, condition)
        return prediction.float(), self.schedule.velocity(x0, noise, t)

    losses_at = losses_at  # validation: the loss of one clip at given timesteps

    def predict(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The network's v-prediction: x (B, T, C, h, w), t (B,), condition with ``tokens`` and maybe ``concat``.

        t: on the device of x, or on the CPU, see ``ExpertTransformer.forward``.
        """
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

    def vae_moments(self, video: Tensor) -> Tensor:
        """video (B, F, 3, H, W), uint8 or in [-1, 1] -> moments (B, T, 2C, h, w), float32, unscaled."""
        with self.phases("vae"):
            return self.frozen_vae.moments(video.to(self.device)).float()

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
        with self.frozen_vae.in_use() as vae:
            for chunk in vae.decode_stream(latents):
                yield chunk.float().clamp_(-1.0, 1.0)

    # ------------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        images: Tensor | None = None,
        video: Tensor | None = None,
        strength: float | None = None,
        keep_frames: Sequence[int] | None = None,
        invert: bool = False,
        source_prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Videos (B, F, 3, H, W) in [-1, 1] for B prompts. Sizes and steps default to the section ``sample``.

        seeds: one per prompt (None: 0, 1, ...); item i of a batch gets the same noise as alone.
        images: (B, 3, H, W), uint8 or in [-1, 1], the first frames of image-to-video.
        video: (B, F, 3, H, W), uint8 or in [-1, 1], F = num_frames: what strength, keep_frames or invert start from.
        strength: the part of the steps that is run, 0 ... 1 (None: 0.8, and 1 with keep_frames).
        keep_frames: frames of ``video`` that stay; ``range(n)`` continues its first n frames.
        invert: start from the noise that DDIM inversion finds, see ``edit_latents``, with ``source_prompts``.
        negative_prompt: None is that of the section ``sample``.
        callback: called after every step, see ``diffusion.samplers``. progress: see ``sample_stream``.
        """
        section, report = self.config.sample, StageReport(progress)
        size = {
            "num_frames": num_frames or section.num_frames,
            "height": height or section.height,
            "width": width or section.width,
        }
        steps = steps or section.steps
        run = {
            "seeds": list(range(len(prompts)) if seeds is None else seeds),
            "steps": steps,
            "callback": callback,
        }
        report.begin("encode", 1)
        encode = partial(self.encode_prompts, images=images, num_frames=size["num_frames"])
        conditions = encode(prompts, negative_prompt=negative_prompt)
        latents = None if video is None else self._clip_latents(video, **size)
        if latents is None and (strength is not None or keep_frames is not None or invert):
            raise ValueError(
                "strength, keep_frames and invert start from a video: give video=(B, F, 3, H, W)"
            )
        report.at(1)
        if invert:
            source = encode(source_prompts) if source_prompts else None
            latents = self.edit_latents(conditions, latents, source=source, **run, report=report)
        else:
            start = keep = None
            if keep_frames is not None:
                ratio = self.vae.temporal_compression
                keep = latents, kept_latents(keep_frames, size["num_frames"], ratio)
            if latents is not None and not (strength is None and keep is not None):
                start = Start(latents, DEFAULT_STRENGTH if strength is None else strength)
            latents = self.sample_latents(conditions, **run, **size, start=start, keep=keep, report=report)
        chunks, done = [], 0
        report.begin("decode", size["num_frames"])
        for chunk in self.decode(latents):
            chunks.append(chunk)
            done += chunk.shape[1]
            report.at(done)
        return torch.cat(chunks, dim=1)

    def sample_stream(self, prompts: Sequence[str], **options: Any) -> Iterator[dict[str, Any]]:
        """``sample`` as a generator: yields its progress, and at last ``{"video": (B, F, 3, H, W)}``.

        options: those of ``sample``. Progress is ``{"stage", "step", "steps", "seconds_left"}`` with the stages encode,
        invert, denoise and decode (whose steps are frames); seconds_left is of the stage, None before its first step.
        Closing the generator ends the work after the step at hand.
        """
        yield from as_generator(lambda progress: self.sample(prompts, **options, progress=progress))

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
            negative_prompt=section.negative_prompt if negative_prompt is None else negative_prompt,
            unconditional=section.unconditional,
            device=self.device,
            **self._image_context(num_frames),
        )

    @torch.no_grad()
    def with_images(
        self, conditions: Conditions, images: Tensor, num_frames: int | None = None
    ) -> Conditions:
        """``conditions`` with other first frames (B, 3, H, W): the next window, without the text encoder."""
        context = self._image_context(num_frames)
        return self.conditioner.with_images(conditions, images.to(self.device), **context)

    def _image_context(self, num_frames: int | None) -> dict[str, Any]:
        section = self.config.sample
        return {
            "num_latent_frames": self._padded_latents(num_frames or section.num_frames),
            "image_latent_scale": section.image_latent_scale,
            "scale_factor": self.config.vae.scale_factor,
            "encode": self.encode_pixels,
        }

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
        start: Start | None = None,
        keep: tuple[Tensor, Tensor] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        report: StageReport | None = None,
    ) -> Tensor:
        """Denoise to scaled latents (B, T, C, h, w), one item per seed.

        start: video to video. None starts from pure noise.
        keep: (known, mask), scaled latents (B, T, C, h, w) and (B or 1, T, 1, h or 1, w or 1) of 0 and 1: where it is
        1 the result is ``known``, at every step (``diffusion.constraints.KeepRegion``; training-free, for any model).
        """
        frames, padded = self.vae.num_latents(num_frames), self._padded_latents(num_frames)
        side = self.vae.spatial_compression
        shape = (len(seeds), padded, self.config.vae.z_channels, height // side, width // side)
        noise = noise_source(seeds, device=self.device)
        x = drawn = noise(torch.empty(shape, device=self.device))
        schedule = self.schedule
        if start is not None:
            schedule = TailSchedule(schedule, steps, start.strength)
            steps = schedule.steps
            x = noised_start(self._padded("start", start.latents, drawn), drawn, schedule)
        denoise = GuidedDenoiser(self.predict, schedule, steps, self.guidance, *conditions)
        if keep is not None:
            known, mask = self._padded("known", keep[0], drawn), pad_front(keep[1], self.patch_t)
            denoise = KeepRegion(denoise, schedule, known, mask, drawn, steps)
            x = torch.where(denoise.inside, known, x) if not steps else x
        callback = in_stage("denoise", steps, callback, report)
        if steps:
            with self.once_per_run(schedule.timesteps(steps)):
                x = self.sampler(denoise, x, schedule, steps=steps, noise=noise, callback=callback)
        return x[:, padded - frames :]

    @torch.no_grad()
    def edit_latents(
        self,
        conditions: Conditions,
        latents: Tensor,
        *,
        steps: int,
        seeds: Sequence[int],
        source: Conditions | None = None,
        iterations: int = 3,
        callback: Callable[[dict[str, Any]], None] | None = None,
        report: StageReport | None = None,
    ) -> Tensor:
        """DDIM inversion of scaled latents (B, T, C, h, w) with ``source``, then DDIM with ``conditions``: the edit.

        source: what the latents show (``encode_prompts``); it is inverted without guidance, which has no inverse.
        None: ``conditions``, and the way back is without guidance too: reconstruction.
        seeds: of nothing here, as DDIM draws nothing; taken so that all ways of sampling are called alike.
        iterations: see ``diffusion.inversion``. The sampler is always DDIM, on the model's own schedule.
        ``sample.reference_steps`` gives the way back the clip's own tokens to attend to (``model.reference``).
        """
        frames, x0 = latents.shape[1], pad_front(latents.to(self.device).float(), self.patch_t)
        source, guidance = (conditions, ConstantGuidance(1.0)) if source is None else (source, self.guidance)
        reference = self._reference(source, steps)
        plain = GuidedDenoiser(self.predict, self.schedule, steps, ConstantGuidance(1.0), *source)
        inner = reference.recording(in_stage("invert", steps, callback, report))
        with self.once_per_run(self.schedule.timesteps(steps)):
            x = ddim_invert(plain, x0, self.schedule, steps=steps, iterations=iterations, callback=inner)
            beside = reference.beside(self.predict)
            denoise = GuidedDenoiser(beside, self.schedule, steps, guidance, *conditions)
            inner = in_stage("denoise", steps, callback, report)
            return ddim(denoise, x, self.schedule, steps=steps, callback=inner)[:, -frames:]

    def _reference(self, source: Conditions, steps: int) -> ReferenceTrajectory:
        """For the first ``sample.reference_steps`` of the steps of an edit; of none where that is 0."""
        section = self.config.sample
        count = reference_count(section.reference_steps, steps)
        attention = ReferenceAttention(self.transformer, section.reference_layers) if count else nullcontext
        return ReferenceTrajectory(self.schedule.timesteps(steps)[:count].tolist(), source[0], attention)

    def _padded(self, name: str, latents: Tensor, like: Tensor) -> Tensor:
        """Latents as the VAE gives them -> as the network sees them: float32, padded in front, shaped like ``like``."""
        latents = pad_front(latents.to(like), self.patch_t)
        if latents.shape != like.shape:
            raise ValueError(
                f"{name} latents are {tuple(latents.shape)} (padded), the video's {tuple(like.shape)}"
            )
        return latents

    def _clip_latents(self, video: Tensor, num_frames: int, height: int, width: int) -> Tensor:
        """The posterior mean of a clip (B, F, 3, H, W), scaled; it must have the size that is sampled."""
        expected = (num_frames, 3, height, width)
        if video.ndim != 5 or tuple(video.shape[1:]) != expected:
            raise ValueError(f"video is {tuple(video.shape)}: expected (B, {', '.join(map(str, expected))})")
        return self.encode_pixels(video)


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

    @staticmethod
    def parameter_group(name: str) -> str:
        """``encoder`` or ``decoder``; ``loss`` for parameters that the loss has of its own."""
        owner, _, rest = name.partition(".")
        return rest.partition(".")[0] if owner == "first_stage_model" else owner
