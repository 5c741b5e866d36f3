"""Models in and out of every format: bit-identical both ways, configured by their shapes, refused in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pipeline_case as case
import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_ins import sat_folder, sparse_safetensors
from torch import Tensor
from transformer_cases import KINDS, full, tiny

from cogvideox.command_line import run_door
from cogvideox.convert.diffusers_config import read_sincos_table
from cogvideox.convert.models import convert_model, parse_size, plan_model
from cogvideox.weights import provenance
from cogvideox.weights.files.headers import read_headers
from cogvideox.weights.geometry import OPTIONAL_KEYS
from cogvideox.weights.identify import identify
from cogvideox.weights.lora.file import read_lora
from cogvideox.weights.reader import WeightsReader
from scripts import convert_weights

PREFIX = "model.diffusion_model."
TABLE = PREFIX + "mixins.pos_embed.pos_embedding"
PUBLISHED = {
    "2b": "CogVideoX-2B",
    "5b": "CogVideoX-5B",
    "5b_i2v": "CogVideoX-5B-I2V",
    "1.5": "CogVideoX1.5-5B",
    "1.5_i2v": "CogVideoX1.5-5B-I2V",
}
SIZE = {"sample_frames": case.FRAMES, "sample_height": case.HEIGHT // 8, "sample_width": case.WIDTH // 8}
"""Of the learned table of ``pipeline_case``: its rows alone do not tell."""


def main(argv: list[str]) -> int:
    return run_door(convert_weights.main, argv)


def known(kind: str) -> dict:
    return SIZE if kind == "5b_i2v" else {}


def source(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    return case.write_sat_transformer(folder, case.network(kind).to(dtype))


def tensors(path: Path, component: str = "transformer") -> dict[str, Tensor]:
    reader = WeightsReader(path, component, ema=False)
    return {name: reader.tensor(name).clone() for name in reader.tensors}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def required(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if not OPTIONAL_KEYS.fullmatch(name.removeprefix(PREFIX))}


def transformer(source: Path, output: Path, to: str, **arguments):
    return convert_model(source, output, to, component="transformer", **arguments)


# ------------------------------------------------------------------------------------------------- both ways, exactly


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_to_diffusers_and_back_is_bit_identical(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    sat = source(tmp_path / "sat", kind, dtype)
    transformer(sat, tmp_path / "diffusers", "diffusers", known=known(kind), max_shard_bytes=60_000)
    assert len(list((tmp_path / "diffusers").glob("*.safetensors"))) > 2
    transformer(tmp_path / "diffusers", tmp_path / "back", "sat")
    assert_same(tensors(tmp_path / "back"), required(tensors(sat)))  # 2B's table, computed anew, too
    transformer(tmp_path / "back", tmp_path / "again", "diffusers", max_shard_bytes=60_000)
    first, again = ((tmp_path / name / "config.json").read_text() for name in ("diffusers", "again"))
    assert again == first
    assert_same(tensors(tmp_path / "again"), tensors(tmp_path / "diffusers"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vae_to_diffusers_and_back_is_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    vae = case.autoencoder().to(dtype)
    sat = case.write_sat_vae(tmp_path / "sat", vae)
    convert_model(
        sat, tmp_path / "diffusers", "diffusers", component="vae", known={"scaling_factor": 1.15258426}
    )
    convert_model(tmp_path / "diffusers", tmp_path / "back", "sat", component="vae")
    assert_same(tensors(tmp_path / "back" / "3d-vae.pt", "vae"), vae.state_dict())
    done = convert_model(tmp_path / "back", tmp_path / "again", "diffusers", component="vae")
    assert json.loads((done.output / "config.json").read_text())["scaling_factor"] == 1.15258426


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_file_becomes_our_network(tmp_path: Path, kind: str) -> None:
    """The source is written by diffusers, so the names and the split tensors are theirs."""
    from transformer_cases import diffusers_twin

    net = case.network(kind)
    diffusers_twin(net).float().save_pretrained(tmp_path / "theirs")  # it makes its table in float64
    transformer(tmp_path / "theirs", tmp_path / "x.safetensors", "safetensors")
    ours = load_file(tmp_path / "x.safetensors")
    if kind == "2b":  # it stores no table, SAT's files do
        del ours[TABLE]
    assert_same(ours, {PREFIX + name: value for name, value in net.state_dict().items()})


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_classes_open_the_folder_without_a_missing_or_unexpected_key(
    tmp_path: Path, kind: str
) -> None:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    case.write_sat(tmp_path / "sat", kind)
    (tmp_path / "size.json").write_text(json.dumps(SIZE))
    arguments = [str(tmp_path / "sat"), str(tmp_path / "out"), "--to", "diffusers", "--no-verify"]
    assert main([*arguments, "--config", str(tmp_path / "size.json")]) == 0
    for model, part in ((CogVideoXTransformer3DModel, "transformer"), (AutoencoderKLCogVideoX, "vae")):
        net, info = model.from_pretrained(tmp_path / "out" / part, output_loading_info=True)
        assert not any(info.values()), info
        written = json.loads((tmp_path / "out" / part / "config.json").read_text())
        assert written.keys() - {"_class_name", "_diffusers_version"} == {
            key for key in net.config if not key.startswith("_")
        }  # nothing is left to the defaults of a version


def test_dtypes_change_on_request_only(tmp_path: Path) -> None:
    sat = source(tmp_path / "sat", "5b", torch.bfloat16)
    before = required(tensors(sat))
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        done = transformer(sat, tmp_path / name, "sat", dtype=dtype)
        assert_same(required(tensors(done.output)), {name: t.to(dtype) for name, t in before.items()})
    state = torch.load(sat / "1" / "mp_rank_00_model_states.pt", weights_only=False)
    state["module"][PREFIX + "time_embed.0.bias"][0] = 1e38
    torch.save(state, sat / "1" / "mp_rank_00_model_states.pt")
    with pytest.raises(
        ValueError, match="time_embed.0.bias has values up to 9.97e.37, float16 ends at 65504"
    ):
        transformer(sat, tmp_path / "overflow", "diffusers", dtype=torch.float16)
    assert not (tmp_path / "overflow").exists() and not list(tmp_path.glob(".*"))


def test_the_same_source_makes_the_same_files(tmp_path: Path) -> None:
    sat = source(tmp_path / "sat", "2b")
    for to in ("diffusers", "sat"):
        for name in ("a", "b"):
            transformer(sat, tmp_path / name / to, to)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


# ---------------------------------------------------------------------------------------- configurations from shapes


@pytest.mark.parametrize("kind", KINDS)
def test_full_size_shapes_give_the_published_names_and_configurations(
    tmp_path: Path, kind: str, reference: Path
) -> None:
    published = json.loads((reference / "keys" / f"diffusers_{PUBLISHED[kind]}.json").read_text())
    names = json.loads((reference / "keys" / f"sat_{PUBLISHED[kind]}.json").read_text())["keys"]
    if kind == "2b":  # its table is data that has to be looked at: see the test of the table
        del names[TABLE]
    file = sparse_safetensors(tmp_path / "sat.safetensors", {name: tuple(s) for name, s in names.items()})
    plan = plan_model(file, "diffusers", component="transformer")
    assert {e.name: list(e.shape) for e in plan.entries} == published["keys"]
    assert published["config"].items() <= plan.config.items()
    assert plan.variant.name == PUBLISHED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_full_size_networks_are_those_that_diffusers_builds_from_the_configuration(
    tmp_path: Path, kind: str
) -> None:
    from diffusers import CogVideoXTransformer3DModel

    shapes = {PREFIX + name: tuple(tensor.shape) for name, tensor in full(kind).state_dict().items()}
    if kind == "5b_i2v":
        shapes[PREFIX + "transformer.position_embeddings.weight"] = (64, 3072)
    file = sparse_safetensors(tmp_path / "sat.safetensors", shapes)
    plan = plan_model(file, "diffusers", component="transformer")
    config = {key: value for key, value in plan.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        theirs = CogVideoXTransformer3DModel(**config).state_dict()
    assert {e.name: e.shape for e in plan.entries} == {n: tuple(t.shape) for n, t in theirs.items()}
    assert {e.dtype for e in plan.entries} == {torch.bfloat16}


def test_the_vaes_configuration_is_the_published_one(tmp_path: Path, reference: Path) -> None:
    published = json.loads((reference / "keys" / "diffusers_vae.json").read_text())
    names = json.loads((reference / "keys" / "sat_vae.json").read_text())["keys"]
    path = tmp_path / "CogVideoX-2b-sat" / "vae" / "3d-vae.safetensors"
    plan = plan_model(
        sparse_safetensors(path, {name: tuple(shape) for name, shape in names.items()}),
        "diffusers",
        component="vae",
    )
    assert {e.name: list(e.shape) for e in plan.entries} == published["keys"]
    assert published["config"].items() <= plan.config.items()
    assert "scaling_factor 1.15258, that of CogVideoX-2B, by its path" in plan.notes


@pytest.mark.parametrize(
    ("grid", "text", "dtype"),
    [((3, 4, 6), 5, torch.float32), ((13, 30, 45), 226, torch.float16), ((2, 1, 4), 7, torch.bfloat16)],
)
def test_a_fixed_table_tells_its_size(grid: tuple[int, int, int], text: int, dtype: torch.dtype) -> None:
    table = tiny("2b").mixins["pos_embed"].table(grid, text).to(dtype)
    assert read_sincos_table(table) == {
        "max_text_seq_length": text,
        "sample_frames": (grid[0] - 1) * 4 + 1,
        "sample_height": grid[1] * 2,
        "sample_width": grid[2] * 2,
    }


def test_what_neither_shapes_nor_files_tell_is_asked_for_or_reported(tmp_path: Path) -> None:
    bare = {PREFIX + name: value for name, value in case.network("5b").state_dict().items()}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(
        ValueError, match="whether its position is rotary .* name its configuration with --config"
    ):
        plan_model(tmp_path / "bare.safetensors", "diffusers", component="transformer")
    learned = source(tmp_path / "i2v", "5b_i2v")
    with pytest.raises(ValueError, match="table has 244 rows, but 226 text tokens and 49 frames .* --config"):
        plan_model(learned, "diffusers", component="transformer")
    plan = plan_model(source(tmp_path / "5b", "5b"), "diffusers", component="transformer")
    assert any("taken from CogVideoX-5B: sample_width=90, sample_height=60" in note for note in plan.notes)
    vae = case.write_sat_vae(tmp_path / "vae", case.autoencoder())
    with pytest.raises(ValueError, match="nothing beside it tells the latent scale.* give --scaling-factor"):
        plan_model(vae, "diffusers", component="vae")


def test_a_yaml_configuration_tells_what_shapes_do_not(tmp_path: Path) -> None:
    """configs/tiny_t2v.yaml with the network of ``pipeline_case``."""
    from cogvideox.config import load_config, save_config

    config = load_config(["configs/tiny_t2v.yaml"])
    section, net = config.model.transformer, case.network("5b")
    section.num_frames, section.latent_height, section.latent_width, section.text_length = 17, 10, 12, 32
    section.hidden_size, section.num_attention_heads, section.num_layers = 48, 3, 2
    save_config(config, tmp_path / "ours.yaml")
    save_file({PREFIX + name: t for name, t in net.state_dict().items()}, tmp_path / "bare.safetensors")
    arguments = [
        str(tmp_path / "bare.safetensors"),
        str(tmp_path / "out"),
        "--to",
        "diffusers",
        "--no-verify",
    ]
    assert main([*arguments, "--config", str(tmp_path / "ours.yaml")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = ("sample_frames", "sample_height", "sample_width", "max_text_seq_length")
    assert [written[key] for key in stated] == [17, 10, 12, 32] and written[
        "use_rotary_positional_embeddings"
    ]


# --------------------------------------------------------------------------------------- other models, dead keys, EMA


def test_other_models_in_the_file_are_ignored_and_named(tmp_path: Path) -> None:
    state = case.published_state(case.network("5b"))
    state |= {f"first_stage_model.{n}": t for n, t in case.autoencoder().state_dict().items()}
    state["conditioner.embedders.0.transformer.shared.weight"] = torch.zeros(4, 4)
    sat_folder(tmp_path / "all", state)
    done = transformer(tmp_path / "all", tmp_path / "out", "diffusers")
    alone = transformer(source(tmp_path / "sat", "5b"), tmp_path / "alone", "diffusers")
    assert_same(tensors(done.output), tensors(alone.output))
    text = "\n".join(done.lines)
    assert "ignored, of other models in the file" in text and "conditioner.embedders" in text
    assert "left out, without use: transformer.position_embeddings.weight" in text
    vae = convert_model(tmp_path / "all", tmp_path / "vae.pt", "sat", component="vae")
    assert_same(tensors(vae.output, "vae"), case.autoencoder().state_dict())


def test_a_runs_averaged_weights_are_taken_unless_refused(tmp_path: Path) -> None:
    sat = source(tmp_path / "run", "5b", torch.bfloat16)
    average = {PREFIX + "time_embed.0.bias": torch.full((20,), 1 / 3)}
    save_file(average, sat / "1" / "ema_rank_00.safetensors")
    name, rest = PREFIX + "time_embed.0.bias", PREFIX + "time_embed.2.bias"
    for arguments, expected in (
        ([], torch.full((20,), 1 / 3).bfloat16()),
        (["--no-ema"], tensors(sat)[name]),
    ):
        assert (
            main([str(sat), str(tmp_path / "out.pt"), "--to", "sat", "--force", "--no-verify", *arguments])
            == 0
        )
        found = tensors(tmp_path / "out.pt")
        assert torch.equal(found[name], expected) and torch.equal(found[rest], tensors(sat)[rest])


def test_the_vae_of_a_pipeline_gets_the_scale_its_transformer_was_trained_with(tmp_path: Path) -> None:
    trained = source(tmp_path / "run", "5b")
    (trained / "1" / "state.json").write_text('{"step": 7}')
    (trained / "1" / "config.yaml").write_text("vae: {scale_factor: 1.159}")
    vae = convert_model(
        case.write_sat_vae(tmp_path / "sat", case.autoencoder()), tmp_path / "vae", "diffusers", component="vae",
        known={"scaling_factor": 0.7},
    ).output  # fmt: skip
    plans = [plan_model(trained, "diffusers", component="transformer", known=known("5b"))]
    plans.append(plan_model(vae, "diffusers", component="vae", transformer=plans[0]))
    assert plans[1].config["scaling_factor"] == 1.159
    assert any("the VAE's own configuration says 0.7" in note for note in plans[1].notes)
    asked = plan_model(vae, "diffusers", component="vae", transformer=plans[0], known={"scaling_factor": 0.5})
    assert asked.config["scaling_factor"] == 0.5


def test_files_say_where_they_come_from(tmp_path: Path) -> None:
    state = case.published_state(case.network("5b"))
    record = {"step": 7, "seed": 3, "source": "not inherited"}
    sat_folder(tmp_path / "sat", state, tag="1", **{provenance.KEY: json.dumps(record)})
    file = tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt"
    for to, written in (("diffusers", "diffusion_pytorch_model.safetensors"), ("sat", "1/" + file.name)):
        done = transformer(tmp_path / "sat", tmp_path / f"to_{to}", to)
        found = provenance.read(read_headers([done.output / written]).metadata)
        assert (found["step"], found["seed"]) == (7, 3)
        assert found["source_sha256"] == provenance.sha256([file]) and found["source"] == str(file)
    assert identify(tmp_path / "to_diffusers").provenance["step"] == 7


# ----------------------------------------------------------------------------------------------------------------- LoRA


def with_lora(state: dict[str, Tensor], rank: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A SAT checkpoint with LoRA on ``dense`` of every layer, and the same weights merged by W + B A / rank."""
    trained, merged = dict(state), dict(state)
    generator = torch.Generator().manual_seed(5)
    for layer in range(2):
        place = f"{PREFIX}transformer.layers.{layer}.attention.dense."
        weight, bias = trained.pop(place + "weight"), trained.pop(place + "bias")
        down, up = (
            torch.randn(shape, generator=generator)
            for shape in ((rank, weight.shape[1]), (weight.shape[0], rank))
        )
        trained |= {
            place + "original.weight": weight,
            place + "original.bias": bias,
            place + "matrix_A.0": down,
            place + "matrix_B.0": up,
        }
        merged[place + "weight"] = weight + up @ down / rank
    return trained, merged


def test_a_lora_inside_a_checkpoint_is_merged_written_alone_or_refused_but_never_lost(tmp_path: Path) -> None:
    trained, merged = with_lora(case.published_state(case.network("5b")))
    sat_folder(tmp_path / "run", trained)
    with pytest.raises(ValueError, match="its LoRA would be lost. Give --merge .* or --component lora"):
        transformer(tmp_path / "run", tmp_path / "out", "sat")
    done = transformer(tmp_path / "run", tmp_path / "out", "sat", merge=True)
    found = tensors(done.output)
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)  # float32 sums in another order
    assert any("rank 2" in line and "strength 1" in line for line in done.lines)
    alone = tmp_path / "lora.safetensors"
    assert main([str(tmp_path / "run"), str(alone), "--to", "diffusers", "--component", "lora"]) == 0
    base = sat_folder(tmp_path / "base", case.published_state(case.network("5b")))
    assert main([str(base), str(tmp_path / "both"), "--to", "sat", "--lora", f"{alone}:1.0"]) == 0
    for name, tensor in tensors(tmp_path / "both").items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)


def test_loras_are_merged_with_their_strengths_under_either_naming(tmp_path: Path) -> None:
    trained, merged = with_lora(case.published_state(case.network("5b")))
    base = source(tmp_path / "base", "5b")
    sat_folder(tmp_path / "run", trained)
    lora = read_lora(tmp_path / "run")
    half = transformer(base, tmp_path / "half", "diffusers", loras=[(lora, 0.25), (lora, 0.25)])
    before = tensors(transformer(base, tmp_path / "plain", "diffusers").output)
    after = transformer(tmp_path / "plain", tmp_path / "again", "diffusers", loras=[(lora, 0.5)])
    name, sat = "transformer_blocks.1.attn1.to_out.0.weight", "transformer.layers.1.attention.dense.weight"
    expected = (before[name] + merged[PREFIX + sat]) / 2
    for done in (half, after):
        torch.testing.assert_close(tensors(done.output)[name], expected, rtol=0, atol=1e-6)
        assert torch.equal(tensors(done.output)["proj_out.weight"], before["proj_out.weight"])


def test_a_lora_run_is_merged_into_the_model_of_its_configuration(tmp_path: Path) -> None:
    state = case.published_state(case.network("5b"))
    trained, merged = with_lora(state)
    base = sat_folder(tmp_path / "base", state)
    matrices = {name: tensor for name, tensor in trained.items() if ".matrix_" in name}
    run = sat_folder(tmp_path / "run", matrices)
    arguments = [
        str(run),
        str(tmp_path / "out"),
        "--to",
        "sat",
        "--merge",
        "--lora-alpha",
        "1",
        "--no-verify",
    ]
    assert main(arguments) == 2  # nothing says what it was trained on
    (run / "config.yaml").write_text(f"load: {{transformer: {base}}}\nlora: {{rank: 2, alpha: 1}}\n")
    assert main(arguments) == 0
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("to", "start"), [("kohya", "lora_"), ("comfyui", "diffusion_model.")])
def test_a_lora_goes_to_the_formats_of_other_tools(tmp_path: Path, to: str, start: str) -> None:
    trained, _ = with_lora(case.published_state(case.network("5b")))
    sat_folder(tmp_path / "run", trained)
    output = tmp_path / "x.safetensors"
    assert main([str(tmp_path / "run"), str(output), "--to", to]) == 0
    assert all(name.startswith(start) for name in load_file(output))
    again, back = read_lora(tmp_path / "run").modules, read_lora(output).modules
    for module in again:
        torch.testing.assert_close(back[module].update(), again[module].update(), rtol=0, atol=1e-6)


def test_a_lora_for_another_network_is_refused(tmp_path: Path) -> None:
    trained, _ = with_lora(case.published_state(case.network("5b")))
    sat_folder(tmp_path / "run", trained)
    lora = read_lora(tmp_path / "run")
    for changes, message in (
        ({"num_layers": 1}, "changes 1 weights"),
        ({"hidden_size": 96}, "its update is"),
    ):
        net = case.network("5b", **changes)
        sat_folder(tmp_path / f"net{len(changes)}{message[:3]}", case.published_state(net))
        with pytest.raises(ValueError, match=message):
            transformer(
                tmp_path / f"net{len(changes)}{message[:3]}", tmp_path / "out", "sat", loras=[(lora, 1.0)]
            )
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(tmp_path: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What the command says; it must leave nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main([*arguments, "--no-verify"]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    return said


def test_missing_and_unknown_tensors_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = case.published_state(case.network("5b"))
    out = str(tmp_path / "out")
    unknown = dict(state)
    unknown[PREFIX + "time_embd.0.weight"] = unknown.pop(PREFIX + "time_embed.2.weight")
    sat_folder(tmp_path / "unknown", unknown)
    said = refused(tmp_path, capsys, str(tmp_path / "unknown"), out, "--to", "sat")
    assert "1 tensors are unknown" in said and "the nearest known is time_embed.0.weight" in said
    missing = {name: t for name, t in state.items() if "layers.1.mlp" not in name}
    sat_folder(tmp_path / "missing", missing)
    said = refused(tmp_path, capsys, str(tmp_path / "missing"), out, "--to", "diffusers")
    assert "4 tensors of 2 layers are missing, first transformer.layers.1.mlp.dense_h_to_4h.weight" in said
    vae = case.autoencoder().state_dict()
    save_file({n: t for n, t in vae.items() if "decoder.up.0" not in n}, tmp_path / "vae.safetensors")
    said = refused(tmp_path, capsys, str(tmp_path / "vae.safetensors"), out, "--to", "sat")
    assert "are missing, first decoder.up.0" in said


def test_nan_is_found_when_asked_for_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    net = case.network("5b")
    net.time_embed[0].bias.data[3] = torch.nan
    sat = case.write_sat_transformer(tmp_path / "sat", net)
    arguments = (str(sat), str(tmp_path / "out"), "--to", "diffusers")
    said = refused(tmp_path, capsys, *arguments, "--check")
    assert "1 tensors hold NaN or infinity" in said and "time_embed.0.bias" in said
    assert main([*arguments, "--no-verify"]) == 0


def test_bad_requests_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sat = source(tmp_path / "sat", "5b")
    out = str(tmp_path / "out")
    assert "does not exist" in refused(tmp_path, capsys, str(tmp_path / "none"), out, "--to", "sat")
    other = str(source(tmp_path / "other", "5b"))
    assert "exists: choose" in refused(tmp_path, capsys, str(sat), other, "--to", "sat")
    said = refused(tmp_path, capsys, str(sat), str(tmp_path), "--to", "sat", "--force")
    assert "which is being read" in said
    said = refused(tmp_path, capsys, str(sat), out, "--to", "sat", "--max-shard-size", "5 bananas")
    assert "expected a size such as 5GB" in said
    assert "expected the weights of a vae" in refused(
        tmp_path, capsys, str(sat), out, "--to", "sat", "--component", "vae"
    )
    assert "there is no LoRA" in refused(tmp_path, capsys, str(sat), out, "--to", "sat", "--merge")
    t5 = case.write_t5(tmp_path / "t5")
    assert "expected a transformer, a VAE or a LoRA" in refused(tmp_path, capsys, str(t5), out, "--to", "sat")
    file = sat / "1" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:10_000])
    assert "truncated" in refused(tmp_path, capsys, str(sat), out, "--to", "sat")
    file.write_bytes(b"")
    assert "0 bytes" in refused(tmp_path, capsys, str(sat), out, "--to", "sat")


def test_sizes_of_shards_are_read_as_diffusers_reads_them() -> None:
    assert [parse_size(text) for text in ("5GB", "500MB", "1.5gb", "2GiB", "77")] == [
        5 * 10**9, 500 * 10**6, 15 * 10**8, 2**31, 77,
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ pipelines


@pytest.mark.parametrize("kind", ["2b", "1.5_i2v"])
def test_a_pipeline_folder_has_the_constants_of_its_kind(tmp_path: Path, kind: str) -> None:
    import diffusers

    case.write_sat(tmp_path / "sat", kind)
    assert main([str(tmp_path / "sat"), str(tmp_path / "out"), "--to", "diffusers", "--no-verify"]) == 0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    image = kind == "1.5_i2v"
    assert index["_class_name"] == ("CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline")
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(tmp_path / "out" / "scheduler")
    assert index["scheduler"][1] == ("CogVideoXDPMScheduler" if image else "CogVideoXDDIMScheduler")
    a = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)
    shifted = (a / (3 - 2 * a) if kind == "2b" else a).sqrt()
    expected = ((shifted - shifted[-1]) * shifted[0] / (shifted[0] - shifted[-1])).square()
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=0, atol=1e-9)
    vae = json.loads((tmp_path / "out" / "vae" / "config.json").read_text())
    assert vae["scaling_factor"] == case.LATENT_SCALE[kind] and vae[
        "invert_scale_latents"
    ] == kind.startswith("1.5")


def test_a_pipeline_goes_to_sat_and_back_with_its_text_encoder(tmp_path: Path) -> None:
    case.write_sat(tmp_path / "sat", "5b")
    arguments = {"--copy": False, "--link": True}
    for option, linked in arguments.items():
        theirs, back = tmp_path / f"theirs{option}", tmp_path / f"back{option}"
        assert main([str(tmp_path / "sat"), str(theirs), "--to", "diffusers", "--no-verify", option]) == 0
        assert (theirs / "tokenizer" / "spiece.model").is_symlink() == linked
        assert main([str(theirs), str(back), "--to", "sat", "--no-verify", "--copy"]) == 0
        for file in (tmp_path / "sat" / "t5-v1_1-xxl").iterdir():
            assert (back / "t5-v1_1-xxl" / file.name).read_bytes() == file.read_bytes()
        assert_same(tensors(back / "transformer"), required(tensors(tmp_path / "sat" / "transformer")))
        assert sorted(p.name for p in back.iterdir()) == ["t5-v1_1-xxl", "transformer", "vae"]
        assert identify(back).variant == identify(tmp_path / "sat").variant


def test_a_pipeline_is_made_of_parts_and_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sat = source(tmp_path / "t", "5b")
    vae = case.write_sat_vae(tmp_path / "v", case.autoencoder())
    t5 = case.write_t5(tmp_path / "t5")
    out = [str(sat), str(tmp_path / "out"), "--to", "diffusers", "--no-verify", "--force"]
    assert main([*out, "--vae", str(vae)]) == 0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["text_encoder"] == [None, None] and index["vae"][1] == "AutoencoderKLCogVideoX"
    assert "text_encoder: none found, left out; --text-encoder PATH" in capsys.readouterr().out
    assert main([*out, "--vae", str(vae), "--text-encoder", str(t5)]) == 0
    assert (tmp_path / "out" / "text_encoder" / "config.json").is_file()
    assert (tmp_path / "out" / "tokenizer" / "spiece.model").is_file()
    said = refused(tmp_path, capsys, *out, "--text-encoder", str(vae.parent))
    assert "no text encoder in transformers' format" in said


def test_an_error_in_one_part_leaves_no_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogvideox.convert import models

    case.write_sat(tmp_path / "sat", "5b")
    monkeypatch.setattr(models, "write_torch", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path / "sat"), str(tmp_path / "out"), "--to", "sat"]) == 130
    assert sorted(tmp_path.rglob("*")) == before


def test_small_models_are_verified_without_being_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sat = source(tmp_path / "sat", "2b")
    assert main([str(sat), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    assert "verified transformer: " in capsys.readouterr().out


def test_a_conversion_that_computes_something_else_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogvideox.convert import plan

    sat = source(tmp_path / "sat", "2b")
    swapped = {"norm_final.bias": "norm_out.norm.bias", "norm_out.norm.bias": "norm_final.bias"}
    rename = plan.keys.sat_to_diffusers
    monkeypatch.setattr(
        plan.keys,
        "sat_to_diffusers",
        lambda part, **k: {swapped.get(name, name): t for name, t in rename(part, **k).items()},
    )
    assert main([str(sat), str(tmp_path / "out"), "--to", "diffusers"]) == 1
    assert "IN and OUT do not compute the same" in capsys.readouterr().err
