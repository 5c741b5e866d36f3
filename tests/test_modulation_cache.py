"""Modulations computed once per schedule: the same network, without its adaLN weights."""

from __future__ import annotations

import pytest
import torch
from transformer_cases import KINDS, full, inputs, randomise, tiny

from cogvideox.model.adaln import ExpertAdaLN
from cogvideox.model.timestep import sinusoid

TIMESTEPS = [999, 500, 17, 0]


def spoil_adaln(net: torch.nn.Module) -> None:
    """NaN in every adaLN weight: whoever still reads one shows it."""
    for module in (*net.mixins["adaln_layer"].adaLN_modulations, net.mixins["final_layer"].adaLN_modulation):
        for parameter in module.parameters():
            parameter.data.fill_(torch.nan)


@pytest.mark.parametrize("kind", KINDS)
def test_precomputed_modulations_give_the_same_bits_without_the_weights(kind: str) -> None:
    net = randomise(tiny(kind))
    arguments = inputs(net, batch=1)
    with torch.no_grad():
        expected = [net(**arguments | {"timesteps": torch.tensor([t])}) for t in TIMESTEPS]
        table = net.precompute_modulations(TIMESTEPS, arguments.get("ofs"))
        spoil_adaln(net)
        with net.use_modulations(table):
            found = [net(**arguments | {"timesteps": torch.tensor([t])}) for t in TIMESTEPS]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_batch_that_shares_its_timestep_or_does_not_gets_its_own_rows() -> None:
    net = randomise(tiny("2b"))
    arguments = inputs(net)
    with torch.no_grad(), net.use_modulations(net.precompute_modulations(torch.tensor(TIMESTEPS))):
        for timesteps in ([17, 17], [999, 500]):
            arguments["timesteps"] = torch.tensor(timesteps)
            found = net(**arguments)
            with net.use_modulations(None):
                # A product of two rows may round otherwise than two of one row.
                torch.testing.assert_close(found, net(**arguments), atol=1e-5, rtol=0)


def test_the_table_holds_what_the_formula_says() -> None:
    """Linear(SiLU(MLP(sinusoid(t)))), one row per timestep (section 2 of the conventions)."""
    net = randomise(tiny("5b"))
    table = net.precompute_modulations([500.5, 3])
    linear = net.mixins["adaln_layer"].adaLN_modulations[1][1]
    first, _, second = net.time_embed
    hidden = torch.nn.functional.silu(sinusoid(torch.tensor([500.5, 3.0]), 48) @ first.weight.T + first.bias)
    emb = hidden @ second.weight.T + second.bias
    expected = torch.nn.functional.silu(emb) @ linear.weight.T + linear.bias
    assert table.layers.shape == (2, 2, 12 * 48) and table.final.shape == (2, 2 * 48)
    torch.testing.assert_close(table.layers[1], expected, atol=1e-5, rtol=1e-5)


def test_outside_the_context_and_in_training_the_weights_are_used() -> None:
    net = randomise(tiny("2b"))
    arguments = inputs(net)
    expected = net(**arguments)
    with net.use_modulations(net.precompute_modulations(TIMESTEPS)):
        pass
    found = net(**arguments)
    assert torch.equal(found, expected)
    found.square().mean().backward()
    assert net.mixins["adaln_layer"].adaLN_modulations[0][1].weight.grad.abs().sum() > 0


def test_a_timestep_an_ofs_or_a_part_that_is_not_in_the_table_is_refused() -> None:
    net = randomise(tiny("1.5_i2v"))
    arguments = inputs(net, batch=1) | {"ofs": 2.0}
    with torch.no_grad(), net.use_modulations(net.precompute_modulations([500], 2.0)):
        with pytest.raises(ValueError, match="timestep 999 is none of the 1 whose"):
            net(**arguments)
        with pytest.raises(ValueError, match="ofs=1.0, but the modulations were precomputed with ofs=2.0"):
            net(**arguments | {"ofs": 1.0, "timesteps": torch.tensor([500])})
    with pytest.raises(ValueError, match="one for the whole batch"):
        net.precompute_modulations([500], torch.tensor([1.0, 2.0]))

    class OtherAdaLN(torch.nn.Module):
        pass

    net.mixins["adaln_layer"] = OtherAdaLN()
    with pytest.raises(ValueError, match="OtherAdaLN .* cannot be precomputed"):
        net.precompute_modulations([500], 2.0)


@pytest.mark.parametrize(("kind", "weights_gb", "table_gb"), [("2b", 0.71, 0.07), ("5b", 1.59, 0.16)])
def test_the_weights_it_replaces_and_its_own_size(kind: str, weights_gb: float, table_gb: float) -> None:
    """Figures of the performance notes, in bfloat16 and 50 steps."""
    net = full(kind, dtype=torch.bfloat16)
    adaln = net.mixins["adaln_layer"]
    assert isinstance(adaln, ExpertAdaLN)
    weights = sum(p.nbytes for p in adaln.adaLN_modulations.parameters())
    assert weights / 1e9 == pytest.approx(weights_gb, abs=0.01)
    timesteps = torch.arange(50)
    embeddings = net.embed_time(timesteps.to("meta"))
    assert embeddings.shape == (50, 512)
    row = 12 * net.hidden_size * 2
    assert 50 * len(net.transformer.layers) * row / 1e9 == pytest.approx(table_gb, abs=0.01)
