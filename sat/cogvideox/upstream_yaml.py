"""YAML files written for CogVideo's own ``sat/`` folder, translated into this project's configuration.

``translate`` takes each key that it understands out of the mapping. A key without effect here is taken with a reason,
and all of those are reported together in the log; what is left in the end, or holds a value that this project cannot
express, is named in one ConfigError. Nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cogvideox.config_merge import resolve_interpolations
from cogvideox.upstream_rules import (
    FIXED,
    KINDS,
    OPTIMIZERS,
    SAMPLERS,
    UPSTREAM_DATA_KEYS,
    UPSTREAM_MODEL_KEYS,
    UPSTREAM_MODULES,
    WITHOUT_EFFECT,
)
from cogvideox.upstream_source import UpstreamSource


def is_upstream(loaded: dict[str, Any]) -> bool:
    """Was this YAML mapping written for CogVideo's ``sat/`` folder?"""
    if "args" in loaded:
        return True
    model, data, deepspeed = (_mapping(loaded.get(name)) for name in ("model", "data", "deepspeed"))
    if UPSTREAM_MODEL_KEYS & model.keys() or UPSTREAM_DATA_KEYS & _mapping(data.get("params")).keys():
        return True
    # Here the optimizer has its home in train.optimizer; SAT reads it from DeepSpeed's section.
    return "optimizer" in deepspeed or any(t.split(".")[0] in UPSTREAM_MODULES for t in _targets(loaded))


def translate(upstream: dict[str, Any]) -> dict[str, Any]:
    """The same experiment as a mapping of this project's sections.

    Sections of which the files say nothing are left out, so that the result can be merged with files of this project.
    Raises ConfigError, one for all keys that cannot be translated. Logs the keys that have no effect here.
    """
    # Interpolations name upstream's keys: they are resolved before these are gone.
    source = UpstreamSource(resolve_interpolations(upstream))
    source.check_kinds(KINDS)
    mode = source.get("args.mode")
    training = source.has("deepspeed") or mode in ("finetune", "pretrain")
    result: dict[str, Any] = {"model": {}, "vae": {}, "load": {}, "train": {}, "sample": {}}
    for path, (allowed, why) in FIXED.items():
        source.only(path, *allowed, why=why)
    for path, reason in WITHOUT_EFFECT.items():
        source.ignore(path, reason)
    result["data"] = _data(source)
    _sampling(source, result, mode == "inference")  # before the network is taken: sizes are read from it
    _transformer(source, result, training)
    _vae(source, result)
    _conditions(source, result)
    _diffusion(source, result)
    _deepspeed(source, result)
    _arguments(source, result, training)
    source.finish()
    return {name: section for name, section in result.items() if section not in ({}, None)}


# ------------------------------------------------------------------------------------------------------ sections


def _transformer(source: UpstreamSource, result: dict[str, Any], training: bool) -> None:
    if not source.has("model.network_config"):
        return
    source.target("model.network_config", "DiffusionTransformer")
    p = "model.network_config.params"
    names = ("num_layers", "hidden_size", "num_attention_heads", "in_channels", "out_channels", "num_frames")
    section = {n: source.take(f"{p}.{n}") for n in (*names, "latent_height", "latent_width")}
    section["patch_size"] = _patch_size(source.take(f"{p}.patch_size"), source, f"{p}.patch_size")
    section["time_embed_dim"] = source.take(f"{p}.time_embed_dim", section["hidden_size"])
    section["ofs_embed_dim"] = source.take(f"{p}.ofs_embed_dim")
    if (compression := source.take(f"{p}.time_compressed_rate", 4)) != 4:
        result["vae"]["temporal_compression"] = compression

    a = f"{p}.transformer_args"
    section["checkpoint_activations"] = source.take(
        f"{a}.checkpoint_activations", source.get("args.checkpoint_activations", False)
    )

    m = f"{p}.modules"
    _position(source, f"{m}.pos_embed_config", p, section)
    source.target(f"{m}.patch_embed_config", "ImagePatchEmbeddingMixin")
    section["text_hidden_size"] = source.take(f"{m}.patch_embed_config.params.text_hidden_size")
    source.target(f"{m}.adaln_layer_config", "AdaLNMixin")
    source.target(f"{m}.final_layer_config", "FinalLayerMixin")
    result["model"]["transformer"] = {key: value for key, value in section.items() if value is not None}
    _lora(source, f"{m}.lora_config", result, training)


def _position(source: UpstreamSource, path: str, network: str, section: dict[str, Any]) -> None:
    kind = source.target(path, "Basic3DPositionEmbeddingMixin", "Rotary3DPositionEmbeddingMixin")
    p = f"{path}.params"
    section["text_length"] = source.take(
        f"{p}.text_length", source.get("model.conditioner_config.params.emb_models.0.params.max_length")
    )
    axes = ("height_interpolation", "width_interpolation", "time_interpolation")
    interpolation = {n: source.take(f"{network}.{n}", 1.0) for n in axes}
    interpolation |= {n: source.take(f"{p}.{n}", interpolation[n]) for n in axes}
    if kind == "Basic3DPositionEmbeddingMixin":
        params = {n: value for n, value in interpolation.items() if value != 1.0}
        section["position"] = {"target": "cogvideox.model.position.SincosPosition3D", "params": params}
    elif kind == "Rotary3DPositionEmbeddingMixin":
        head = source.take(f"{p}.hidden_size_head")
        heads, width = section["num_attention_heads"], section["hidden_size"]
        if head is not None and heads and width and head * heads != width:
            source.problems.append(
                f"{p}.hidden_size_head={head}: hidden_size / num_attention_heads is {width / heads:g}"
            )
        for name in (n for n, value in interpolation.items() if value != 1.0):
            source.note(f"{p}.{name}", "rotary positions are whole numbers, upstream too")
        params = {}
        if (theta := source.take(f"{p}.theta", 10000)) != 10000:
            params["theta"] = theta
        if source.take(f"{p}.learnable_pos_embed", False):
            params["learned_table"] = True
        section["position"] = {"target": "cogvideox.model.position.RotaryPosition3D", "params": params}


def _lora(source: UpstreamSource, path: str, result: dict[str, Any], training: bool) -> None:
    prefixes = source.take("model.not_trainable_prefixes", ["first_stage_model", "conditioner"])
    if source.has(path):
        source.target(path, "LoraMixin")
        p = f"{path}.params"
        layers = source.take(f"{p}.layer_range")
        result["lora"] = {"rank": source.take(f"{p}.r"), "alpha": source.take(f"{p}.lora_alpha", 1)}
        if layers is not None:
            result["lora"]["transformer_layers"] = layers
        if training and "all" not in prefixes:
            source.problems.append(
                f"model.not_trainable_prefixes={prefixes}: with lora_config it would train adapters and base weights "
                f"together; here the base is frozen: set it to ['all']"
            )
    elif set(prefixes) - {"first_stage_model", "conditioner"}:
        source.problems.append(
            f"model.not_trainable_prefixes={prefixes}: only LoRA ('all' together with lora_config) or training the "
            f"whole transformer can be expressed"
        )


def _vae(source: UpstreamSource, result: dict[str, Any]) -> None:
    section, path = result["vae"], "model.first_stage_config"
    has_vae = source.has(path)
    if source.has("model.scale_factor") or has_vae:
        section["scale_factor"] = source.take("model.scale_factor", 1.0)
    if not has_vae:
        return
    source.target(path, "VideoAutoencoderInferenceWrapper", "VideoAutoencodingEngine")
    p = f"{path}.params"
    result["load"]["vae"] = source.take(f"{p}.ckpt_path")
    source.target(f"{p}.regularizer_config", "DiagonalGaussianRegularizer")
    halves = []
    for half in ("encoder", "decoder"):
        source.target(f"{p}.{half}_config", f"ContextParallel{half.title()}3D")
        q = f"{p}.{half}_config.params"
        shape = {
            "channels": source.take(f"{q}.ch"),
            "channel_multipliers": source.take(f"{q}.ch_mult"),
            "num_res_blocks": source.take(f"{q}.num_res_blocks"),
            "z_channels": source.take(f"{q}.z_channels"),
            "in_channels": source.take(f"{q}.in_channels", 3),
            "temporal_compression": source.take(
                f"{q}.temporal_compress_times", section.get("temporal_compression", 4)
            ),
        }
        source.only(f"{q}.out_ch", shape["in_channels"], why="the decoder gives back what the encoder takes")
        halves.append(shape)
    if halves[0] != halves[1]:
        differing = [
            f"{k}: {halves[0][k]} and {halves[1][k]}" for k in halves[0] if halves[0][k] != halves[1][k]
        ]
        source.problems.append(f"{p}: encoder and decoder differ in {'; '.join(differing)}")
    section.update({key: value for key, value in halves[0].items() if value is not None})


def _conditions(source: UpstreamSource, result: dict[str, Any]) -> None:
    conditions: list[dict[str, Any]] = []
    path = "model.conditioner_config"
    source.target(path, "GeneralConditioner")
    for index in list(source.get(f"{path}.params.emb_models", {})):
        e = f"{path}.params.emb_models.{index}"
        source.target(e, "FrozenT5Embedder")
        source.only(f"{e}.input_key", "txt", why="the text encoder reads the captions")
        source.only(f"{e}.legacy_ucg_value", None, why="a dropped caption is a zero embedding")
        params: dict[str, Any] = {"dropout": source.take(f"{e}.ucg_rate", 0.0)}
        if (length := source.take(f"{e}.params.max_length")) is not None:
            params["max_length"] = length
        if source.take(f"{e}.is_trainable", False):
            params["trainable"] = True
        result["load"]["text_encoder"] = source.take(f"{e}.params.model_dir")
        for name in ("device", "freeze", "cache_dir"):
            source.ignore(f"{e}.params.{name}", "follows from other keys")
        conditions.append({"target": "cogvideox.conditioning.text.TextCondition", "params": params})
    image, everywhere = (
        source.take("model.noised_image_input", False),
        source.take("model.noised_image_all_concat", False),
    )
    dropout = source.take("model.noised_image_dropout", 0.0)
    if image:
        # One draw drops the image of the whole batch, as upstream does.
        params = {"dropout": dropout, "dropout_per": "batch"} | ({"repeat": True} if everywhere else {})
        conditions.append({"target": "cogvideox.conditioning.frames.FirstFrameCondition", "params": params})
    if conditions:
        result["model"]["conditions"] = conditions


def _diffusion(source: UpstreamSource, result: dict[str, Any]) -> None:
    d, s = "model.denoiser_config", "model.loss_fn_config"
    schedules = [_schedule(source, f"{d}.params.discretization_config")]
    source.target(d, "DiscreteDenoiser")
    source.target(f"{d}.params.scaling_config", "VideoScaling")

    source.target(s, "VideoDiffusionLoss")
    if offset := source.take(f"{s}.params.offset_noise_level", 0):
        result["model"]["offset_noise"] = offset
    t = f"{s}.params.sigma_sampler_config"
    schedules.append(_schedule(source, f"{t}.params.discretization_config"))
    if source.has(t):
        source.target(t, "DiscreteSampling")
        # Upstream's uniform_sampling ties each rank to one interval for good; strata that move are the sound rule.
        kind = "Stratified" if source.take(f"{t}.params.uniform_sampling", False) else "Uniform"
        result["model"]["timesteps"] = {"target": f"cogvideox.diffusion.timesteps.{kind}Timesteps"}
    schedules.append(_schedule(source, "model.sampler_config.params.discretization_config"))
    schedules = [schedule for schedule in schedules if schedule is not None]
    if any(schedule != schedules[0] for schedule in schedules):
        source.problems.append(
            f"denoiser_config, loss_fn_config and sampler_config hold different noise schedules, {schedules}: here one "
            f"schedule serves training and sampling"
        )
    if schedules:
        num_timesteps = schedules[0].get("num_timesteps", 1000)
        target = "cogvideox.diffusion.schedule.ZeroSNRSchedule"
        result["model"]["schedule"] = {"target": target, "params": schedules[0]}
    else:
        num_timesteps = 1000
    for path in (f"{d}.params.num_idx", f"{t}.params.num_idx"):
        source.only(path, num_timesteps, why=f"the schedule has {num_timesteps} time steps")


def _schedule(source: UpstreamSource, path: str) -> dict[str, Any] | None:
    if not source.has(path):
        return None
    source.target(path, "ZeroSNRDDPMDiscretization")
    names = {"snr_shift": ("shift_scale", 1.0), "num_timesteps": ("num_timesteps", 1000)}
    names |= {"linear_start": ("linear_start", 0.00085), "linear_end": ("linear_end", 0.012)}
    values = {
        ours: (source.take(f"{path}.params.{theirs}", default), default)
        for ours, (theirs, default) in names.items()
    }
    return {ours: value for ours, (value, default) in values.items() if value != default}


def _sampling(source: UpstreamSource, result: dict[str, Any], videos_per_prompt: bool) -> None:
    """Sampler, guidance, and the sizes of samples; upstream counts sampling_num_frames in latents."""
    section, path = result["sample"], "model.sampler_config"
    if source.has(path):
        kind = source.target(path, *SAMPLERS)
        result["sampler"] = {"target": SAMPLERS[kind]} if kind else None
        section["steps"] = source.take(f"{path}.params.num_steps")
        result["guidance"] = _guidance(source, f"{path}.params.guider_config", section["steps"])

    network = source.get("model.network_config.params", {})
    patch_t = _patch_size(network.get("patch_size", 2), None, "")[0]
    latents = source.take("args.sampling_num_frames")
    size = source.take("args.sampling_image_size")
    fps = source.take("args.sampling_fps")
    if latents is not None:
        # With a temporal patch of 2 one latent is padding. Without the network's file, an even count tells: 13, 11, 9.
        padding = patch_t - 1 if network else (latents + 1) % 2
        section["num_frames"] = (latents - padding - 1) * network.get("time_compressed_rate", 4) + 1
    if size is not None:
        section["height"], section["width"] = size
    if fps is not None:
        section["fps"] = fps
    if network and section.get("steps") is not None:
        # A model file alone: the sizes that upstream's code takes when it is not told.
        grid = [8 * network.get(side, 0) for side in ("latent_height", "latent_width")]
        height, width = source.get("data.params.video_size", [768, 1360] if patch_t > 1 else grid)
        section.setdefault("num_frames", network.get("num_frames"))
        section.setdefault("height", height)
        section.setdefault("width", width)
        section.setdefault("fps", source.get("data.params.fps", 16 if patch_t > 1 else 8))
    if videos_per_prompt:
        source.only("args.batch_size", 1, why="several videos of one prompt: repeat it in the prompt file")


def _guidance(source: UpstreamSource, path: str, steps: Any) -> dict[str, Any]:
    kind = source.target(path, "DynamicCFG", "VanillaCFG", "IdentityGuider") or "IdentityGuider"
    thresholding = f"{path}.params.dyn_thresh_config"
    source.target(thresholding, "NoDynamicThresholding")
    scale = source.take(f"{path}.params.scale", 1.0)
    if kind != "DynamicCFG":
        return {"target": "cogvideox.diffusion.guidance.ConstantGuidance", "params": {"scale": scale}}
    # Upstream hands the training time step to a formula meant for the step count; the published form is kept.
    params = {"scale": scale}
    if (exponent := source.take(f"{path}.params.exp", 5)) != 5:
        params["exponent"] = exponent
    source.only(f"{path}.params.num_steps", steps, why="guidance runs over the sampler's num_steps")
    return {"target": "cogvideox.diffusion.guidance.DynamicTimestepGuidance", "params": params}


def _data(source: UpstreamSource) -> dict[str, Any]:
    if not source.has("data"):
        return {}
    source.target("data", "SFTDataset")
    size = source.take("data.params.video_size", [None, None])
    section = {
        "height": size[0],
        "width": size[1],
        "fps": source.get("data.params.fps"),
        "num_frames": source.take("data.params.max_num_frames"),
    }
    if (skip := source.take("data.params.skip_frms_num")) is not None:
        section["params"] = {"skip_frames": int(skip)}
    return {key: value for key, value in section.items() if value is not None}


def _deepspeed(source: UpstreamSource, result: dict[str, Any]) -> None:
    train, d = result["train"], "deepspeed"
    if not source.has(d):
        return
    for theirs, ours in (
        ("train_micro_batch_size_per_gpu", "batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("gradient_clipping", "gradient_clipping"),
    ):
        if (value := source.take(f"{d}.{theirs}")) is not None:
            train[ours] = value
    half = {name: source.take(f"{d}.{name}.enabled", False) for name in ("bf16", "fp16")}
    train["precision"] = next((name for name, enabled in half.items() if enabled), "fp32")
    if source.take(f"{d}.zero_optimization.cpu_offload", False):
        source.get(f"{d}.zero_optimization")["offload_optimizer"] = {"device": "cpu"}

    o = f"{d}.optimizer"
    if source.has(o):
        kind = source.take(f"{o}.type")
        if kind not in OPTIMIZERS:
            source.problems.append(f"{o}.type={kind}: no equivalent here (known: {', '.join(OPTIMIZERS)})")
        params = {
            n: v
            for n in ("lr", "betas", "eps", "weight_decay")
            if (v := source.take(f"{o}.params.{n}")) is not None
        }
        train["optimizer"] = {
            "target": "torch.optim.AdamW",
            "params": {n: _number(v) for n, v in params.items()},
        }
        decay = source.take(f"{o}.params.ema_decay", 0.9999)
        if OPTIMIZERS.get(kind):
            train["ema_decay"] = _number(decay)
        for path, value in source.left(f"{o}.params"):
            source.problems.append(f"{path}={value!r}: not known")
        source.take(o)
    result["deepspeed"] = {name: value for name, value in source.take(d).items() if value != {}}


def _arguments(source: UpstreamSource, result: dict[str, Any], training: bool) -> None:
    train, load, sample = result["train"], result["load"], result["sample"]
    load["transformer"] = source.take("args.load")
    result["load"] = {key: value for key, value in load.items() if value is not None}
    _precision(source, result, training)
    if (output := source.take("args.output_dir")) is not None:
        sample["output_dir"] = str(output).rstrip("/")
    if (seed := source.take("args.seed")) is not None:
        result["seed"] = seed
    _run_folder_and_data(source, result)

    batch = source.take("args.batch_size")
    if training and batch is not None:
        train.setdefault("batch_size", batch)
    for theirs, ours in (
        ("train_iters", "steps"),
        ("save_interval", "save_every"),
        ("log_interval", "log_every"),
    ):
        if (value := source.take(f"args.{theirs}")) is not None:
            train[ours] = value
    if training:
        _learning_rate(source, train)
    if source.take("args.wandb", False):
        train["trackers"] = ["wandb"]
    checkpointing, network = source.take("args.checkpoint_activations"), result["model"].get("transformer")
    if checkpointing is not None and network and network["checkpoint_activations"] != checkpointing:
        source.note("args.checkpoint_activations", "network_config.params.transformer_args decides")


def _precision(source: UpstreamSource, result: dict[str, Any], training: bool) -> None:
    """Upstream runs everything, the VAE too, in the precision that args (sampling) or deepspeed (training) name."""
    given = {name: source.take(f"args.{name}") for name in ("bf16", "fp16")}
    if any(value is not None for value in given.values()):
        precision = next((name for name, value in given.items() if value), "fp32")
        result["sample"]["precision"] = precision
    else:
        precision = result["train"].get("precision")
    precision = result["train"].get("precision", precision) if training else precision
    if precision is None:
        return
    if "scale_factor" in result["vae"]:
        result["vae"]["precision"] = precision
    for condition in result["model"].get("conditions", []):
        if condition["target"].endswith(".TextCondition"):
            condition["params"]["dtype"] = "fp32" if condition["params"].get("trainable") else precision


def _run_folder_and_data(source: UpstreamSource, result: dict[str, Any]) -> None:
    save, name = source.take("args.save"), source.take("args.experiment_name")
    if save is not None:
        result["run"] = {"dir": "/".join(str(part).rstrip("/") for part in (save, name) if part)}
    folders, held_out = source.take("args.train_data"), source.take("args.valid_data")
    interval, batches = source.take("args.eval_interval"), source.take("args.eval_iters")
    for key, value in (("train_data", folders), ("valid_data", held_out)):
        if isinstance(value, list) and len(value) > 1:
            source.problems.append(f"args.{key}={value}: one folder; link the others into it")
    folder, held_out = _first(folders), _first(held_out)
    if folder is not None:
        result["data"]["path"] = folder
    if held_out is not None and held_out == folder:
        source.note("args.valid_data", "it is the training folder, which validates nothing")
    elif held_out is not None:
        result["data"]["validation_path"] = held_out
        if interval is not None:
            result["train"]["validate_every"] = interval
        if batches is not None:
            result["train"]["validation_batches"] = batches
    if (workers := source.take("args.num_workers")) is not None:
        result["data"]["num_workers"] = workers
    fps = source.take("data.params.fps")
    assert fps is None or result["data"]["fps"] == fps


def _learning_rate(source: UpstreamSource, train: dict[str, Any]) -> None:
    """SAT's own defaults hold where the file is silent: linear decay after a warm-up of 1 % of the steps."""
    style = source.take("args.lr_decay_style", "linear")
    steps = source.take("args.lr_decay_iters", train.get("steps"))
    if steps != train.get("steps"):
        source.problems.append(
            f"args.lr_decay_iters={steps}: the decay ends with the run, at args.train_iters"
        )
    warmup, floor = source.take("args.warmup", 0.01), source.take("args.lr_decay_ratio", 0.1)
    if steps is not None:
        train["warmup_steps"] = round(_number(warmup) * steps)
    # SAT's "exponential" is a constant (training/learning_rates.py), and only its cosine reads the ratio.
    train["lr_schedule"] = style if style in ("linear", "cosine") else "constant"
    if style == "cosine":
        train["min_lr_ratio"] = _number(floor)
    lr, decay = source.take("args.lr"), source.take("args.weight_decay")
    optimizer = train.setdefault("optimizer", {"target": "torch.optim.AdamW", "params": {}})["params"]
    for name, value in (("lr", lr), ("weight_decay", decay)):
        if value is not None:
            optimizer.setdefault(name, _number(value))
    if (accumulation := source.take("args.gradient_accumulation_steps")) is not None:
        train.setdefault("gradient_accumulation_steps", accumulation)


# ------------------------------------------------------------------------------------------------------- plumbing


def _patch_size(value: Any, source: UpstreamSource | None, path: str) -> list[int]:
    """2 (CogVideoX 1.0: per frame) -> [1, 2, 2]; [2, 2, 2] (1.5) stays."""
    if isinstance(value, int):
        return [1, value, value]
    if isinstance(value, list) and len(value) == 3:
        return value
    if source is not None:
        source.problems.append(f"{path}={value!r}: expected a number or [t, h, w]")
    return [1, 1, 1]


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("target"), str):
            yield node["target"]
        node = list(node.values())
    for item in node if isinstance(node, list) else []:
        yield from _targets(item)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _number(value: Any) -> Any:
    """``1e-8`` and ``1e-4`` are strings to a YAML 1.1 reader."""
    return float(value) if isinstance(value, str) else value
