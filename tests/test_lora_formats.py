"""LoRA files of every origin: their names, their alpha, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_consumers import apply_in_comfyui, comfyui_name, load_in_diffusers
from safetensors.torch import load_file, save_file
from stand_ins import repeated, sat_folder
from test_transformer_fixtures import ATOL, arguments_of, network_of
from transformer_cases import diffusers_twin, randomise, run_twin, tiny

from cogvideox.convert.lora import write_lora
from cogvideox.model.lora import inject_lora
from cogvideox.weights.lora.file import read_lora
from cogvideox.weights.lora.formats import parse, tensor_names
from cogvideox.weights.lora.low_rank import place

TO_Q = "transformer_blocks.3.attn1.to_q"


def pair(
    down: str, up: str, rank: int = 4, width: int = 8, **alphas: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {down: torch.ones(rank, width), up: torch.ones(width, rank), **alphas}


def peft_names(module: str = TO_Q, rank: int = 4, width: int = 8) -> dict[str, torch.Tensor]:
    return pair(*(f"transformer.{module}.lora_{x}.weight" for x in "AB"), rank=rank, width=width)


def kohya_names(module: str, rank: int = 4, alpha: float | None = None) -> dict[str, torch.Tensor]:
    stem = f"lora_unet_{module.replace('.', '_')}"
    alphas = {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
    return pair(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", rank=rank, **alphas)


def sat_names(layer: int = 0, rank: int = 4, width: int = 8, prefix: str = "") -> dict[str, torch.Tensor]:
    stem = f"{prefix}transformer.layers.{layer}.attention."
    names = [f"{stem}query_key_value.matrix_{{}}.{i}" for i in range(3)] + [f"{stem}dense.matrix_{{}}.0"]
    return {k: v for n in names for k, v in pair(n.format("A"), n.format("B"), rank, width).items()}


def saved(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


# --------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "format", "module", "role"),
    [
        ("transformer.transformer_blocks.3.attn1.to_q.lora_A.weight", "diffusers", TO_Q, "down"),
        ("transformer_blocks.3.attn1.to_q.lora_B.weight", "diffusers", TO_Q, "up"),
        ("base_model.model.transformer_blocks.3.attn1.to_q.lora_A.weight", "diffusers", TO_Q, "down"),
        ("base_model.model.transformer_blocks.3.attn1.to_q.lora_A.default.weight", "diffusers", TO_Q, "down"),
        ("transformer.transformer_blocks.3.attn1.to_q.alpha", "diffusers", TO_Q, "alpha"),
        ("transformer.transformer_blocks.3.attn1.to_q.lora.down.weight", "diffusers", TO_Q, "down"),
        ("transformer.transformer_blocks.3.attn1.processor.to_q_lora.up.weight", "diffusers", TO_Q, "up"),
        (
            "transformer_blocks.3.attn1.processor.to_out_lora.down.weight",
            "diffusers",
            "transformer_blocks.3.attn1.to_out.0",
            "down",
        ),
        ("lora_unet_transformer_blocks_3_attn1_to_q.lora_down.weight", "kohya", TO_Q, "down"),
        ("lora_unet__transformer_blocks_3_attn1_to_q.lora_up.weight", "kohya", TO_Q, "up"),
        ("lora_transformer_transformer_blocks_3_attn1_to_q.alpha", "kohya", TO_Q, "alpha"),
        ("lora_unet__transformer_blocks_12_attn1_to_out_0.alpha", "kohya",
         "transformer_blocks.12.attn1.to_out.0", "alpha"),
        ("lora_unet_time_embedding_linear_1.lora_down.weight", "kohya", "time_embedding.linear_1", "down"),
        ("lora_unet_blocks_3_q.lora_down.weight", "kohya", TO_Q, "down"),
        ("diffusion_model.blocks.3.q.lora_A.weight", "ComfyUI", TO_Q, "down"),
        ("diffusion_model.blocks.3.ff_proj.lora_up.weight", "ComfyUI",
         "transformer_blocks.3.ff.net.0.proj", "up"),
        ("diffusion_model.transformer_blocks.3.attn1.to_q.lora_down.weight", "ComfyUI", TO_Q, "down"),
        ("transformer.layers.3.attention.query_key_value.matrix_A.0", "SAT", TO_Q, "down"),
        ("model.diffusion_model.transformer.layers.3.attention.query_key_value.matrix_B.2", "SAT",
         "transformer_blocks.3.attn1.to_v", "up"),
        ("transformer.layers.3.mlp.dense_4h_to_h.matrix_A.0", "SAT", "transformer_blocks.3.ff.net.2", "down"),
    ],
)  # fmt: skip
def test_a_name_is_understood(name: str, format: str, module: str, role: str) -> None:
    other = {"down": "up", "up": "down"}
    swapped = name
    for a, b in (
        ("lora_A", "lora_B"),
        ("lora_down", "lora_up"),
        (".down.", ".up."),
        ("matrix_A", "matrix_B"),
    ):
        swapped = swapped.replace(*((a, b) if a in name else (b, a)))
    partners = (
        [swapped]
        if role != "alpha"
        else [name[:-6] + end for end in (".lora_down.weight", ".lora_up.weight")]
    )
    found = parse([name, *partners])
    assert found.format == format
    assert getattr(found, role) == {module: name}
    if role != "alpha":
        assert getattr(found, other[role]) == {module: swapped}


def test_the_modules_are_the_linear_layers_of_the_network() -> None:
    twin = diffusers_twin(tiny("1.5_i2v"))
    linears = {name for name, m in twin.named_modules() if isinstance(m, torch.nn.Linear)}
    named = [name for module in linears for name in tensor_names(module, "kohya")]
    found = parse(named)
    assert found.down.keys() == linears
    for module in linears:
        assert tensor_names(module, "ComfyUI")[2] == f"diffusion_model.{comfyui_name(module)}.alpha"
        assert parse(tensor_names(module, "ComfyUI")).down.keys() == {module}


def test_the_place_in_sat_is_that_of_the_weight() -> None:
    """transformer_keys.py says in which third of which weight a module lies; it is tested against diffusers."""
    for module in ("to_q", "to_k", "to_v", "to_out.0"):
        module = f"transformer_blocks.5.attn1.{module}"
        where, down = place(module, "SAT"), tensor_names(module, "SAT")[0]
        stem = where.weight.removesuffix(".weight")
        assert down == f"model.diffusion_model.{stem}.matrix_A.{where.chunks[0]}"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["transformer.transformer_blocks.0.attn1.to_q.dora_scale"], "belongs to DoRA"),
        (["base_model.model.transformer_blocks.0.attn1.to_q.lora_magnitude_vector"], "belongs to DoRA"),
        (["lora_unet_transformer_blocks_0_attn1_to_q.hada_w1_a"], "belongs to LoHa"),
        (["transformer.transformer_blocks.0.attn1.to_q.lokr_w1"], "belongs to LoKr"),
        (["lora_te_text_model_encoder_layers_0.lora_down.weight"], "belongs to LoRA of the text encoder"),
        (["transformer.transformer_blocks.0.attn1.to_q.lora_B.bias"], "belongs to LoRA with biases"),
        (
            ["transformer.transformer_blocks.0.attn1.to_qq.lora_A.weight"],
            r"no linear layer 'transformer_blocks.0.attn1.to_qq'; the nearest is 'transformer_blocks.0.attn1.to_q'",
        ),
        (["lora_unet_transformer_blocks_0_attn1_to_x.alpha"], "nearest is 'transformer_blocks_0_attn1_to_"),
        (
            ["transformer.transformer_blocks.0.attn1.to_q.lora_C.weight"],
            "expected e.g. 'transformer.transformer_blocks.0.attn1.to_q.lora_[AB].weight'",
        ),
        (["optimizer.step", "epoch"], r"'optimizer.step'.*and 1 more unknown names"),
        (["transformer.transformer_blocks.0.attn1.to_k.lora_A.weight"], "'up' is missing beside 'down' for transf"),
        (["transformer.transformer_blocks.0.attn1.to_k.alpha"], "there is alpha, but no matrix for .*to_k"),
        (["lora_unet_proj_out.lora_down.weight", "lora_unet_proj_out.lora_up.weight"], "names of diffusers and kohya"),
        (["base_model.model.transformer_blocks.3.attn1.to_q.lora_A.weight"], "is there twice"),
    ],
)  # fmt: skip
def test_a_name_that_does_not_belong_is_one_clear_error(extra: list[str], message: str) -> None:
    good = [f"transformer.{TO_Q}.lora_A.weight", f"transformer.{TO_Q}.lora_B.weight"]
    with pytest.raises(ValueError, match=message):
        parse([*good, *extra])


def test_an_unknown_layer_of_sat_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="nearest layer is transformer.layers.0.attention.dense"):
        parse(["transformer.layers.0.cross_attention.dense.matrix_A.0"])


def test_a_file_without_lora_says_so(tmp_path: Path) -> None:
    path = saved({"proj_out.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors: there is no LoRA in it.*proj_out.weight"):
        read_lora(path)


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((4, 8), (8, 3), r"the ranks differ \(4 and 3\)"),
        ((0, 8), (8, 0), "the rank is 0"),
        ((4, 8, 1, 1), (8, 4, 1, 1), "not the matrices of a linear layer"),
    ],
)
def test_matrices_that_do_not_fit_each_other_are_refused(down, up, message: str, tmp_path: Path) -> None:
    a, b, _ = tensor_names(TO_Q, "diffusers")
    path = saved({a: torch.zeros(down), b: torch.zeros(up)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors: {TO_Q}: down.*{message}"):
        read_lora(path)


def test_size_and_targets_are_read_off_the_tensors(tmp_path: Path) -> None:
    tensors = peft_names(rank=4) | peft_names("transformer_blocks.11.ff.net.2", rank=2)
    found = read_lora(saved(tensors, tmp_path / "a.safetensors"))
    assert (found.ranks, found.num_layers, found.width, found.tensors) == ([2, 4], 12, 8, 4)


# --------------------------------------------------------------------------------------------------------- alpha


def test_peft_folders_have_pefts_scales(tmp_path: Path) -> None:
    """Written by peft itself, with patterns for ranks and alphas; the scales are those of its layers."""
    from peft import LoraConfig, get_peft_model

    for name, options in {
        "plain": {"r": 4, "lora_alpha": 10},
        "patterns": {
            "r": 4,
            "lora_alpha": 10,
            "rank_pattern": {"to_k": 2, r"transformer_blocks\.1\.attn1\.to_q": 3},
            "alpha_pattern": {"to_k": 7, "^transformer_blocks.0.attn1.to_v": 1},
        },
        "rslora": {"r": 4, "lora_alpha": 10, "use_rslora": True},
    }.items():
        config = LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **options)
        model = get_peft_model(diffusers_twin(tiny("5b")), config)
        model.save_pretrained(tmp_path / name)
        found = read_lora(tmp_path / name)
        prefix = "base_model.model."
        scales = {n[len(prefix) :]: m.scaling for n, m in model.named_modules() if hasattr(m, "scaling")}
        assert (
            found.tensors == 16
            and found.format == "diffusers"
            and "adapter_config.json" in found.alpha_source
        )
        assert {m: part.scale for m, part in found.modules.items()} == pytest.approx(
            {module: scale["default"] for module, scale in scales.items()}
        )
        for module, part in found.modules.items():
            layer = model.get_submodule(prefix + module)
            assert torch.equal(part.down, layer.lora_A["default"].weight)
            assert torch.equal(part.up, layer.lora_B["default"].weight)


def test_another_method_in_adapter_config_is_refused(tmp_path: Path) -> None:
    path = saved(peft_names(), tmp_path / "adapter_model.safetensors")
    for config, method in (({"use_dora": True}, "DoRA"), ({"peft_type": "LOHA"}, "LOHA")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4} | config))
        with pytest.raises(ValueError, match=f"adapter_config.json: an adapter of type {method}"):
            read_lora(path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 4}))
    with pytest.raises(ValueError, match=f"says rank 8 for {TO_Q}, its matrices have 4"):
        read_lora(path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="configuration is damaged.*give alpha"):
        read_lora(path)


def test_beside_a_file_of_diffusers_an_adapter_config_has_no_meaning(tmp_path: Path) -> None:
    saved(peft_names(), tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 1}))
    found = read_lora(tmp_path)
    assert found.alpha == 4 and "rule of diffusers" in found.alpha_source


def test_alpha_tensors_count_under_diffusers_names_too(tmp_path: Path) -> None:
    tensors = peft_names() | {f"transformer.{TO_Q}.alpha": torch.tensor(2.0)}
    assert read_lora(saved(tensors, tmp_path / "a.safetensors")).modules[TO_Q].scale == 0.5
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    path = saved(tensors, tmp_path / "b.safetensors", metadata)
    with pytest.raises(
        ValueError, match=f"alpha of {TO_Q} is 2 in its .alpha tensor, 8 in the file's metadata"
    ):
        read_lora(path)
    assert read_lora(path, alpha=8.0).alpha == 8.0


def test_kohya_without_alpha_means_alpha_is_the_rank(tmp_path: Path) -> None:
    found = read_lora(saved(kohya_names(TO_Q), tmp_path / "a.safetensors"))
    assert found.modules[TO_Q].scale == 1.0 and found.alpha == 4
    assert found.alpha_source == "= rank, the rule of kohya (the file has no alpha)"


def test_alpha_for_some_modules_only_is_refused(tmp_path: Path) -> None:
    tensors = kohya_names(TO_Q, alpha=1.0) | kohya_names("transformer_blocks.0.attn1.to_k")
    path = saved(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"1 of 2 modules have no .alpha.*transformer_blocks.0.attn1.to_k"):
        read_lora(path)
    assert read_lora(path, alpha=2.0).alpha == 2.0


def test_alpha_of_each_module_is_its_own(tmp_path: Path) -> None:
    other = "transformer_blocks.0.attn1.to_k"
    tensors = kohya_names(TO_Q, alpha=1.0) | kohya_names(other, rank=2, alpha=3.0)
    found = read_lora(saved(tensors, tmp_path / "a.safetensors"))
    assert {m: part.scale for m, part in found.modules.items()} == {TO_Q: 0.25, other: 1.5}
    assert found.alpha is None


@pytest.mark.parametrize("alpha", [0.0, float("nan")])
def test_an_alpha_of_nothing_is_refused(alpha: float, tmp_path: Path) -> None:
    path = saved(kohya_names(TO_Q, alpha=alpha), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"alpha of {TO_Q} is {alpha:g}"):
        read_lora(path)


# ------------------------------------------------------------------------------------------- runs of ours and of SAT


def run_folder(run: Path, lora: str | None, where: str = "checkpoints/5") -> Path:
    """A LoRA-only checkpoint of this project: ``module`` holds what was trained."""
    step = run / "checkpoints" / "5"
    step.mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("5")
    states = {"module": sat_names(), "ds_version": "0.16", "dp_world_size": 1, "iteration": 5}
    torch.save(states, step / "mp_rank_00_model_states.pt")
    (step / "state.json").write_text(json.dumps({"step": 5, "cogvideox": {"step": 5, "seed": 7}}))
    if lora is not None:
        (run / where / "config.yaml").write_text(f"seed: 7\nlora: {lora}\n")
    return run


@pytest.mark.parametrize("where", ["checkpoints/5", "."])
def test_a_run_of_ours_has_its_alpha_in_config_yaml(where: str, tmp_path: Path) -> None:
    found = read_lora(run_folder(tmp_path / "run", "{rank: 4, alpha: 2.0}", where))
    assert found.format == "SAT" and found.alpha == 2.0 and found.tensors == 8
    assert found.alpha_source == f"2 from {tmp_path / 'run' / where / 'config.yaml'}"
    assert found.modules["transformer_blocks.0.attn1.to_v"].scale == 0.5
    assert found.provenance["seed"] == 7


def test_alpha_null_is_sats_default(tmp_path: Path) -> None:
    assert read_lora(run_folder(tmp_path, "{rank: 4, alpha: null}")).alpha == 1.0


def test_averaged_matrices_are_read_where_asked(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "{rank: 4, alpha: 4}")
    averaged = {name: torch.full_like(value, 0.5) for name, value in sat_names().items()}
    save_file(averaged, run / "checkpoints" / "5" / "ema_rank_00.safetensors")
    assert read_lora(run).modules["transformer_blocks.0.attn1.to_q"].up.unique() == 0.5
    assert read_lora(run, ema=False).modules["transformer_blocks.0.attn1.to_q"].up.unique() == 1.0


def test_a_config_of_another_run_is_noticed(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "{rank: 8, alpha: 2}")
    with pytest.raises(ValueError, match="config.yaml says LoRA rank 8, the matrices have 4"):
        read_lora(run)


def test_alpha_missing_is_one_clear_error(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", None)
    with pytest.raises(
        ValueError, match="alpha is missing.*put the run's config.yaml beside them, or give alpha"
    ):
        read_lora(run)
    assert read_lora(run, alpha=4.0).alpha == 4.0
    path = saved(sat_names(), tmp_path / "lora" / "a.safetensors")
    with pytest.raises(ValueError, match="alpha is missing"):
        read_lora(path)
    (path.parent / "config.yaml").write_text("lora: {rank: 4, alpha: 8}\n")
    assert read_lora(path).alpha == 8.0


SAT_YAML = """
- args: {mode: finetune}
- model:
    network_config:
      params:
        modules:
          lora_config: {target: sat.model.finetune.lora2.LoraMixin, params: {r: RANK, lora_alpha: ALPHA}}
"""


def sat_run(folder: Path) -> Path:
    """A LoRA checkpoint of SAT: the whole network with ``.original`` weights and matrices."""
    net = randomise(tiny("5b"))
    inject_lora(net, 4)
    return sat_folder(folder, {f"model.diffusion_model.{k}": v for k, v in net.state_dict().items()})


def test_a_full_checkpoint_of_sat_gives_its_matrices_alone(tmp_path: Path) -> None:
    folder = sat_run(tmp_path / "lora-disney-07-01-12-00")
    found = read_lora(folder)
    assert found.tensors == 16 and found.ranks == [4] and found.width == 48 and found.num_layers == 2
    assert found.alpha == 1.0 and "SAT's default" in found.alpha_source
    assert {part.scale for part in found.modules.values()} == {0.25}
    state = torch.load(folder / "1000" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    key = "model.diffusion_model.transformer.layers.1.attention.query_key_value.matrix_{}.2"
    part = found.modules["transformer_blocks.1.attn1.to_v"]
    assert torch.equal(part.down, state[key.format("A")]) and torch.equal(part.up, state[key.format("B")])


def test_sats_own_yaml_tells_its_alpha(tmp_path: Path) -> None:
    folder = sat_run(tmp_path / "run")
    yaml = folder / "training_config.yaml"
    yaml.write_text(SAT_YAML.replace("RANK", "4").replace("ALPHA", "16"))
    found = read_lora(folder)
    assert found.alpha == 16.0 and found.alpha_source == f"16 from {yaml}"
    yaml.write_text(SAT_YAML.replace("RANK", "8").replace("ALPHA", "16"))
    with pytest.raises(ValueError, match="training_config.yaml says LoRA rank 8, the matrices have 4"):
        read_lora(folder)
    yaml.write_text(SAT_YAML.replace("RANK", "4").replace(", lora_alpha: ALPHA", ""))
    assert read_lora(folder).alpha == 1.0 and str(yaml) in read_lora(folder).alpha_source
    (folder / "model.yaml").write_text(SAT_YAML.replace("RANK", "4").replace("ALPHA", "2"))
    with pytest.raises(ValueError, match=r"alpha is 2 \(.*model.yaml\) or 1 \(.*training_config.yaml\)"):
        read_lora(folder)
    (folder / "model.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="model.yaml, where alpha might stand, is no YAML"):
        read_lora(folder)


@pytest.mark.parametrize(
    ("model", "count", "rank", "layers", "width"),
    [
        ("CogVideoX-2B-lora-r128", 240, 128, 30, 1920),
        ("CogVideoX-5B-lora-r128", 336, 128, 42, 3072),
        ("CogVideoX-5B-I2V-lora-r256", 336, 256, 42, 3072),
    ],
)
def test_published_lora_checkpoints_export_whole(
    model: str, count: int, rank: int, layers: int, width: int, reference: Path, tmp_path: Path
) -> None:
    """SAT's exporter stops at "length is not 240" for any model but 2B."""
    shapes = json.loads((reference / "keys" / f"sat_{model}.json").read_text())["keys"]
    found = read_lora(sat_folder(tmp_path / "run", repeated(shapes)))
    assert (found.tensors, found.ranks, found.num_layers, found.width) == (count, [rank], layers, width)
    assert {part.scale for part in found.modules.values()} == {1 / rank}
    assert len({name for m in found.modules for name in tensor_names(m, "diffusers")[:2]}) == count
    if count == 240:
        written = load_file(write_lora(found, tmp_path / "out", "diffusers"))
        assert len(written) == 240 and all(".attn1.to_" in name for name in written)


def test_recorded_values_of_sat_come_out_of_diffusers_and_comfyui(reference: Path, tmp_path: Path) -> None:
    """SAT's own LoRA network and its outputs: exported here, loaded there."""
    folder = reference / "fixtures" / "lora" / "t2v_sincos"
    weights = load_file(folder / "weights.safetensors")
    found = read_lora(saved(weights, tmp_path / "sat.safetensors"))
    assert found.alpha == 1.0 and "SAT's default" in found.alpha_source

    net = network_of(folder, load=False)
    base = {n.replace(".original.", "."): v for n, v in weights.items() if ".matrix_" not in n}
    net.load_state_dict(base)
    recorded, arguments = load_file(folder / "outputs.safetensors"), load_file(folder / "inputs.safetensors")
    for to in ("diffusers", "ComfyUI"):
        twin = diffusers_twin(net)
        path = write_lora(found, tmp_path / f"{to}.safetensors", to)
        if to == "diffusers":
            load_in_diffusers(path, twin)
        else:
            assert not apply_in_comfyui(load_file(path), twin)
        with torch.no_grad():
            output = run_twin(net, twin, arguments_of(arguments))
        torch.testing.assert_close(output, recorded["out_int"], atol=ATOL, rtol=0)
