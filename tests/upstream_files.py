"""The YAML files of CogVideo's ``sat/`` folder as data: one function per kind of file, facts in dotted keys.

The test that compares them with ``../shared/reference/UPSTREAM_YAML.md`` stands in ``test_upstream_yaml.py``.
"""

from __future__ import annotations

import copy
from typing import Any

REMOVED = object()
"""As a value of ``changed``: the key is taken out."""

MODELS = {
    **{("v1.0", name): f"cogvideox_{name}" for name in ("2b", "5b", "5b_i2v")},
    **{("main", name): f"cogvideox_{name}" for name in ("2b", "5b", "5b_i2v")},
    **{("v1.0", f"{name}_lora"): f"cogvideox_{name}" for name in ("2b", "5b", "5b_i2v")},
    **{("main", f"{name}_lora"): f"cogvideox_{name}" for name in ("2b", "5b", "5b_i2v")},
    ("main", "1.5_5b"): "cogvideox1.5_5b",
    ("main", "1.5_5b_i2v"): "cogvideox1.5_5b_i2v",
}
"""(code line, model file) -> this project's file of the same model."""

_DIFFUSION = "sgm.modules.diffusionmodules"
_NETWORK = "model.network_config.params"
_TEXT = "model.conditioner_config.params.emb_models"
_VAE = "model.first_stage_config"
_SCHEDULES = (
    "model.denoiser_config.params.discretization_config",
    "model.loss_fn_config.params.sigma_sampler_config.params.discretization_config",
    "model.sampler_config.params.discretization_config",
)


def model_file(name: str) -> dict[str, Any]:
    """cogvideox_NAME.yaml; those that both code lines have are the same in both."""
    variant = name.removesuffix("_lora")
    is_15, is_image, is_2b = variant.startswith("1.5"), variant.endswith("i2v"), variant == "2b"
    layers, width = (30, 1920) if is_2b else (42, 3072)
    side = {"height": 300, "width": 300} if is_15 else {"height": 60, "width": 90}
    text_length = 224 if is_15 else 226
    keys = {
        "model.scale_factor": 1.15258426 if is_2b else 0.7,
        "model.disable_first_stage_autocast": True,
        "model.log_keys": ["txt"],
        "model.denoiser_config.target": f"{_DIFFUSION}.denoiser.DiscreteDenoiser",
        "model.denoiser_config.params.num_idx": 1000,
        "model.denoiser_config.params.quantize_c_noise": False,
        "model.denoiser_config.params.weighting_config.target": f"{_DIFFUSION}.denoiser_weighting.EpsWeighting",
        "model.denoiser_config.params.scaling_config.target": f"{_DIFFUSION}.denoiser_scaling.VideoScaling",
        "model.network_config.target": "dit_video_concat.DiffusionTransformer",
        f"{_NETWORK}.time_embed_dim": 512,
        f"{_NETWORK}.elementwise_affine": True,
        f"{_NETWORK}.num_frames": 81 if is_15 else 49,
        f"{_NETWORK}.time_compressed_rate": 4,
        f"{_NETWORK}.latent_width": side["width"],
        f"{_NETWORK}.latent_height": side["height"],
        f"{_NETWORK}.num_layers": layers,
        f"{_NETWORK}.patch_size": [2, 2, 2] if is_15 else 2,
        f"{_NETWORK}.in_channels": 32 if is_image else 16,
        f"{_NETWORK}.out_channels": 16,
        f"{_NETWORK}.hidden_size": width,
        f"{_NETWORK}.adm_in_channels": 256,
        f"{_NETWORK}.num_attention_heads": width // 64,
        f"{_NETWORK}.transformer_args.checkpoint_activations": True,
        f"{_NETWORK}.transformer_args.vocab_size": 1,
        f"{_NETWORK}.transformer_args.max_sequence_length": 64,
        f"{_NETWORK}.transformer_args.layernorm_order": "pre",
        f"{_NETWORK}.transformer_args.skip_init": False,
        f"{_NETWORK}.transformer_args.model_parallel_size": 1,
        f"{_NETWORK}.transformer_args.is_decoder": False,
        f"{_NETWORK}.modules.pos_embed_config.params.text_length": text_length,
        f"{_NETWORK}.modules.patch_embed_config.target": "dit_video_concat.ImagePatchEmbeddingMixin",
        f"{_NETWORK}.modules.patch_embed_config.params.text_hidden_size": 4096,
        f"{_NETWORK}.modules.adaln_layer_config.target": "dit_video_concat.AdaLNMixin",
        f"{_NETWORK}.modules.adaln_layer_config.params.qk_ln": True,
        f"{_NETWORK}.modules.final_layer_config.target": "dit_video_concat.FinalLayerMixin",
        "model.conditioner_config.target": "sgm.modules.GeneralConditioner",
        f"{_TEXT}.0.is_trainable": False,
        f"{_TEXT}.0.input_key": "txt",
        f"{_TEXT}.0.ucg_rate": 0.1,
        f"{_TEXT}.0.target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        f"{_TEXT}.0.params.model_dir": "google/t5-v1_1-xxl" if is_15 else "t5-v1_1-xxl",
        f"{_TEXT}.0.params.max_length": text_length,
        "model.loss_fn_config.target": f"{_DIFFUSION}.loss.VideoDiffusionLoss",
        "model.loss_fn_config.params.offset_noise_level": 0.0 if variant == "1.5_5b_i2v" else 0,
        "model.loss_fn_config.params.sigma_sampler_config.target": f"{_DIFFUSION}.sigma_sampling.DiscreteSampling",
        "model.loss_fn_config.params.sigma_sampler_config.params.uniform_sampling": True,
        "model.loss_fn_config.params.sigma_sampler_config.params.group_num": 40,
        "model.loss_fn_config.params.sigma_sampler_config.params.num_idx": 1000,
        "model.sampler_config.target": f"{_DIFFUSION}.sampling.VPSDEDPMPP2MSampler",
        "model.sampler_config.params.num_steps": 50,
        "model.sampler_config.params.verbose": True,
        "model.sampler_config.params.guider_config.target": f"{_DIFFUSION}.guiders.DynamicCFG",
        "model.sampler_config.params.guider_config.params.scale": 6,
        "model.sampler_config.params.guider_config.params.exp": 5,
        "model.sampler_config.params.guider_config.params.num_steps": 50,
        **_vae(variant, gather_norm=is_15 or is_image),
    }
    position = f"{_NETWORK}.modules.pos_embed_config"
    if is_2b:
        keys[f"{position}.target"] = "dit_video_concat.Basic3DPositionEmbeddingMixin"
        keys[f"{position}.params.height_interpolation"] = keys[f"{position}.params.width_interpolation"] = (
            1.875
        )
    else:
        keys[f"{position}.target"] = "dit_video_concat.Rotary3DPositionEmbeddingMixin"
        keys[f"{position}.params.hidden_size_head"] = 64
    for path in _SCHEDULES:
        keys[f"{path}.target"] = f"{_DIFFUSION}.discretizer.ZeroSNRDDPMDiscretization"
        if not is_15:
            keys[f"{path}.params.shift_scale"] = 3.0 if is_2b else 1.0
    if is_image:
        keys |= {
            "model.latent_input": False,
            "model.noised_image_input": True,
            "model.noised_image_dropout": 0.05,
        }
        keys |= {"model.noised_image_all_concat": False, "model.augmentation_dropout": 0.15}
        keys |= {"model.loss_fn_config.params.fixed_frames": 0, "model.sampler_config.params.fixed_frames": 0}
        keys |= (
            {f"{_NETWORK}.ofs_embed_dim": 512} if is_15 else {f"{position}.params.learnable_pos_embed": True}
        )
    elif is_15:
        keys["model.latent_input"] = True
    if name.endswith("lora"):
        keys["model.not_trainable_prefixes"] = ["all"]
        keys[f"{_NETWORK}.modules.lora_config.target"] = "sat.model.finetune.lora2.LoraMixin"
        keys[f"{_NETWORK}.modules.lora_config.params.r"] = 256 if is_image else 128
    return changed({}, keys)


def _vae(variant: str, gather_norm: bool) -> dict[str, Any]:
    folder = {"2b": "2b", "5b": "5b", "5b_i2v": "5b-i2v", "1.5_5b": "5b", "1.5_5b_i2v": "5b-i2v"}[variant]
    keys: dict[str, Any] = {
        f"{_VAE}.target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper",
        f"{_VAE}.params.cp_size": 1,
        f"{_VAE}.params.ckpt_path": f"cogvideox-{folder}-sat/vae/3d-vae.pt",
        f"{_VAE}.params.ignore_keys": ["loss"],
        f"{_VAE}.params.loss_config.target": "torch.nn.Identity",
        f"{_VAE}.params.regularizer_config.target": "vae_modules.regularizers.DiagonalGaussianRegularizer",
    }
    for half in ("encoder", "decoder"):
        p = f"{_VAE}.params.{half}_config"
        keys[f"{p}.target"] = f"vae_modules.cp_enc_dec.ContextParallel{half.title()}3D"
        keys |= {f"{p}.params.double_z": True, f"{p}.params.z_channels": 16, f"{p}.params.resolution": 256}
        keys |= {f"{p}.params.in_channels": 3, f"{p}.params.out_ch": 3, f"{p}.params.ch": 128}
        keys |= {f"{p}.params.ch_mult": [1, 2, 2, 4], f"{p}.params.attn_resolutions": []}
        keys |= {f"{p}.params.num_res_blocks": 3, f"{p}.params.dropout": 0.0}
        keys[f"{p}.params.gather_norm"] = gather_norm or half == "encoder"
    return keys


def sft_file() -> dict[str, Any]:
    """sft.yaml, the same in both code lines."""
    args = {"checkpoint_activations": True, "model_parallel_size": 1, "experiment_name": "lora-disney"}
    args |= {"mode": "finetune", "load": "{your CogVideoX SAT folder}/transformer", "no_load_rng": True}
    args |= {"train_iters": 1000, "eval_iters": 1, "eval_interval": 100, "eval_batch_size": 1}
    args |= {"save": "ckpts_5b_lora", "save_interval": 500, "log_interval": 20, "split": "1,0,0"}
    args |= {"train_data": ["disney"], "valid_data": ["disney"], "num_workers": 8}
    args |= {"force_train": True, "only_log_video_latents": True}
    size = {"video_size": [480, 720], "fps": 8, "max_num_frames": 49, "skip_frms_num": 3.0}
    zero = {"stage": 2, "cpu_offload": False, "contiguous_gradients": False, "overlap_comm": True}
    zero |= {"reduce_scatter": True, "reduce_bucket_size": 1000000000, "allgather_bucket_size": 1000000000}
    zero |= {"load_from_fp32_weights": False}
    adam = {"lr": 1e-5, "betas": [0.9, 0.95], "eps": "1e-8", "weight_decay": "1e-4"}
    deepspeed = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "steps_per_print": 50}
    deepspeed |= {"gradient_clipping": 0.1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    deepspeed |= {"bf16": {"enabled": True}, "fp16": {"enabled": False}, "wall_clock_breakdown": False}
    deepspeed |= {"loss_scale": 0, "loss_scale_window": 400, "hysteresis": 2, "min_loss_scale": 1}
    deepspeed |= {"optimizer": {"type": "sat.ops.FusedEmaAdam", "params": adam}}
    checkpointing = {"partition_activations": False, "contiguous_memory_optimization": False}
    deepspeed["activation_checkpointing"] = checkpointing
    data = {"target": "data_video.SFTDataset", "params": size}
    return {"args": args, "data": data, "deepspeed": deepspeed}


def inference_file(line: str) -> dict[str, Any]:
    """inference.yaml of a code line: v1.0 for 1.0 models, main for 1.5."""
    is_main = line == "main"
    args = {"image2video": False, "latent_channels": 16, "mode": "inference", "batch_size": 1}
    args |= {"load": "{your CogVideoX SAT folder}/transformer", "input_type": "txt"}
    args |= {"input_file": "configs/test.txt", "bf16": True, "force_inference": True}
    args["sampling_image_size"] = [768, 1360] if is_main else [480, 720]
    args["sampling_num_frames"], args["sampling_fps"] = (22, 16) if is_main else (13, 8)
    args["output_dir"] = "outputs" if is_main else "outputs/"
    return {"args": args}


def changed(tree: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``tree`` with dotted keys set, or taken out where the value is REMOVED. ``emb_models`` is a list."""
    tree = copy.deepcopy(tree)
    for key, value in keys.items():
        *parents, last = key.split(".")
        node: Any = tree
        for name in parents:
            if isinstance(node, list):
                node.extend({} for _ in range(int(name) + 1 - len(node)))
                node = node[int(name)]
            else:
                node = node.setdefault(name, [] if name == "emb_models" else {})
        if value is REMOVED:
            del node[last]
        else:
            node[last] = value
    return tree
