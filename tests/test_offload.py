"""Weights that wait in host memory: the same numbers, and never more on the device than promised."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformer_cases import inputs, randomise, tiny

from cogvideox.model.lora import inject_lora
from cogvideox.model.quantize import quantize
from cogvideox.sampling.offload import (
    HostWeights,
    LayerOffload,
    Turns,
    WholeOffload,
    move_rest,
    repeated_layers,
)

CPU = torch.device("cpu")


def chain(length: int = 5, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(length))).requires_grad_(False)


def in_block(module: nn.Module, block: torch.Tensor) -> bool:
    low, high = block.data_ptr(), block.data_ptr() + block.nbytes
    return all(low <= p.data_ptr() < high for p in module.parameters())


def test_host_weights_keep_values_types_and_tied_tensors() -> None:
    module = nn.ModuleList([nn.Linear(3, 5), nn.Linear(3, 5).bfloat16()])
    module[1].bias = module[0].bias
    module[0].register_buffer("count", torch.arange(7, dtype=torch.int8))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    host = HostWeights(module, CPU)
    for place in (host.park, lambda: host.place(host.block.clone())):
        place()
        after = module.state_dict()
        assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())
        assert module[1].bias.data_ptr() == module[0].bias.data_ptr()


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("slots", [2, 3])
def test_layers_give_the_same_numbers_pass_after_pass(length: int, slots: int) -> None:
    plain, net = chain(length), chain(length)
    offload = LayerOffload(net, CPU, slots)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        assert torch.equal(net(x), plain(x))
    assert offload.peak_resident == min(slots, length)
    assert offload.device_bytes == min(slots, length) * (
        8 * 8 * 4 + 256
    )  # the bias takes one unit of alignment


def test_a_layer_computes_from_its_slot_while_the_next_is_there_and_the_others_wait() -> None:
    net = chain(5)
    offload = LayerOffload(net, CPU)
    seen = []

    def look(module: nn.Module, *_) -> None:
        device = [any(in_block(layer, slot) for slot in offload._slots) for layer in net]
        seen.append((device, list(offload._in_slot)))

    for layer in net:
        layer.register_forward_pre_hook(look)
    net(torch.zeros(1, 8))
    for index, (device, in_slot) in enumerate(seen):
        assert device == [i == index for i in range(5)]  # one computes from the device
        assert sorted(in_slot) == sorted([index, (index + 1) % 5])  # the next one was fetched
    assert all(in_block(layer, host.block) for layer, host in zip(net, offload._hosts, strict=True))


@pytest.mark.parametrize("slots", [2, 3])
def test_layers_may_be_called_in_any_order(slots: int) -> None:
    """0, 5, 1 with three slots: the slot whose turn it is to be filled is the one that computes."""
    plain, net = chain(7), chain(7)
    LayerOffload(net, CPU, slots)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    order = [0, 5, 1, *torch.randint(0, 7, (40,), generator=torch.Generator().manual_seed(1)).tolist()]
    assert all(torch.equal(net[i](x), plain[i](x)) for i in order)


def test_freed_slots_come_back_and_a_failed_layer_leaves_the_weights_whole() -> None:
    plain, net = chain(), chain()
    offload = LayerOffload(net, CPU)
    x = torch.ones(1, 8)
    net(x)
    offload.free()
    assert offload.device_bytes == 0
    with pytest.raises(RuntimeError):
        net(torch.ones(1, 7))
    assert torch.equal(net(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_layers_of_unlike_size_share_slots() -> None:
    """LoRA in one layer only, and eight-bit weights, which are buffers."""
    nets = [randomise(tiny("5b", num_layers=3)).requires_grad_(False) for _ in range(2)]
    for net in nets:
        inject_lora(net, rank=2, transformer_layers=[1])
        randomise(net)
        quantize(net, "int8")
    LayerOffload(nets[0].transformer.layers, CPU)
    arguments = inputs(nets[0])
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(nets[0](**arguments), nets[1](**arguments))


def test_a_whole_model_comes_once_and_goes() -> None:
    plain, net = chain(), chain()
    offload = WholeOffload(net, CPU)
    x = torch.ones(1, 8)
    parked = [p.data_ptr() for p in net.parameters()]
    for _ in range(2):
        offload.load()
        there = [p.data_ptr() for p in net.parameters()]
        offload.load()
        assert there == [p.data_ptr() for p in net.parameters()] and not set(there) & set(parked)
        assert torch.equal(net(x), plain(x))
        offload.park()
        assert parked == [p.data_ptr() for p in net.parameters()]


def test_models_take_turns() -> None:
    events, models = [], {name: nn.Identity() for name in ("text", "transformer", "vae")}
    turns = Turns()
    for name, module in models.items():
        evicts = {"text": ("transformer", "vae"), "transformer": ("text",), "vae": ("transformer",)}[name]
        turns.add(
            name,
            lambda n=name: events.append(f"+{n}"),
            lambda n=name: events.append(f"-{n}"),
            at=[module],
            evicts=evicts,
        )
    x = torch.zeros(1)
    for name in ("text", "transformer", "transformer", "vae", "text"):
        models[name](x)
    assert events == [
        "+text",
        "-text",
        "+transformer",
        "+transformer",
        "-transformer",
        "+vae",
        "-vae",
        "+text",
    ]
    assert turns.resident == {"text"}


def test_the_rest_moves_and_the_chain_of_a_model_is_found() -> None:
    net = tiny("5b", num_layers=3)
    assert repeated_layers(net) is net.transformer.layers
    move_rest(net, [net.transformer.layers], torch.device("cpu"))
    with pytest.raises(ValueError, match="Linear has no chain of layers"):
        repeated_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="1 slots: expected at least 2"):
        LayerOffload(chain(), CPU, slots=1)
