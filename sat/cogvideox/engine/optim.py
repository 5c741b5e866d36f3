"""The optimizer, the learning rate as a function of the step, and the configuration that DeepSpeed gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox import dist
from cogvideox.build import factory
from cogvideox.config import GroupConfig, Part, TrainConfig
from cogvideox.engine.groups import parameter_groups, split_by_blocks
from cogvideox.engine.logging import get_logger
from cogvideox.engine.pieces import PIECE_ELEMENTS, cut_groups
from cogvideox.engine.profile import check_profile
from cogvideox.optimizer_names import check_zero, known_optimizer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("constant", "cosine", "linear")

# Optimizers that a deepspeed section written for SAT or for DeepSpeed itself may name: train.optimizer does their work.
_ADAM_FAMILY = ("sat.ops.FusedEmaAdam", "FusedEmaAdam", "AdamW", "Adam", "FusedAdam")
# SAT's published files write these beside fp16 instead of inside, where DeepSpeed never sees them.
_LOSS_SCALE_KEYS = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
# Elements, 200 MB in bf16: links are at their rate long before. With DeepSpeed's own 500 million the buffers (three, as
# one is filled while another is reduced) take 3 GB.
_LARGEST_BUCKET = 100_000_000


def check_train_config(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError for values that cannot be trained with on this device, before anything heavy is loaded."""
    if config.precision not in PRECISIONS:
        raise ValueError(f"train.precision={config.precision!r}: expected one of {', '.join(PRECISIONS)}")
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("train.precision=fp16 needs a GPU and this machine has none; use fp32 or bf16")
    if config.lr_schedule not in SCHEDULES:
        raise ValueError(f"train.lr_schedule={config.lr_schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if config.ema_decay is not None and not 0.0 <= config.ema_decay < 1.0:
        raise ValueError(
            f"train.ema_decay={config.ema_decay}: expected a number in [0, 1), or null for no average"
        )
    for key, least in {
        "steps": 1,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0,
        "warmup_steps": 0,
        "log_every": 1,
        "save_every": 1,
        "validate_every": 1,
        "preview_every": 1,
        "keep_checkpoints": 1,
        "keep_every": 1,
        "global_batch_size": 1,
        "max_nonfinite_steps": 1,
    }.items():
        value = getattr(config, key)
        if value is not None and value < least:
            raise ValueError(f"train.{key}={value}: expected at least {least}")
    check_profile(config.profile_steps, config.profile_ranks, config.steps, dist.world_size())


def build_optimizer(
    module: nn.Module,
    part: Part,
    decay_norms_and_biases: bool = False,
    rules: Sequence[GroupConfig] = (),
) -> torch.optim.Optimizer:
    """The optimizer of ``part`` over the trainable parameters of ``module``, in groups (``engine.groups``).

    Weight decay is for matrices: norms' gains and all biases go without, unless ``decay_norms_and_biases`` or a rule.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: every parameter of the model is frozen")
    # YAML 1.1 readers hand over 1e-4 as a string.
    lr = float(part.params["lr"]) if "lr" in part.params else None
    groups, lines = parameter_groups(trainable, rules, lr, decay_norms_and_biases)
    for line in lines:
        get_logger().info("%s", line)
    block = part.params.get("block_size", known_optimizer(part.target).block)
    if block > 1:
        groups = split_by_blocks(groups, block * dist.world_size())
    groups = cut_groups(groups)
    bound = factory(part, params=groups)
    if not getattr(bound.func, "needs_names", False):
        for group in groups:
            del group["names"]
    return bound()


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Iterable[float]) -> None:
    """One for each group. Those of torchao hold theirs as a tensor, which must stay the same one."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def kept_in_full(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """(numbers whose state torchao keeps in 32 bits, all numbers that this rank updates).

    torchao's low-bit states come in blocks: a tensor that they do not divide, or a small one, has none. Under ZeRO the
    tensors are a rank's slices of whole groups. Call it once DeepSpeed has made them.
    """
    block = getattr(optimizer, "block_size", None)
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    if block is None or not type(optimizer).__module__.startswith("torchao"):
        return 0, sum(sizes)
    return sum(n for n in sizes if n < 4096 or n % block), sum(sizes)


def learning_rate_factor(
    step: int, *, steps: int, schedule: str, warmup_steps: int = 0, min_ratio: float = 0.0
) -> float:
    """What the learning rate is multiplied by in ``step`` (0-based) of ``steps``; a function of the step alone.

    Linear warm-up over the first ``warmup_steps`` (1/w, 2/w, ... 1), then with p in [0, 1) running over the rest:
    constant 1;  linear 1 - (1 - min_ratio) p;  cosine min_ratio + (1 - min_ratio) (1 + cos(pi p)) / 2
    (Loshchilov & Hutter 2017, eq. 5).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    p = (step - warmup_steps) / max(steps - warmup_steps, 1)
    if schedule == "linear":
        return 1.0 - (1.0 - min_ratio) * p
    if schedule == "cosine":
        return min_ratio + (1.0 - min_ratio) * (1.0 + math.cos(math.pi * p)) / 2.0
    return 1.0


def deepspeed_config(
    config: TrainConfig,
    overrides: Mapping[str, Any],
    *,
    trainable: int,
    world_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """What ``deepspeed.initialize`` gets: the train section, ZeRO-2, and the user's ``deepspeed`` section on top.

    trainable: number of trained parameters; communication buckets never get larger than that.
    A value that the train section owns may stand in ``overrides`` too, as it does in SAT's published files, if it is
    the same there. Raises ValueError naming both keys where it is not.
    """
    user = dict(overrides)
    _drop_what_train_owns(user, config, world_size)
    bucket = min(trainable + trainable % 2, _LARGEST_BUCKET)  # DeepSpeed wants an even number
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": device.type != "cpu",
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "sub_group_size": PIECE_ELEMENTS,  # what a piece is to ZeRO-1 and 2, for ZeRO-3
        },
        # Any torch optimizer is taken as it is, also with its state offloaded to the CPU.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        # DeepSpeed's own timer synchronises the device in every step.
        "timers": {"throughput": {"enabled": False}},
    }
    loss_scale = {key: user.pop(key) for key in _LOSS_SCALE_KEYS if key in user}
    if config.precision == "fp16":
        base["fp16"].update(loss_scale)
    zero = user.get("zero_optimization", {})
    if "cpu_offload" in zero:  # the old spelling, in SAT's files
        user["zero_optimization"] = zero = dict(zero)
        if zero.pop("cpu_offload"):
            zero.setdefault("offload_optimizer", {"device": "cpu"})
    merged = _merged(base, user)
    stage = merged["zero_optimization"]["stage"]
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_optimization.stage={stage!r}: expected 0, 1, 2 or 3")
    check_zero(config.optimizer.target, merged["zero_optimization"])
    if trainer_checks_gradients(stage, config.precision):
        merged["gradient_clipping"] = 0.0  # done by clip_or_drop_gradients
    return merged


def trainer_checks_gradients(stage: int, precision: str) -> bool:
    """Whether DeepSpeed hands gradients to the optimizer as they are, NaN included: stage 0 in fp32.

    Every other wrapper of it looks at their norm, and skips the step on every rank where that is not finite.
    """
    return stage == 0 and precision == "fp32"


@torch.no_grad()
def clip_or_drop_gradients(module: nn.Module, max_norm: float) -> Tensor:
    """The L2 norm of the reduced gradients, after clipping them to ``max_norm`` (0: off).

    If the norm is not finite they are removed, so that the optimizer changes nothing.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        module.zero_grad(set_to_none=True)
    elif max_norm > 0.0:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def _drop_what_train_owns(user: dict[str, Any], config: TrainConfig, world_size: int) -> None:
    """Remove the keys of the train section from ``user``, after checking that they say the same."""
    batch, accumulation = config.batch_size, config.gradient_accumulation_steps

    def same(found: Any, expected: Any) -> bool:
        if isinstance(found, list | tuple):
            return len(found) == len(expected) and all(map(same, found, expected))
        # YAML 1.1 readers hand over 1e-8 as a string.
        return found == "auto" or float(found) == float(expected)

    def check(key: str, found: Any, expected: Any, ours: str) -> None:
        if not same(found, expected):
            raise ValueError(
                f"deepspeed.{key}={found} but {ours}={expected}: set {ours} and leave deepspeed.{key} out"
            )

    for key, expected, ours in (
        ("train_micro_batch_size_per_gpu", batch, "train.batch_size"),
        ("gradient_accumulation_steps", accumulation, "train.gradient_accumulation_steps"),
        ("gradient_clipping", config.gradient_clipping, "train.gradient_clipping"),
    ):
        if key in user:
            check(key, user.pop(key), expected, ours)
    if "train_batch_size" in user:
        check(
            "train_batch_size",
            user.pop("train_batch_size"),
            batch * accumulation * world_size,
            "train.batch_size * train.gradient_accumulation_steps * ranks",
        )
    for precision in ("bf16", "fp16"):
        section = dict(user.pop(precision, {}))
        enabled = section.pop("enabled", "auto")
        if section:
            user[precision] = section
        if enabled not in ("auto", config.precision == precision):
            raise ValueError(
                f"deepspeed.{precision}.enabled={enabled} but train.precision={config.precision}: "
                f"set train.precision and leave deepspeed.{precision}.enabled out"
            )
    if "optimizer" in user:
        optimizer = user.pop("optimizer")
        if optimizer.get("type") not in _ADAM_FAMILY:
            raise ValueError(
                f"deepspeed.optimizer.type={optimizer.get('type')}: the optimizer is chosen by train.optimizer "
                f"(a target and its params); leave deepspeed.optimizer out"
            )
        for key, found in (optimizer.get("params") or {}).items():
            if key in config.optimizer.params:
                check(
                    f"optimizer.params.{key}",
                    found,
                    config.optimizer.params[key],
                    f"train.optimizer.params.{key}",
                )
    if "scheduler" in user:
        raise ValueError(
            "deepspeed.scheduler: the learning rate follows train.lr_schedule, train.warmup_steps and "
            "train.min_lr_ratio; leave deepspeed.scheduler out"
        )


def _merged(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in overlay.items():
        if isinstance(value, Mapping):
            value = _merged(base.get(key, {}), value)
        result[key] = value
    return result
