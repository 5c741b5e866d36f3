"""What blocks keep for the backward pass: the same gradients, less memory, and nothing computed twice that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformer_cases import inputs, randomise, tiny

import cogvideox
from cogvideox import flops
from cogvideox.config import Config, ConfigError, load_config
from cogvideox.live_memory import LiveMemory
from cogvideox.model.checkpointing import Checkpointing
from cogvideox.model.lora import freeze_base, inject_lora
from cogvideox.planning.choices import resolve_budget
from cogvideox.planning.memory import training_peak
from cogvideox.recompute import KEPT, Budget, Recompute, read_recompute

AGAIN = ("products", "selective", "full", 2)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KEY = "model.transformer.checkpoint_activations"
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def load(*names: str, overrides: tuple[str, ...] = ()) -> Config:
    return load_config([CONFIGS / f"{name}.yaml" for name in names], overrides)


def network(kind: str, value, lora: bool = False, num_layers: int = 3) -> torch.nn.Module:
    net = tiny(kind, num_layers=num_layers, checkpoint_activations=value)
    if lora:
        inject_lora(net, 2, generator=torch.Generator().manual_seed(0))
    randomise(net)
    if lora:
        freeze_base(net)
    return net


def gradients(net: torch.nn.Module) -> list[torch.Tensor]:
    net(**inputs(net)).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("value", AGAIN)
@pytest.mark.parametrize(
    ("kind", "lora"), [("2b", False), ("5b", True), ("5b_i2v", False), ("1.5_i2v", True)]
)
def test_every_policy_gives_the_gradients_of_none_bit_for_bit(kind: str, lora: bool, value) -> None:
    expected, found = gradients(network(kind, "none", lora)), gradients(network(kind, value, lora))
    assert len(expected) == len(found) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def executed(value, lora: bool) -> tuple[int, int]:
    """FLOPs of a training step of a tiny network, and how often attention ran."""
    net = network("5b", value, lora)
    calls = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Calls(), FlopCounterMode(display=False) as counter:
        net(**inputs(net)).square().mean().backward()
    return counter.get_total_flops(), calls.count(FLASH)


@pytest.mark.parametrize("lora", [False, True])
def test_attention_runs_twice_only_where_its_output_is_not_kept(lora: bool) -> None:
    runs = {value: executed(value, lora)[1] for value in ("none", *AGAIN)}
    assert runs == {"none": 3, "products": 3, "selective": 3, "full": 6, 2: 5}  # 2: blocks 0 and 2 of three


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("value", AGAIN)
def test_what_is_computed_again_is_what_the_plan_says(value, lora: bool) -> None:
    """The difference to keeping everything, by torch's counter, is the closed form's."""
    config = load("tiny_t2v", *(["lora"] if lora else []))
    net = network("5b", value, lora)
    g, t = net.geometry, config.model.transformer
    for name in ("num_layers", "hidden_size", "num_attention_heads", "time_embed_dim"):
        setattr(t, name, g[name])
    t.checkpoint_activations = value
    video = g["grid"][0] * g["grid"][1] * g["grid"][2]
    clip = flops.Clip(0, 0, 0, video, g["text_length"])
    # Adapters of the closed form: rank 2 on q, k, v and the output.
    adapters = g["num_layers"] * 2 * (3 * 2 + 2) * g["hidden_size"] if lora else 0
    again = flops.recomputed_flops(config, clip, adapters)
    batch = 2
    difference = executed(value, lora)[0] - executed("none", lora)[0]
    # torch's counter knows no FLOPs of the CPU's flash attention: products alone. The modulation is once per clip.
    assert difference == batch * again.matmul


def test_a_policy_compiles_to_one_graph_with_the_same_gradients() -> None:
    """fullgraph: a graph break would be an error. (full: test_transformer.py.)"""
    net, eager = network("5b", "selective", num_layers=1), network("5b", "none", num_layers=1)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(**inputs(net)).square().mean().backward()
    for gradient, expected in zip([p.grad for p in net.parameters()], gradients(eager), strict=True):
        # float32 sums over all tokens in another order: 1e-4 of the gradient's size
        torch.testing.assert_close(gradient, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_each_policy_keeps_less_than_the_one_before() -> None:
    kept = []
    for what in KEPT:
        net = network("5b", what)
        with LiveMemory() as memory:
            loss = net(**inputs(net)).square().mean()
            kept.append(memory.live_bytes)
        del loss
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept)


def test_unfused_attention_is_said_once_and_changes_no_gradient(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="cogvideox")
    net, plain = network("5b", "selective"), network("5b", "none")
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients(plain)
        found = [gradient.clone() for gradient in gradients(net)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with sdpa_kernel(SDPBackend.MATH):
        gradients(net)
    assert (
        len([record for record in caplog.records if "none of torch's fused kernels" in record.message]) == 1
    )


def test_without_gradients_nothing_is_kept_and_nothing_is_asked() -> None:
    net, plain = network("5b", "selective"), network("5b", "none")
    with torch.no_grad():
        assert torch.equal(net(**inputs(net)), plain(**inputs(plain)))


# --- the key --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (False, Recompute("none")),
        (True, Recompute("full")),
        ("none", Recompute("none")),
        ("selective", Recompute("selective")),
        ("products", Recompute("products")),
        (1, Recompute("full", 1)),
        (3, Recompute("full", 3)),
        ("24 GiB", Budget(24 * 2**30)),
        ("1.5GiB", Budget(1.5 * 2**30)),
    ],
)
def test_the_key_takes_words_numbers_budgets_and_the_published_booleans(value, meaning) -> None:
    assert read_recompute(value) == meaning


@pytest.mark.parametrize("value", ["selectiv", 0, -1, 2.5, "0 GiB", "24 GB", []])
def test_anything_else_is_one_clear_error(value) -> None:
    with pytest.raises(ValueError, match="model.transformer.checkpoint_activations=.*expected false or none"):
        read_recompute(value)
    with pytest.raises(ConfigError, match="model.transformer.checkpoint_activations"):
        load("tiny_t2v", overrides=(f"{KEY}={value}",))


def test_every_third_block_counts_from_the_first() -> None:
    assert [Recompute("full", 3).of_block(i) for i in range(7)] == [*(["full", "none", "none"] * 2), "full"]
    assert Recompute("full", 3).counts(7) == {"full": 3, "none": 4}
    assert Recompute("selective").counts(5) == {"selective": 5}


def test_a_chosen_policy_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="cogvideox")
    overrides = ("data.latent_cache=c", "data.text_cache=c", f"{KEY}=24 GiB")
    cogvideox.build_transformer(load("cogvideox_5b", "lora", overrides=overrides), device="meta")
    assert "checkpoint_activations=24 GiB takes selective, planned to need 23.2 GiB" in caplog.text


def test_a_network_alone_takes_no_budget() -> None:
    with pytest.raises(ValueError, match="a budget is chosen for a run"):
        Checkpointing("24 GiB")


def test_a_budget_becomes_the_policy_of_the_run() -> None:
    chosen = {}
    for gib in (19.5, 24, 62, 80):
        config = load(
            "cogvideox_5b", "lora", overrides=("data.latent_cache=c", "data.text_cache=c", f"{KEY}={gib} GiB")
        )
        resolved = resolve_budget(config)
        chosen[gib] = str(resolved.model.transformer.checkpoint_activations)
        assert training_peak(resolved, 1) <= gib * 2**30
        assert config.model.transformer.checkpoint_activations == f"{gib} GiB"  # the file's value stays
    assert chosen == {19.5: "full", 24: "selective", 62: "products", 80: "none"}
    net = cogvideox.build_transformer(config, device="meta")
    assert net.transformer.checkpointing.policy == Recompute("none")


def test_a_budget_that_cannot_be_met_says_the_least_and_what_would_need_less() -> None:

    def resolve(budget: str):
        return resolve_budget(load("cogvideox_5b", "lora", overrides=(f"{KEY}={budget} GiB",)))

    with pytest.raises(ConfigError, match=r"'9 GiB' cannot be met: the least .* is [\d.]+ GiB") as error:
        resolve("9")
    assert "data.latent_cache" in str(error.value) and "offload_optimizer" in str(error.value)
    number = str(error.value).split("reaches is ")[1].split(" GiB")[0]
    assert str(resolve(number).model.transformer.checkpoint_activations) in str(error.value)
    with pytest.raises(ConfigError):
        resolve(f"{float(number) - 0.1:.1f}")
