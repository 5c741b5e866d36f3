"""Upstream's sections ``args``, ``data`` and ``deepspeed``: how a model is trained and sampled."""

from __future__ import annotations

import re
from typing import Any

from cogvideox.upstream_model import patch_size
from cogvideox.upstream_rules import (
    DEEPSPEED_DECIDES,
    DEEPSPEED_KEYS,
    LOSS_SCALE,
    NETWORK,
    OPTIMIZER,
    OPTIMIZERS,
)
from cogvideox.upstream_source import UpstreamSource

Result = dict[str, Any]

TRAINING_ARGUMENTS = (
    "train_iters", "save_interval", "log_interval", "eval_interval", "eval_iters", "wandb", "train_data", "valid_data",
    "split", "num_workers", "save", "experiment_name", "lr", "warmup", "lr_decay_style", "lr_decay_iters",
    "lr_decay_ratio", "gradient_accumulation_steps",
)  # fmt: skip


def translate_sizes(source: UpstreamSource, result: Result) -> None:
    """Sizes of clips (data) and of samples (sample). Reads the network's section: to be called before that is taken."""
    _data(source, result)
    section = result["sample"]
    network = source.get(NETWORK) or {}
    is_joining_frames = (patch_size(network.get("patch_size", 2)) or [1])[0] > 1  # CogVideoX 1.5
    latents = source.take("args.sampling_num_frames")
    if latents is not None:
        # 1.5 joins pairs, and one latent is padding. Without the network's file an even count tells: 1.0 has 13, 11, 9.
        padding = int(is_joining_frames) if network else (latents + 1) % 2
        section["num_frames"] = (latents - padding - 1) * network.get("time_compressed_rate", 4) + 1
    size, fps = source.take("args.sampling_image_size"), source.take("args.sampling_fps")
    if size is not None:
        section["height"], section["width"] = size
    if fps is not None:
        section["fps"] = fps
    if network and source.has("model.sampler_config"):
        # Nothing said: the size of the training clips, or else what upstream's code takes.
        grid = [8 * network.get(side, 0) for side in ("latent_height", "latent_width")]
        height, width = [768, 1360] if is_joining_frames else grid
        usual = {"num_frames": network.get("num_frames"), "height": height, "width": width}
        usual |= {"fps": 16 if is_joining_frames else 8}
        usual |= {name: result["data"][name] for name in usual if name in result["data"]}
        result["sample"] = usual | section


def translate_run(source: UpstreamSource, result: Result, mode: str | None, training: bool) -> None:
    """Fill ``result``'s sections train, deepspeed, run, seed, the rest of data, load and sample, and all precisions.

    mode: args.mode. training: the files say how to train. The sections model and vae must have been filled.
    """
    sampling = mode == "inference"
    if sampling and not training:
        for name in TRAINING_ARGUMENTS:
            source.ignore(f"args.{name}", "acts in training, and the files are for sampling")
    _deepspeed(source, result)
    _precision(source, result, training, sampling)
    _data_folders(source, result)
    if (weights := source.take("args.load")) is not None:
        result["load"]["transformer"] = weights
    if (seed := source.take("args.seed")) is not None:
        result["seed"] = seed
    if source.take("args.wandb", False):
        result["train"]["trackers"] = ["wandb"]
    _run_folder(source, result)
    _sampling_arguments(source, result, training, sampling)
    for theirs, ours in (
        ("train_iters", "steps"),
        ("save_interval", "save_every"),
        ("log_interval", "log_every"),
        ("eval_interval", "validate_every"),
        ("eval_iters", "validation_batches"),
    ):
        if (value := source.take(f"args.{theirs}")) is not None:
            result["train"][ours] = value
    if training:
        _learning_rate(source, result["train"])
        if mode == "finetune":
            source.note_difference(
                "args.mode",
                "SAT's finetune holds the learning rate at 5 % of its value in the first 100 steps, whatever "
                "args.warmup says; here it rises over train.warmup_steps",
            )


def _data(source: UpstreamSource, result: Result) -> None:
    result["data"] = section = {}
    source.target("data", "SFTDataset")
    if (size := source.take("data.params.video_size")) is not None:
        section["height"], section["width"] = size
    for theirs, ours in (("fps", "fps"), ("max_num_frames", "num_frames")):
        if (value := source.take(f"data.params.{theirs}")) is not None:
            section[ours] = value
            if ours == "fps":
                source.note_difference(
                    "data.params.fps",
                    "frames are chosen by their time, not by a whole stride, which misses the rate",
                )
    if (skip := source.take("data.params.skip_frms_num")) is not None:
        section["params"] = {"skip_frames": int(skip)}


def _deepspeed(source: UpstreamSource, result: Result) -> None:
    train, d = result["train"], "deepspeed"
    if not source.has(d):
        return
    for theirs, ours in (
        ("train_micro_batch_size_per_gpu", "batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ):
        if (value := source.take(f"{d}.{theirs}")) is not None:
            train[ours] = value
    train["gradient_clipping"] = source.take(f"{d}.gradient_clipping", 0.0)  # DeepSpeed's default: off
    half = [name for name in ("bf16", "fp16") if source.take(f"{d}.{name}.enabled", False)]
    if len(half) == 2:
        source.problems.append(
            "deepspeed.bf16.enabled and deepspeed.fp16.enabled: only one of them can be true"
        )
    train["precision"] = half[0] if half else "fp32"
    if source.take(f"{d}.zero_optimization.cpu_offload", False):
        source.get(f"{d}.zero_optimization").setdefault("offload_optimizer", {"device": "cpu"})
    if source.has(f"{d}.optimizer"):
        _optimizer(source, train)
    rest = source.take(d)
    for key in [key for key in rest if key not in DEEPSPEED_KEYS]:
        del rest[key]
        reason = "stands outside fp16:, so" if key in LOSS_SCALE else "is no key of its top level:"
        source.note(f"{d}.{key}", f"{reason} DeepSpeed never sees it")
    result["deepspeed"] = {name: value for name, value in rest.items() if value not in ({}, None)}


def _optimizer(source: UpstreamSource, train: Result) -> None:
    kind = source.take("deepspeed.optimizer.type")
    keeps_average = OPTIMIZERS.get(str(kind).lower())
    if keeps_average is None:
        source.problems.append(
            f"deepspeed.optimizer.type={kind}: no equivalent here (known: sat.ops.FusedEmaAdam, AdamW, Adam, FusedAdam)"
        )
    # What SAT and DeepSpeed take where nothing is said: torch's AdamW has another weight decay.
    if source.has(f"{OPTIMIZER}.lr"):
        source.ignore("args.lr", DEEPSPEED_DECIDES)
    params = {
        "lr": source.take_number(f"{OPTIMIZER}.lr", source.take_number("args.lr", 1e-4)),
        "betas": source.take(f"{OPTIMIZER}.betas"),
        "eps": source.take_number(f"{OPTIMIZER}.eps"),
        "weight_decay": source.take_number(f"{OPTIMIZER}.weight_decay", 0.0),
    }
    params = {name: value for name, value in params.items() if value is not None}
    train["optimizer"] = {"target": "torch.optim.AdamW", "params": params}
    decay = source.take_number(f"{OPTIMIZER}.ema_decay", 0.9999)
    if keeps_average:
        train["ema_decay"] = decay
    for path, value in source.left("deepspeed.optimizer"):
        source.problems.append(f"{path}={value!r}: not known")
    source.take("deepspeed.optimizer")


def _precision(source: UpstreamSource, result: Result, training: bool, sampling: bool) -> None:
    """Upstream runs everything, the VAE too, in the precision that args (sampling) or deepspeed (training) name."""
    given = {name: source.take(f"args.{name}") for name in ("bf16", "fp16")}
    half = [name for name, value in given.items() if value]
    if len(half) == 2:
        source.problems.append("args.bf16 and args.fp16: only one of them can be true")
    trained_in = result["train"].get("precision")
    if sampling or any(value is not None for value in given.values()):
        result["sample"]["precision"] = half[0] if half else "fp32"
    elif trained_in is not None and result["sample"]:
        result["sample"]["precision"] = trained_in
    precision = trained_in if training and trained_in else result["sample"].get("precision")
    if precision is None:
        return
    if "scale_factor" in result["vae"]:
        result["vae"]["precision"] = precision
    for condition in result["model"].get("conditions", []):
        if condition["target"].endswith(".TextCondition"):
            condition["params"]["dtype"] = "fp32" if condition["params"].get("trainable") else precision


def _data_folders(source: UpstreamSource, result: Result) -> None:
    training, held_out = _folder(source, "args.train_data"), _folder(source, "args.valid_data")
    if training is not None:
        result["data"]["path"] = training
    if held_out is not None and held_out == training:
        source.note("args.valid_data", "it is the training folder, which validates nothing")
    elif held_out is not None:
        result["data"]["validation_path"] = held_out
    split = source.take("args.split")
    is_whole = re.fullmatch(r"\s*[1-9]\d*(\.0*)?([,/]\s*0?(\.0*)?\s*)*", str(split or "1")) is not None
    if held_out is None and not is_whole:
        source.problems.append(
            f"args.split={split}: it holds part of the training clips back; put those into a folder of their own, "
            f"args.valid_data, and set args.split to 1,0,0"
        )
    elif split is not None:
        source.note("args.split", "training and validation clips are two folders, never one that is split")
    if (workers := source.take("args.num_workers")) is not None:
        result["data"]["num_workers"] = workers


def _folder(source: UpstreamSource, path: str) -> str | None:
    value = source.take(path)
    folders = value if isinstance(value, list) else [value]
    if len(folders) > 1:
        source.problems.append(
            f"{path}={value}: one folder is read, with all folders below it; move these into one, or list their clips "
            f"in a metadata.csv (data/README.md) and name that file"
        )
    return folders[0] if folders else None


def _run_folder(source: UpstreamSource, result: Result) -> None:
    save, name = source.take("args.save"), source.take("args.experiment_name")
    if save is None and name is None:
        return
    result["run"] = {"dir": "/".join(str(part).rstrip("/") for part in (save or "runs", name) if part)}
    source.note_difference(
        "args.save" if save else "args.experiment_name",
        "the run folder has no date in its name: the same command resumes, run.dir=... starts anew",
    )


def _sampling_arguments(source: UpstreamSource, result: Result, training: bool, sampling: bool) -> None:
    if (output := source.take("args.output_dir")) is not None:
        result["sample"]["output_dir"] = str(output).rstrip("/")
    file, kind = source.take("args.input_file"), source.take("args.input_type")
    if kind not in (None, "txt", "cli"):
        source.problems.append(f"args.input_type={kind}: not known (txt or cli)")
    if kind == "txt" and file is not None:
        result["sample"]["prompt_file"] = file
    elif file is not None:
        source.note(
            "args.input_file", f"args.input_type={kind}: prompts come from standard input, or --prompt"
        )
    batch = source.take("args.batch_size")
    if batch is None:
        return
    if sampling and batch != 1:
        source.problems.append(
            f"args.batch_size={batch}: several videos of one prompt: repeat it in the prompt file"
        )
    elif training and result["train"].setdefault("batch_size", batch) != batch:
        source.note("args.batch_size", DEEPSPEED_DECIDES)


def _learning_rate(source: UpstreamSource, train: Result) -> None:
    """SAT's own defaults hold where the file is silent: linear decay after a warm-up of 1 % of the steps."""
    style = str(source.take("args.lr_decay_style", "linear")).lower()
    steps = source.take("args.lr_decay_iters", train.get("steps"))
    if steps != train.get("steps"):
        source.problems.append(
            f"args.lr_decay_iters={steps}: the decay ends with the run, at args.train_iters"
        )
    warmup = source.take_number("args.warmup", 0.01)
    floor = source.take_number("args.lr_decay_ratio", 0.1)
    if steps is not None:
        train["warmup_steps"] = round(warmup * steps)
    # SAT's "exponential" is a constant (training/learning_rates.py), and only its cosine reads the ratio.
    train["lr_schedule"] = style if style in ("linear", "cosine") else "constant"
    # SAT's linear decay starts after the warm-up with the slope 1 / steps: it ends at the fraction of the warm-up.
    train["min_lr_ratio"] = {"linear": warmup, "cosine": floor}.get(style, 0.0)
    if (accumulation := source.take("args.gradient_accumulation_steps")) is not None:
        if train.setdefault("gradient_accumulation_steps", accumulation) != accumulation:
            source.note("args.gradient_accumulation_steps", DEEPSPEED_DECIDES)
