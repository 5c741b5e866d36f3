"""Groups and optimizers against plain loops, under every ZeRO stage that takes them, and exact resume."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from workers.launch import launch
from workers.train_toy import SEED, Toy, make_trainer, samples

from cogvideox import dist
from cogvideox.config import ConfigError, GroupConfig, Part, load_config
from cogvideox.dist import RandomStreams
from cogvideox.engine.groups import parameter_groups, split_by_blocks
from cogvideox.engine.logging import read_metrics
from cogvideox.engine.muon import Muon, orthogonalised
from cogvideox.engine.optim import build_optimizer, kept_in_full
from cogvideox.optimizer_names import KNOWN, OPTIMIZERS, known_optimizer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LORA = [CONFIGS / "cogvideox_2b.yaml", CONFIGS / "lora.yaml"]
CALM = {"dropout": 0.0, "noise": 0.0}
STEPS = 8
ADAMW = {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1}
# The last layer is AdamW's; the one matrix of Muon, 16 x 6, is cut in the middle by the border of two ranks.
MUON = {
    "target": "cogvideox.engine.muon.Muon",
    "params": {"lr": 0.02, "weight_decay": 0.1, "exclude": ["last.*"]},
}
GROUPS = [
    {"pattern": "last.*", "lr_scale": 16.0},
    {"pattern": "re:(first|norm)\\.bias", "lr": 0.002, "weight_decay": 0.5},
]


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def run(folder: Path, ranks_dir: str, stage: int, **train: Any) -> dict[str, Any]:
    fields = {"steps": STEPS, "save_every": 4, "gradient_clipping": 0.0, **train}
    zero = {"zero_optimization": {"stage": stage}}
    return {"run_dir": str(folder / ranks_dir), "toy": CALM, "train": fields, "deepspeed": zero}


def logged(folder: Path, name: str = "train/loss") -> list[float]:
    return [record[name] for record in read_metrics(folder / "metrics.jsonl") if name in record]


def plain_loop(optimizers: list[torch.optim.Optimizer], toy: Toy, batch_size: int) -> list[float]:
    losses = []
    for step in range(STEPS):
        loss, _ = toy(samples(step * batch_size, batch_size), RandomStreams.at(SEED, step))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_groups(batch_size: int) -> list[float]:
    """AdamW with the groups written out by hand."""
    toy = Toy(**CALM)
    groups = [
        {"params": [toy.first.weight]},
        {"params": [toy.norm.weight], "weight_decay": 0.0},
        {"params": [toy.last.weight], "lr": 0.16},
        {"params": [toy.last.bias], "lr": 0.16, "weight_decay": 0.0},
        {"params": [toy.first.bias, toy.norm.bias], "lr": 0.002, "weight_decay": 0.5},
    ]
    return plain_loop([torch.optim.AdamW(groups, **{**ADAMW, "betas": (0.9, 0.95)})], toy, batch_size)


def plain_muon(batch_size: int) -> list[float]:
    """torch's own Muon on the one hidden matrix, its AdamW on the rest."""
    toy = Toy(**CALM)
    muon = torch.optim.Muon([toy.first.weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    vectors = [toy.first.bias, toy.norm.weight, toy.norm.bias, toy.last.bias]
    groups = [{"params": [toy.last.weight]}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    return plain_loop([muon, adamw], toy, batch_size)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that needs two ranks, in one launch."""
    root = tmp_path_factory.mktemp("two_ranks")
    runs = [run(root, f"groups_zero{stage}", stage, groups=GROUPS) for stage in (0, 1, 2, 3)]
    runs += [run(root, f"muon_zero{stage}", stage, optimizer=MUON) for stage in (0, 1, 2)]
    runs += [
        run(root, f"muon_bf16_zero{stage}", stage, optimizer=MUON, precision="bf16") for stage in (0, 1, 2)
    ]
    fused = {"target": "torch.optim.AdamW", "params": {**ADAMW, "fused": True}}
    runs += [run(root, "fused_zero2", 2, optimizer=fused, groups=GROUPS)]
    for stage in (0, 2, 3):
        runs += [run(root, f"fp8_zero{stage}", stage, precision="bf16")]
        runs[-1]["toy"] = CALM | {"quantize": "fp8"}
    # Resumed in the same launch: the second trainer of a folder goes on from its checkpoint.
    runs += [run(root, "half", 2, optimizer=MUON, steps=4), run(root, "half", 2, optimizer=MUON)]
    done = launch(runs, 2, root)
    assert done.returncode == 0, done.stdout
    for folder in [r["run_dir"] for r in runs]:
        result = json.loads((Path(folder) / "result_0.json").read_text())
        assert "error" not in result, result
    return root


# ---------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_groups_under_every_zero_stage_give_the_losses_of_a_plain_loop(two_ranks: Path, stage: int) -> None:
    # float32 sums in another order.
    assert logged(two_ranks / f"groups_zero{stage}") == pytest.approx(plain_groups(4), abs=1e-5)


def test_fused_adamw_gives_the_losses_of_the_plain_one(two_ranks: Path) -> None:
    assert logged(two_ranks / "fused_zero2") == pytest.approx(plain_groups(4), abs=1e-5)


def test_groups_change_the_losses(two_ranks: Path) -> None:
    """So that the tests above can fail: without the groups the loop is another."""
    toy = Toy(**CALM)
    groups = [
        {"params": [toy.first.weight, toy.last.weight]},
        {"params": [toy.first.bias, toy.norm.weight, toy.norm.bias, toy.last.bias], "weight_decay": 0.0},
    ]
    plain = plain_loop([torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)], toy, 4)
    assert abs(plain[-1] - plain_groups(4)[-1]) > 1e-3


def test_the_schedule_keeps_the_ratios_of_the_groups(tmp_path: Path) -> None:
    entry = run(tmp_path, "run", 2, groups=GROUPS, lr_schedule="cosine", warmup_steps=3)
    trainer = make_trainer(entry)
    ratios = set()
    for factor in (0.1, 1.0, 0.37):
        trainer._set_learning_rate(factor)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates[0] == pytest.approx(0.01 * factor)
        ratios.add(tuple(round(rate / rates[0], 9) for rate in rates))
    assert ratios == {(1.0, 1.0, 16.0, 16.0, 0.2)}
    trainer.run()
    assert logged(tmp_path / "run", "train/lr")[3] == pytest.approx(0.01)  # of those that no group has


def test_what_each_group_chose_is_counted() -> None:
    rules = [GroupConfig("last.*", lr_scale=16.0), GroupConfig("norm.*", weight_decay=0.5)]
    trainable = [(name, p) for name, p in Toy().named_parameters() if p.requires_grad]
    _, lines = parameter_groups(trainable, rules, 0.1)
    assert lines == [
        "train.groups.0: 'last.*' has 2 of 6 parameters, 17 numbers: lr_scale 16",
        "train.groups.1: 'norm.*' has 2 of 6 parameters, 32 numbers: weight_decay 0.5",
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"pattern": "lsat.*", "lr": 1.0}], r"pattern: 'lsat\.\*' matches nothing; did you mean"),
        ([{"pattern": "re:fir(st", "lr": 1.0}], "'re:fir\\(st' is no regular expression"),
        ([{"pattern": "*", "lr": 1.0}, {"pattern": "last.*"}], "'last.*' is chosen by a group before it"),
        ([{"pattern": "last.*", "lr": 1.0, "lr_scale": 2.0}], "lr=1.0 and lr_scale=2.0"),
        ([{"pattern": "last.*", "weight_decay": -1.0}], "train.groups.0.weight_decay=-1.0"),
    ],
)
def test_a_wrong_group_is_one_clear_error(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(
            Toy(), Part("torch.optim.AdamW", {"lr": 0.1}), rules=[GroupConfig(**rule) for rule in rules]
        )


# ------------------------------------------------------------------------------------------------------------ Muon


def test_orthogonalised_has_singular_values_near_1_and_the_right_vectors() -> None:
    matrix = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix).float()
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    # The iteration aims at 0.7 to 1.2 and not at 1 (Jordan et al. 2024).
    values = torch.diagonal(u.T @ found @ vh.T)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (u.T @ found @ vh.T - torch.diag(values)).abs().max() < 0.03  # bfloat16


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_on_whole_matrices_is_torchs(adjust: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((8, 20), (20, 8))]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in matrices]
    ours = Muon([{"params": matrices, "names": ["a", "b"]}], lr=0.1, weight_decay=0.2, adjust_lr=adjust)
    theirs = torch.optim.Muon(twins, lr=0.1, weight_decay=0.2, adjust_lr_fn=adjust)
    for _ in range(4):
        for p, twin in zip(matrices, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, twin in zip(matrices, twins, strict=True):
        torch.testing.assert_close(p, twin, atol=2e-3, rtol=0)  # bfloat16 inside, 2^-8 of steps of 0.1 to 0.9


def test_muon_on_a_flat_group_steps_as_on_its_matrices() -> None:
    """As ZeRO hands it over on one rank: the matrices of a group end to end, and some padding."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 6), (5, 3), (2, 8))
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in matrices] + [torch.zeros(5)]))
    names = ["a", "b", "c"]
    whole, slices = (Muon([{"params": matrices, "names": names}], lr=0.1, weight_decay=0.2) for _ in range(2))
    slices.param_groups[0]["params"] = [flat]
    for _ in range(3):
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=generator)
        flat.grad = torch.cat([p.grad.flatten() for p in matrices] + [torch.zeros(5)])
        whole.step()
        slices.step()
    expected = torch.cat([p.detach().flatten() for p in matrices] + [torch.zeros(5)])
    torch.testing.assert_close(flat.detach(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_on_two_ranks_gives_the_losses_of_torchs_muon_and_adamw(
    two_ranks: Path, stage: int, precision: str
) -> None:
    name = f"muon_zero{stage}" if precision == "fp32" else f"muon_bf16_zero{stage}"
    losses = plain_muon(4)
    # Newton-Schulz runs in bfloat16: a gradient off by 1e-7 may round a step by 2^-8. In bf16 the network does too.
    tolerance = {"fp32": {"abs": 2e-3}, "bf16": {"rel": 0.05, "abs": 0.02}}[precision]
    assert logged(two_ranks / name) == pytest.approx(losses, **tolerance)


def test_orthogonalising_a_slice_would_be_another_training() -> None:
    """So that the test above can fail: Muon on each half of the matrix, as slices would have it."""
    toy = Toy(**CALM)
    halves = [torch.nn.Parameter(half.clone()) for half in toy.first.weight.detach().flatten().view(2, 8, 6)]
    muon = torch.optim.Muon(halves, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    losses = []
    for step in range(STEPS):
        toy.first.weight.data.copy_(torch.cat([half.detach() for half in halves]))
        loss, _ = toy(samples(step * 4, 4), RandomStreams.at(SEED, step))
        loss.backward()
        for half, grad in zip(halves, toy.first.weight.grad.view(2, 8, 6), strict=True):
            half.grad = grad.clone()
        muon.step()
        toy.zero_grad()
        losses.append(loss.item())
    assert abs(losses[-1] - plain_muon(4)[-1]) > 4e-3


def test_muon_resumes_bit_for_bit_on_two_ranks(two_ranks: Path) -> None:
    assert logged(two_ranks / "half") == logged(two_ranks / "muon_zero2")
    shards = [
        [
            torch.load(
                two_ranks / name / "checkpoints" / "8" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
                weights_only=False,
            )["optimizer_state_dict"]["base_optimizer_state"]
            for rank in (0, 1)
        ]
        for name in ("half", "muon_zero2")
    ]
    tensors = [list(_tensors(shard)) for shard in shards]
    assert len(tensors[0]) > 8 and all(map(torch.equal, *tensors))


def _tensors(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


# --------------------------------------------------------------------------------------------------- eight-bit base


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_frozen_layer_in_eight_bits_stays_so_under_deepspeeds_bfloat16(two_ranks: Path, stage: int) -> None:
    folder = two_ranks / f"fp8_zero{stage}"
    assert json.loads((folder / "result_1.json").read_text())["frozen"] == "torch.float8_e4m3fn"
    toy = Toy(**CALM, quantize="fp8")
    groups = [
        {"params": [toy.first.weight, toy.last.weight]},
        {"params": [toy.first.bias, toy.norm.weight, toy.norm.bias, toy.last.bias], "weight_decay": 0.0},
    ]
    losses = plain_loop([torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)], toy, 4)
    # bfloat16 has 8 bits: activations and weights are off by 2^-9 each.
    assert logged(folder) == pytest.approx(losses, rel=0.05, abs=0.02)
    saved = (
        folder
        / "checkpoints"
        / str(STEPS)
        / ("zero_pp_rank_0_" * (stage == 3) + "mp_rank_00_model_states.pt")
    )
    assert not [name for name in torch.load(saved, weights_only=False)["module"] if "frozen" in name]


# ----------------------------------------------------------------------------------------------- names, bad input


def test_each_short_name_leads_to_its_class_where_its_library_is_there() -> None:
    for name, target in OPTIMIZERS.items():
        library = target.partition(".")[0]
        override = [f"train.optimizer={name}", "train.optimizer.params.lr=1e-4"]
        if importlib.util.find_spec(library) is None:
            with pytest.raises(
                ConfigError, match=f"{library}, which is not installed: pip install {library}"
            ):
                load_config(LORA, override)
        else:
            assert load_config(LORA, override).train.optimizer == Part(target, {"lr": 1e-4})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.optimizer=adanw"], r"train.optimizer=adanw: did you mean adamw\?"),
        (["train.optimizer=muon"], "train.optimizer.params.lr is missing"),
        (
            ["train.optimizer=muon", "train.optimizer.params.lr=1e-3", "train.optimizer.params.beta=1"],
            "did you mean betas",
        ),
        (
            ["train.optimizer=muon", "train.optimizer.params.lr=1e-3", "deepspeed.zero_optimization.stage=3"],
            "works on whole matrices.*stage=3: set it to 0, 1, 2",
        ),
        (
            [
                "train.optimizer=muon",
                "train.optimizer.params.lr=1e-3",
                "deepspeed.zero_optimization.offload_optimizer={device: cpu}",
            ],
            "does not work with deepspeed.zero_optimization.offload_optimizer",
        ),
        (
            ["train.optimizer.target=torch.optim.Muon", "train.optimizer.params.lr=1"],
            "use train.optimizer=muon",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_is_one_clear_error(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(LORA, overrides)


def test_muon_without_a_matrix_is_an_error() -> None:
    part = Part(MUON["target"], {"lr": 0.1, "exclude": ["*"]})
    with pytest.raises(ValueError, match=r"no matrix to train is left besides those of exclude=\['\*'\]"):
        build_optimizer(Toy(), part)


def test_the_table_of_state_bytes_is_what_the_optimizers_keep() -> None:
    """Counted after one step; torchao's only where it is installed."""
    for name, known in KNOWN.items():
        if importlib.util.find_spec(known.target.partition(".")[0]) is None or name.endswith("bnb"):
            continue
        weight = torch.nn.Linear(256, 256, bias=False)
        params = {"lr": 0.1} | ({"momentum": 0.9} if name == "sgd" else {})
        optimizer = build_optimizer(weight, Part(known.target, params))
        weight(torch.ones(1, 256)).sum().backward()
        optimizer.step()
        kept = sum(
            t.untyped_storage().nbytes()
            for state in optimizer.state.values()
            for value in state.values()
            for t in _storages(value)
            if t.numel() > 256  # not the step, nor the table that maps codes to values
        )
        assert kept / weight.weight.numel() == pytest.approx(known.state_bytes, rel=0.01), name


def _storages(value: Any) -> list[Tensor]:
    if hasattr(value, "tensor_attrs"):
        return [getattr(value, attribute) for attribute in value.tensor_attrs]
    return [value] if isinstance(value, Tensor) else []


def test_unknown_optimizers_count_as_adam() -> None:
    assert known_optimizer("somewhere.Lion").state_bytes == 4
    assert known_optimizer("somewhere.Prodigy").state_bytes == 8
    assert known_optimizer("bitsandbytes.optim.AdamW8bit") == KNOWN["adamw_8bit_bnb"]


def test_groups_are_split_so_that_every_rank_holds_whole_blocks() -> None:
    sizes = {"a": 512, "b": 100, "c": 1024, "d": 256}
    named = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    group = {"params": list(named.values()), "names": list(named), "lr": 0.1}
    whole, rest = split_by_blocks([group], 256 * 2)
    assert (whole["names"], rest["names"]) == (["a", "c"], ["b", "d"]) and whole["lr"] == rest["lr"] == 0.1
    assert sum(p.numel() for p in whole["params"]) % (256 * 2) == 0


@pytest.mark.parametrize("stage", [0, 2])
def test_eight_bit_adamw_trains_and_resumes_bit_for_bit(tmp_path: Path, stage: int) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed (pip install torchao runs this test)")
    part = {"target": "torchao.optim.AdamW8bit", "params": {"lr": 0.01}}
    whole = run(tmp_path, "whole", stage, optimizer=part, lr_schedule="linear")
    half = run(tmp_path, "half", stage, optimizer=part, lr_schedule="linear")
    wide = Wide(), Wide(), Wide()
    make_trainer(whole, wide[0]).run()
    first = make_trainer(half, wide[1])
    first.config.save_every, first.loader.before = 4, lambda k, batch: _stop(k, 4)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = make_trainer(half, wide[2])
    assert second.step == 4 and kept_in_full(second.optimizer)[0] < 4100  # of 10,241
    second.run()
    assert logged(tmp_path / "half") == logged(tmp_path / "whole")
    losses = logged(tmp_path / "whole")
    assert losses[-1] < losses[0]


def _stop(k: int, at: int) -> None:
    if k >= at:
        raise KeyboardInterrupt


class Wide(Toy):
    """With a layer that is large enough for torchao to quantise its state."""

    def __init__(self) -> None:
        super().__init__(**CALM)
        self.first, self.norm, self.last = (
            torch.nn.Linear(6, 1024),
            torch.nn.LayerNorm(1024),
            torch.nn.Linear(1024, 1),
        )
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
