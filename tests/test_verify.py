"""Verification passes for every published kind, and finds the first stage that a wrong tensor or flag reaches."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pipeline_case as case
import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_ins import sat_folder

from cogvideox.convert.stages import Stage, compute_in_float32, first_failure, format_stages
from cogvideox.convert.verify import verify
from cogvideox.model.lora import inject_lora
from cogvideox.weights.lora.low_rank import LowRank, add_to

KINDS = list(case.KINDS)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """kind -> (SAT folder, folder that diffusers wrote) of one model."""
    pytest.importorskip("diffusers")
    root, made = tmp_path_factory.mktemp("models"), {}

    def of(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            sat = case.write_sat(root / kind / "sat", kind)
            made[kind] = sat, case.write_diffusers(root / kind / "diffusers", kind)
        return made[kind]

    return of


@pytest.fixture
def copy_of(models, tmp_path: Path) -> Callable[[str], Path]:
    """kind -> a diffusers folder to damage."""
    return lambda kind: Path(shutil.copytree(models(kind)[1], tmp_path / "copy"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(state)
    save_file(state, folder / WEIGHTS)
    return folder


def edit_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# ------------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_itself_saved_agrees_with_sat_at_every_stage(kind: str, models) -> None:
    sat, diffusers = models(kind)
    for pair in ((sat, diffusers), (diffusers, sat)):
        stages = verify(*pair, "transformer")
        assert first_failure(stages) is None
        # float32 on both sides; values reach 9
        assert max(stage.max_difference - stage.known for stage in stages) < 3e-6
        noted = {stage.name for stage in stages if stage.note}
        assert noted == {"final modulation", "output"}
    names = [
        "time embedding",
        *["ofs embedding"] * (kind == "1.5_i2v"),
        "text projection",
        "patch projection",
    ]
    names += ["tokens and positions", "block 0", "block 1", "final norm", "final modulation", "output"]
    assert sorted(stage.name for stage in stages) == sorted(names)


def test_diffusers_eps_of_the_final_norm_is_shown_and_measured(models) -> None:
    """CONVENTIONS section 2: 2e-5 at the output. Diffusers with the published eps is the reference for the share."""
    stages = {stage.name: stage for stage in verify(*models("5b"), "transformer")}
    output, before = stages["output"], stages["final norm"]
    assert 5e-6 < output.known < 1e-4 and abs(output.max_difference - output.known) < 3e-6
    assert before.known == 0 and before.max_difference < 3e-6
    assert "eps is 1e-05 in diffusers, 1e-06 in the published code" in output.note


def test_the_vae_agrees_at_every_block(models) -> None:
    stages = verify(*[folder / "vae" for folder in models("2b")], "vae")
    # Relative where values are large: our VAE sums in another order than diffusers' (vae/decoder.py).
    assert max(stage.max_difference / max(1.0, stage.largest) for stage in stages) < 1e-5
    assert first_failure(stages) is None
    names = [stage.name for stage in stages]
    assert names[-2:] == ["encode: moments", "decode: video"]
    blocks = [
        name for name, module in case.autoencoder().named_modules() if type(module).__name__ == "ResBlock"
    ]
    assert set(blocks) < set(names) and len(blocks) == 4 + 2 + 2 + 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_are_computed_in_float32(dtype: torch.dtype, models, tmp_path: Path) -> None:
    """The same bf16 weights on both sides agree as float32 ones do; bf16 arithmetic would be 1e-2 apart."""
    sat = case.write_sat_transformer(tmp_path / "sat", case.network("1.5_i2v").to(dtype))
    diffusers = shutil.copytree(models("1.5_i2v")[1] / "transformer", tmp_path / "diffusers")
    edit_weights(diffusers, lambda state: state.update({k: v.to(dtype) for k, v in state.items()}))
    stages = verify(sat, diffusers, "transformer")
    assert first_failure(stages) is None
    assert max(stage.max_difference - stage.known for stage in stages) < 3e-6


@pytest.mark.parametrize("back", [False, True], ids=["SAT first", "diffusers first"])
def test_rounding_to_a_shorter_type_hides_nothing(
    back: bool, models, copy_of, tmp_path: Path, caplog
) -> None:
    """A conversion to bf16 is compared with the original rounded to bf16, so that the limits stay those of float32."""
    caplog.set_level("INFO", "cogvideox")
    original, folder = models("2b")[0], copy_of("2b") / "transformer"
    if back:
        original = models("2b")[1]
    edit_weights(folder, lambda state: state.update({k: v.bfloat16() for k, v in state.items()}))
    assert first_failure(verify(original, folder, "transformer")) is None
    assert "is compared as rounded to bfloat16" in caplog.text
    one_ulp = 1 + 2**-7
    edit_weights(folder, lambda state: state["transformer_blocks.1.attn1.to_v.weight"].mul_(one_ulp))
    assert first_failure(verify(original, folder, "transformer")).name == "block 1"


def test_the_weights_are_as_before_after_a_widened_forward() -> None:
    net = case.network("5b").bfloat16()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compute_in_float32(net.transformer)
    x = torch.randn(1, 3, 48)
    assert net.transformer.layers[0].mlp(x).dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert {value.dtype for value in net.state_dict().values()} == {torch.bfloat16}


def test_two_files_under_sat_names_need_no_diffusers(models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    sat, _ = models("5b_i2v")
    save_file(
        {k: v.contiguous() for k, v in case.published_state(case.network("5b_i2v")).items()},
        tmp_path / "w.safetensors",
    )
    stages = verify(sat, tmp_path / "w.safetensors", "transformer")
    assert {stage.max_difference for stage in stages} == {0.0}
    assert not any(stage.note for stage in stages)


def test_a_file_under_diffusers_names_without_its_config_runs_here_and_says_so(
    models, tmp_path: Path, caplog
) -> None:
    caplog.set_level("INFO", "cogvideox")
    sat, diffusers = models("2b")
    for part, name in (("transformer", "t.safetensors"), ("vae", "v.safetensors")):
        file = shutil.copyfile(diffusers / part / WEIGHTS, tmp_path / name)
        assert {stage.max_difference for stage in verify(file, sat, part)} == {0.0}
        assert f"{name} has no config.json: this project's network runs it" in caplog.text


def test_a_merged_lora_is_added_to_the_original(models, tmp_path: Path) -> None:
    sat, _ = models("5b")
    g = torch.Generator().manual_seed(3)
    module = "transformer_blocks.1.attn1.to_k"
    lora = {module: LowRank(torch.randn(2, 48, generator=g), torch.randn(48, 2, generator=g), 0.5)}
    state = case.network("5b").state_dict()
    save_file(
        add_to(state, {module: LowRank(lora[module].down, 0.3 * lora[module].up, 0.5)}, "SAT"),
        tmp_path / "m.safetensors",
    )
    assert first_failure(verify(sat, tmp_path / "m.safetensors", "transformer", loras=[(lora, 0.3)])) is None
    assert (
        first_failure(verify(models("5b")[1], tmp_path / "m.safetensors", "transformer", loras=[(lora, 0.3)]))
        is None
    )
    assert first_failure(verify(sat, tmp_path / "m.safetensors", "transformer")).name == "block 1"


def test_a_checkpoint_with_its_lora_inside_is_compared_merged(tmp_path: Path) -> None:
    """SAT's LoRA runs store the full model: ``.original.`` and matrices."""
    net = case.network("5b")
    inject_lora(net, 2, alpha=2.0, layers=["dense"], transformer_layers=[0])
    net.transformer.layers[0].attention.dense.matrix_B[0].data.normal_()
    run = sat_folder(tmp_path / "run", case.published_state(net), tag="1")
    dense = net.transformer.layers[0].attention.dense
    lora = {
        "transformer_blocks.0.attn1.to_out.0": LowRank(dense.matrix_A[0].data, dense.matrix_B[0].data, 1.0)
    }
    plain = case.network("5b").state_dict()
    plain["transformer.layers.0.attention.dense.weight"] += dense.matrix_B[0].data @ dense.matrix_A[0].data
    save_file(plain, tmp_path / "merged.safetensors")
    assert (
        first_failure(verify(run, tmp_path / "merged.safetensors", "transformer", loras=[(lora, 1.0)]))
        is None
    )
    with pytest.raises(ValueError, match="with LoRA .rank 2.: verify compares merged weights"):
        verify(run, tmp_path / "merged.safetensors", "transformer")


# ------------------------------------------------------------------------------------------------ differences found


@pytest.mark.parametrize(
    "kind, name, stage",
    [
        ("2b", "patch_embed.text_proj.weight", "text projection"),
        ("1.5", "patch_embed.proj.weight", "patch projection"),
        ("5b_i2v", "patch_embed.pos_embedding", "tokens and positions"),
        ("5b", "time_embedding.linear_2.bias", "time embedding"),
        ("1.5_i2v", "ofs_embedding.linear_1.weight", "ofs embedding"),
        ("5b", "transformer_blocks.0.attn1.norm_k.weight", "block 0"),
        ("5b", "transformer_blocks.1.norm2.linear.bias", "block 1"),
        ("2b", "norm_final.bias", "final norm"),
        ("2b", "norm_out.linear.weight", "final modulation"),
        ("1.5", "proj_out.bias", "output"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_found_at_its_stage(kind: str, name: str, stage: str, models, copy_of) -> None:
    def swap_halves(state: dict[str, torch.Tensor]) -> None:
        state[name] = torch.cat(state[name].chunk(2, dim=-1)[::-1], dim=-1).contiguous()

    folder = edit_weights(copy_of(kind) / "transformer", swap_halves).parent
    failed = first_failure(verify(models(kind)[0], folder, "transformer"))
    assert failed.name == stage
    assert not failed.passed and failed.max_difference > 100 * failed.limit


@pytest.mark.parametrize(
    "kind, changes, stage",
    [
        ("2b", {"spatial_interpolation_scale": 1.0}, "tokens and positions"),
        ("5b", {"use_rotary_positional_embeddings": False}, "tokens and positions"),
        ("2b", {"use_rotary_positional_embeddings": True}, "tokens and positions"),
        ("1.5", {"norm_eps": 1e-2}, "block 0"),
        ("5b", {"flip_sin_to_cos": False}, "time embedding"),
    ],
)
def test_a_wrong_flag_is_found_at_its_stage(kind: str, changes: dict, stage: str, models, copy_of) -> None:
    folder = edit_config(copy_of(kind) / "transformer", **changes)
    assert first_failure(verify(models(kind)[0], folder, "transformer")).name == stage


@pytest.mark.parametrize(
    "name",
    [
        "encoder.down_blocks.1.resnets.0.conv2.conv.weight",
        "decoder.mid_block.resnets.1.norm1.conv_y.conv.bias",
    ],
)
def test_a_wrong_tensor_of_the_vae_is_found_at_its_block(name: str, models, copy_of) -> None:
    folder = edit_weights(copy_of("5b") / "vae", lambda state: state[name].neg_()).parent
    expected = "encoder.down.1.block.0" if name.startswith("encoder") else "decoder.mid.block_2"
    assert first_failure(verify(models("5b")[0], folder, "vae")).name == expected


def test_nan_does_not_pass(models, copy_of) -> None:
    folder = edit_weights(
        copy_of("5b") / "transformer", lambda state: state["proj_out.bias"].fill_(torch.nan)
    )
    failed = first_failure(verify(models("5b")[0], folder, "transformer"))
    assert failed.name == "output" and "nan" in format_stages([failed])


# ----------------------------------------------------------------------------------------------------- bad inputs


def test_another_variant_is_refused_before_anything_runs(models) -> None:
    for one, other in (("5b", "1.5"), ("5b", "5b_i2v"), ("1.5", "1.5_i2v")):
        with pytest.raises(ValueError, match="not two forms of one model: .*channels in.* is .*channels in"):
            verify(models(one)[0], models(other)[1], "transformer")


def test_a_lost_learned_table_is_refused(models, copy_of) -> None:
    folder = copy_of("5b_i2v") / "transformer"
    edit_weights(folder, lambda state: state.pop("patch_embed.pos_embedding"))
    with pytest.raises(ValueError, match="not two forms of one model"):
        verify(models("5b_i2v")[0], folder, "transformer")


def test_the_fixed_table_of_2b_does_not_belong_in_diffusers(models, copy_of) -> None:
    folder = copy_of("2b") / "transformer"
    edit_weights(folder, lambda state: state.update({"patch_embed.pos_embedding": torch.zeros(1, 244, 48)}))
    with pytest.raises(
        ValueError, match="1 unexpected keys for diffusers.*, first patch_embed.pos_embedding"
    ):
        verify(models("2b")[0], folder, "transformer")


def test_keys_that_diffusers_misses_are_named(models, copy_of) -> None:
    folder = copy_of("5b") / "transformer"
    edit_weights(folder, lambda state: state.pop("transformer_blocks.1.attn1.to_k.bias"))
    with pytest.raises(ValueError, match="1 missing keys .* first transformer_blocks.1.attn1.to_k.bias"):
        verify(models("5b")[0], folder, "transformer")


def test_a_table_size_that_config_json_gets_wrong_is_named(models, copy_of) -> None:
    folder = edit_config(copy_of("5b_i2v") / "transformer", sample_frames=49)
    with pytest.raises(ValueError, match="has 244 rows, but config.json says 226 .* sample_frames"):
        verify(models("5b_i2v")[0], folder, "transformer")


def test_a_component_that_one_side_lacks_is_an_error(models, tmp_path: Path) -> None:
    sat, diffusers = models("5b")
    part = shutil.copytree(diffusers / "transformer", tmp_path / "only" / "transformer").parent
    with pytest.raises(ValueError, match="no weights for the vae in this folder"):
        verify(sat, part, "vae")
    with pytest.raises(ValueError, match="expected the weights of a vae, this is"):
        verify(sat, part / "transformer" / WEIGHTS, "vae")
    with pytest.raises(ValueError, match="no component 'scheduler'; expected transformer or vae"):
        verify(sat, diffusers, "scheduler")


def test_a_missing_diffusers_says_what_to_install_or_to_skip(models, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="`pip install diffusers`.*--no-verify"):
        verify(*models("5b"), "transformer")


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_names_the_first_difference_and_shortens_many_stages() -> None:
    stages = [Stage(f"block {i}", 1e-7, 2.0) for i in range(42)]
    stages.append(Stage("output", 3e-5, 1.0, 2.5e-5, "the reason"))
    text = format_stages(stages)
    assert text.splitlines()[0].startswith("43 stages in float32: they agree, at most 5.0e-06 apart (output")
    assert len(text.splitlines()) == 4 and "2.5e-05 of it known*" in text and text.endswith("* the reason")
    stages[7] = dataclasses.replace(stages[7], max_difference=0.5)
    text = format_stages(stages)
    assert "DIFFERENT from 'block 7' on: 5.0e-01 apart, expected 2.0e-05" in text
    columns = {line.index("e-0") for line in text.splitlines()[2:4]}
    assert len(columns) == 1 and len(format_stages(stages, limit=50).splitlines()) == 2 + 43 + 1
