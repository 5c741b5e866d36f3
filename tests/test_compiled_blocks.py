"""model.transformer.compile: one compiled layer for all, with the numbers of the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformer_cases import inputs, randomise, tiny

from cogvideox.config import ConfigError, load_config
from cogvideox.model.compiled_blocks import MOST_GRAPHS, layer_runner
from cogvideox.model.lora import freeze_base, inject_lora
from cogvideox.model.quantize import quantize
from cogvideox.model.reference import ReferenceAttention
from cogvideox.sampling.memory import apply_memory, choose_memory
from cogvideox.system import VideoDiffusion

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CPU = torch.device("cpu")


@pytest.fixture
def graphs():
    """Counts the graphs that torch.compile makes; aot_eager runs them, and their gradients, without compiling C++."""
    torch.compiler.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


def compiled(net: torch.nn.Module, graphs: CompileCounterWithBackend) -> torch.nn.Module:
    net.transformer.run_layer = layer_runner("blocks", backend=graphs)
    return net


def gradients(net: torch.nn.Module) -> list[torch.Tensor]:
    net.zero_grad()
    torch.manual_seed(0)  # of a LoRA's dropout
    net(**inputs(net)).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def assert_same_gradients(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for gradient, right in zip(found, expected, strict=True):
        # float32 sums over all tokens in another order: 1e-4 of the gradient's size
        torch.testing.assert_close(gradient, right, atol=1e-4 * right.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5_i2v"])
def test_three_layers_are_one_graph(kind: str, graphs) -> None:
    net = randomise(tiny(kind, num_layers=3))
    arguments = inputs(net)
    with torch.no_grad():
        expected = net(**arguments)
        found = compiled(net, graphs)(**arguments)
    assert graphs.frame_count == 1  # fullgraph: a break in it would be an error
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_training_is_one_graph_under_every_policy_of_recomputation(policy: str, graphs) -> None:
    net = randomise(tiny("5b", num_layers=3, checkpoint_activations=policy))
    expected = [g.clone() for g in gradients(net)]
    assert_same_gradients(gradients(compiled(net, graphs)), expected)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True, "quantize": "int8"}])
def test_adapters_are_compiled_with_their_layers(options: dict, graphs) -> None:
    net = tiny("5b", num_layers=3, checkpoint_activations="full")
    if method := options.pop("quantize", None):
        quantize(net, method)
    inject_lora(net, 2, generator=torch.Generator().manual_seed(0), **options)
    freeze_base(randomise(net))
    expected = [g.clone() for g in gradients(net)]
    assert_same_gradients(gradients(compiled(net, graphs)), expected)
    # Nothing below the first layer is trained, so its input has no gradient and its graph is another one.
    assert graphs.frame_count == 2


def test_a_sampling_run_is_one_graph_and_takes_what_is_known_before_it(graphs) -> None:
    """A table of modulations, projected texts, and an MLP in chunks."""
    net = randomise(tiny("5b", num_layers=3, checkpoint_activations=2))
    arguments = inputs(net)
    net.chunk_mlp(50)
    with torch.no_grad(), net.use_modulations(net.precompute_modulations([500, 17])):
        found = []
        for _ in range(2):
            with net.project_texts_once():
                steps = [net(**arguments | {"timesteps": torch.tensor([t, t])}) for t in (500, 17)]
            found.append(steps)
            compiled(net, graphs)
    assert graphs.frame_count == 1
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)


def test_a_reference_tells_layers_apart_and_still_works(graphs) -> None:
    net = compiled(randomise(tiny("5b", num_layers=3)), graphs)
    arguments = inputs(net)
    with torch.no_grad(), ReferenceAttention(net, layers=[1])(1):
        found = net(**arguments)
        net.transformer.run_layer = layer_runner("none")
        torch.testing.assert_close(found, net(**arguments), atol=1e-5, rtol=0)
    assert graphs.frame_count <= 3 < MOST_GRAPHS


def test_compiled_by_inductor_it_gives_the_same_numbers() -> None:
    """The real compiler, C++ included."""
    torch.compiler.reset()
    net = randomise(tiny("5b", compile="blocks"))
    arguments = inputs(net)
    with torch.no_grad():
        found = net(**arguments)
        net.transformer.run_layer = layer_runner("none")
        torch.testing.assert_close(found, net(**arguments), atol=1e-5, rtol=0)
    torch.compiler.reset()


def test_models_in_turns_are_compiled_and_layers_in_turns_refused(graphs) -> None:
    """In turns, weights lie elsewhere at each load: the graph takes them as they come."""
    videos = []
    for run_layer in (layer_runner("none"), layer_runner("blocks", backend=graphs)):
        config = load_config(
            [CONFIGS / "tiny_t2v.yaml"], ["model.transformer.num_layers=2", "sample.steps=2"]
        )
        torch.manual_seed(0)
        system = VideoDiffusion(config)
        plan = choose_memory(config, "balanced", CPU)
        system.prepare_sampling(CPU, place=False)
        apply_memory(system, plan, CPU)
        system.transformer.transformer.run_layer = run_layer
        videos.append(torch.cat([system.sample(["a red circle"]) for _ in range(2)]))
    torch.testing.assert_close(*videos, atol=1e-5, rtol=0)
    assert graphs.frame_count == 1
    config = load_config([CONFIGS / "tiny_t2v.yaml"], ["model.transformer.compile=blocks"])
    with pytest.raises(ValueError, match="sample.memory=small wants.*compile=none"):
        choose_memory(config, "small", CPU)


def test_sharded_weights_are_not_compiled() -> None:
    overrides = ["model.transformer.compile=blocks", "deepspeed.zero_optimization.stage=3"]
    with pytest.raises(ConfigError, match="compile=blocks does not work with .*stage=3"):
        load_config([CONFIGS / "tiny_t2v.yaml"], overrides)


def test_a_misspelt_word_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="compile='block': did you mean blocks"):
        load_config([CONFIGS / "tiny_t2v.yaml"], ["model.transformer.compile=block"])
