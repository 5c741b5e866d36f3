"""The plan against what is counted: states on the real engine, activations at full size, times against closed forms."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideox import dist, plan
from cogvideox.config import ConfigError
from cogvideox.engine.optim import _LARGEST_BUCKET
from cogvideox.engine.pieces import PIECE_ELEMENTS
from cogvideox.gpus import GPUS, gpu_named
from cogvideox.planning import states
from cogvideox.planning.choices import Choice, choices, fits, planned
from cogvideox.planning.communication import EFFICIENCY, Cluster, exposed_seconds, seconds, step_volumes
from cogvideox.planning.description import describe
from cogvideox.planning.memory import method_of, optimizer_bytes, peak, training_peak, training_phases
from cogvideox.planning.states import Method
from cogvideox.planning.step_time import step_time
from cogvideox.recompute import Recompute
from scripts import benchmark_memory
from scripts.benchmark_memory import config_of, counted_pass, counted_states, load, planned_pass

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STATES = ("weights", "fp32 masters", "optimizer states")


# ---------------------------------------------------------------------------------------------------- activations


PASSES = [("5B", method, policy) for method in ("full", "LoRA") for policy in benchmark_memory.POLICIES]
PASSES += [(model, *way) for model in ("2B", "1.5-5B") for way in (("full", "full"), ("LoRA", "selective"))]


@pytest.mark.parametrize(("model", "method", "policy"), PASSES)
def test_planned_activations_are_the_counted_ones(model: str, method: str, policy: str) -> None:
    """At the published width, grid and text, on four blocks: all are alike. docs/memory.md has all of them."""
    config = config_of(model, method, policy, "model.transformer.num_layers=4")
    kept, most = planned_pass(config)
    after, counted = counted_pass(config)
    # 3 %: gradients of the ends of the network, which count little at full depth, are in it or not.
    assert most == pytest.approx(counted, rel=0.03)
    # Beside the blocks' own, the ends of the network keep up to four tensors of tokens x width.
    unit = (1 if model != "1.5-5B" else 45_104 / 17_776) * 17_776 * config.model.transformer.hidden_size * 2
    assert 0.95 * unit <= after - kept <= 4.6 * unit


def test_the_documented_plan_is_that_of_today() -> None:
    results = json.loads((benchmark_memory.RESULTS / "memory.json").read_text())
    assert len(results["passes"]) == 3 * 2 * len(benchmark_memory.POLICIES)
    for row in results["passes"]:
        kept, most = planned_pass(config_of(row["model"], row["method"], row["policy"]))
        assert (row["planned_kept"], row["planned"]) == (kept, most)
        assert most == pytest.approx(row["counted"], rel=0.01)
    for row, target in zip(results["targets"], benchmark_memory.TARGETS, strict=True):
        assert row["planned"] == training_peak(load(*target.files, overrides=target.overrides), 1)


def test_a_batch_multiplies_the_activations() -> None:
    one = config_of("2B", "LoRA", "selective")
    four = config_of("2B", "LoRA", "selective", "train.batch_size=4")
    assert planned_pass(four)[0] == 4 * planned_pass(one)[0]


# --------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_planned_states_are_those_of_the_engine(stage: int, precision: str) -> None:
    dist.init(2.0, model_parallel=False)
    expected, counted = counted_states(stage, precision)
    for moment, count in counted.items():
        # Stage 0 updates parameter by parameter on a CPU (all at once on a GPU, which is planned): less.
        least = 0.7 if stage == 0 else 0.97
        assert least * expected[moment] <= count <= 1.02 * expected[moment], moment


def test_a_fused_optimizer_needs_no_room_to_update_and_a_frozen_base_no_states() -> None:
    dist.init(2.0, model_parallel=False)
    for options in ({"fused": True}, {"frozen": 6}, {"optimizer": "torch.optim.SGD"}):
        expected, counted = counted_states(2, **options)
        for moment, count in counted.items():
            assert count == pytest.approx(expected[moment], rel=0.03), (options, moment)


def test_the_planner_knows_the_engine_s_own_sizes() -> None:
    assert (states.GROUP_ELEMENTS, states.BUCKET_ELEMENTS) == (PIECE_ELEMENTS, _LARGEST_BUCKET)


def resident(*names: str, ranks: int = 1, overrides: tuple[str, ...] = ()) -> dict[str, float]:
    return states.resident(method_of(load(*names, overrides=overrides), ranks))


def test_full_fine_tuning_takes_16_bytes_per_parameter_on_one_gpu() -> None:
    config = load("cogvideox_2b", "sft")
    found = states.resident(method_of(config, 1))
    assert sum(found[kind] for kind in STATES) + states.gradients(method_of(config, 1)) == 16 * 1_693_783_872
    averaged = resident("cogvideox_2b", "sft", overrides=("train.ema_decay=0.999",))
    assert averaged["averaged weights (EMA)"] == 4 * 1_693_783_872


def test_zero_stages_divide_states_then_gradients_then_weights() -> None:
    one = method_of(load("cogvideox_2b", "sft"), 1)
    for stage, divided in (
        (0, ()),
        (1, ("fp32 masters", "optimizer states")),
        (2, ("fp32 masters", "optimizer states", "gradients")),
        (3, ("fp32 masters", "optimizer states", "gradients", "weights")),
    ):
        eight = replace(one, stage=stage, ranks=8)
        found = states.resident(eight) | {"gradients": states.gradients(eight)}
        whole = states.resident(one) | {"gradients": states.gradients(one)}
        for kind in (*STATES, "gradients"):
            assert found[kind] == whole[kind] / (8 if kind in divided else 1), (stage, kind)


def test_offloading_moves_masters_states_and_gradients_to_the_host() -> None:
    method = method_of(
        load(
            "cogvideox_2b", "sft", overrides=("deepspeed.zero_optimization.offload_optimizer={device: cpu}",)
        ),
        1,
    )
    found = states.resident(method)
    assert found["weights"] == 2 * method.trained and found["optimizer states"] == found["fp32 masters"] == 0
    assert states.on_host(method) == (4 + 8 + 4 + 2) * method.trained


def test_lora_keeps_states_of_the_adapters_only() -> None:
    found = resident("cogvideox_5b", "lora")
    assert found["weights"] == 2 * (5_570_283_072 + 132_120_576)
    assert found["optimizer states"] == 8 * 132_120_576


def test_a_trainable_text_encoder_is_trained_except_by_lora() -> None:
    whole, adapted = load("tiny_t2v"), load("tiny_t2v", "lora")
    encoder = plan.text_encoder(whole).parameters
    assert plan.trained_parameters(whole) == plan.network_parameters(whole) + encoder
    assert plan.trained_parameters(adapted) == plan.lora_parameters(adapted)
    assert training_phases(adapted, 1)["encoding"]["text encoder"] == 4 * encoder


@pytest.mark.parametrize(
    ("target", "params", "expected"),
    [
        ("torch.optim.AdamW", {}, (8, 8)),
        ("torch.optim.AdamW", {"fused": True}, (8, 0)),
        ("torchao.optim.AdamW8bit", {}, (2 + 8 / 256, 8)),
        ("bitsandbytes.optim.AdamW8bit", {}, (2 + 8 / 256, 0)),
        ("torch.optim.SGD", {}, (0, 0)),
    ],
)
def test_optimizers_by_what_they_keep(target: str, params: dict, expected: tuple) -> None:
    assert optimizer_bytes(target, params) == expected


# ---------------------------------------------------------------------------------------------------------- phases


def test_encoding_and_activations_are_never_added_up() -> None:
    raw = training_phases(load("cogvideox_5b", "lora"), 1)
    assert set(raw) == {"encoding", "forward and backward", "update"}
    assert "activations" not in raw["encoding"] and "VAE at work" not in raw["forward and backward"]
    phase, most = peak(raw)
    assert most == sum(raw[phase].values()) == max(sum(kinds.values()) for kinds in raw.values())


def test_with_a_cache_neither_vae_nor_text_encoder_is_there() -> None:
    cached = training_phases(
        load("cogvideox_2b", "sft", overrides=("data.latent_cache=c", "data.text_cache=c")), 1
    )
    kinds = {kind for kinds in cached.values() for kind in kinds}
    assert not {"VAE", "VAE at work", "text encoder"} & kinds and "encoding" not in cached


def test_gradients_wait_through_the_encoding_of_an_accumulating_run() -> None:
    phases = training_phases(
        load("cogvideox_2b", "sft", overrides=("train.gradient_accumulation_steps=4",)), 1
    )
    assert phases["encoding"]["gradients"] == 2 * 1_693_783_872


@pytest.mark.parametrize("target", benchmark_memory.TARGETS, ids=lambda target: target.name)
def test_the_targets_are_reached_by_the_plan(target: benchmark_memory.Target) -> None:
    config = load(*target.files, overrides=target.overrides)
    assert training_peak(config, 1) <= target.gigabytes * 1e9


# ----------------------------------------------------------------------------------------------- communication, time


def method(
    trained: int = 1000, frozen: int = 0, stage: int = 2, ranks: int = 8, accumulation: int = 1
) -> Method:
    return Method(trained, frozen, 2, 8, 0, stage, ranks, accumulation=accumulation)


def test_volumes_are_those_of_ring_algorithms() -> None:
    # An all-reduce of V bytes over 8 ranks sends 2 * 7/8 V, an all-gather 7/8 V; V = 2 bytes x 1000.
    assert step_volumes(method(stage=0)) == {"all-reduce of gradients": 3500}
    assert step_volumes(method(stage=2)) == {"all-reduce of gradients": 3500, "all-gather of weights": 1750}
    assert step_volumes(method(stage=3, frozen=500)) == {
        "all-gather of weights": 2 * 7 / 8 * 3000,
        "reduce-scatter of gradients": 1750,
    }
    assert step_volumes(method(accumulation=4))["all-reduce of gradients"] == 4 * 3500
    assert step_volumes(method(stage=1, accumulation=4))["all-reduce of gradients"] == 3500
    assert set(step_volumes(method(ranks=1)).values()) == {0}


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    h200 = gpu_named("h200")
    cluster = Cluster(h200)
    assert cluster.bus_bytes_per_second(8) == EFFICIENCY * 450e9
    assert cluster.bus_bytes_per_second(64) == EFFICIENCY * 8 * 50e9
    assert Cluster(h200, cards_per_node=1).bus_bytes_per_second(64) == EFFICIENCY * 50e9
    assert sum(seconds(method(trained=10**9), cluster).values()) == pytest.approx(3 * 7 / 8 * 2e9 / 360e9)


def test_the_reduction_hides_behind_the_backward_pass_and_the_gathering_does_not() -> None:
    cluster, m = Cluster(gpu_named("h200")), method(trained=5 * 10**9)
    times = seconds(m, cluster)
    gathered, reduced = times["all-gather of weights"], times["all-reduce of gradients"]
    assert exposed_seconds(m, cluster, 1.0, 2.0) == pytest.approx(gathered + 0.1 * reduced)
    assert exposed_seconds(m, cluster, 1.0, 0.0) == pytest.approx(gathered + reduced)


def test_the_step_of_a_5b_lora_is_near_the_reference_s_estimate() -> None:
    """3.8 s on an H200 with FlashAttention-2 and full recomputation, cached (the shared performance notes)."""
    config = config_of("5B", "LoRA", "full")
    assert step_time(config, Cluster(gpu_named("h200")), 1).total == pytest.approx(3.8, rel=0.2)


def test_raw_clips_cost_the_vae_s_encoding() -> None:
    cached, raw = (
        load("cogvideox_5b", "lora", overrides=("data.latent_cache=c", "data.text_cache=c")),
        load("cogvideox_5b", "lora"),
    )
    cluster = Cluster(gpu_named("h200"))
    assert step_time(cached, cluster, 1).vae == 0
    # 149 TFLOP at 250 to 400 TFLOP/s.
    assert 149 / 400 <= step_time(raw, cluster, 1).vae <= 149 / 250


# ------------------------------------------------------------------------------------------------------------ choices


def test_more_memory_is_never_planned_for_keeping_less() -> None:
    config = load("cogvideox_5b", "sft", overrides=("data.latent_cache=c", "data.text_cache=c"))
    peaks = [
        training_peak(replace(Choice.of(config), policy=Recompute(what)).applied(config), 8)
        for what in ("none", "products", "selective", "full")
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config, gpu = (
        load("cogvideox_5b", "lora", overrides=("data.latent_cache=c", "data.text_cache=c")),
        gpu_named("h100"),
    )
    way = Choice.of(config)
    most = planned(config, way, Cluster(gpu), 1).most
    peaks = [training_peak(replace(way, batch=batch).applied(config), 1) for batch in (most, most + 1)]
    assert [fits(count, gpu) for count in peaks] == [True, False]


def test_every_way_is_another() -> None:
    config = load("cogvideox_5b", "lora")
    assert len(set(choices(config, 1))) == len(list(choices(config, 1))) == 2 * 4 * 2
    assert len(set(choices(config, 8))) == len(list(choices(config, 8))) == 2 * 4 * 5


# -------------------------------------------------------------------------------------------------------------- text


def test_the_description_names_what_a_user_looks_for() -> None:
    text = describe(load("cogvideox_5b", "lora"), world_size=8)
    for expected in (
        "5,570,283,072",
        "132,120,576",
        "17,776 tokens",
        "332.2 TFLOP",
        "ZeRO-2 on 8 ranks",
        "GiB",
    ):
        assert expected in text
    assert "(estimate)" in next(line for line in text.splitlines() if line.startswith("most:"))


def test_for_a_gpu_the_configured_way_is_marked_and_the_fastest_named() -> None:
    text = describe(
        load("cogvideox_5b", "sft", overrides=("data.latent_cache=c", "data.text_cache=c")), gpu="h100"
    )
    rows = [line for line in text.splitlines() if line.startswith("* full")]
    assert len(rows) == 1 and " full " in rows[0] and "no" in rows[0]  # 16 bytes x 5.6 billion on 80 GB
    assert (
        "fastest full that fits, cached: " in text
        and "offload" in text.split("fastest full")[1].splitlines()[0]
    )


@pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS])
def test_every_known_gpu_has_a_plan(gpu: str) -> None:
    assert "fastest LoRA" in describe(load("cogvideox_2b", "lora"), gpu=gpu)


def test_an_unknown_gpu_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="H200"):
        describe(load("cogvideox_2b", "lora"), gpu="h201x")


def test_the_plan_of_sampling_is_that_of_the_savings_ladder() -> None:
    from cogvideox.planning.sampling import LADDER, stage_bytes

    config = load("cogvideox_2b", overrides=("sample.memory=balanced",))
    text = describe(config)
    assert "50 steps with guidance" in text and "optimizer" not in text
    line = next(line for line in text.splitlines() if "balanced, most in" in line)
    assert "*" in line and f"{max(stage_bytes(config, LADDER[1]).values()) / 2**30:.2f} GiB" in line
    assert "20 steps with guidance" in describe(load("tiny_t2v"), sampling=True)


def test_the_plan_needs_no_torch() -> None:
    program = (
        "import sys, cogvideox\nfrom cogvideox.planning.description import describe\n"
        "describe(cogvideox.load_config(sys.argv[1:]), gpu='h200')\nprint('torch' in sys.modules)"
    )
    files = [str(CONFIGS / name) for name in ("cogvideox_2b.yaml", "lora.yaml")]
    run = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_budget_is_refused_before_anything_is_loaded() -> None:
    config = load("cogvideox_5b", "sft", overrides=("model.transformer.checkpoint_activations=8 GiB",))
    with pytest.raises(ConfigError, match="cannot be met"):
        describe(config)


def test_a_gpu_without_a_dry_run_is_an_error(capsys: pytest.CaptureFixture) -> None:
    import train_video

    with pytest.raises(SystemExit):
        train_video.main(["--base", str(CONFIGS / "tiny_t2v.yaml"), "--gpu", "h200"])
    assert "add --dry-run" in capsys.readouterr().err
