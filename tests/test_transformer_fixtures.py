"""The transformer against tensors recorded from the published code (shared/reference/fixtures/transformer)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformer_cases import MIXINS

from cogvideox.model.position import RotaryPosition3D, SincosPosition3D
from cogvideox.model.transformer import PREFIX, ExpertTransformer

KINDS = ["t2v_sincos", "t2v_rope", "i2v_rope", "t2v_v15", "i2v_v15"]
# The project's tolerance for float32 parity; what is left comes from the order of float32 sums (about 1e-6).
ATOL = 1e-5


def network_of(folder: Path, load: bool = True, **changes) -> ExpertTransformer:
    """The network that a fixture's config.json (upstream's keys) describes, with its weights."""
    params = json.loads((folder / "config.json").read_text())["network_params"]
    position = params["modules"]["pos_embed_config"]
    options = position["params"]
    if "Basic3D" in position["target"]:
        factory = partial(
            SincosPosition3D,
            height_interpolation=options["height_interpolation"],
            width_interpolation=options["width_interpolation"],
        )
    else:
        factory = partial(RotaryPosition3D, learned_table=options.get("learnable_pos_embed", False))
    patch = params["patch_size"]
    names = (
        "num_layers hidden_size num_attention_heads in_channels out_channels time_embed_dim "
        "num_frames latent_height latent_width"
    ).split()
    net = ExpertTransformer(
        **MIXINS,
        **{name: params[name] for name in names},
        patch_size=[1, patch, patch] if isinstance(patch, int) else patch,
        text_length=options["text_length"],
        text_hidden_size=params["modules"]["patch_embed_config"]["params"]["text_hidden_size"],
        ofs_embed_dim=params.get("ofs_embed_dim"),
        position=factory,
        **changes,
    )
    if load:
        net.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    return net


def arguments_of(inputs: dict[str, Tensor], run: str = "out_int") -> dict[str, Tensor]:
    """Keyword arguments of one recorded run: out_{int,float,frac}[_ofs2], out_int_{T1,T2,crop}."""
    _, timesteps, *change = run.split("_")
    result = {"x": inputs["x"], "timesteps": inputs[f"timesteps_{timesteps}"], "context": inputs["context"]}
    if "concat" in inputs:
        result["concat_images"] = inputs["concat"]
    if "ofs" in inputs:
        result["ofs"] = inputs["ofs_ofs2" if "ofs2" in change else "ofs"]
    for name in ("x", "concat_images"):
        if name in result and change and change[0].startswith("T"):
            result[name] = result[name][:, : int(change[0][1:])]
        if name in result and change == ["crop"]:
            result[name] = result[name][..., :-4, :-2]
    return result


@pytest.fixture(params=KINDS)
def case(request, reference: Path):
    folder = reference / "fixtures" / "transformer" / request.param
    return (
        network_of(folder),
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
        folder,
    )


def test_every_recorded_output(case) -> None:
    net, inputs, outputs, _ = case
    runs = [name for name in outputs if name.startswith("out_")]
    assert len(runs) >= 5
    for run in runs:
        with torch.no_grad():
            out = net(**arguments_of(inputs, run))
        torch.testing.assert_close(out, outputs[run], atol=ATOL, rtol=0, msg=lambda m, run=run: f"{run}: {m}")


def test_every_recorded_intermediate_value(case) -> None:
    net, inputs, outputs, _ = case
    seen = {}
    trunk = net.transformer

    def entering(module, args, kwargs) -> None:
        seen["embed"], seen["emb"] = args[0], kwargs["emb"]

    trunk.layers[0].register_forward_pre_hook(entering, with_kwargs=True)
    for index, layer in enumerate(trunk.layers):
        layer.register_forward_hook(lambda m, a, out, index=index: seen.update({f"hidden_{index}": out}))
    trunk.final_layernorm.register_forward_hook(lambda m, a, out: seen.update(final_layernorm=out))
    with torch.no_grad():
        net(**arguments_of(inputs))
    assert len(seen) == 3 + len(trunk.layers)
    for name, value in seen.items():
        torch.testing.assert_close(value, outputs[name], atol=ATOL, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_and_every_gradient(case) -> None:
    net, inputs, outputs, folder = case
    arguments = arguments_of(inputs)
    arguments["x"], arguments["context"] = (
        arguments["x"].requires_grad_(),
        arguments["context"].requires_grad_(),
    )
    embedded = {}
    net.transformer.layers[0].register_forward_pre_hook(lambda m, args: embedded.update(tokens=args[0]))
    loss = (net(**arguments) * inputs["probe"]).mean()
    parameters = {PREFIX + name: p for name, p in net.named_parameters()}
    leaves = {
        **parameters,
        "x": arguments["x"],
        "context": arguments["context"],
        "tokens": embedded["tokens"],
    }
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    # 2B's table is a constant of ours: the gradient that it would have is that of the embedded tokens.
    table = PREFIX + "mixins.pos_embed.pos_embedding"
    gradients.setdefault(table, gradients.pop("tokens").sum(0, keepdim=True))

    torch.testing.assert_close(loss[None], outputs["loss"], atol=ATOL, rtol=0)
    recorded = {
        name.removeprefix("grad."): value for name, value in outputs.items() if name.startswith("grad.")
    }
    assert len(recorded) > 20
    for name, value in recorded.items():
        # The loss is a mean over all outputs and its gradients are far below 1: hence 1e-5 of their own size.
        atol = ATOL * value.abs().max().item() + 1e-9
        torch.testing.assert_close(
            gradients[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    norms = json.loads((folder / "grad_norms.json").read_text())
    assert set(parameters) <= set(norms) | {table}
    for name in set(norms) & set(gradients):
        norm, total = norms[name]
        assert gradients[name].norm().item() == pytest.approx(norm, abs=ATOL), name
        assert gradients[name].sum().item() == pytest.approx(total, abs=ATOL), name
    # Parameters of SAT's trunk without a use have no gradient there and do not exist here.
    assert all(norms[name] is None or norms[name][0] == 0 for name in set(norms) - set(gradients))


def test_checkpointed_network_has_the_recorded_gradients(reference: Path) -> None:
    folder = reference / "fixtures" / "transformer" / "i2v_v15"
    net = network_of(folder, checkpoint_activations=True)
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    (net(**arguments_of(inputs)) * inputs["probe"]).mean().backward()
    for name, parameter in net.named_parameters():
        if f"grad.{PREFIX}{name}" in outputs:
            torch.testing.assert_close(parameter.grad, outputs[f"grad.{PREFIX}{name}"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_fixture_state_dicts_convert_to_diffusers_and_back(kind: str, reference: Path) -> None:
    from cogvideox.weights.transformer_keys import SAT_PREFIX, diffusers_to_sat, sat_to_diffusers

    weights = load_file(reference / "fixtures" / "transformer" / kind / "weights.safetensors")
    back = diffusers_to_sat(sat_to_diffusers(weights), prefix=SAT_PREFIX)
    gone = {key.removeprefix(SAT_PREFIX) for key in set(weights) - set(back)}
    fixed = {"mixins.pos_embed.pos_embedding"} if kind == "t2v_sincos" else set()
    assert gone <= fixed | {"transformer.position_embeddings.weight"} | {
        "mixins.pos_embed.freqs_sin",
        "mixins.pos_embed.freqs_cos",
    }
    assert all(torch.equal(value, weights[key]) for key, value in back.items())
