"""Exported LoRA files in the programs that they are for, and what is refused before anything is written."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from lora_consumers import apply_in_comfyui, apply_in_kohya_readers, load_in_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from transformer_cases import diffusers_twin, inputs, randomise, run_twin, tiny

from cogvideox.convert import writer
from cogvideox.convert.lora import write_lora
from cogvideox.model.lora import inject_lora
from cogvideox.weights.lora.file import LoraFile, read_lora
from cogvideox.weights.lora.formats import parse, tensor_names
from cogvideox.weights.lora.low_rank import Lora, LowRank

ALPHA, RANK = 6.0, 4
LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# Float32, one more rounding of B; outputs are near 1 and change by near 0.1.
ATOL = 1e-5


class Trained:
    """A small network with trained adapters: its LoRA in our form, its output, and diffusers' twin of its base."""

    def __init__(self):
        net = randomise(tiny("1.5"))
        self.base = net
        self.twin = diffusers_twin(net)
        self.arguments = inputs(net)
        with torch.no_grad():
            self.plain = net(**self.arguments)
            adapted = copy.deepcopy(net)
            inject_lora(adapted, RANK, ALPHA, layers=LAYERS)
            generator = torch.Generator().manual_seed(2)
            for name, parameter in adapted.named_parameters():
                if "matrix_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            self.output = adapted(**self.arguments)
        self.state = {name: value for name, value in adapted.state_dict().items() if "matrix_" in name}
        names = parse(self.state)
        self.lora: Lora = {
            module: LowRank(self.state[down], self.state[names.up[module]], ALPHA / RANK)
            for module, down in names.down.items()
        }

    def run(self, twin) -> torch.Tensor:
        with torch.no_grad():
            return run_twin(self.base, twin, self.arguments)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.fixture
def twin(trained: Trained):
    return copy.deepcopy(trained.twin)


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output, expected, atol=ATOL, rtol=0)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def mixed(module: str, part: LowRank) -> LowRank:
    """The same update of another rank (a row of zeros more) in every second layer, and of another alpha."""
    if not module.startswith("transformer_blocks.1"):
        return part
    down = torch.cat([part.down, torch.ones_like(part.down[:1])])
    up = torch.cat([part.up, torch.zeros_like(part.up[:, :1])], dim=1)
    return LowRank(down, 2 * up, part.scale / 2)


def test_the_adapters_change_the_output(trained: Trained) -> None:
    assert (trained.output - trained.plain).abs().max() > 0.05


@pytest.mark.parametrize("alpha_mode", ["fold", "metadata", "external"])
def test_diffusers_gives_the_trained_output(alpha_mode: str, trained: Trained, twin, tmp_path: Path) -> None:
    path = write_lora(trained.lora, tmp_path, "diffusers", alpha_mode=alpha_mode)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    load_in_diffusers(path, twin, ALPHA / RANK if alpha_mode == "external" else 1.0)
    close(trained.run(twin), trained.output)


@pytest.mark.parametrize("alpha_mode", ["fold", "metadata"])
def test_diffusers_gives_the_trained_output_of_mixed_ranks(
    alpha_mode: str, trained: Trained, twin, tmp_path: Path
) -> None:
    lora = {module: mixed(module, part) for module, part in trained.lora.items()}
    path = write_lora(lora, tmp_path / "a.safetensors", "diffusers", alpha_mode=alpha_mode)
    # With the metadata diffusers does not guess, which went wrong before 0.42 where ranks differ.
    assert "lora_adapter_metadata" in metadata_of(path)
    load_in_diffusers(path, twin)
    assert {layer.r["ours"] for layer in twin.modules() if hasattr(layer, "lora_A")} == {RANK, RANK + 1}
    close(trained.run(twin), trained.output)


def test_our_metadata_is_what_diffusers_writes(trained: Trained, twin, tmp_path: Path) -> None:
    """Loaded there and saved again by its own writer, every key of ours comes back with its value."""
    from diffusers import CogVideoXPipeline
    from peft.utils import get_peft_model_state_dict

    path = write_lora(trained.lora, tmp_path / "a.safetensors", "diffusers", alpha_mode="metadata")
    load_in_diffusers(path, twin)
    CogVideoXPipeline.save_lora_weights(
        tmp_path / "theirs",
        get_peft_model_state_dict(twin, adapter_name="ours"),
        transformer_lora_adapter_metadata=twin.peft_config["ours"].to_dict(),
    )
    theirs = tmp_path / "theirs" / "pytorch_lora_weights.safetensors"
    ours, saved = (json.loads(metadata_of(p)["lora_adapter_metadata"]) for p in (path, theirs))
    saved["transformer.target_modules"].sort()
    assert ours == {key: saved[key] for key in ours}
    assert ours["transformer.lora_alpha"] == 6 and ours["transformer.r"] == 4
    a, b = load_file(path), load_file(theirs)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    close_loras(read_lora(theirs), read_lora(path))


@pytest.mark.parametrize("alpha_mode", ["fold", "metadata", "external"])
def test_comfyui_gives_the_trained_output(alpha_mode: str, trained: Trained, twin, tmp_path: Path) -> None:
    path = write_lora(trained.lora, tmp_path / "a.safetensors", "ComfyUI", alpha_mode=alpha_mode)
    tensors = load_file(path)
    assert sum(key.endswith(".alpha") for key in tensors) == (0 if alpha_mode == "external" else 12)
    unknown = apply_in_comfyui(tensors, twin, ALPHA / RANK if alpha_mode == "external" else 1.0)
    assert not unknown
    close(trained.run(twin), trained.output)


@pytest.mark.parametrize("alpha_mode", ["fold", "metadata", "external"])
def test_kohya_readers_give_the_trained_output(
    alpha_mode: str, trained: Trained, twin, tmp_path: Path
) -> None:
    path = write_lora(trained.lora, tmp_path / "a.safetensors", "kohya", alpha_mode=alpha_mode)
    apply_in_kohya_readers(load_file(path), twin, ALPHA / RANK if alpha_mode == "external" else 1.0)
    close(trained.run(twin), trained.output)
    said = metadata_of(path)
    assert said["ss_network_module"] == "networks.lora" and said["ss_network_dim"] == "4"
    assert said.get("ss_network_alpha") == {"fold": "4", "metadata": "6", "external": None}[alpha_mode]


def test_modules_outside_of_attention_reach_every_consumer(trained: Trained, twin, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)

    def part(module: str) -> LowRank:
        out, width = twin.get_submodule(module).weight.shape
        down, up = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
        return LowRank(down / width**0.5, 0.1 * up, 0.5)

    linears = [name for name, m in twin.named_modules() if isinstance(m, torch.nn.Linear)]
    lora = {module: part(module) for module in linears}
    expected = copy.deepcopy(twin)
    with torch.no_grad():
        for module, update in lora.items():
            expected.get_submodule(module).weight += update.update()
    expected = trained.run(expected)
    assert (expected - trained.plain).abs().max() > 0.05
    for to, apply in (("ComfyUI", apply_in_comfyui), ("kohya", apply_in_kohya_readers)):
        there = copy.deepcopy(twin)
        path = write_lora(lora, tmp_path / to, to)
        assert not apply(load_file(path), there)
        close(trained.run(there), expected)
        assert read_lora(path).modules.keys() == set(linears)
    load_in_diffusers(write_lora(lora, tmp_path / "d", "diffusers"), twin)
    close(trained.run(twin), expected)


# --------------------------------------------------------------------------------------------------- round trips


def close_loras(one: LoraFile, other: LoraFile, folded: bool = False) -> None:
    assert one.modules.keys() == other.modules.keys()
    for module, a in one.modules.items():
        b = other.modules[module]
        assert torch.equal(a.down, b.down)
        if folded:
            assert b.scale == 1.0
            torch.testing.assert_close(b.up, a.scale * a.up, atol=0, rtol=1e-6)
        else:
            assert torch.equal(a.up, b.up) and a.scale == b.scale


@pytest.mark.parametrize("start", ["SAT", "diffusers", "kohya", "ComfyUI"])
@pytest.mark.parametrize("to", ["SAT", "diffusers", "kohya", "ComfyUI"])
def test_every_format_goes_into_every_other_and_back(
    start: str, to: str, trained: Trained, tmp_path: Path
) -> None:
    first = read_lora(write_lora(trained.lora, tmp_path / "1", start, alpha_mode="metadata"))
    assert first.format == start and first.alpha == ALPHA and first.ranks == [RANK]
    second = read_lora(write_lora(first, tmp_path / "2", to, alpha_mode="metadata"))
    assert second.format == to
    close_loras(first, second)
    third = read_lora(write_lora(second, tmp_path / "3", start, alpha_mode="external"))
    close_loras(first, third)  # alpha from our record
    close_loras(first, read_lora(write_lora(third, tmp_path / "4", to)), folded=True)


@pytest.mark.parametrize("to", ["SAT", "diffusers", "kohya", "ComfyUI"])
def test_ranks_and_alphas_that_differ_survive(to: str, trained: Trained, tmp_path: Path) -> None:
    lora = {module: mixed(module, part) for module, part in trained.lora.items()}
    again = read_lora(write_lora(lora, tmp_path / "a.safetensors", to, alpha_mode="metadata"))
    assert again.ranks == [4, 5] and again.alpha is None and "differing by module" in again.alpha_source
    for module, part in lora.items():
        assert torch.equal(again.modules[module].up, part.up)
        assert again.modules[module].scale == pytest.approx(part.scale, rel=1e-6)  # .alpha is float32


def test_the_dtype_is_the_sources_or_the_one_asked_for(trained: Trained, tmp_path: Path) -> None:
    half = {m: LowRank(p.down.bfloat16(), p.up.bfloat16(), 2.0**-7) for m, p in trained.lora.items()}
    path = write_lora(half, tmp_path / "a.safetensors", "diffusers")
    assert {t.dtype for t in load_file(path).values()} == {torch.bfloat16}
    folded = read_lora(path).modules
    # A power of two only moves the exponent: the fold is exact.
    assert all(torch.equal(folded[m].up.float(), part.up.float() / 128) for m, part in half.items())
    path = write_lora(half, tmp_path / "b.safetensors", "diffusers", dtype=torch.float32)
    assert {t.dtype for t in load_file(path).values()} == {torch.float32}


def test_a_given_alpha_takes_the_place_of_the_files(trained: Trained, tmp_path: Path) -> None:
    path = write_lora(trained.lora, tmp_path / "a", "kohya", alpha=2.0, alpha_mode="metadata")
    assert read_lora(path).alpha == 2.0
    found = read_lora(path, alpha=8.0)
    assert found.alpha == 8.0 and found.alpha_source == "8, as given"
    assert {part.scale for part in found.modules.values()} == {2.0}


def test_the_record_tells_where_the_file_is_from(trained: Trained, tmp_path: Path) -> None:
    source = write_lora(trained.lora, tmp_path / "a", "diffusers", metadata={"note": "mine"})
    assert metadata_of(source)["note"] == "mine"
    lora = read_lora(source)
    lora.provenance |= {"step": 500, "seed": 3}
    record = json.loads(metadata_of(write_lora(lora, tmp_path / "b", "kohya"))["cogvideox"])
    assert record["source"] == str(source) and len(record["source_sha256"]) == 64
    assert (record["step"], record["seed"]) == (500, 3)
    assert record["lora"] == {"alpha_mode": "fold", "scale": 1.0}


def test_the_same_input_gives_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    a, b = (write_lora(trained.lora, tmp_path / name, "ComfyUI") for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_external_says_which_strength_to_set(trained: Trained, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, "cogvideox"):
        write_lora(trained.lora, tmp_path / "a", "ComfyUI", alpha_mode="external")
        assert "strength 1.5 is the trained strength" in caplog.text
        write_lora(trained.lora, tmp_path / "b", "ComfyUI")
        assert "strength 1 is the trained strength" in caplog.text


# ----------------------------------------------------------------------------------------------------- refusals


def test_an_existing_output_is_kept(trained: Trained, tmp_path: Path) -> None:
    path = write_lora(trained.lora, tmp_path / "a.safetensors", "kohya")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a.safetensors exists"):
        write_lora(trained.lora, path, "diffusers")
    assert path.read_bytes() == before
    write_lora(trained.lora, path, "diffusers", force=True)
    assert read_lora(path).format == "diffusers"
    with pytest.raises(ValueError, match="being read"):
        write_lora(read_lora(path), path, "kohya", force=True)


def test_a_full_disk_leaves_nothing_behind(trained: Trained, tmp_path: Path, monkeypatch) -> None:
    old = write_lora(trained.lora, tmp_path / "old.safetensors", "kohya")

    def full(file) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_flush", full)
    for name in ("old.safetensors", "new.safetensors"):
        with pytest.raises(OSError, match="no space left"):
            write_lora(trained.lora, tmp_path / name, "kohya", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["old.safetensors"]
    assert read_lora(old).tensors == 24


def test_scales_that_differ_have_no_one_strength(trained: Trained, tmp_path: Path) -> None:
    lora = {module: mixed(module, part) for module, part in trained.lora.items()}
    with pytest.raises(ValueError, match=r"differs by module \(0.75, 1.5\).*--alpha fold or metadata"):
        write_lora(lora, tmp_path / "a.safetensors", "kohya", alpha_mode="external")


def test_a_fold_that_fp16_cannot_hold_is_refused(trained: Trained, tmp_path: Path) -> None:
    lora = {m: LowRank(p.down.half(), (p.up * 1e-4).half(), 1 / 256) for m, p in trained.lora.items()}
    with pytest.raises(ValueError, match="too small for fp16.*write bf16 or fp32"):
        write_lora(lora, tmp_path / "a.safetensors", "diffusers")
    assert not list(tmp_path.iterdir())
    write_lora(lora, tmp_path / "a.safetensors", "diffusers", dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "comfy"}, "to='comfy': expected one of SAT, diffusers, kohya, ComfyUI"),
        ({"alpha_mode": "folded"}, "alpha_mode='folded': expected one of fold, metadata, external"),
        ({"output": "a.pt"}, "name it a.safetensors"),
        ({"lora": {}}, "nothing to write"),
        ({"alpha": 0.0}, "is 0: expected a number other than 0"),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    options: dict, message: str, trained: Trained, tmp_path: Path
) -> None:
    chosen = {"lora": trained.lora, "output": "a.safetensors", "to": "kohya"} | options
    chosen["output"] = tmp_path / chosen["output"]
    with pytest.raises(ValueError, match=message):
        write_lora(**chosen)
    assert not list(tmp_path.iterdir())


def test_the_names_are_those_of_the_format() -> None:
    module = "transformer_blocks.7.attn1.to_out.0"
    assert tensor_names(module, "diffusers")[0] == f"transformer.{module}.lora_A.weight"
    assert tensor_names(module, "kohya")[1] == "lora_unet_transformer_blocks_7_attn1_to_out_0.lora_up.weight"
    assert tensor_names(module, "ComfyUI")[2] == "diffusion_model.blocks.7.attn_out.alpha"
    assert tensor_names(module, "SAT")[1] == (
        "model.diffusion_model.transformer.layers.7.attention.dense.matrix_B.0"
    )
