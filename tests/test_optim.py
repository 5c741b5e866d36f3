"""Parameter groups, the learning rate's closed form, and what DeepSpeed is configured with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from workers.train_toy import Toy, train_config

from cogvideox.config import Part
from cogvideox.engine.optim import (
    build_optimizer,
    check_train_config,
    deepspeed_config,
    learning_rate_factor,
)

CPU = torch.device("cpu")

# The deepspeed section of CogVideo's published sat/configs/sft.yaml (1e-8 and 1e-4 are strings to a YAML 1.1 reader).
PUBLISHED = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 50,
    "gradient_clipping": 0.1,
    "zero_optimization": {
        "stage": 2,
        "cpu_offload": False,
        "contiguous_gradients": False,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1000000000,
        "allgather_bucket_size": 1000000000,
        "load_from_fp32_weights": False,
    },
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "loss_scale": 0,
    "loss_scale_window": 400,
    "hysteresis": 2,
    "min_loss_scale": 1,
    "optimizer": {
        "type": "sat.ops.FusedEmaAdam",
        "params": {"lr": 0.00001, "betas": [0.9, 0.95], "eps": "1e-8", "weight_decay": "1e-4"},
    },
    "activation_checkpointing": {"partition_activations": False, "contiguous_memory_optimization": False},
    "wall_clock_breakdown": False,
}


def compose(config: Any, overrides: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    return deepspeed_config(config, overrides, trainable=1001, world_size=ranks, device=CPU)


def published_train(**fields: Any) -> Any:
    optimizer = Part(
        "torch.optim.AdamW", {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-4}
    )
    return train_config(**{"gradient_clipping": 0.1, "precision": "bf16", "optimizer": optimizer} | fields)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_follows_its_closed_form(schedule: str) -> None:
    steps, warmup, low = 110, 10, 0.2
    rates = [
        learning_rate_factor(k, steps=steps, schedule=schedule, warmup_steps=warmup, min_ratio=low)
        for k in range(steps)
    ]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    p = torch.arange(100, dtype=torch.float64) / 100
    expected = {
        "constant": torch.ones(100, dtype=torch.float64),
        "linear": torch.lerp(
            torch.tensor(1.0, dtype=torch.float64), torch.tensor(low, dtype=torch.float64), p
        ),
        "cosine": low
        + (1 - low) * torch.cos(p * math.pi / 2) ** 2,  # the half-angle form of (1 + cos pi p) / 2
    }[schedule]
    assert rates[10:] == pytest.approx(expected.tolist())


def test_a_warm_up_longer_than_the_run_is_cut_off_and_none_starts_at_the_full_rate() -> None:
    assert learning_rate_factor(4, steps=5, schedule="cosine", warmup_steps=10) == 0.5
    assert learning_rate_factor(0, steps=5, schedule="cosine") == 1.0


def test_weight_decay_is_for_matrices_unless_asked_and_frozen_parameters_are_left_out() -> None:
    toy = Toy()
    part = Part("torch.optim.AdamW", {"lr": 0.1, "weight_decay": 0.5})
    decayed, plain = build_optimizer(toy, part).param_groups
    assert {id(p) for p in decayed["params"]} == {id(toy.first.weight), id(toy.last.weight)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert len(plain["params"]) == 4  # two biases, the norm's gain and bias
    (everything,) = build_optimizer(toy, part, decay_norms_and_biases=True).param_groups
    assert len(everything["params"]) == 6 and everything["weight_decay"] == 0.5


def test_a_model_with_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        build_optimizer(Toy().requires_grad_(False), Part("torch.optim.AdamW"))


def test_the_published_deepspeed_section_passes_and_drives_only_what_train_does_not() -> None:
    config = compose(published_train(), PUBLISHED)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000000000
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    assert config["gradient_clipping"] == 0.1 and config["train_micro_batch_size_per_gpu"] == 2
    assert not {"optimizer", "loss_scale", "hysteresis"} & config.keys()
    assert "cpu_offload" not in config["zero_optimization"]
    assert config["activation_checkpointing"] == PUBLISHED["activation_checkpointing"]


def test_loss_scale_keys_beside_fp16_reach_deepspeed() -> None:
    overrides = PUBLISHED | {"bf16": {"enabled": False}, "fp16": {"enabled": True}}
    config = compose(published_train(precision="fp16"), overrides)
    assert config["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 400,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }


def test_zero_2_is_the_default_and_buckets_are_no_larger_than_the_model() -> None:
    zero = compose(train_config(), {})["zero_optimization"]
    assert zero["stage"] == 2 and zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 1002
    assert compose(train_config(), {"zero_optimization": {"stage": 3}})["zero_optimization"]["stage"] == 3
    offloaded = compose(train_config(), {"zero_optimization": {"cpu_offload": True}})["zero_optimization"]
    assert offloaded["offload_optimizer"] == {"device": "cpu"} and offloaded["reduce_scatter"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"gradient_clipping": 0.1}, "train.gradient_clipping=1.0"),
        ({"train_micro_batch_size_per_gpu": 4}, "train.batch_size=2"),
        ({"train_batch_size": 2}, "train.batch_size"),
        ({"gradient_accumulation_steps": 8}, "train.gradient_accumulation_steps=1"),
        ({"bf16": {"enabled": True}}, "train.precision=fp32"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "train.optimizer.params.lr=0.01"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "train.optimizer.params.betas"),
        ({"optimizer": {"type": "Lion"}}, "train.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "train.lr_schedule"),
        ({"zero_optimization": {"stage": 4}}, "deepspeed.zero_optimization.stage=4"),
    ],
)
def test_a_value_set_differently_in_both_places_is_an_error_naming_both(
    overrides: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match="deepspeed") as error:
        compose(train_config(), overrides, ranks=2)
    assert named in str(error.value)


def test_the_same_value_in_both_places_passes() -> None:
    compose(
        train_config(),
        {"train_batch_size": 4, "gradient_clipping": "auto", "fp16": {"enabled": False}},
        ranks=2,
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"precision": "fp16"}, "train.precision=fp16 needs a GPU"),
        ({"precision": "fp8"}, "train.precision='fp8'"),
        ({"lr_schedule": "polynomial"}, "constant, cosine, linear"),
        ({"ema_decay": 1.0}, "train.ema_decay=1.0"),
        ({"steps": 0}, "train.steps=0"),
        ({"log_every": 0}, "train.log_every=0"),
        ({"keep_checkpoints": 0}, "train.keep_checkpoints=0"),
    ],
)
def test_a_value_that_cannot_be_trained_with_is_an_error(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as error:
        check_train_config(train_config(**fields), CPU)
    assert named in str(error.value)
