"""Low-rank updates: the same weights as peft's and diffusers', and truncated SVD by its closed form."""

from __future__ import annotations

import pytest
import torch
from transformer_cases import diffusers_twin, inputs, randomise, run_twin, tiny

from cogvideox.weights.lora import low_rank
from cogvideox.weights.lora.low_rank import Lora, LowRank, add_to, combine, extract, place, touched
from cogvideox.weights.transformer_keys import diffusers_to_sat, sat_to_diffusers

BLOCK = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear",
         "norm2.linear")  # fmt: skip
OUTSIDE = ("patch_embed.text_proj", "time_embedding.linear_1", "norm_out.linear", "proj_out")
EVERY = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in BLOCK] + list(OUTSIDE)


def some_lora(state: dict[str, torch.Tensor], modules: list[str], seed: int, rank: int = 3) -> Lora:
    """state: under diffusers' names. Updates of the size of the weights themselves."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for module in modules:
        out, width = state[f"{module}.weight"].shape
        down = torch.randn(rank, width, generator=generator) / width**0.5
        lora[module] = LowRank(down, torch.randn(out, rank, generator=generator), 0.25)
    return lora


def peft_adapters(twin, loras: dict[str, Lora]) -> None:
    """Loras into a diffusers model, in the names and by the loader of its users: alpha is scale times rank."""
    for name, lora in loras.items():
        part = next(iter(lora.values()))
        config = {"r": part.rank, "lora_alpha": part.scale * part.rank, "target_modules": list(lora)}
        config = {f"transformer.{key}": value for key, value in config.items()}  # as diffusers stores it
        twin.load_lora_adapter(
            {f"transformer.{m}.lora_{side}.weight": matrix for m, p in lora.items()
             for side, matrix in (("A", p.down), ("B", p.up))},
            prefix="transformer",
            adapter_name=name,
            metadata=config,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["2b", "1.5"])
def test_several_loras_with_strengths_give_what_diffusers_gives(kind: str) -> None:
    """``set_adapters`` with weights against the weights that ``combine`` and ``add_to`` make, on every linear layer."""
    net = randomise(tiny(kind))
    theirs = sat_to_diffusers(net.state_dict())
    every = EVERY + (["patch_embed.proj"] if kind == "1.5" else [])
    loras = {"a": some_lora(theirs, every, 1), "b": some_lora(theirs, every[2:7], 2, rank=5)}
    strengths = [0.8, -0.5]
    twin, arguments = diffusers_twin(net), inputs(net)
    peft_adapters(twin, loras)
    twin.set_adapters(list(loras), strengths)
    with torch.no_grad():
        expected = run_twin(net, twin, arguments)
        plain = net(**arguments)
        total = combine(list(zip(loras.values(), strengths, strict=True)))
        net.load_state_dict(add_to(net.state_dict(), total, "SAT"))
        torch.testing.assert_close(net(**arguments), expected, atol=1e-5, rtol=0)
    assert (plain - expected).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["2b", "1.5"])
def test_both_namings_give_the_same_weights(kind: str) -> None:
    sat = randomise(tiny(kind)).state_dict()
    theirs = sat_to_diffusers(sat)
    lora = some_lora(theirs, EVERY, 1)
    added = add_to(theirs, lora, "diffusers")
    expected = diffusers_to_sat(added)
    ours = add_to(sat, lora, "SAT")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    # What is not touched is passed on, not copied.
    assert touched(lora, "SAT") == {name for name in sat if ours[name] is not sat[name]}
    assert touched(lora, "diffusers") == {name for name in theirs if added[name] is not theirs[name]}


def test_adding_rounds_once() -> None:
    weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = "transformer_blocks.0.attn1.to_out.0"
    part = some_lora({f"{module}.weight": weight}, [module], 1)[module]
    expected = (weight.float() + 0.25 * (part.up @ part.down)).bfloat16()
    name = "transformer.layers.0.attention.dense.weight"
    assert torch.equal(add_to({name: weight}, {module: part}, "SAT")[name], expected)


def test_a_part_of_a_checkpoint_takes_its_part_of_the_lora() -> None:
    net = randomise(tiny("5b"))
    state = net.state_dict()
    lora = some_lora(sat_to_diffusers(state), EVERY, 1)
    whole = add_to(state, lora, "SAT")
    for name, value in state.items():
        assert torch.equal(add_to({name: value}, lora, "SAT")[name], whole[name])


def test_strength_0_is_the_base_bit_for_bit() -> None:
    state = {"proj_out.weight": torch.tensor([[-0.0, 1.0], [float("1e-45"), -2.0]])}
    lora = {"proj_out": LowRank(torch.ones(1, 2), torch.ones(2, 1))}
    result = add_to(state, combine([(lora, 0.0)]), "diffusers")["proj_out.weight"]
    assert result is state["proj_out.weight"]  # -0.0 + 0.0 would be 0.0


def test_a_combined_lora_has_the_sum_of_the_updates_and_of_the_ranks() -> None:
    weight = {"proj_out.weight": torch.zeros(4, 6)}
    a, b = (some_lora(weight, ["proj_out"], seed, rank)["proj_out"] for seed, rank in ((1, 2), (2, 3)))
    total = combine([({"proj_out": a}, 2.0), ({"proj_out": b}, -0.5)])["proj_out"]
    assert (total.rank, total.scale) == (5, 1.0)
    torch.testing.assert_close(total.update(), 0.5 * a.up @ a.down - 0.125 * b.up @ b.down, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_the_error_of_an_extraction_is_the_tail_of_the_singular_values(shape, rank: int) -> None:
    """Eckart and Young 1936: no update of this rank is nearer, and it misses exactly the singular values beyond it."""
    generator = torch.Generator().manual_seed(0)
    base, difference = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    part, error = extract(base, base + difference, rank)
    values = torch.linalg.svdvals(difference)
    # The matrices are stored in float32.
    assert error == pytest.approx((values[rank:].norm() / values.norm()).item(), abs=1e-7)
    missed = (difference - part.update(torch.float64)).norm() / difference.norm()
    assert missed.item() == pytest.approx(error, abs=1e-6)
    assert part.rank == rank


@pytest.mark.parametrize(("spectrum", "tolerance"), [("flat", 5e-3), ("falling", 1e-4), ("of rank 16", 1e-5)])
def test_large_layers_come_near_the_best_update(spectrum: str, tolerance: float, monkeypatch) -> None:
    """Subspace iteration, for layers beyond 1024: how near depends on how fast the singular values fall."""
    generator = torch.Generator().manual_seed(0)
    u, values, v = torch.linalg.svd(torch.randn(96, 128, generator=generator), full_matrices=False)
    if spectrum != "flat":
        count = torch.arange(1.0, 97.0)
        values = 1 / count if spectrum == "falling" else (count <= 16).float()
    difference = u @ torch.diag(values) @ v
    best = (values[16:].norm() / values.norm()).item()
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 8)
    part, error = extract(torch.zeros(96, 128), difference, 16)
    assert best - 1e-6 <= error <= best + tolerance
    missed = (difference - part.update()).norm() / difference.norm()
    assert missed.item() == pytest.approx(error, abs=1e-5)
    torch.manual_seed(7)
    assert torch.equal(extract(torch.zeros(96, 128), difference, 16)[0].up, part.up)


def test_a_difference_of_low_rank_is_extracted_whole_and_in_balance() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(48, 96, generator=generator)
    update = 1e-3 * torch.randn(48, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
    part, error = extract(base, base.double() + update, 16)  # twelve directions of rounding noise
    assert error < 1e-6
    torch.testing.assert_close(part.update(), update, atol=1e-8, rtol=0)
    assert part.up.norm().item() == pytest.approx(part.down.norm().item(), rel=1e-5)
    part, error = extract(base, base, 2)
    assert error == 0 and not part.update().any()


def test_wrong_updates_are_one_clear_error() -> None:
    square = LowRank(torch.zeros(2, 4), torch.zeros(4, 2))
    with pytest.raises(
        ValueError, match=r"attn2\.to_q: a CogVideoX transformer has no such module; .*attn1\.to_q"
    ):
        place("transformer_blocks.3.attn2.to_q", "SAT")
    with pytest.raises(ValueError, match="no such module"):
        place("transformer_blocks.0.attn1.to_q.bias", "SAT")
    convolution = {"patch_embed.proj.weight": torch.zeros(4, 1, 2, 2)}
    with pytest.raises(ValueError, match=r"patch_embed\.proj: its weight \(4, 1, 2, 2\) is a convolution's"):
        add_to(convolution, {"patch_embed.proj": square}, "diffusers")
    fused = {"transformer.layers.0.attention.query_key_value.weight": torch.zeros(18, 6, device="meta")}
    with pytest.raises(ValueError, match=r"to_k: its update is \(4, 4\), the weight of the network \(6, 6\)"):
        add_to(fused, {"transformer_blocks.0.attn1.to_k": square}, "SAT")
    with pytest.raises(ValueError, match=r"rank 5: a weight \(4, 8\) has updates of rank 1 to 4"):
        extract(torch.zeros(4, 8), torch.ones(4, 8), 5)
    with pytest.raises(ValueError, match="rank 0"):
        extract(torch.zeros(4, 8), torch.ones(4, 8), 0)
