"""What is known of the keys that upstream's configuration has and this one does not: tables of facts."""

from __future__ import annotations

from typing import Any

# The first component of the targets that upstream's own modules have.
UPSTREAM_MODULES = {"sgm", "dit_video_concat", "vae_modules", "data_video", "diffusion_video"}
# Keys that no file of this project has in its sections of the same names.
UPSTREAM_MODEL_KEYS = {
    "scale_factor", "disable_first_stage_autocast", "latent_input", "log_keys", "input_key", "not_trainable_prefixes",
    "network_config", "denoiser_config", "conditioner_config", "first_stage_config", "loss_fn_config", "sampler_config",
    "noised_image_input", "noised_image_all_concat", "noised_image_dropout", "augmentation_dropout",
}  # fmt: skip
UPSTREAM_DATA_KEYS = {"video_size", "max_num_frames", "skip_frms_num"}

SAMPLERS = {
    "VPSDEDPMPP2MSampler": "cogvideox.diffusion.samplers.dpmpp_2m_sde",
    "VPODEDPMPP2MSampler": "cogvideox.diffusion.samplers.dpmpp_2m",
    "VideoDDIMSampler": "cogvideox.diffusion.samplers.ddim",
}
# type -> does it keep an average of the weights
OPTIMIZERS = {"sat.ops.FusedEmaAdam": True, "FusedEmaAdam": True, "AdamW": False, "Adam": False}

NETWORK = "model.network_config.params"
TRUNK = f"{NETWORK}.transformer_args"
MIXINS = f"{NETWORK}.modules"
LORA = f"{MIXINS}.lora_config.params"
VAE = "model.first_stage_config.params"
DENOISER = "model.denoiser_config.params"
LOSS = "model.loss_fn_config.params"
SAMPLER = "model.sampler_config.params"
OPTIMIZER = "deepspeed.optimizer.params"
DISCRETIZATIONS = [
    f"{path}.discretization_config" for path in (DENOISER, f"{LOSS}.sigma_sampler_config.params", SAMPLER)
]

TENSOR_PARALLEL = "tensor parallel training gives wrong gradients, so it is refused"

# path -> (the values that this project implements, the first being upstream's default; why there are no others)
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "args.model_parallel_size": ((1,), TENSOR_PARALLEL),
    "model.use_pd": ((False,), "progressive distillation is not supported"),
    "model.lr_scale": ((None,), "super-resolution training is not supported"),
    f"{NETWORK}.elementwise_affine": ((True,), "the layer norms here always have weights"),
    f"{NETWORK}.num_classes": ((None,), "class labels are not supported"),
    f"{NETWORK}.input_time": (("adaln",), "the time step enters by adaLN"),
    f"{NETWORK}.use_SwiGLU": ((False,), "the MLP here is GELU"),
    f"{NETWORK}.use_RMSNorm": ((False,), "the norms here are layer norms"),
    f"{TRUNK}.layernorm_order": (("pre",), "layers here are pre-norm"),
    f"{TRUNK}.model_parallel_size": ((1,), TENSOR_PARALLEL),
    f"{TRUNK}.is_decoder": ((False,), "attention here is not causal"),
    f"{TRUNK}.hidden_dropout": ((0,), "the network has no dropout"),
    f"{TRUNK}.attention_dropout": ((0,), "the network has no dropout"),
    f"{TRUNK}.drop_path": ((0,), "the network has no dropout"),
    f"{MIXINS}.pos_embed_config.params.rot_v": ((False,), "values are not rotated"),
    f"{MIXINS}.adaln_layer_config.params.qk_ln": ((True,), "queries and keys are always normalised here"),
    f"{LORA}.lora_dropout": ((0,), "LoRA here has no dropout"),
    f"{LORA}.qlora": ((False,), "quantised base weights are not supported"),
    f"{VAE}.regularizer_config.params.sample": ((True,), "latents are samples of the posterior"),
    f"{DENOISER}.quantize_c_noise": ((False,), "the network is given the index of the time step"),
    f"{LOSS}.type": (("l2",), "the loss is the squared error of v"),
    f"{LOSS}.fixed_frames": ((0,), "every latent frame is noised"),
    f"{LOSS}.block_scale": ((None,), "the loss here has no such term"),
    f"{LOSS}.block_size": ((None,), "the loss here has no such term"),
    f"{LOSS}.min_snr_value": ((None,), "the loss here has no such term"),
    f"{LOSS}.batch2model_keys": ((None, []), "the network is given no further inputs"),
    f"{SAMPLER}.fixed_frames": ((0,), "every latent frame is denoised"),
    f"{SAMPLER}.sdedit": ((False,), "editing a video is not supported"),
    "deepspeed.scheduler": ((None,), "the learning rate is set by train.lr_schedule and train.warmup_steps"),
    f"{OPTIMIZER}.adam_w_mode": ((True,), "weight decay is decoupled (AdamW)"),
    f"{OPTIMIZER}.bias_correction": ((True,), "AdamW corrects its bias"),
}
for _path in DISCRETIZATIONS:
    FIXED[f"{_path}.params.keep_start"] = ((False,), "the schedule is rescaled to zero terminal SNR")
    FIXED[f"{_path}.params.post_shift"] = ((False,), "the SNR shift comes before the rescaling")
for _half in (f"{VAE}.encoder_config.params", f"{VAE}.decoder_config.params"):
    FIXED[f"{_half}.double_z"] = ((True,), "the encoder gives mean and log variance")
    FIXED[f"{_half}.attn_resolutions"] = (([],), "the VAE here has no attention")
    FIXED[f"{_half}.dropout"] = ((0,), "the VAE has no dropout")
    FIXED[f"{_half}.pad_mode"] = (("first",), "time is padded by repeating the first frame")
    FIXED[f"{_half}.resamp_with_conv"] = ((True,), "resampling has convolutions")

# path -> what the translation calculates with: a whole number, a number, a list of so many (0: any), or a mapping
KINDS: dict[str, type | int] = {
    "args.sampling_num_frames": int,
    "args.sampling_image_size": 2,
    "args.train_iters": int,
    "args.warmup": float,
    "data.params.video_size": 2,
    "data.params.skip_frms_num": float,
    f"{NETWORK}.num_frames": int,
    f"{NETWORK}.hidden_size": int,
    f"{NETWORK}.num_attention_heads": int,
    f"{NETWORK}.latent_height": int,
    f"{NETWORK}.latent_width": int,
    f"{MIXINS}.pos_embed_config.params.hidden_size_head": int,
    f"{VAE}.encoder_config.params.ch_mult": 0,
    f"{VAE}.decoder_config.params.ch_mult": 0,
    "model.not_trainable_prefixes": 0,
    "model.conditioner_config.params.emb_models": dict,
    "deepspeed.zero_optimization": dict,
    "deepspeed.optimizer": dict,
    "deepspeed.optimizer.params": dict,
    "deepspeed.bf16": dict,
    "deepspeed.fp16": dict,
    **dict.fromkeys(("args", "model", "data", "deepspeed", NETWORK, TRUNK, MIXINS), dict),
}

SPLIT_COMMANDS = "train_video.py trains and sample_video.py samples"
PROMPTS = "sample_video.py takes prompts and images by --prompt, --prompt-file, --image or standard input"
DERIVED = "follows from other keys"
SAT_INTERNAL = "a detail of SAT's own training loop or model files"
PERFORMANCE_ONLY = "changes speed or memory upstream, not numbers"
DISPLAY = "only changed what upstream printed or stored"
MISPLACED = "stands outside fp16:, so DeepSpeed never sees it"
STATELESS = "random draws derive from the seed and the step; no state is stored"


def _keys(parent: str, names: str, reason: str) -> dict[str, str]:
    return {f"{parent}.{name}": reason for name in names.split()}


# path -> why it has no effect here; reported in the log
WITHOUT_EFFECT: dict[str, str] = {
    **_keys("args", "mode force_inference force_train force_pretrain", SPLIT_COMMANDS),
    **_keys("args", "input_type input_file input_dir image2video", PROMPTS),
    **_keys("args", "only_log_video_latents log_image debug save_args summary_dir", DISPLAY),
    **_keys("args", "grid_num_rows wandb_project_name", DISPLAY),
    **_keys("args", "distributed_backend local_rank device zero_stage strict_eval", SAT_INTERNAL),
    **_keys("args", "prefetch_factor block_size batch_from_same_dataset", SAT_INTERNAL),
    **_keys("args", "no_load_rng no_save_rng", STATELESS),
    "args.resume_dataloader": "a resumed run always goes on with the data where it stopped",
    "args.latent_channels": DERIVED,
    "args.eval_batch_size": "validation uses train.batch_size",
    "args.split": "training and validation clips are two folders, never one that is split",
    "model.log_keys": DISPLAY,
    "model.input_key": SAT_INTERNAL,
    "model.lora_train": "a lora section means LoRA training",
    "model.augmentation_dropout": "no code of upstream reads it",
    "model.disable_first_stage_autocast": "the VAE runs in vae.precision",
    "model.latent_input": "the dataset gives videos; data.latent_cache encodes each clip once",
    **_keys("model", "en_and_decode_n_samples_a_time compile_model", PERFORMANCE_ONLY),
    f"{NETWORK}.adm_in_channels": "unused without class labels",
    f"{NETWORK}.parallel_output": SAT_INTERNAL,
    f"{NETWORK}.dtype": "the precision comes from train.precision and sample.precision",
    **_keys(TRUNK, "vocab_size max_sequence_length skip_init", SAT_INTERNAL),
    **_keys(LORA, "layer_num cross_attention", DERIVED),
    f"{VAE}.cp_size": PERFORMANCE_ONLY,
    f"{VAE}.ignore_keys": "weights of the training loss are always skipped",
    f"{VAE}.loss_config": "the VAE is frozen here; configs/vae.yaml trains it",
    **_keys(f"{VAE}.encoder_config.params", "resolution", "the VAE is convolutional: any size"),
    **_keys(f"{VAE}.decoder_config.params", "resolution", "the VAE is convolutional: any size"),
    **_keys(f"{VAE}.encoder_config.params", "gather_norm", "only acts with context parallelism"),
    **_keys(f"{VAE}.decoder_config.params", "gather_norm", "only acts with context parallelism"),
    f"{DENOISER}.weighting_config": "the v-prediction loss does not read it, upstream either",
    f"{LOSS}.sigma_sampler_config.params.group_num": DERIVED,
    f"{SAMPLER}.verbose": DISPLAY,
    f"{SAMPLER}.device": SAT_INTERNAL,
    **_keys("deepspeed", "loss_scale loss_scale_window hysteresis min_loss_scale", MISPLACED),
    "deepspeed.steps_per_print": "train.log_every says when to log",
    "deepspeed.activation_checkpointing": "model.transformer.checkpoint_activations switches it",
    **_keys(OPTIMIZER, "set_grad_none use_num_upates torch_adam", SAT_INTERNAL),
}
