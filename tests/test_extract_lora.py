"""A LoRA out of two checkpoints: with it the base computes what the tuned model does, and what it misses is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stand_ins import sat_folder
from test_low_rank import some_lora
from transformer_cases import inputs, randomise, tiny

from cogvideox.command_line import run_door
from cogvideox.model.lora import inject_lora
from cogvideox.weights.lora.apply import add_to_network
from cogvideox.weights.lora.file import read_lora
from cogvideox.weights.lora.low_rank import add_to
from cogvideox.weights.transformer_keys import diffusers_to_sat, sat_to_diffusers
from scripts import extract_lora

PREFIX = "model.diffusion_model."
ATTENTION = [f"transformer_blocks.{i}.attn1.to_{part}" for i in range(2) for part in ("q", "k", "v", "out.0")]
MLP = [f"transformer_blocks.{i}.ff.net.{part}" for i in range(2) for part in ("0.proj", "2")]


def state_of(kind: str = "5b", seed: int = 0) -> dict[str, torch.Tensor]:
    """Under diffusers' names."""
    return {k: v.contiguous() for k, v in sat_to_diffusers(randomise(tiny(kind), seed).state_dict()).items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """In SAT's format, with its dead values; the tuned models are in diffusers'."""
    sat = {PREFIX + name: value for name, value in randomise(tiny("5b")).state_dict().items()}
    return sat_folder(tmp_path / "base", sat | {PREFIX + "mixins.pos_embed.freqs_sin": torch.ones(5, 16)})


def write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def run(*argv: object) -> int:
    return run_door(extract_lora.main, [str(part) for part in argv])


@pytest.mark.parametrize("to", ["diffusers", "kohya", "ComfyUI", "SAT"])
def test_a_merged_lora_comes_out_again(to: str, base: Path, tmp_path: Path, capsys) -> None:
    """Base in SAT's format, tuned in diffusers': its difference has rank 3, so that rank 3 holds all of it."""
    theirs = state_of()
    tuned = add_to(theirs, some_lora(theirs, ATTENTION + MLP, 1), "diffusers")
    out = tmp_path / "lora.safetensors"
    assert run(base, write(tmp_path / "tuned.safetensors", tuned), out, "--rank", 3, "--to", to.lower()) == 0
    printed = capsys.readouterr().out
    assert "attn1.to_q               0.0000" in printed and "differ and are not" not in printed
    file = read_lora(out)
    assert (file.format, file.ranks, set(file.modules)) == (to, [3], set(ATTENTION + MLP))
    expected, net = tiny("5b"), randomise(tiny("5b"))
    expected.load_state_dict(diffusers_to_sat(tuned), strict=False)
    add_to_network(net, file.modules)
    with torch.no_grad():
        torch.testing.assert_close(net(**inputs(net)), expected(**inputs(net)), atol=1e-5, rtol=0)
    with safe_open(out, "pt") as opened:
        record = json.loads(opened.metadata()["cogvideox"])
    assert record["source"].endswith("tuned.safetensors") and record["base"] == str(base)
    assert len(record["source_sha256"]) == len(record["base_sha256"]) == 64
    assert record["source_sha256"] != record["base_sha256"]


def test_the_printed_error_is_that_of_the_best_update_of_its_rank(base: Path, tmp_path: Path, capsys) -> None:
    """Eckart and Young: the singular values beyond the rank, of all layers of a kind together."""
    before, generator = state_of(), torch.Generator().manual_seed(3)
    after = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in before.items()
    }
    out = tmp_path / "lora.safetensors"
    tuned = write(tmp_path / "tuned.safetensors", after)
    assert run(base, tuned, out, "--rank", 4, "--layers", "query_key_value", "ff.net.2") == 0
    printed = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line}
    sums = {}
    for name in after:
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "ff.net.2.weight")):
            values = torch.linalg.svdvals((after[name] - before[name]).double())
            kind = name.removesuffix(".weight").split(".", 2)[2]
            missed, whole = sums.get(kind, (0, 0))
            sums[kind] = (missed + values[4:].square().sum(), whole + values.square().sum())
    sums["all"] = tuple(map(sum, zip(*sums.values(), strict=True)))
    assert len(sums) == 5
    for kind, (missed, whole) in sums.items():
        assert float(printed[kind]) == pytest.approx((missed / whole).sqrt().item(), abs=1e-4)
    assert printed["differ"] == "and"  # biases, norms, embeddings: told, not lost in silence


def test_every_linear_layer_can_be_asked_for(base: Path, tmp_path: Path) -> None:
    before = state_of()
    every = [*ATTENTION, "transformer_blocks.1.norm1.linear", "time_embedding.linear_1", "proj_out"]
    tuned = write(tmp_path / "tuned.safetensors", add_to(before, some_lora(before, every, 1), "diffusers"))
    assert run(base, tuned, tmp_path / "l.safetensors", "--rank", 3, "--layers", "all") == 0
    assert set(read_lora(tmp_path / "l.safetensors").modules) == set(every)


def refused(capsys, *argv: object) -> str:
    assert run(*argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_what_cannot_be_extracted_is_one_clear_error(base: Path, tmp_path: Path, capsys) -> None:
    before, out = state_of(), tmp_path / "lora.safetensors"
    same = write(tmp_path / "same.safetensors", before)
    assert "hold the same weights in every chosen layer; there is no difference" in (
        refused(capsys, base, same, out, "--rank", 4)
    )
    norms = write(tmp_path / "norms.safetensors", before | {"proj_out.bias": before["proj_out.bias"] + 1})
    message = refused(capsys, base, norms, out, "--rank", 4)
    assert "differ in 1 tensors, none of them a chosen layer (first proj_out.bias)" in message
    tuned = write(tmp_path / "tuned.safetensors", state_of(seed=1))
    assert "transformer_blocks.0.attn1.to_k: rank 49: a weight (48, 48) has updates of rank 1 to 48" in (
        refused(capsys, base, tuned, out, "--rank", 49)
    )
    assert "--rank 0: expected at least 1" in refused(capsys, base, tuned, out, "--rank", 0)
    other = write(tmp_path / "other.safetensors", state_of("1.5"))
    assert (
        "patch 1x2x2" in (message := refused(capsys, base, other, out, "--rank", 4))
        and "patch 2x2x2" in message
    )
    assert "--layers to_x: expected all, or some of query_key_value" in (
        refused(capsys, base, tuned, out, "--rank", 4, "--layers", "to_x")
    )
    broken = before | {"transformer_blocks.0.attn1.to_q.weight": torch.full((48, 48), float("nan"))}
    broken = write(tmp_path / "nan.safetensors", broken)
    assert "to_q.weight: NaN or inf" in refused(capsys, base, broken, out, "--rank", 4)
    adapted = tiny("5b")
    inject_lora(adapted, 4)
    lora = write(tmp_path / "with_lora.safetensors", adapted.state_dict())
    assert "its LoRA is there already" in refused(capsys, base, lora, out, "--rank", 4)
    out.write_bytes(b"kept")
    assert f"{out} exists" in refused(capsys, base, tuned, out, "--rank", 4)
    assert out.read_bytes() == b"kept"
