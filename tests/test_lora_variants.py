"""LoRA by patterns, DoRA, and eight-bit bases: against peft, diffusers, and closed forms."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pipeline_case as case
import pytest
import torch
import torch.nn.functional as F
from lora_consumers import load_in_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformer_cases import diffusers_twin, full, inputs, randomise, run_twin, tiny

import cogvideox
from cogvideox.config import ConfigError, load_config
from cogvideox.convert.lora import largest_difference, write_lora
from cogvideox.convert.models import convert_model
from cogvideox.live_memory import LiveMemory
from cogvideox.lora_sizes import linear_layers, lora_parameters
from cogvideox.model.lora import (
    PARTS,
    LoRALinear,
    freeze_base,
    inject_lora,
    lora_scales,
    lora_state_dict,
    merge_lora,
)
from cogvideox.model.quantize import EightBitLinear, TorchaoLinear, quantize_base
from cogvideox.model.transformer import PREFIX
from cogvideox.planning.memory import training_phases
from cogvideox.weights.identify import identify
from cogvideox.weights.lora.apply import add_to_network, applied, start_adapters
from cogvideox.weights.lora.file import read_lora
from cogvideox.weights.reader import WeightsReader
from cogvideox.weights.transformer_keys import SPLIT, diffusers_to_sat

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EVERYWHERE = ["attention.*", "mlp.*", "adaLN_modulations.*", "text_proj", "time_embed.*", "final_layer.*"]
PATTERNS = {"layers": EVERYWHERE, "rank_pattern": {"mlp.*": 2, "re:time_embed\\.[02]": 1}}


def adapted(kind: str = "5b", seed: int = 5, **options):
    """A network with random adapters, and the same without."""
    net = randomise(tiny(kind))
    plain = copy.deepcopy(net)
    inject_lora(net, **({"rank": 3, "alpha": 2.0} | options))
    randomise_adapters(net, seed)
    return net, plain


@torch.no_grad()
def randomise_adapters(net, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in lora_state_dict(net).values():
        value.copy_(0.2 * torch.randn(value.shape, generator=generator))


def run_folder(net, folder: Path, section: str) -> Path:
    """The adapters as a run of ours leaves them: matrices, and the YAML with what they mean."""
    save_file({PREFIX + k: v.contiguous() for k, v in lora_state_dict(net).items()}, folder / "a.safetensors")
    (folder / "config.yaml").write_text(section)
    return folder


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# -------------------------------------------------------------------------------------------------------- patterns


def test_patterns_reach_every_linear_layer_with_ranks_and_scales_of_their_own() -> None:
    net = tiny("1.5_i2v")
    paths = inject_lora(net, 4, 8.0, ["*"], None, rank_pattern={"dense": 2}, alpha_pattern={"dense": 3.0})
    linears = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    assert [f"{path}.original" for path in paths] == linears and len(paths) == 6 + 2 * 5 + 2
    scales = lora_scales(net)
    assert scales["transformer.layers.1.attention.dense"] == 1.5 and scales["time_embed.0"] == 2.0
    assert len(net.get_submodule("transformer.layers.1.attention.dense").matrix_A[0]) == 2
    net(**inputs(net))


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    net = tiny("5b")
    inject_lora(net, 16, 8.0, rslora=True, rank_pattern={"dense": 4})
    assert set(lora_scales(net).values()) == {8.0 / 4, 8.0 / 2}


def test_chosen_transformer_layers_limit_those_alone() -> None:
    paths = inject_lora(
        tiny("5b"), 2, layers=["dense", "adaLN_modulations.*", "time_embed.0"], transformer_layers=[1]
    )
    assert paths == [
        "mixins.adaln_layer.adaLN_modulations.1.1", "transformer.layers.1.attention.dense", "time_embed.0"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["attention.dens"]}, "'attention.dens' matches nothing; did you mean 'attention.dense'"),
        ({"rank_pattern": {"mlp.*": 2}}, r"lora.rank_pattern: 'mlp.\*' matches nothing; the names end in attention"),
        ({"alpha_pattern": {"dense": 0.0}}, "lora.alpha_pattern.dense=0.0: expected a number other than 0"),
        ({"rank_pattern": {"dense": 0}}, "lora.rank_pattern.dense=0: expected at least 1"),
        ({"dropout": 1.0}, "lora.dropout=1.0"),
        ({"layers": ["re:(dense"]}, "'re:\\(dense' is no regular expression"),
    ],
)  # fmt: skip
def test_a_wrong_pattern_is_one_clear_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject_lora(tiny("5b"), **({"rank": 4} | options))


def test_the_two_tables_of_parts_agree() -> None:
    """model.lora and weights.transformer_keys may not import each other."""
    modulations = tuple(chunks for _, chunks in SPLIT["mixins.adaln_layer.adaLN_modulations.{}.1.weight"])
    assert PARTS["adaLN_modulations.*.1"] == modulations


@pytest.mark.parametrize("kind", ["cogvideox_5b", "cogvideox1.5_5b_i2v"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_plan_counts_the_parameters_that_are_injected(kind: str, dora: bool) -> None:
    """At full size, on the meta device."""
    patterns = "lora.layers=[attention.*,adaLN_modulations.*,text_proj,final_layer.*]"
    overrides = [patterns, "lora.rank_pattern={text_proj: 7}", f"lora.dora={str(dora).lower()}"]
    config = load_config([CONFIGS / f"{kind}.yaml", CONFIGS / "lora.yaml"], overrides)
    net, lora = cogvideox.build_transformer(config, device="meta"), config.lora
    sizes = {n: (m.in_features, m.out_features) for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert sizes == {path: size[:2] for path, size in linear_layers(config.model.transformer).items()}
    inject_lora(net, lora.rank, lora.alpha, lora.layers, rank_pattern=lora.rank_pattern, dora=dora)
    assert lora_parameters(config) == sum(value.numel() for value in lora_state_dict(net).values())


def test_dropout_acts_in_training_only() -> None:
    layer = LoRALinear(nn.Linear(6, 4), 2, dropout=0.5)
    nn.init.normal_(layer.matrix_B[0])
    x = torch.randn(64, 6)
    assert not torch.equal(layer.train()(x), layer(x))
    layer.eval()
    expected = F.linear(
        x, layer.original.weight + layer.matrix_B[0] @ layer.matrix_A[0] / 2, layer.original.bias
    )
    close(layer(x), expected)


SECTION = """
lora:
  rank: 3
  alpha: 2.0
  rank_pattern: {"mlp.*": 2, 're:time_embed\\.[02]': 1}
  alpha_pattern: {"text_proj": 5.0}
"""


@pytest.mark.parametrize("to", ["diffusers", "kohya", "ComfyUI", "SAT"])
@pytest.mark.parametrize("alpha_mode", ["fold", "metadata"])
def test_a_run_with_patterns_is_read_and_written_in_every_format(
    to: str, alpha_mode: str, tmp_path: Path
) -> None:
    net, _ = adapted(**PATTERNS, alpha_pattern={"text_proj": 5.0})
    lora = read_lora(run_folder(net, tmp_path, SECTION))
    assert lora.ranks == [1, 2, 3] and lora.modules["patch_embed.text_proj"].scale == pytest.approx(5 / 3)
    assert lora.modules["transformer_blocks.1.norm2.linear"].scale == pytest.approx(2 / 3)
    again = read_lora(write_lora(lora, tmp_path / "b.safetensors", to, alpha_mode=alpha_mode))
    difference, largest = largest_difference(lora.modules, again.modules)
    assert difference < 1e-6 * max(largest, 1)


def test_diffusers_gives_the_trained_output_of_a_run_with_patterns(tmp_path: Path) -> None:
    net, plain = adapted(**PATTERNS, alpha_pattern={"text_proj": 5.0})
    lora = read_lora(run_folder(net, tmp_path, SECTION))
    twin = diffusers_twin(plain)
    load_in_diffusers(write_lora(lora, tmp_path / "b.safetensors", "diffusers", alpha_mode="metadata"), twin)
    with torch.no_grad():
        expected = net(**inputs(net))
        close(run_twin(plain, twin, inputs(net)), expected)
        assert (expected - plain(**inputs(plain))).abs().max() > 0.05


def test_a_run_with_patterns_continues_from_its_own_matrices(tmp_path: Path) -> None:
    net, _ = adapted(**PATTERNS)
    file = read_lora(run_folder(net, tmp_path, SECTION.replace('alpha_pattern: {"text_proj": 5.0}', "")))
    again = randomise(tiny("5b"))
    inject_lora(again, 3, 2.0, **PATTERNS)
    start_adapters(again, file, 1.0, lora_scales(again))
    own = lora_state_dict(again)
    # B goes through scale / scale, which is 1 but for the last bit.
    assert all(torch.allclose(value, own[name], rtol=1e-6) for name, value in lora_state_dict(net).items())


def test_patterns_of_another_run_are_refused(tmp_path: Path) -> None:
    net, _ = adapted(**PATTERNS)
    with pytest.raises(ValueError, match="says LoRA rank 3, the matrices have 1, 2: is it of another run"):
        read_lora(run_folder(net, tmp_path, "lora: {rank: 3}"))


# ------------------------------------------------------------------------------------------------------------ DoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_starts_as_the_identity(dtype: torch.dtype) -> None:
    net = randomise(tiny("5b")).to(dtype)
    expected = net(**inputs(net))
    inject_lora(net, 4, layers=EVERYWHERE, dora=True)
    assert torch.equal(net(**inputs(net)), expected)


def test_dora_and_its_gradients_are_pefts() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.Module()
    holder.dense = nn.Linear(12, 8)
    ours = LoRALinear(copy.deepcopy(holder.dense), rank=3, alpha=6.0, dora=True)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["dense"], use_dora=True), holder)
    theirs, length = holder.dense, ours.original.weight.detach().norm(dim=1)
    magnitude = theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        ours.matrix_B[0].normal_()
        ours.magnitude_gain.normal_(std=0.3)
        theirs.lora_A["default"].weight.copy_(ours.matrix_A[0])
        theirs.lora_B["default"].weight.copy_(ours.matrix_B[0])
        magnitude.copy_((1 + ours.magnitude_gain) * length)
    x = torch.randn(5, 12)
    close(ours(x), theirs(x))
    probe = torch.randn(5, 8)
    (ours(x) * probe).sum().backward()
    (theirs(x) * probe).sum().backward()
    for mine, other in (
        (ours.matrix_A[0].grad, theirs.lora_A["default"].weight.grad),
        (ours.matrix_B[0].grad, theirs.lora_B["default"].weight.grad),
        (ours.magnitude_gain.grad, magnitude.grad * length),  # m = (1 + g) |W|
    ):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_merging_a_dora_is_exact() -> None:
    net, _ = adapted(layers=EVERYWHERE, dora=True)
    net = net.double()
    arguments = inputs(net, dtype=torch.float64)
    with torch.no_grad():
        expected = net(**arguments)
        names = list(tiny("5b").state_dict())
        merge_lora(net)
        assert list(net.state_dict()) == names
        # The lengths are summed in another order; rope and the timestep's sinusoid are float32 in both.
        close(net(**arguments), expected, atol=1e-11)


def test_a_dora_run_is_known_merged_and_not_written_as_lora(tmp_path: Path) -> None:
    net, plain = adapted(layers=EVERYWHERE, dora=True)
    folder = run_folder(net, tmp_path, "lora: {rank: 3, alpha: 2.0, dora: true}")
    assert identify(folder).variant.startswith("DoRA for")
    file = read_lora(folder)
    total, reports = applied([(file, 1.0)], "merged")
    assert "DoRA, rank 3" in str(reports[0])
    add_to_network(plain, total)
    with torch.no_grad():
        close(plain(**inputs(plain)), net(**inputs(net)))
    for to in ("diffusers", "kohya", "ComfyUI", "SAT"):
        with pytest.raises(ValueError, match="a DoRA cannot be written as .* merge it into its base"):
            write_lora(file, tmp_path / "b.safetensors", to)
    for loras in ([(file, 0.5)], [(file, 1.0), (file, 1.0)]):
        with pytest.raises(ValueError, match="no strength but 1 and no sum"):
            applied(loras, "merged")
    lora = randomise(tiny("5b"))
    inject_lora(lora, 3, 2.0, EVERYWHERE)
    with pytest.raises(ValueError, match="it is a DoRA, your config has lora.dora=false"):
        start_adapters(lora, file, 1.0, lora_scales(lora))
    again = randomise(tiny("5b"))
    inject_lora(again, 3, 2.0, EVERYWHERE, dora=True)
    start_adapters(again, file, 1.0, lora_scales(again))
    with torch.no_grad():
        close(again(**inputs(again)), net(**inputs(net)))


@pytest.mark.parametrize("to", ["diffusers", "sat"])
def test_a_dora_is_exported_merged(to: str, tmp_path: Path) -> None:
    """The converter adds it to the stored weights; the network merges it by itself."""
    plain = case.network("5b")
    base = case.write_sat_transformer(tmp_path / "base", plain)
    net = copy.deepcopy(plain)
    inject_lora(net, 3, 2.0, EVERYWHERE, dora=True)
    randomise_adapters(net)
    folder = tmp_path / "run"
    folder.mkdir()
    dora = read_lora(run_folder(net, folder, "lora: {rank: 3, alpha: 2.0, dora: true}"))
    done = convert_model(base, tmp_path / "out", to, component="transformer", loras=[(dora, 1.0)])
    merge_lora(net)
    expected = {name: value for name, value in net.state_dict().items() if "pos_embed" not in name}
    reader = WeightsReader(done.output, "transformer", ema=False)
    found = {name: reader.tensor(name) for name in reader.tensors}
    if to == "diffusers":
        found = diffusers_to_sat(found)
    found = {name.removeprefix(PREFIX): value for name, value in found.items()}
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------------------------------- eight-bit base


METHODS = ["int8", "fp8", "torchao_int8", "torchao_fp8"]


def needs(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if method.startswith("torchao") and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed (pip install torchao runs this test)")
    # A ZeRO-3 engine of another test replaces it for the whole process, by one that knows no tensor subclasses.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_quantized_base_has_the_output_and_gradients_of_its_dequantised_weights(
    method: str, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(method, monkeypatch)
    net = randomise(tiny("5b"))
    assert quantize_base(net, method) == 8
    twin = randomise(tiny("5b"))
    for path, module in net.named_modules():
        if isinstance(module, EightBitLinear | TorchaoLinear):
            twin.get_submodule(path).weight.data.copy_(module.dequantised())
    for one in (net, twin):
        inject_lora(one, 3, 2.0, dora=dora, generator=torch.Generator().manual_seed(0))
        freeze_base(one)
        randomise_adapters(one)
        one.transformer.checkpoint_activations = dora  # as large models are trained
        one(**inputs(one)).square().mean().backward()
    with torch.no_grad():
        close(net(**inputs(net)), twin(**inputs(twin)), atol=2e-5)
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_casts_leave_the_eight_bits_and_checkpoints_leave_the_base_out(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(method, monkeypatch)
    net = randomise(tiny("5b"))
    quantize_base(net, method)
    inject_lora(net, 3)
    layer = net.transformer.layers[0].attention.dense.original
    before = layer.dequantised().clone()
    net.bfloat16()  # what DeepSpeed does
    assert torch.equal(layer.dequantised(), before)
    assert layer.bias.dtype == torch.bfloat16
    assert not [name for name in net.state_dict() if ".original." in name and "transformer.layers" in name]
    assert torch.isfinite(net(**inputs(net))).all()


def test_the_backward_pass_keeps_no_cast_copy_of_the_base() -> None:
    """Counted at the width of 5B: what lives between forward and backward has no weight in bfloat16."""
    kept = {}
    for method in (None, "int8", "fp8"):
        net = full("5b", num_layers=2, dtype=torch.bfloat16)
        if method is not None:
            quantize_base(net, method)
        inject_lora(net, 8)
        freeze_base(net)
        arguments = {
            "x": torch.empty(1, 1, 16, 8, 8, device="meta", dtype=torch.bfloat16),
            "timesteps": torch.zeros(1, device="meta"),
            "context": torch.empty(1, 226, 4096, device="meta", dtype=torch.bfloat16),
        }
        with LiveMemory() as memory:
            output = net(**arguments)
            kept[method] = memory.live_bytes
        del output
    weights = 2 * 12 * 3072**2 * 2
    # The rest is activations: the products before the scale and the bias are views or gone.
    assert kept["int8"] < kept[None] + 0.05 * weights and kept["fp8"] < kept[None] + 0.05 * weights


def test_the_plan_of_a_5b_lora_on_int8_is_what_its_tensors_take() -> None:
    config = load_config(
        [CONFIGS / "cogvideox_5b.yaml", CONFIGS / "lora.yaml"], ["lora.quantize_base=int8", "lora.rank=64"]
    )
    net = full("5b", dtype=torch.bfloat16)
    quantize_base(net, "int8")
    inject_lora(net, 64)
    counted = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
    tables = sum(t.nbytes for name, t in net.named_buffers() if "pos_embed" in name)
    kinds = training_phases(config, 1)["update"]
    planned = kinds["weights"] + kinds["frozen base in eight bits"]
    assert planned == pytest.approx(counted - tables, rel=1e-3)


def test_merging_into_eight_bits_is_refused() -> None:
    net = randomise(tiny("5b"))
    quantize_base(net, "int8")
    inject_lora(net, 3)
    with pytest.raises(ValueError, match="merged into the weights that they were made from"):
        merge_lora(net)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.quantize_base=int8"], "rounded weights cannot be trained.*Add configs/lora.yaml"),
        (["lora.rank=4", "lora.quantise_base=int8"], "did you mean lora.quantize_base"),
    ],
)
def test_a_quantized_base_without_a_lora_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([CONFIGS / "cogvideox_2b.yaml", CONFIGS / "sft.yaml"], overrides)


def test_torchao_under_zero_3_is_refused() -> None:
    overrides = ["lora.quantize_base=torchao_int8", "deepspeed.zero_optimization.stage=3"]
    with pytest.raises(ConfigError, match="use lora.quantize_base=int8, or stage 2"):
        load_config([CONFIGS / "cogvideox_2b.yaml", CONFIGS / "lora.yaml"], overrides)


def test_an_unknown_form_or_a_missing_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="lora.quantize_base='int4': expected null or one of int8, fp8"):
        quantize_base(tiny("5b"), "int4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchao_int8 needs torchao, .* or lora.quantize_base=int8"):
        quantize_base(tiny("5b"), "torchao_int8")
