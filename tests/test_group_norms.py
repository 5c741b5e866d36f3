"""Gradient norms and update ratios by group against a plain loop, under every ZeRO stage on one and two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from workers.launch import launch
from workers.train_toy import SEED, Toy, make_trainer, samples

import cogvideox
from cogvideox import dist
from cogvideox.dist import RandomStreams
from cogvideox.engine import group_norms
from cogvideox.engine.logging import read_metrics
from cogvideox.model.parameter_groups import parameter_group

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STEPS = 3
CALM = {"dropout": 0.0, "noise": 0.0}  # so that a plain loop needs no random streams
GROUPS = ("first", "norm", "last")
RUNS = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def plain_loop(batch_size: int) -> list[dict[str, float]]:
    """AdamW by torch alone: what should be logged in each step."""
    toy = Toy(**CALM)
    groups = {name: [p for p in getattr(toy, name).parameters()] for name in GROUPS}
    trained = [p for group in groups.values() for p in group]
    settings = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(settings, lr=0.01, betas=(0.9, 0.95))
    lines = []
    for step in range(STEPS):
        loss, _ = toy(samples(step * batch_size, batch_size), RandomStreams.at(SEED, step))
        loss.backward()
        line = {f"train/grad_norm/{name}": length([p.grad for p in group]) for name, group in groups.items()}
        nn.utils.clip_grad_norm_(trained, 1.0)
        before = {name: [p.detach().clone() for p in group] for name, group in groups.items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, group in groups.items():
            update = length([p.detach() - old for p, old in zip(group, before[name], strict=True)])
            line[f"train/update_ratio/{name}"] = update / length(before[name])
        lines.append(line)
    return lines


def length(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def run(root: Path, stage: int, precision: str) -> dict:
    return {
        "run_dir": str(root / f"zero{stage}_{precision}"),
        "toy": CALM,
        "train": {"steps": STEPS, "precision": precision},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two_ranks")
    runs = [run(root, *which) for which in RUNS]
    runs.append(run(root, 2, "fp32") | {"run_dir": str(root / "skipped"), "nan_at": [1]})
    done = launch(runs, 2, root)
    assert done.returncode == 0, done.stdout
    return root


def check(folder: Path, batch_size: int, precision: str) -> None:
    lines, expected = read_metrics(folder / "metrics.jsonl"), plain_loop(batch_size)
    assert len(lines) == STEPS and len(expected[0]) == 6
    # fp32: sums in another order. bf16: 8 bits in the weights and activations that make the gradients; Adam's first
    # update is lr * sign(gradient), which hides them.
    relative = 2e-4 if precision == "fp32" else 0.08
    for line, plain in zip(lines, expected, strict=True):
        assert {name: line[name] for name in plain} == pytest.approx(plain, rel=relative)
        total = math.sqrt(sum(line[f"train/grad_norm/{name}"] ** 2 for name in GROUPS))
        assert total == pytest.approx(line["train/grad_norm"], rel=1e-5)
        assert not any("frozen" in name for name in line)
    # Clipped to 1 in some steps: there the optimizer sees other norms than are logged.
    assert max(line["train/grad_norm"] for line in lines) > 1.2


@pytest.mark.parametrize("stage, precision", RUNS)
def test_groups_are_those_of_a_plain_loop_alone(tmp_path: Path, stage: int, precision: str) -> None:
    make_trainer(run(tmp_path, stage, precision)).run()
    check(tmp_path / f"zero{stage}_{precision}", 2, precision)


@pytest.mark.parametrize("stage, precision", RUNS)
def test_groups_are_those_of_a_plain_loop_on_two_ranks(two_ranks: Path, stage: int, precision: str) -> None:
    check(two_ranks / f"zero{stage}_{precision}", 4, precision)


def test_the_padding_of_zero_3s_last_slice_does_not_count() -> None:
    class Zero:
        grad_position = {"weight": [0, 0, 4], "bias": [0, 4, 1]}
        fp32_partitioned_groups_flat = [torch.empty(5)]

        def get_param_id(self, parameter: nn.Parameter) -> str:
            return "bias" if parameter.ds_numel == 1 else "weight"

    module = nn.Linear(7, 1)  # on two ranks: 4 and 3 weights, 1 and 0 biases
    for rank, held in ((0, {"weight": 4, "bias": 1}), (1, {"weight": 3})):
        for parameter in module.parameters():
            parameter.ds_numel, parameter.ds_zero_partition_rank = parameter.numel(), rank
        found = group_norms.pieces(SimpleNamespace(optimizer=Zero(), module=module))
        assert {name: count for name, _, _, count in found} == held


def test_a_skipped_step_has_no_norms_and_the_next_one_has(two_ranks: Path) -> None:
    lines = read_metrics(two_ranks / "skipped" / "metrics.jsonl")
    found = [line["train/grad_norm/first"] for line in lines]
    assert found[1] is None and found[0] > 0 and found[2] > 0
    assert lines[1]["train/update_ratio/first"] is None


def test_a_step_that_is_not_logged_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    norms = group_norms._norms
    monkeypatch.setattr(group_norms, "_norms", lambda tensors: looked.append(len(tensors)) or norms(tensors))
    trainer = make_trainer({"run_dir": str(tmp_path), "train": {"steps": 5, "log_every": 2}})
    trainer.run()
    # Steps 2, 4 and the last: gradients, updates and weights, once for matrices and once for vectors.
    assert len(looked) == 3 * 3 * 2


def test_the_ratio_of_a_large_tensor_is_estimated_from_a_sample_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_norms, "_MOST_SAMPLES", 1000)
    weight = torch.randn(200, 240, generator=torch.Generator().manual_seed(0))
    view = group_norms._sample(weight, 240, 199 * 240)
    assert view.data_ptr() == weight[1].data_ptr() and 1000 // 2 < view.numel() <= 1000
    columns = torch.arange(200 * 240).view(200, 240)
    seen = group_norms._sample(columns, 240, 199 * 240) % 240
    assert len(seen.unique()) > 200  # not the same few columns of every row
    # The mean square of n independent values is off by sqrt(2 / n) = 5 %; three times that.
    assert float(view.square().mean() / weight[1:].square().mean()) == pytest.approx(1.0, abs=0.15)
    assert group_norms._sample(weight, 0, 900).numel() == 900


@pytest.mark.parametrize("config", ["tiny_t2v", "cogvideox1.5_5b_i2v"])
def test_every_parameter_of_the_network_is_in_a_named_group(config: str) -> None:
    net = cogvideox.build_transformer(
        cogvideox.load_config([CONFIGS / f"{config}.yaml"]), device="meta", skip_init=True
    )
    names = ["model.diffusion_model." + name for name, _ in net.named_parameters()]
    groups = {name: parameter_group(name) for name in names}
    assert set(groups.values()) == {"attention", "mlp", "adaln", "embeddings", "final"}, groups
    layer = "model.diffusion_model.transformer.layers.0."
    assert groups[layer + "attention.dense.bias"] == "attention"
    assert groups[layer + "input_layernorm.weight"] == "adaln"
    assert groups["model.diffusion_model.time_embed.0.weight"] == "embeddings"
    assert parameter_group(layer + "attention.dense.matrix_A.0") == "lora"
    assert parameter_group("conditioner.embedders.0.transformer.shared.weight") == "text_encoder"
