"""The transformer against diffusers with random weights, and its promises: sizes, one graph, precision, errors."""

from __future__ import annotations

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from sat.model.base_model import BaseMixin, BaseModel, non_conflict
from torch import nn
from transformer_cases import KINDS, MIXINS, diffusers_twin, full, inputs, randomise, run_twin, tiny

from cogvideox.model.position import RotaryPosition3D
from cogvideox.model.transformer import PREFIX, ExpertTransformer
from cogvideox.weights.transformer_keys import sat_to_diffusers

# Two implementations sum in different orders: about 1e-6 on outputs near 1.
ATOL = 1e-5
SIZES = {"configured": (), "fewer frames": (2, 0, 0), "smaller": (2, 4, 10), "larger": (6, 12, 8)}


def trained(kind: str, **changes) -> ExpertTransformer:
    return randomise(tiny(kind, **changes))


# diffusers has no learned table at other sizes than the configured one; test_position.py holds ours.
CASES = [(kind, size) for kind in KINDS for size in SIZES if kind != "5b_i2v" or size == "configured"]


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_output_matches_diffusers(kind: str, size: str) -> None:
    net = trained(kind)
    arguments = inputs(net, *SIZES[size])
    with torch.no_grad():
        out, expected = net(**arguments), run_twin(net, diffusers_twin(net), arguments)
    assert expected.std() > 0.3
    torch.testing.assert_close(out, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_diffusers(kind: str) -> None:
    net = trained(kind)
    twin = diffusers_twin(net)
    arguments = inputs(net)
    probe = torch.randn(arguments["x"].shape, generator=torch.Generator().manual_seed(2))
    (net(**arguments) * probe).mean().backward()
    (run_twin(net, twin, arguments) * probe).mean().backward()
    # The key table only moves rows about, so it carries gradients as well as weights.
    ours = sat_to_diffusers({name: p.grad for name, p in net.named_parameters()}, learned_position=True)
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    assert ours.keys() - {"patch_embed.pos_embedding"} == theirs.keys()
    for name, gradient in theirs.items():
        # 1e-4 of the gradient's size: the gradients are sums over all tokens, in two different orders.
        atol = 1e-4 * gradient.abs().max().item() + 1e-8
        torch.testing.assert_close(ours[name], gradient, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("2b", 1_693_783_872),
        ("5b", 5_570_283_072),
        # diffusers counts 5,570,479,680 and holds the learned table of 17,776 x 3,072 as a buffer.
        ("5b_i2v", 5_570_479_680 + 17_776 * 3_072),
        ("1.5", 5_570_676_352),
        ("1.5_i2v", 5_571_594_880),
    ],
)
def test_full_size_networks_build_on_the_meta_device_with_the_published_count(
    kind: str, parameters: int
) -> None:
    net = full(kind)
    assert all(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert not list(net.buffers())


def test_a_default_device_is_honoured() -> None:
    with torch.device("meta"):
        net = tiny("5b_i2v")
    assert all(p.is_meta for p in net.parameters())


def test_every_parameter_gets_a_gradient() -> None:
    for kind in KINDS:
        net = trained(kind)
        net(**inputs(net)).square().mean().backward()
        assert [
            name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
        ] == []


def test_building_leaves_the_random_state_alone_where_nothing_is_drawn() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    full("2b")
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not torch.distributed.is_initialized()


def test_the_seed_decides_the_initial_weights() -> None:
    def weights(seed: int) -> dict:
        torch.manual_seed(seed)
        return tiny("5b").state_dict()

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(*(w["transformer.layers.0.attention.dense.weight"] for w in (first, other)))


def test_the_untrained_network_ignores_attention_and_mlp() -> None:
    """adaLN starts at zero, so every gate is closed: the layers are the identity (Peebles & Xie 2023, adaLN-Zero)."""
    net = tiny("5b")
    seen = []
    net.transformer.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net.transformer.layers[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    net(**inputs(net))
    assert torch.equal(*seen)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_one_graph(kind: str) -> None:
    net = trained(kind, num_layers=1, checkpoint_activations=kind == "5b_i2v")
    explanation = torch._dynamo.explain(net)(**inputs(net))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0), explanation.break_reasons


def test_compiled_equals_eager() -> None:
    net = trained("1.5_i2v")
    arguments = inputs(net)
    # aot_eager traces forward and backward and makes them functional, without the minutes of a C++ compiler.
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    out, expected = compiled(**arguments), net(**arguments)
    torch.testing.assert_close(out, expected, atol=ATOL, rtol=0)
    parameters = list(net.parameters())
    pairs = zip(*(torch.autograd.grad(y.square().mean(), parameters) for y in (out, expected)), strict=True)
    for gradient, wanted in pairs:
        # float32 sums over all tokens in another order: 1e-4 of the gradient's size
        atol = 1e-4 * wanted.abs().max().item()
        torch.testing.assert_close(gradient, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["2b", "5b_i2v"])
def test_checkpointing_changes_no_bit(kind: str) -> None:
    net = trained(kind)
    checkpointed = trained(kind, checkpoint_activations=True)
    for n in (net, checkpointed):
        n(**inputs(n)).square().mean().backward()
    for (name, a), b in zip(net.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_checkpointing_keeps_fewer_activations() -> None:
    def saved(checkpointing: bool) -> int:
        net = trained("5b", checkpoint_activations=checkpointing)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(**inputs(net))
        return sum(sizes.values())

    assert saved(True) < 0.5 * saved(False)


@pytest.mark.parametrize("kind", ["2b", "5b_i2v", "1.5_i2v"])
def test_bfloat16_stays_within_its_rounding(kind: str) -> None:
    net = trained(kind)
    low = copy.deepcopy(net).to(torch.bfloat16)
    net.load_state_dict({key: value.float() for key, value in low.state_dict().items()})
    arguments = inputs(net)
    arguments = {key: v.bfloat16().float() if v.is_floating_point() else v for key, v in arguments.items()}
    with torch.no_grad():
        exact, out = net(**arguments), low(**arguments)
    assert out.dtype == torch.float32  # the dtype of x
    # 2^-9 per rounding; about 10 roundings a layer that add up like noise: some 1 % of the output's size.
    assert (out - exact).pow(2).mean().sqrt() < 0.02 * exact.std()
    low.to(torch.bfloat16)(**arguments).sum().backward()
    assert all(p.grad.isfinite().all() for p in low.parameters())


def test_building_in_bfloat16() -> None:
    net = tiny("1.5_i2v", dtype=torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net(**inputs(net, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_one_input_gives_one_output() -> None:
    net = trained("5b")
    with torch.no_grad():
        first, again = net(**inputs(net)), net(**inputs(net))
    assert torch.equal(first, again)


def test_samples_of_a_batch_do_not_mix() -> None:
    net = trained("1.5_i2v")
    arguments = inputs(net)
    with torch.no_grad():
        both, last = net(**arguments), net(**{key: value[1:] for key, value in arguments.items()})
    torch.testing.assert_close(both[1:], last, atol=ATOL, rtol=0)


def test_one_timestep_serves_the_whole_batch_and_ofs_may_be_a_number() -> None:
    net = trained("1.5_i2v")
    arguments = inputs(net) | {"timesteps": torch.tensor([7, 7]), "ofs": torch.tensor([2.0, 2.0])}
    with torch.no_grad():
        expected = net(**arguments)
        out = net(**arguments | {"timesteps": torch.tensor(7), "ofs": 2.0})
    torch.testing.assert_close(out, expected, atol=ATOL, rtol=0)


def test_a_copy_is_independent() -> None:
    net = trained("5b")
    net(**inputs(net))
    twin = copy.deepcopy(net)
    expected = net(**inputs(net))
    nn.init.zeros_(net.transformer.layers[0].attention.dense.weight)
    assert torch.equal(twin(**inputs(twin)), expected)
    assert not torch.equal(net(**inputs(net)), expected)


# --- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_published_state_dicts_load_strictly(kind: str) -> None:
    net, other = trained(kind), tiny(kind)
    published = {PREFIX + key: value for key, value in net.state_dict().items()}
    width = net.hidden_size
    if kind == "2b":
        table = net.mixins["pos_embed"].table(net.geometry["grid"], net.text_length)
        published[PREFIX + "mixins.pos_embed.pos_embedding"] = table.half()
    else:
        published[PREFIX + "transformer.position_embeddings.weight"] = torch.zeros(64, width)
        published[PREFIX + "mixins.pos_embed.freqs_sin"] = torch.zeros(72, 16)
        published[PREFIX + "mixins.pos_embed.freqs_cos"] = torch.zeros(72, 16)
    other.load_state_dict(published)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))

    system = nn.ModuleDict({"model": nn.ModuleDict({"diffusion_model": tiny(kind)})})
    system.load_state_dict(published)
    assert list(system.state_dict()) == [PREFIX + key for key in net.state_dict()]


def test_skip_init_leaves_loading_complete() -> None:
    net, empty = trained("5b_i2v"), tiny("5b_i2v", skip_init=True)
    empty.load_state_dict(net.state_dict())
    assert torch.equal(empty(**inputs(net)), net(**inputs(net)))


def test_missing_and_unexpected_keys_are_errors() -> None:
    net = tiny("5b")
    weights = net.state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*final_layernorm.bias"):
        net.load_state_dict(
            {key: value for key, value in weights.items() if "final_layernorm.bias" not in key}
        )
    with pytest.raises(RuntimeError, match="Unexpected key.*pos_embedding"):
        net.load_state_dict(weights | {"mixins.pos_embed.pos_embedding": torch.zeros(1, 77, 48)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net.load_state_dict(
            {PREFIX + key: value for key, value in weights.items()} | {"conditioner.x": torch.zeros(1)}
        )


def test_a_sincos_table_of_another_model_is_an_error() -> None:
    net = tiny("2b")
    table = net.mixins["pos_embed"].table(net.geometry["grid"], net.text_length)
    with pytest.raises(RuntimeError, match="pos_embedding is not the sincos table.*interpolation"):
        net.load_state_dict(net.state_dict() | {"mixins.pos_embed.pos_embedding": table.roll(1, dims=1)})


# --- parts of one's own --------------------------------------------------------------------------------------------


class FrameIndex(BaseMixin):
    """A position mixin as a user would write it: a learned row per frame, and sharper attention."""

    def __init__(self, hidden_size: int, grid: tuple[int, int, int], sharpness: float):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(grid[0], hidden_size))
        self.sharpness = sharpness

    def position_embedding_forward(self, position_ids, *, grid, text_length, **_):
        rows = self.rows[: grid[0]].repeat_interleave(grid[1] * grid[2], dim=0)
        return torch.nn.functional.pad(rows, (0, 0, text_length, 0))[None]

    @non_conflict
    def attention_fn(self, query, key, value, *args, old_impl, **kw_args):
        return old_impl(self.sharpness * query, key, value, *args, **kw_args)


class NoPosition(BaseMixin):
    """Replaces the attention itself, without a word about other hooks."""

    def attention_fn(self, query, key, value, mask, dropout=None, **_):
        return torch.zeros_like(query)


def test_a_position_mixin_of_ones_own_takes_the_place() -> None:
    net = randomise(tiny("5b", position=partial(FrameIndex, sharpness=1.0)))
    arguments = inputs(net)
    assert "mixins.pos_embed.rows" in net.state_dict()
    out = net(**arguments)
    out.square().mean().backward()
    assert net.mixins["pos_embed"].rows.grad.abs().sum() > 0
    net.mixins["pos_embed"].sharpness = 2.0
    assert not torch.allclose(net(**arguments), out)


def test_a_mixin_may_replace_the_attention() -> None:
    with pytest.warns(UserWarning, match="attention_fn at pos_embed replaces model"):
        net = randomise(tiny("5b", position=NoPosition))
    arguments = inputs(net)
    out = net(**arguments)
    with torch.no_grad():  # without attention, no video token sees the text
        assert torch.equal(net(**arguments | {"context": arguments["context"] + 1}), out)


def test_a_finished_mixin_is_taken_as_it_is() -> None:
    mixin = RotaryPosition3D(head_dim=16, hidden_size=48, grid=(3, 4, 6), text_length=5, theta=100.0)
    assert tiny("5b", position=mixin).mixins["pos_embed"] is mixin


def test_without_adaln_the_trunk_is_a_plain_transformer() -> None:
    class Nothing(BaseMixin):
        pass

    net = randomise(tiny("5b", adaln=Nothing))
    assert isinstance(net, BaseModel)
    layer, d = net.transformer.layers[0], net.hidden_size
    x = torch.randn(1, 7, d, generator=torch.Generator().manual_seed(0))
    net.transformer.hooks.clear()
    net.transformer.hooks["attention_fn"] = net.attention_fn
    y = x + nn.functional.multi_head_attention_forward(
        *[layer.input_layernorm(x).transpose(0, 1)] * 3, d, 3, layer.attention.query_key_value.weight,
        layer.attention.query_key_value.bias, None, None, False, 0.0, layer.attention.dense.weight,
        layer.attention.dense.bias, need_weights=False,
    )[0].transpose(0, 1)  # fmt: skip
    z = layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(y))
    y = y + layer.mlp.dense_4h_to_h(nn.functional.gelu(z, approximate="tanh"))
    torch.testing.assert_close(layer(x, None), y, atol=ATOL, rtol=0)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "5b",
            {"num_attention_heads": 5},
            "num_attention_heads=5 does not divide model.transformer.hidden_size=48",
        ),
        ("5b", {"num_attention_heads": 6}, "head of 8 channels.*multiple of 16"),
        ("2b", {"hidden_size": 36}, "hidden_size=36.*multiple of 16"),
        ("5b", {"latent_height": 9}, "9x12.*model.transformer.patch_size"),
        ("5b", {"patch_size": (2, 2)}, "model.transformer.patch_size.*three numbers"),
        ("1.5_i2v", {"ofs_embed_dim": 24}, "ofs_embed_dim=24.*time_embed_dim=20"),
        ("5b", {"position": FrameIndex}, "model.transformer.position.*'sharpness'.*params"),
        ("5b", {"position": nn.Identity}, "model.transformer.position.*expected a SAT BaseMixin"),
        ("5b", {"final_layer": BaseMixin}, "model.transformer.final_layer.*final_forward"),
    ],
)
def test_a_wrong_configuration_names_its_key(kind: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(kind, **changes)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("5b", lambda a: {"x": a["x"][..., :-1]}, "8x11.*patch_size=.*nearest below is 8x10"),
        ("5b", lambda a: {"x": a["x"][..., :-3, :]}, "5x12.*patch_size"),
        ("5b", lambda a: {"x": a["x"][0]}, "expected .B, T, C, H, W"),
        ("1.5", lambda a: {"x": a["x"][:, :3]}, "3 latent frames.*multiple of 2"),
        ("5b", lambda a: {"x": a["x"][:, :, :3]}, "3 channels.*in_channels=4"),
        ("5b_i2v", lambda a: {"concat_images": None}, "needs concat_images"),
        ("5b_i2v", lambda a: {"concat_images": a["x"][:, :1]}, "concat_images has shape .*expected"),
        ("5b", lambda a: {"concat_images": a["x"]}, "concat_images has shape"),
        ("5b", lambda a: {"context": a["context"][:, :4]}, "model.transformer.text_length=5"),
        ("5b", lambda a: {"timesteps": torch.arange(3)}, "3 timesteps for a batch of 2"),
        ("5b", lambda a: {"ofs": 2.0}, "it has no ofs input"),
        ("1.5_i2v", lambda a: {"ofs": None}, "it needs ofs"),
        (
            "5b_i2v",
            lambda a: {k: a[k].repeat(1, 2, 1, 1, 1) for k in ("x", "concat_images")},
            "3x4x6 patches.*6x4x6",
        ),
    ],
)
def test_a_wrong_input_is_one_clear_error(kind: str, change, message: str) -> None:
    net = tiny(kind)
    arguments = inputs(net)
    with pytest.raises(ValueError, match=message):
        net(**arguments | change(arguments))


def test_the_four_mixins_are_the_default_parts() -> None:
    net = tiny("5b")
    assert list(net.mixins) == ["pos_embed", "patch_embed", "adaln_layer", "final_layer"]
    assert {type(m) for m in net.mixins.values()} == {RotaryPosition3D, *MIXINS.values()}
