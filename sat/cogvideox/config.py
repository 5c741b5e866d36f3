"""Configuration: one dataclass per section, what each key means, and the checks that need more than one key.

``load_config(["configs/cogvideox_5b.yaml", "configs/lora.yaml"], ["train.steps=10"])`` merges left to right (later
wins), checks every key and type against the dataclasses below, checks every ``{target, params}`` part against the
signature of its target, and returns a typed ``Config``. The mechanics are in ``config_merge.py``.

Neither torch nor SAT is imported here, so that a mistake in a YAML answers at once.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox.config_merge import ConfigError, Part, dump_yaml, merge_files, set_by_path, to_dataclass
from cogvideox.config_names import spell_out
from cogvideox.execution import check_attention, check_compile
from cogvideox.optimizer_names import check_zero
from cogvideox.recompute import read_recompute

__all__ = [
    "Config",
    "ConfigError",
    "Part",
    "config_from_dict",
    "latent_frames",
    "load_config",
    "nearest_frame_counts",
    "save_config",
    "to_yaml",
]


@dataclass
class RunConfig:
    dir: str | None = None
    # The run folder: the same command with the same folder resumes. None: runs/<names of the YAML files>.
    force: bool = False
    # Go on from a checkpoint although keys that change the training differ from its own; they are listed.


@dataclass
class TransformerConfig:
    """The expert transformer. The architecture has no defaults: width and depth come from the YAML."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    in_channels: int
    # Latent channels in, channel-concatenated condition included (I2V: 16 noisy + 16 image = 32).
    out_channels: int
    time_embed_dim: int
    patch_size: list[int]
    # [t, h, w]: [1, 2, 2] for CogVideoX 1.0 (a convolution per frame), [2, 2, 2] for 1.5 (a linear layer).
    text_length: int
    text_hidden_size: int
    num_frames: int
    # Pixel frames of the trained clips (49; 1.5: 81).
    latent_height: int
    latent_width: int
    # Latent grid of the trained resolution (60 x 90). Other sizes work; a learned table ends there.
    position: Part
    ofs_embed_dim: int | None = None
    # Width of the sinusoid of the ``ofs`` input (1.5-I2V: 512). None: the network has no such input.
    patch_embed: Part = field(default_factory=lambda: Part("cogvideox.model.patch_embed.PatchEmbed"))
    adaln: Part = field(default_factory=lambda: Part("cogvideox.model.adaln.ExpertAdaLN"))
    final_layer: Part = field(default_factory=lambda: Part("cogvideox.model.final_layer.FinalLayer"))
    checkpoint_activations: Any = False
    # What each block keeps for the backward pass; the rest is computed again from its input. false or none: everything.
    # products: the outputs of linear layers and attention, half the memory for hardly more work. selective: the outputs
    # of attention. true or full: nothing. A whole number n: blocks 0, n, 2n ... as full, the others as none. "24 GiB":
    # the fastest of these whose planned peak fits.
    attention: str = "auto"
    # The attention kernel: flash, cudnn, efficient, math, fa3, fa4 (execution.py). auto: on a GPU each is timed and
    # checked at the start, and a run that is resumed, or a video made again, goes on with the one it had.
    compile: str = "none"
    # none, or blocks: torch.compile of one transformer block, which all blocks use, in training and sampling. The first
    # step of each size takes up to a minute more.


@dataclass
class ModelConfig:
    transformer: TransformerConfig | None = None
    # None in runs that train the VAE alone.
    schedule: Part = field(default_factory=lambda: Part("cogvideox.diffusion.schedule.ZeroSNRSchedule"))
    # The only noise schedule: training and sampling both read it.
    timesteps: Part = field(default_factory=lambda: Part("cogvideox.diffusion.timesteps.StratifiedTimesteps"))
    # How training timesteps are drawn.
    loss: Part = field(default_factory=lambda: Part("cogvideox.diffusion.loss.v_prediction_loss"))
    # (prediction, target, t, schedule) -> (loss, metrics). Short names: min_snr, debiased ... (diffusion/names.py).
    offset_noise: float = 0.0
    # Standard deviation of a constant added to each sample's noise; 0 is off.
    conditions: list[Part] = field(default_factory=list)
    # Each item turns a batch into text tokens or concatenated channels.
    ofs: float = 2.0
    # Value of the network's ofs input, where it has one.

    @property
    def has_image_condition(self) -> bool:
        return any("FirstFrame" in part.target for part in self.conditions)


@dataclass
class VAEConfig:
    """The 3D causal VAE."""

    channels: int
    channel_multipliers: list[int]
    num_res_blocks: int
    z_channels: int
    scale_factor: float
    # Latents are multiplied by it after encoding (2B: 1.15258426, the others 0.7).
    in_channels: int = 3
    temporal_compression: int = 4
    norm_groups: int = 32
    encode_frames_per_pass: int | None = None
    # None: the whole clip in one pass (SAT). 8: diffusers' batching (9 frames, then 8 by 8).
    tile_latent_height: int | None = None
    tile_latent_width: int | None = None
    # Encode and decode in overlapping tiles of a frame: a quarter of the memory, slightly other pixels. In latents,
    # multiples of 6 and 5; diffusers' tiles are 30 and 45. None: the whole height or width.
    slice_batch: bool = False
    # Encode and decode the clips of a batch one after the other: the memory of one clip, the same pixels.
    precision: str = "fp32"

    @property
    def spatial_compression(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass
class LoraSource:
    path: str
    strength: float = 1.0
    # The update is multiplied by it; 0 is off.
    alpha: float | None = None
    # None: what the file says. SAT's matrices without their YAML say nothing.


@dataclass
class LoadConfig:
    transformer: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    # Each: a SAT folder or file, a run folder of ours, a diffusers folder, safetensors, or hf://ORG/NAME. None: random
    # weights.
    lora: Any = None
    # A path, or a list of paths and {path: ..., strength: 0.5} (LoraSource); any format. Rank and scale come from the
    # file. With the section lora: the one LoRA that its adapters start from.
    ema: bool = True
    # Take the averaged weights of a run folder where it has them.
    force_fp16: bool = False
    # Allow fp16 for weights that were trained in bf16 (5B, 1.5), which overflow in it, and on a CPU.
    force_constants: bool = False
    # Allow a vae.scale_factor or an SNR shift that is not that of the published weights.

    @property
    def loras(self) -> list[LoraSource]:
        """The LoRAs that ``lora`` names, with their strengths. Raises ConfigError for anything else."""
        entries = self.lora if isinstance(self.lora, list) else [] if self.lora is None else [self.lora]
        result = []
        for index, entry in enumerate(entries):
            key = f"load.lora.{index}" if isinstance(self.lora, list) else "load.lora"
            if not isinstance(entry, str | dict):
                raise ConfigError(f"{key}={entry!r}: expected a path or {{path: ..., strength: 0.5}}")
            try:
                source = to_dataclass(LoraSource, {"path": entry} if isinstance(entry, str) else entry)
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from error
            if not source.path or not math.isfinite(source.strength):
                raise ConfigError(f"{key}={entry!r}: expected a path and a finite strength")
            if source.alpha is not None and not (math.isfinite(source.alpha) and source.alpha):
                raise ConfigError(f"{key}.alpha={source.alpha}: expected a number other than 0")
            result.append(source)
        return result


@dataclass
class LoraConfig:
    rank: int
    alpha: float = 1.0
    # The update is scaled by alpha / rank. 1 is SAT's value; diffusers users expect alpha = rank.
    layers: list[str] = field(default_factory=lambda: ["query_key_value", "dense"])
    # Linear layers by pattern (patterns.py): the end of a path such as dense or adaLN_modulations.*, or re:EXPRESSION.
    transformer_layers: list[int] | None = None
    # Indices of the transformer layers. None: all. Layers outside of them are chosen by ``layers`` alone.
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    # Pattern -> rank, in place of ``rank``; the first that matches counts.
    alpha_pattern: dict[str, Any] = field(default_factory=dict)
    # Pattern -> alpha, in place of ``alpha``.
    rslora: bool = False
    # The update is scaled by alpha / sqrt(rank) (Kalajdzievski 2023): its size does not depend on the rank.
    dropout: float = 0.0
    # Of the adapters' input, in training.
    dora: bool = False
    # Train the length of each row of the weight apart from its direction (Liu et al. 2024). Exported merged.
    quantize_base: str | None = None
    # The frozen linear layers of the transformer's layers in eight bits: int8, fp8, torchao_int8, torchao_fp8.


@dataclass
class DataConfig:
    num_frames: int
    height: int
    width: int
    fps: float
    path: str | None = None
    # A folder of videos with captions; data/README.md shows the layouts that are recognised.
    target: str = "cogvideox.data.video_folder.VideoFolder"
    params: dict[str, Any] = field(default_factory=dict)
    # Further arguments of the dataset (skip_frames, on_bad_clip, on_missing_caption, max_bad_fraction ...).
    validation_path: str | None = None
    # A second folder, never trained on. None: no validation loss.
    num_workers: int = 2
    # Loader processes per rank; 0 reads in the training process.
    clip_timeout_seconds: float | None = 60.0
    # A clip that takes longer to read is put aside like a damaged one, and its process replaced. None: wait for ever.
    # With num_workers=0 nothing can be cut off.
    latent_cache: str | None = None
    # Folder where each clip's latents are kept, encoded once. None: encode in every step.
    latent_cache_precision: str | None = None
    # Of the moments on disk: fp32, bf16 or fp16. None: vae.precision, in which they are made, so nothing is lost.
    text_cache: str | None = None
    # Folder where each caption's features are kept, encoded once; it may be that of latent_cache. None: the text
    # encoder runs in every step.
    cache_in_memory_gib: float = 1.0
    # Cached latents up to this size, and as much of text features, are also held in memory.


@dataclass
class GroupConfig:
    pattern: str
    # Which parameters, by name (patterns.py): the end of a path, or re:EXPRESSION. The first group that matches counts.
    lr_scale: float | None = None
    # Their learning rate is that of the optimizer times this. None: 1.
    lr: float | None = None
    # Their learning rate. None: by lr_scale.
    weight_decay: float | None = None
    # None: the optimizer's, and 0 for norms and biases.


@dataclass
class TrainConfig:
    steps: int
    batch_size: int
    # Clips per rank and micro-step.
    optimizer: Part
    # adamw, muon, adamw_8bit ...: optimizer_names.py has the short names.
    groups: list[GroupConfig] = field(default_factory=list)
    # Parameters with a learning rate or weight decay of their own; docs/optimizers.md.
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None
    # Clips per optimizer step over all ranks: the micro-steps follow from it, so another number of ranks trains the
    # same batches. None: batch_size * gradient_accumulation_steps * ranks.
    gradient_clipping: float = 1.0
    # Maximum L2 norm of the gradient; 0 is off.
    precision: str = "bf16"
    # fp32, bf16, or fp16 (GPU only).
    lr_schedule: str = "constant"
    # constant, cosine or linear, after the warm-up.
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    # The decaying schedules end at this fraction of the learning rate.
    ema_decay: float | None = None
    # None: no averaged weights.
    log_every: int = 20
    save_every: int = 500
    validate_every: int | None = None
    validation_batches: int = 4
    # Held-out batches of batch_size clips, and as many clips of the training set, for val/train_loss.
    validation_timesteps: int = 8
    # Timesteps at which each of these clips is seen, the middles of as many equal parts of the schedule; its end, where
    # the input is pure noise, comes on top.
    timestep_bands: int = 4
    # Equal bands of timesteps, for train/loss_by_t and val/loss_by_t.
    preview_prompts: list[str] = field(default_factory=list)
    # One video each, in the size of the section sample, prompt i with the seed ``seed + i``; image-to-video:
    # ``prompt@@image.png``. Empty: no previews.
    preview_every: int | None = None
    # None: with every checkpoint. The base model's come before the first step in any case.
    preview_drift_warning: float | None = 0.5
    # Warn when saturation, brightness or motion of the previews moved from the base model's by more than this part of
    # it. Only with load.transformer. None: never.
    keep_checkpoints: int | None = 3
    # The newest so many; None keeps all.
    keep_best: bool = True
    # And, of those saved at a step that was validated, the one with the lowest held-out loss.
    keep_every: int | None = None
    # And those of every so many steps. None: no others.
    max_nonfinite_steps: int = 20
    # Consecutive steps with a non-finite loss or gradient after which the run stops.
    profile_steps: list[int] | None = None
    # [first, last]: these steps are recorded by torch's profiler, into run.dir/profile. None: none.
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    # The ranks that record.
    trackers: list[str] = field(default_factory=list)
    # Any of wandb, tensorboard. metrics.jsonl is always written.
    resume: str = "auto"
    # auto: go on from the newest checkpoint of run.dir; never: refuse a used folder.
    timeout_minutes: float = 30.0
    # A collective that takes longer ends the run (a hung rank).


@dataclass
class SampleConfig:
    steps: int
    num_frames: int
    height: int
    width: int
    fps: float
    batch_size: int = 1
    # Prompts denoised together.
    precision: str | None = "bf16"
    # fp32, bf16, or fp16 (GPU only). None: the precision that the checkpoint of load.transformer was published in.
    negative_prompt: str | None = None
    # What guidance moves away from, encoded; it takes the place of ``unconditional``. None: no negative prompt.
    unconditional: str = "zeros"
    # zeros: as published and trained; empty_prompt: the text encoder's output for "", as diffusers does.
    merge_lora: bool = True
    # Fold the LoRAs into the weights before sampling: faster. False keeps them beside the weights.
    image_latent_scale: str = "training"
    # 1.5-I2V image latents exist in three conventions: training 0.7 z, sat_sampling z, diffusers z / 0.7.
    strength: float | None = None
    # Video to video: the part of the steps that is run, 0 (the video itself) to 1 (all from noise). None: 0.8, and 1
    # with keep_frames.
    keep_frames: str | None = None
    # Frames of the given video that stay, such as 0-8,40-48; the others are made to fit. None: none.
    invert: bool = False
    # Start from the noise that DDIM inversion finds for the given video: reconstruction, and editing.
    reference_steps: float = 0.0
    # With invert: the part of the steps, from the first, in which the edit also attends to the given video's tokens at
    # the same timestep, so that it keeps the layout. 0: never; 1: always. These steps take half as much again.
    reference_layers: list[int] | None = None
    # The transformer layers in which it does, counted from 0. None: all.
    total_frames: int | None = None
    # Frames of the result where it is longer than num_frames, the window. None: one window.
    continue_by: str | None = None
    # What the next window is given: image (the last frame), frames (the last frames, encoded again and kept) or latents
    # (the last latents, kept). None: image for image-to-video models, latents for the others.
    overlap: int | None = None
    # Latent frames that neighbouring windows share, for frames and latents. None: a quarter of the window.
    memory: str = "fast"
    # fast: all models stay on the device; balanced: savings that cost seconds; small: layer by layer; or "12 GiB", the
    # fastest set that fits. None of them changes a pixel beyond rounding.
    text_encoder_device: str | None = None
    # cpu: prompts are encoded on the CPU, whatever memory says. None: on the network's device.
    text_features: str | None = None
    # A file, or a folder of files, that scripts/encode_prompts.py wrote: no text encoder is loaded.
    quantize: str | None = None
    # The transformer's layers in eight bits, which changes the video: int8, fp8, torchao_int8, torchao_fp8.
    quantize_report: bool = False
    # Measure how much quantize changes the output of one forward pass of a small clip.
    prompt_file: str | None = None
    # One prompt per line, read where the command line gives no prompts. None: standard input.
    output_dir: str = "outputs/samples"
    outputs: list[str] = field(default_factory=lambda: ["mp4"])
    # Of mp4, gif, frames (a folder of png), latents (decoded later by --from-latents), sheet (a contact sheet).
    gallery: bool = False
    # Write index.html over all videos of output_dir.
    preview_every: int | None = None
    # Steps between pictures of the unfinished video, NAME.preview.png. None: no pictures.


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    system: Part = field(default_factory=lambda: Part("cogvideox.system.VideoDiffusion"))
    # What turns a batch into a loss.
    model: ModelConfig = field(default_factory=ModelConfig)
    vae: VAEConfig | None = None
    load: LoadConfig = field(default_factory=LoadConfig)
    lora: LoraConfig | None = None
    data: DataConfig | None = None
    train: TrainConfig | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)
    # Passed to DeepSpeed; ZeRO-2 where it names no stage.
    sampler: Part = field(default_factory=lambda: Part("cogvideox.diffusion.samplers.dpmpp_2m_sde"))
    guidance: Part = field(default_factory=lambda: Part("cogvideox.diffusion.guidance.ConstantGuidance"))
    sample: SampleConfig | None = None


def load_config(paths: list[str | Path], overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Merge YAML files (later wins) and ``key.path=value`` overrides into a checked ``Config``.

    Raises ConfigError (a ValueError): unknown or misspelt key with the nearest right one, wrong type, missing value,
    or values that contradict each other. YAML files of CogVideo's own ``sat/`` folder are recognised and translated.
    """
    from cogvideox.upstream_yaml import is_upstream, translate

    paths = [Path(p) for p in paths]
    merged = merge_files(paths, is_upstream=is_upstream, translate=translate)
    config = config_from_dict(merged, overrides)
    if config.run.dir is None:
        config.run.dir = "runs/" + "-".join(p.stem for p in paths)
    return config


def config_from_dict(tree: dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """A checked ``Config`` from nested mappings, such as the ``config`` of a sidecar json."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        set_by_path(tree, override)
    spell_out(tree)
    config = to_dataclass(Config, tree)
    check(config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the merged configuration as YAML that ``load_config`` reads back to the same ``Config``."""
    Path(path).write_text(to_yaml(config))


def to_yaml(config: Config) -> str:
    return dump_yaml(dataclasses.asdict(config))


def nearest_frame_counts(num_frames: int, multiple: int) -> str:
    """``"45 or 49"``: the legal counts (multiple * k + 1) around an illegal one."""
    below = max((num_frames - 1) // multiple, 0) * multiple + 1
    return f"{below} or {below + multiple}"


def check(config: Config) -> None:
    """Checks that involve more than one key. Each error names the keys, what was found and what would be right."""
    transformer, vae = config.model.transformer, config.vae
    if transformer is not None:
        _check_transformer(transformer)
    if len(config.load.loras) > 1 and config.lora is not None:
        raise ConfigError(
            f"load.lora names {len(config.load.loras)} LoRAs, but the section lora has one set of adapters, which one "
            f"LoRA can start: name one, or leave the section out (lora=null), which applies them all"
        )
    for section, name in ((config.data, "data"), (config.sample, "sample")):
        if section is not None and vae is not None:
            _check_size(section, name, vae, transformer)
    if transformer is not None and vae is not None:
        if transformer.out_channels != vae.z_channels:
            raise ConfigError(
                f"model.transformer.out_channels={transformer.out_channels} but vae.z_channels={vae.z_channels}: "
                f"the network predicts latents, both must be the same number"
            )
        concatenated = transformer.in_channels - transformer.out_channels
        has_image = any("FirstFrame" in part.target for part in config.model.conditions)
        if has_image and concatenated != vae.z_channels:
            raise ConfigError(
                f"model.transformer.in_channels={transformer.in_channels}: with an image condition it must be "
                f"{2 * vae.z_channels} (twice vae.z_channels)"
            )
    if config.data is not None and config.data.text_cache and trains_text_encoder(config):
        raise ConfigError(
            "data.text_cache cannot be used while the text encoder trains, as its features change in every step; set "
            "data.text_cache=null, or trainable: false in model.conditions (the section lora freezes it too)"
        )
    for precision, name in (
        (config.train.precision if config.train else None, "train.precision"),
        (config.sample.precision if config.sample else None, "sample.precision"),
        (vae.precision if vae else None, "vae.precision"),
        (config.data.latent_cache_precision if config.data else None, "data.latent_cache_precision"),
    ):
        if precision not in (None, "fp32", "bf16", "fp16"):
            raise ConfigError(f"{name}={precision!r}: expected fp32, bf16 or fp16")
    if config.sample is not None and config.sample.text_encoder_device not in (None, "cpu"):
        raise ConfigError(
            f"sample.text_encoder_device={config.sample.text_encoder_device!r}: expected cpu, or null for that "
            f"of the network"
        )
    if config.train is not None:
        try:
            check_zero(config.train.optimizer.target, config.deepspeed.get("zero_optimization") or {})
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if config.train.preview_prompts:
            _check_previews(config)
        _check_validation(config.train)
        _check_torchao(config)
        _check_compiled(config)
    for index, part in enumerate(config.model.conditions):
        length = part.params.get("max_length")
        if transformer is not None and length is not None and length != transformer.text_length:
            raise ConfigError(
                f"model.conditions.{index}.params.max_length={length} but model.transformer.text_length="
                f"{transformer.text_length}: the text encoder pads to the length that the network was built for"
            )


def _check_validation(train: TrainConfig) -> None:
    for key in ("validation_batches", "timestep_bands"):
        if getattr(train, key) < 1:
            raise ConfigError(f"train.{key}={getattr(train, key)}: expected at least 1")
    if train.validation_timesteps < train.timestep_bands:
        raise ConfigError(
            f"train.validation_timesteps={train.validation_timesteps}: expected at least train.timestep_bands="
            f"{train.timestep_bands}, so that each band has one"
        )


def _check_torchao(config: Config) -> None:
    stage = (config.deepspeed.get("zero_optimization") or {}).get("stage", 2)
    method = (config.lora.quantize_base if config.lora else None) or ""
    if method.startswith("torchao") and stage == 3:
        raise ConfigError(
            f"lora.quantize_base={method} does not work with deepspeed.zero_optimization.stage=3, which puts its own "
            f"linear operation in torch's place: use lora.quantize_base={method.removeprefix('torchao_')}, or stage 2"
        )


def _check_compiled(config: Config) -> None:
    stage = (config.deepspeed.get("zero_optimization") or {}).get("stage", 2)
    if stage == 3 and config.model.transformer is not None and config.model.transformer.compile != "none":
        raise ConfigError(
            f"model.transformer.compile={config.model.transformer.compile} does not work with deepspeed."
            f"zero_optimization.stage=3, which brings the weights of a layer while it runs: use none, or stage 2"
        )


def _check_previews(config: Config) -> None:
    if config.sample is None:
        raise ConfigError(
            "train.preview_prompts needs the section sample (steps and size of the videos): add configs/sample.yaml"
        )
    needs_image = any("FirstFrame" in part.target for part in config.model.conditions)
    for index, line in enumerate(config.train.preview_prompts):
        prompt, separator, _ = line.partition("@@")
        where = f"train.preview_prompts.{index}={line!r}"
        if not prompt.strip():
            raise ConfigError(f"{where}: the prompt is empty")
        if bool(separator) != needs_image:
            expected = "needs an image: prompt@@image.png" if needs_image else "takes no image"
            raise ConfigError(f"{where}: this model {expected}")


def _check_transformer(t: TransformerConfig) -> None:
    if t.hidden_size % t.num_attention_heads:
        legal = [h for h in range(1, t.hidden_size + 1) if t.hidden_size % h == 0]
        near = min(legal, key=lambda h: abs(h - t.num_attention_heads))
        raise ConfigError(
            f"model.transformer.num_attention_heads={t.num_attention_heads} does not divide "
            f"model.transformer.hidden_size={t.hidden_size}; the nearest that does is {near}"
        )
    if len(t.patch_size) != 3 or min(t.patch_size) < 1:
        raise ConfigError(f"model.transformer.patch_size={t.patch_size}: expected three numbers [t, h, w]")
    try:
        read_recompute(t.checkpoint_activations)
        check_attention(t.attention)
        check_compile(t.compile)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_size(section: Any, name: str, vae: VAEConfig, transformer: TransformerConfig | None) -> None:
    patch = transformer.patch_size if transformer else [1, 1, 1]
    multiple = vae.temporal_compression
    if (section.num_frames - 1) % multiple or section.num_frames < 1:
        raise ConfigError(
            f"{name}.num_frames={section.num_frames}: the VAE needs {multiple}k+1 frames; "
            f"use {nearest_frame_counts(section.num_frames, multiple)}"
        )
    for axis, p in (("height", patch[1]), ("width", patch[2])):
        unit, value = vae.spatial_compression * p, getattr(section, axis)
        if value % unit or value <= 0:
            low = max(value // unit, 1) * unit
            raise ConfigError(
                f"{name}.{axis}={value}: it must be a multiple of {unit} (VAE {vae.spatial_compression} x patch {p}); "
                f"use {low} or {low + unit}"
            )


def trains_text_encoder(config: Config) -> bool:
    """Whether a text encoder is trained with the network. LoRA freezes it."""
    return config.lora is None and any(part.params.get("trainable") for part in config.model.conditions)


def latent_frames(num_frames: int, config: Config) -> int:
    """Latent frames that the network sees: (frames - 1) / 4 + 1, padded to a multiple of the temporal patch."""
    frames = (num_frames - 1) // config.vae.temporal_compression + 1
    patch_t = config.model.transformer.patch_size[0]
    return math.ceil(frames / patch_t) * patch_t


def reference_count(part: float, steps: int) -> int:
    """How many of ``steps`` the reference of an edit lasts: ``sample.reference_steps`` as a number of steps."""
    if not 0 <= part <= 1:
        raise ConfigError(
            f"sample.reference_steps={part}: expected a part of the steps, from 0 (no reference) to 1 (all steps)"
        )
    if part and not round(part * steps):
        raise ConfigError(
            f"sample.reference_steps={part} of sample.steps={steps} is no step at all: use at least {1 / steps:.3g}, "
            "or more steps"
        )
    return round(part * steps)
