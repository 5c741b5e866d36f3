"""What is known of the keys that upstream's configuration has and this one does not: tables of facts."""

from __future__ import annotations

from typing import Any

SECTIONS = ("args", "model", "data", "deepspeed")
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
_EDM = "it steps in sigma = sqrt(1 - a^2) / a, which is infinite where CogVideoX starts (zero terminal SNR)"
# Class -> why it has no equivalent
IMPOSSIBLE = {
    **dict.fromkeys(
        (
            "EDMSampler", "EulerEDMSampler", "HeunEDMSampler", "SdeditEDMSampler", "EulerAncestralSampler",
            "DDIMSampler", "DPMPP2SAncestralSampler", "DPMPP2MSampler", "SDEDPMPP2MSampler", "LinearMultistepSampler",
        ),
        _EDM,
    ),
    "EDMSampling": _EDM,
    "EDMDiscretization": _EDM,
    "LegacyDDPMDiscretization": "its last step is not pure noise (no zero terminal SNR)",
    "LinearDynamicCFG": "write its formula as a guidance of your own (docs/extending.md)",
    "Basic2DPositionEmbeddingMixin": "its table is the same for every frame",
    "VideoDataset": "it reads web datasets; unpack them into a folder of clips and captions (data/README.md)",
}  # fmt: skip
# type, in small letters -> does it keep an average of the weights
OPTIMIZERS = {
    "sat.ops.fusedemaadam": True,
    "fusedemaadam": True,
    "adamw": False,
    "adam": False,
    "fusedadam": False,
}

NETWORK = "model.network_config.params"
TRUNK = f"{NETWORK}.transformer_args"
MIXINS = f"{NETWORK}.modules"
LORA = f"{MIXINS}.lora_config.params"
VAE = "model.first_stage_config.params"
DENOISER = "model.denoiser_config.params"
LOSS = "model.loss_fn_config.params"
TIMESTEPS = f"{LOSS}.sigma_sampler_config.params"
SAMPLER = "model.sampler_config.params"
OPTIMIZER = "deepspeed.optimizer.params"

TENSOR_PARALLEL = "tensor parallel training gives wrong gradients, so it is refused"
NO_DROPOUT = "the network has no dropout"
PLAIN_MLP = "the MLP here is two layers of width 4 x hidden_size with GELU"

# path -> (the values that this project implements, the first being upstream's default; why there are no others)
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "args.model_parallel_size": ((1,), TENSOR_PARALLEL),
    "args.epochs": ((None,), "a run is counted in steps: set args.train_iters"),
    "args.iterable_dataset": ((False,), "the dataset is a folder, whose clips are numbered"),
    "args.deepspeed_config": ((None,), "write the content of that file as the section deepspeed"),
    "args.sdedit": ((False,), "editing a video is not supported"),
    "model.use_pd": ((False,), "progressive distillation is not supported"),
    "model.lr_scale": ((None,), "super-resolution training is not supported"),
    "model.network_wrapper": ((None,), "the network is called as it is"),
    f"{NETWORK}.elementwise_affine": ((True,), "the layer norms here always have weights"),
    f"{NETWORK}.num_classes": ((None,), "class labels are not supported"),
    f"{NETWORK}.input_time": (("adaln",), "the time step enters by adaLN"),
    f"{NETWORK}.use_SwiGLU": ((False,), PLAIN_MLP),
    f"{NETWORK}.use_RMSNorm": ((False,), "the norms here are layer norms"),
    f"{TRUNK}.layernorm_order": (("pre",), "layers here are pre-norm"),
    f"{TRUNK}.layernorm_epsilon": ((1e-5, "1e-5"), "the norms of the layers have 1e-5"),
    f"{TRUNK}.model_parallel_size": ((1,), TENSOR_PARALLEL),
    f"{TRUNK}.is_decoder": ((False,), "attention here is not causal"),
    f"{TRUNK}.is_gated_mlp": ((False,), PLAIN_MLP),
    f"{TRUNK}.num_multi_query_heads": ((0,), "every head has its own keys and values"),
    f"{TRUNK}.hidden_dropout": ((0,), NO_DROPOUT),
    f"{TRUNK}.attention_dropout": ((0,), NO_DROPOUT),
    f"{TRUNK}.drop_path": ((0,), NO_DROPOUT),
    f"{MIXINS}.pos_embed_config.params.rot_v": ((False,), "values are not rotated"),
    f"{MIXINS}.adaln_layer_config.params.qk_ln": ((True,), "queries and keys are always normalised here"),
    f"{LORA}.lora_dropout": ((0,), "LoRA here has no dropout"),
    f"{LORA}.qlora": ((False,), "quantised base weights are not supported"),
    f"{VAE}.regularizer_config.params.sample": ((True,), "latents are samples of the posterior"),
    f"{DENOISER}.quantize_c_noise": ((False,), "the network is given the index of the time step"),
    f"{DENOISER}.flip": ((True,), "the time step counts from clean to noise"),
    f"{DENOISER}.do_append_zero": ((False,), "the schedule ends with its cleanest step"),
    f"{LOSS}.type": (("l2",), "the loss is the squared error of v"),
    f"{LOSS}.fixed_frames": ((0,), "every latent frame is noised"),
    f"{LOSS}.block_scale": ((None,), "the loss here has no such term"),
    f"{LOSS}.block_size": ((None,), "the loss here has no such term"),
    f"{LOSS}.min_snr_value": ((None,), "the loss here has no such term"),
    f"{LOSS}.batch2model_keys": ((None, []), "the network is given no further inputs"),
    f"{TIMESTEPS}.flip": ((True,), "the time step counts from clean to noise"),
    f"{TIMESTEPS}.do_append_zero": ((False,), "the schedule ends with its cleanest step"),
    f"{SAMPLER}.fixed_frames": ((0,), "every latent frame is denoised"),
    f"{SAMPLER}.sdedit": ((False,), "editing a video is not supported"),
    "deepspeed.scheduler": ((None,), "the learning rate is set by train.lr_schedule and train.warmup_steps"),
    f"{OPTIMIZER}.adam_w_mode": ((True,), "weight decay is decoupled (AdamW)"),
    f"{OPTIMIZER}.bias_correction": ((True,), "AdamW corrects its bias"),
    f"{OPTIMIZER}.amsgrad": ((False,), "AdamW without AMSGrad, upstream too"),
}
for _half in (f"{VAE}.encoder_config.params", f"{VAE}.decoder_config.params"):
    FIXED[f"{_half}.double_z"] = ((True,), "the encoder gives mean and log variance")
    FIXED[f"{_half}.attn_resolutions"] = (([],), "the VAE here has no attention")
    FIXED[f"{_half}.dropout"] = ((0,), "the VAE has no dropout")
    FIXED[f"{_half}.pad_mode"] = (("first",), "time is padded by repeating the first frame")
    FIXED[f"{_half}.resamp_with_conv"] = ((True,), "resampling has convolutions")
    FIXED[f"{_half}.add_conv"] = ((False,), "the decoder's norms have no convolution of their own")
    FIXED[f"{_half}.give_pre_end"] = ((False,), "the decoder gives pixels")

# path -> what the translation calculates with: a mapping, true or false, a number, or a list of so many (0: any)
KINDS: dict[str, type | int] = {
    **dict.fromkeys((*SECTIONS, NETWORK, TRUNK, MIXINS, OPTIMIZER), dict),
    "model.conditioner_config.params.emb_models": dict,
    **dict.fromkeys((f"deepspeed.{name}" for name in ("zero_optimization", "optimizer", "bf16", "fp16")), dict),
    **dict.fromkeys((f"{NETWORK}.{name}" for name in ("num_frames", "hidden_size", "num_attention_heads")), int),
    f"{NETWORK}.latent_height": int,
    f"{NETWORK}.latent_width": int,
    f"{NETWORK}.time_compressed_rate": int,
    f"{MIXINS}.pos_embed_config.params.hidden_size_head": int,
    f"{VAE}.encoder_config.params.ch_mult": 0,
    f"{VAE}.decoder_config.params.ch_mult": 0,
    "model.not_trainable_prefixes": 0,
    "args.sampling_num_frames": int,
    "args.sampling_image_size": 2,
    "args.train_iters": int,
    "args.warmup": float,
    "data.params.video_size": 2,
    "data.params.skip_frms_num": float,
    **dict.fromkeys(("args.bf16", "args.fp16", "deepspeed.bf16.enabled", "deepspeed.fp16.enabled"), bool),
    "deepspeed.zero_optimization.cpu_offload": bool,
    "model.noised_image_input": bool,
}  # fmt: skip

DERIVED = "follows from other keys"
UNREAD = "CogVideo's published code does not read it"
SAT_INTERNAL = "a detail of SAT's own training loop or model files"
PERFORMANCE_ONLY = "changes speed or memory upstream, not numbers"
DISPLAY = "only changed what upstream printed or stored"
DEEPSPEED_DECIDES = "the section deepspeed decides, upstream too"


def _keys(parent: str, names: str, reason: str) -> dict[str, str]:
    return {f"{parent}.{name}": reason for name in names.split()}


# path -> why it has no effect here; reported in the log
WITHOUT_EFFECT: dict[str, str] = {
    **_keys("args", "mode force_pretrain", "train_video.py trains and sample_video.py samples"),
    **_keys("args", "force_train force_inference", "missing weights are always an error, and named"),
    **_keys("args", "image2video", "an image condition in the model's file makes it image-to-video"),
    **_keys("args", "only_log_video_latents log_image debug save_args summary_dir", DISPLAY),
    **_keys("args", "grid_num_rows only_save_latents profiling", DISPLAY),
    "args.wandb_project_name": "the environment variable WANDB_PROJECT names wandb's project",
    **_keys("args", "distributed_backend local_rank device deepspeed strict_eval", SAT_INTERNAL),
    **_keys("args", "prefetch_factor block_size batch_from_same_dataset iterable_dataset_eval", SAT_INTERNAL),
    **_keys("args", "checkpoint_num_layers checkpoint_skip_layers", PERFORMANCE_ONLY),
    **_keys("args", "zero_stage weight_decay", DEEPSPEED_DECIDES),
    **_keys("args", "final_size lcm_steps input_dir", UNREAD),
    **_keys("args", "no_load_rng no_save_rng", "random draws derive from the seed and the step; no state is stored"),
    "args.resume_dataloader": "a resumed run always goes on with the data where it stopped",
    "args.exit_interval": "a run ends at train.steps, or at Ctrl-C with a checkpoint",
    "args.latent_channels": DERIVED,
    "args.eval_batch_size": "validation uses train.batch_size",
    "args.train_data_weights": "there is one training folder",
    "args.test_data": "training ends without a test",
    "model.log_keys": DISPLAY,
    "model.input_key": SAT_INTERNAL,
    "model.lora_train": "a lora section means LoRA training",
    "model.augmentation_dropout": UNREAD,
    "model.disable_first_stage_autocast": "the VAE runs in vae.precision",
    "model.latent_input": "the dataset gives videos; data.latent_cache encodes each clip once",
    **_keys("model", "en_and_decode_n_samples_a_time compile_model", PERFORMANCE_ONLY),
    f"{NETWORK}.adm_in_channels": "unused without class labels",
    f"{NETWORK}.parallel_output": SAT_INTERNAL,
    f"{NETWORK}.dtype": "the precision comes from train.precision and sample.precision",
    **_keys(TRUNK, "vocab_size max_sequence_length skip_init use_gpu_initialization", SAT_INTERNAL),
    **_keys(TRUNK, "checkpoint_num_layers checkpoint_skip_layers", PERFORMANCE_ONLY),
    **_keys(LORA, "layer_num cross_attention", DERIVED),
    f"{VAE}.cp_size": PERFORMANCE_ONLY,
    f"{VAE}.ignore_keys": "weights of the training loss are always skipped",
    **_keys(VAE, "loss_config monitor ema_decay optimizer_config", "the VAE is frozen; configs/vae.yaml trains it"),
    **_keys(f"{VAE}.encoder_config.params", "resolution", "the VAE is convolutional: any size"),
    **_keys(f"{VAE}.decoder_config.params", "resolution", "the VAE is convolutional: any size"),
    **_keys(f"{VAE}.encoder_config.params", "gather_norm", "only acts with context parallelism"),
    **_keys(f"{VAE}.decoder_config.params", "gather_norm", "only acts with context parallelism"),
    f"{DENOISER}.weighting_config": "the v-prediction loss does not read it, upstream either",
    f"{TIMESTEPS}.group_num": DERIVED,
    f"{SAMPLER}.verbose": DISPLAY,
    f"{SAMPLER}.device": SAT_INTERNAL,
    "deepspeed.steps_per_print": "train.log_every says when to log",
    "deepspeed.activation_checkpointing": "model.transformer.checkpoint_activations switches it",
    **_keys(OPTIMIZER, "set_grad_none use_num_upates torch_adam", SAT_INTERNAL),
}  # fmt: skip

LOSS_SCALE = {"loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"}
# What DeepSpeed reads at the top of its configuration; it passes over all else in silence.
DEEPSPEED_KEYS = set(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler fp16
    bf16 bfloat16 amp torch_autocast data_types gradient_clipping communication_data_type
    seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor
    gradient_allreduce_op sparse_gradients zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown dump_state memory_breakdown
    autotuning flops_profiler activation_checkpointing sparse_attention aio tensorboard wandb
    csv_monitor comet comms_logger elasticity compression_training data_efficiency
    curriculum_learning progressive_layer_drop eigenvalue pipeline checkpoint nebula hybrid_engine
    compile timers dataloader_drop_last disable_allgather disable_python_gc tensor_parallel
    weight_quantization use_data_before_expert_parallelism""".split()
)
