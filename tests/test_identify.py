"""Weights say what they are by names and shapes: each published variant at full size, and files that are none."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from stand_ins import repeated, sat_folder, sparse_safetensors
from transformer_cases import full, tiny

from cogvideox.command_line import run_door
from cogvideox.config import load_config, save_config
from cogvideox.weights.files.headers import read_headers
from cogvideox.weights.identify import identify
from cogvideox.weights.variants import VARIANTS, Variant
from scripts import inspect_weights

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "2b": "CogVideoX-2B",
    "5b": "CogVideoX-5B",
    "5b_i2v": "CogVideoX-5B-I2V",
    "1.5": "CogVideoX1.5-5B",
    "1.5_i2v": "CogVideoX1.5-5B-I2V",
}
PREFIX = "model.diffusion_model."


def main(argv: list[str]) -> int:
    return run_door(inspect_weights.main, argv)


def keys_of(reference: Path, name: str) -> dict[str, tuple[int, ...]]:
    return {
        k: tuple(shape)
        for k, shape in json.loads((reference / "keys" / f"{name}.json").read_text())["keys"].items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_full_size_networks_are_recognised(kind: str, tmp_path: Path) -> None:
    state = full(kind).state_dict()
    info = identify(
        sparse_safetensors(tmp_path / "w.safetensors", {k: tuple(v.shape) for k, v in state.items()})
    )
    assert (info.family, info.variant, info.naming) == ("transformer", KINDS[kind], "SAT")
    assert (ROOT / info.config).is_file()


@pytest.mark.parametrize("name", KINDS.values())
def test_published_sat_folders_are_recognised(name: str, tmp_path: Path, reference: Path) -> None:
    shapes = keys_of(reference, f"sat_{name}")
    dtype = torch.float16 if "2B" in name else torch.bfloat16
    info = identify(sat_folder(tmp_path / "transformer", repeated(shapes, dtype)))
    assert (info.variant, info.layout, info.prefix, info.step) == (name, "SAT folder", PREFIX, 1000)
    small, new, image = "2B" in name, "1.5" in name, "I2V" in name
    assert (info.num_layers, info.hidden_size, info.num_attention_heads) == (
        (30, 1920, 30) if small else (42, 3072, 48)
    )
    assert info.patch_size == ((2, 2, 2) if new else (1, 2, 2))
    assert (info.in_channels, info.out_channels, info.text_hidden_size) == (32 if image else 16, 16, 4096)
    assert info.ofs_embed_dim == (512 if new and image else None)
    assert info.learned_table == (name == "CogVideoX-5B-I2V")
    assert (info.latent_scale, info.snr_shift) == ((1.15258426, 3.0) if small else (0.7, 1.0))
    assert info.dtype == info.published_dtype == ("float16" if small else "bfloat16")
    optional = {"CogVideoX-2B": 1, "CogVideoX-5B": 3, "CogVideoX-5B-I2V": 3}.get(name, 1)
    assert len(info.optional_keys) == optional and not info.refused_globals


@pytest.mark.parametrize("name", KINDS.values())
def test_published_diffusers_folders_are_recognised(name: str, tmp_path: Path, reference: Path) -> None:
    shapes = keys_of(reference, f"diffusers_{name}")
    folder = tmp_path / "transformer"
    names = list(shapes)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        sparse_safetensors(folder / file, {n: shapes[n] for n in part})
    index = {"weight_map": {n: file for file, part in halves.items() for n in part}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("{}")
    sparse_safetensors(
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors", keys_of(reference, "diffusers_vae")
    )
    info = identify(tmp_path)
    assert (info.variant, info.naming) == (name, "diffusers")
    assert info.layout == "diffusers folder, 2 safetensors shards"
    assert info.others == {"vae": "CogVideoX VAE"}
    expected = json.loads((reference / "keys" / f"diffusers_{name}.json").read_text())["n_parameters"]
    # diffusers holds the learned table of 5B-I2V as a buffer and does not count it.
    assert info.num_parameters - expected == (17776 * 3072 if name == "CogVideoX-5B-I2V" else 0)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of its 2 shards are missing: b\.safetensors"):
        identify(tmp_path)


@pytest.mark.parametrize(
    "name, rank",
    [("CogVideoX-2B-lora-r128", 128), ("CogVideoX-5B-lora-r128", 128), ("CogVideoX-5B-I2V-lora-r256", 256)],
)
def test_a_full_sat_checkpoint_with_lora_names_base_and_rank(
    name: str, rank: int, tmp_path: Path, reference: Path
) -> None:
    shapes = keys_of(reference, f"sat_{name}")
    base = name.partition("-lora")[0]
    info = identify(sat_folder(tmp_path, repeated(shapes)))
    assert info.variant == f"{base} with LoRA (rank {rank})"
    assert info.lora_targets == ["attention.dense", "attention.query_key_value"]
    matrices = {key.removeprefix(PREFIX): shape for key, shape in shapes.items() if ".matrix_" in key}
    alone = identify(sparse_safetensors(tmp_path / "lora.safetensors", matrices))
    assert (alone.family, alone.lora_rank, alone.lora_layers) == ("lora", rank, 30 if "2B" in name else 42)
    assert alone.variant.startswith("LoRA for CogVideoX") and base in alone.variant


ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")


def matrices(names: Callable[[str], tuple[str, str]], layers: int, width: int, rank: int) -> dict:
    """Shapes of a LoRA of the attention; ``names`` gives those of the two matrices of a module."""
    shapes = {}
    for layer in range(layers):
        for target in ATTENTION:
            down, up = names(f"transformer_blocks.{layer}.{target}")
            shapes |= {down: (rank, width), up: (width, rank)}
    return shapes


def kohya(module: str) -> tuple[str, str]:
    stem = f"lora_unet_{module.replace('.', '_')}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


def before_peft(module: str) -> tuple[str, str]:
    stem = re.sub(r"attn1\.(to_\w+?)(\.0)?$", r"attn1.processor.\1_lora", f"transformer.{module}")
    return f"{stem}.down.weight", f"{stem}.up.weight"


LORA_NAMES = {
    "diffusers LoRA": lambda m: (f"transformer.{m}.lora_A.weight", f"transformer.{m}.lora_B.weight"),
    "PEFT LoRA": lambda m: (f"base_model.model.{m}.lora_A.weight", f"base_model.model.{m}.lora_B.weight"),
    "ComfyUI LoRA": lambda m: (f"diffusion_model.{m}.lora_A.weight", f"diffusion_model.{m}.lora_B.weight"),
    "kohya LoRA": kohya,
}


@pytest.mark.parametrize("format", LORA_NAMES)
@pytest.mark.parametrize("layers, width, tensors", [(30, 1920, 240), (42, 3072, 336)])
def test_lora_of_every_tool_is_told_by_its_names(
    format: str, layers: int, width: int, tensors: int, tmp_path: Path
) -> None:
    shapes = matrices(LORA_NAMES[format], layers, width, 64)
    info = identify(sparse_safetensors(tmp_path / "lora.safetensors", shapes))
    assert (info.family, info.format, info.naming) == (
        "lora",
        format,
        format.split()[0].replace("PEFT", "diffusers"),
    )
    assert (info.lora_rank, info.lora_layers, info.hidden_size, info.lora_tensors) == (
        64,
        layers,
        width,
        tensors,
    )
    assert info.lora_targets == sorted(ATTENTION)
    assert info.num_parameters == tensors * 64 * width
    # All tools take alpha = rank where a file has none. Text-to-video and image-to-video cannot be told apart.
    assert info.lora_alpha == 64 and "no alpha" in info.lora_alpha_source
    fits = [name for name in KINDS.values() if ("2B" in name) == (layers == 30)]
    assert info.variant == f"LoRA for {' or '.join(fits)}"
    assert info.base == ("CogVideoX-2B" if layers == 30 else None)
    assert f"load.lora={info.path}" in info.use


def test_lora_names_before_peft_are_diffusers(tmp_path: Path) -> None:
    shapes = matrices(before_peft, 30, 1920, 8)
    info = identify(sparse_safetensors(tmp_path / "lora.safetensors", shapes))
    assert (info.format, info.lora_rank, info.lora_targets) == ("diffusers LoRA", 8, sorted(ATTENTION))


def test_alpha_is_read_where_each_tool_keeps_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def saved(name: str, shapes: dict, metadata: dict | None = None) -> Path:
        tensors = {
            k: torch.full(shape, 16.0) if k.endswith("alpha") else torch.zeros(shape)
            for k, shape in shapes.items()
        }
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(tensors, tmp_path / name, metadata=metadata)
        return tmp_path / name

    names = kohya("transformer_blocks.0.attn1.to_q")
    shapes = {names[0]: (4, 64), names[1]: (64, 4), names[0].replace("lora_down.weight", "alpha"): ()}
    info = identify(saved("kohya.safetensors", shapes))
    assert info.lora_alpha == 16 and ".alpha tensors" in info.lora_alpha_source
    assert "scale 4" in str(info) and info.num_parameters == 2 * 4 * 64

    shapes = matrices(LORA_NAMES["diffusers LoRA"], 1, 64, 4)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    info = identify(saved("diffusers.safetensors", shapes, metadata))
    assert info.lora_alpha == 2 and "lora_adapter_metadata" in info.lora_alpha_source

    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    saved("peft/adapter_model.safetensors", matrices(LORA_NAMES["PEFT LoRA"], 1, 64, 4))
    info = identify(tmp_path / "peft")
    assert info.lora_alpha == 8 and "adapter_config.json" in info.lora_alpha_source

    layer = "transformer.layers.0.attention.dense.matrix_"
    info = identify(saved("sat.safetensors", {f"{layer}A.0": (4, 64), f"{layer}B.0": (64, 4)}))
    assert info.lora_alpha is None and "alpha unknown" in str(info)


def test_a_lora_that_peft_wrote_itself_is_recognised(tmp_path: Path) -> None:
    from diffusers import CogVideoXTransformer3DModel
    from peft import LoraConfig, get_peft_model

    model = CogVideoXTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, text_embed_dim=12, time_embed_dim=20,
        sample_height=8, sample_width=8, sample_frames=9, max_text_seq_length=4,
    )  # fmt: skip
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=list(ATTENTION)))
    adapted.save_pretrained(tmp_path)
    info = identify(tmp_path)
    assert (info.format, info.lora_rank, info.lora_alpha, info.lora_tensors) == ("PEFT LoRA", 4, 12, 16)
    assert (info.num_layers, info.hidden_size) == (2, 32)


@pytest.mark.parametrize(
    "target, down, up",
    [
        ("ff.net.2", (4, 7680), (1920, 4)),
        ("ff.net.0.proj", (4, 1920), (7680, 4)),
        ("norm1.linear", (4, 512), (11520, 4)),
    ],
)
def test_the_width_is_read_from_any_layer(target: str, down: tuple, up: tuple, tmp_path: Path) -> None:
    names = LORA_NAMES["diffusers LoRA"](f"transformer_blocks.29.{target}")
    info = identify(sparse_safetensors(tmp_path / "l.safetensors", dict(zip(names, (down, up), strict=True))))
    assert (info.hidden_size, info.variant, info.lora_targets) == (1920, "LoRA for CogVideoX-2B", [target])


def test_a_broken_lora_says_what_is_wrong(tmp_path: Path) -> None:
    down, up = LORA_NAMES["diffusers LoRA"]("transformer_blocks.0.attn1.to_q")
    info = identify(sparse_safetensors(tmp_path / "empty.safetensors", {down: (0, 1920), up: (1920, 0)}))
    assert info.lora_rank == 0 and "rank 0" in str(info)
    info = identify(sparse_safetensors(tmp_path / "half.safetensors", {down: (4, 1920)}))
    assert info.family == "unknown" and "not whole" in info.variant
    wan = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    info = identify(
        sparse_safetensors(tmp_path / "wan.safetensors", {wan.format("A"): (4, 8), wan.format("B"): (8, 4)})
    )
    assert info.family == "unknown" and "no linear layer 'blocks.0.self_attn.q'" in info.variant


# -------------------------------------------------------------------------------- runs, and files made from them


def run_folder(folder: Path, bases: list[str], options: list[str], state: dict, **beside: object) -> Path:
    """RUN/checkpoints/500 as this project writes it, with the real configuration."""
    config = load_config([ROOT / "configs" / f"{base}.yaml" for base in bases], options)
    sat_folder(folder / "checkpoints", state, tag="500", ds_version="0.19", **beside)
    step = folder / "checkpoints" / "500"
    save_config(config, step / "config.yaml")
    record = {"version": "0.1.0", "step": 500, "seed": 7, "dataset": "fedcba9876543210ff", "config": {}}
    (step / "state.json").write_text(json.dumps({"step": 500, "zero_stage": 2, "cogvideox": record}))
    (step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    sparse_safetensors(step / "ema_rank_00.safetensors", {"a": (1,)})
    return folder


def test_a_fine_tune_of_ours_is_told_from_the_published_weights(tmp_path: Path) -> None:
    shapes = {f"{PREFIX}{k}": tuple(v.shape) for k, v in full("2b").state_dict().items()}
    options = ["load.transformer=CogVideoX-2b-sat", "data.path=x"]
    run = run_folder(tmp_path / "run", ["cogvideox_2b", "sft"], options, repeated(shapes, torch.float16))
    info = identify(run)
    assert (info.variant, info.base, info.format) == (
        "CogVideoX-2B, fine-tuned",
        "CogVideoX-2B",
        "DeepSpeed run",
    )
    assert (info.step, info.zero_stage, info.has_ema, info.has_optimizer) == (500, 2, True, True)
    assert info.config == str(run / "checkpoints" / "500" / "config.yaml") and not info.notes
    assert info.provenance["seed"] == 7 and "step 500, seed 7, dataset fedcba9876543210" in str(info)
    assert "step 500, ZeRO stage 2, optimizer state, averaged weights (EMA)" in str(info)
    scratch = run_folder(
        tmp_path / "scratch", ["cogvideox_2b", "sft"], ["data.path=x", "vae.scale_factor=1.55258426"],
        repeated(shapes, torch.float16),
    )  # fmt: skip
    info = identify(scratch)
    assert info.variant == "CogVideoX-2B, trained from random weights" and info.latent_scale == 1.55258426
    assert info.notes == ["CogVideoX-2B has latent scale 1.15258426, the run used 1.55258426"]


def test_a_lora_run_knows_its_model_and_alpha_from_its_own_config(tmp_path: Path, reference: Path) -> None:
    shapes = keys_of(reference, "sat_CogVideoX-5B-I2V-lora-r256")
    state = repeated({k: shape for k, shape in shapes.items() if ".matrix_" in k})
    options = ["data.path=x", "load.transformer=x", "lora.rank=256", "lora.alpha=32"]
    info = identify(run_folder(tmp_path / "run", ["cogvideox_5b_i2v", "lora"], options, state))
    assert info.variant == "LoRA for CogVideoX-5B-I2V (run of this project)"
    assert (info.format, info.lora_rank, info.lora_alpha) == ("DeepSpeed run", 256, 32.0)
    assert "config.yaml" in info.lora_alpha_source and info.use.endswith(f"load.lora={tmp_path / 'run'}")
    assert "scale 0.125" in str(info)


def test_the_record_in_a_file_is_shown(tmp_path: Path) -> None:
    """A LoRA exported from a run carries its configuration, which says what its shapes do not."""
    config = yaml.safe_load((ROOT / "configs" / "cogvideox1.5_5b_i2v.yaml").read_text())
    record = {
        "version": "9.9", "source": "runs/lora", "source_sha256": "0123456789abcdef" * 4, "step": 500, "config": config,
        "sources": {"transformer": {"path": "w", "variant": "CogVideoX1.5-5B-I2V", "sha256": "aa" * 32}},
        "lora": {"alpha_mode": "fold", "scale": 1.0},
    }  # fmt: skip
    shapes = matrices(LORA_NAMES["diffusers LoRA"], 42, 3072, 2)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "l.safetensors", metadata={"cogvideox": json.dumps(record)})
    info = identify(tmp_path / "l.safetensors")
    assert info.variant == "LoRA for CogVideoX1.5-5B-I2V (run of this project)" and info.provenance == record
    for text in (
        "version 9.9",
        "runs/lora (sha256 0123456789abcdef)",
        "step 500",
        "w (sha256 aaaaaaaaaaaaaaaa)",
    ):
        assert text in str(info)


# ------------------------------------------------------------------------------ what stands beside the weights


def test_a_config_json_that_contradicts_the_tensors_is_reported(tmp_path: Path) -> None:
    shapes = {k: tuple(v.shape) for k, v in diffusers_state("2b").items()}
    sparse_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", shapes)
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 30, "in_channels": 4, "patch_size": 4}))
    assert identify(tmp_path).notes == [
        "config.json says num_layers=30, the tensors have 2",
        "config.json says patch_size=4, the tensors have 2",
    ]
    (tmp_path / "config.json").write_text("{")
    assert identify(tmp_path).notes == ["config.json beside cannot be read (JSONDecodeError)"]


def diffusers_state(kind: str, **changes) -> dict[str, torch.Tensor]:
    from cogvideox.weights.transformer_keys import sat_to_diffusers

    return sat_to_diffusers(tiny(kind, **changes).state_dict())


def test_an_unpublished_temporal_patch_is_taken_from_the_configuration(tmp_path: Path) -> None:
    net = tiny("1.5", patch_size=(4, 2, 2), num_frames=13)
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    file = sparse_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", shapes)
    assert identify(file).patch_size == (2, 2, 2)
    (tmp_path / "config.json").write_text(json.dumps({"patch_size": 2, "patch_size_t": 4}))
    info = identify(file)
    assert (info.patch_size, info.in_channels, info.out_channels) == ((4, 2, 2), 4, 4)
    assert info.notes == [
        "patch 4x2x2, no learned position table: taken from config.json; the tensors do not tell"
    ]


def test_a_fixed_table_with_image_input_needs_the_configuration(tmp_path: Path) -> None:
    """By names and shapes it could be the learned one of 5B-I2V: a 2B with 32 channels in, made by users."""
    shapes = {k: tuple(v.shape) for k, v in tiny("2b").state_dict().items()}
    shapes |= {"mixins.pos_embed.pos_embedding": (1, 77, 48), "mixins.patch_embed.proj.weight": (48, 8, 2, 2)}
    file = sparse_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", shapes)
    assert identify(file).learned_table
    config = {"patch_size": 2, "use_learned_positional_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not identify(file).learned_table


@pytest.mark.parametrize("kind, scale", [("2b", 1.15258426), ("5b", 0.7)])
def test_the_scale_of_a_vae_is_that_of_the_transformer_beside_it(
    kind: str, scale: float, tmp_path: Path, reference: Path
) -> None:
    torch.save({"state_dict": repeated(keys_of(reference, "sat_vae"), torch.float32)}, tmp_path / "3d-vae.pt")
    alone = identify(tmp_path / "3d-vae.pt")
    assert alone.latent_scale is None and "1.15258426 (CogVideoX-2B) or 0.7 (CogVideoX-5B)" in str(alone)
    (tmp_path / "vae").mkdir()
    (tmp_path / "3d-vae.pt").rename(tmp_path / "vae" / "3d-vae.pt")
    shapes = {k: tuple(v.shape) for k, v in full(kind).state_dict().items()}
    sat_folder(tmp_path / "transformer", repeated(shapes))
    info = identify(tmp_path / "vae")
    assert info.latent_scale == scale and info.notes == [
        f"latent scale: that of the {KINDS[kind]} in transformer/"
    ]
    whole = identify(tmp_path)
    assert (whole.variant, whole.components["vae"].latent_scale) == (KINDS[kind], scale)
    assert json.loads(json.dumps(whole.as_dict()))["components"]["vae"]["latent_scale"] == scale
    assert whole.use.endswith(f"load.transformer={tmp_path} load.vae={tmp_path}")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_the_table_of_variants_agrees_with_diffusers_and_with_our_configs(
    variant: Variant, reference: Path
) -> None:
    text = (reference / "keys" / f"diffusers_{variant.name}.json").read_text()
    theirs = json.loads(text)["config"]
    assert theirs["num_attention_heads"] == variant.num_attention_heads
    assert theirs["use_rotary_positional_embeddings"] == variant.rotary
    assert theirs.get("use_learned_positional_embeddings", False) == variant.learned_table
    assert (theirs["sample_frames"], theirs["sample_height"] * 8, theirs["sample_width"] * 8) == (
        variant.num_frames, variant.height, variant.width,
    )  # fmt: skip
    assert (theirs.get("patch_size_t") or 1, theirs["patch_size"]) == variant.patch_size[:2]
    assert (theirs["in_channels"], theirs.get("ofs_embed_dim")) == (
        variant.in_channels,
        variant.ofs_embed_dim,
    )
    ours = load_config([ROOT / variant.config])
    assert (
        ours.model.transformer.text_length == variant.text_length
        and ours.vae.scale_factor == variant.latent_scale
    )
    assert ours.model.schedule.params.get("snr_shift", 1.0) == variant.snr_shift
    sizes = (ours.data.num_frames, ours.data.height, ours.data.width, ours.data.fps)
    assert sizes == (variant.num_frames, variant.height, variant.width, variant.fps)


# ------------------------------------------------------------------------------------------------ every container

REFERENCE_NAMES = (
    *(f"{side}_{name}" for side in ("sat", "diffusers") for name in KINDS.values()),
    "sat_CogVideoX-2B-lora-r128", "sat_CogVideoX-5B-lora-r128", "sat_CogVideoX-5B-I2V-lora-r256",
    "sat_vae", "diffusers_vae", "t5_v1_1_xxl_encoder",
)  # fmt: skip


def sharded(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    names = list(shapes)
    parts = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in parts.items():
        sparse_safetensors(folder / file, {n: shapes[n] for n in part})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, part in parts.items() for n in part}}))
    return index


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


CONTAINERS: dict[str, Callable[[Path, dict], Path]] = {
    "SAT folder": lambda folder, shapes: sat_folder(folder / "run", repeated(shapes)),
    "torch, wrapped": lambda folder, shapes: torch_file(folder / "w.pt", {"state_dict": repeated(shapes)}),
    "torch, bare": lambda folder, shapes: torch_file(folder / "w.bin", repeated(shapes)),
    "one safetensors": lambda folder, shapes: sparse_safetensors(folder / "w.safetensors", shapes),
    "shards": sharded,
    "folder of shards": lambda folder, shapes: sharded(folder, shapes).parent,
}


@pytest.mark.parametrize("name", REFERENCE_NAMES)
def test_every_published_list_of_keys_is_recognised_in_every_container(
    name: str, tmp_path: Path, reference: Path
) -> None:
    content = json.loads((reference / "keys" / f"{name}.json").read_text())
    shapes = {key: tuple(shape) for key, shape in content["keys"].items()}
    base, _, rank = name.partition("_")[2].partition("-lora-r")
    variant = {"vae": "CogVideoX VAE", "v1_1_xxl_encoder": "T5-v1.1-XXL encoder"}.get(base, base)
    for label, make in CONTAINERS.items():
        folder = tmp_path / label.replace(" ", "_")
        folder.mkdir()
        path = make(folder, shapes)
        start = time.perf_counter()
        info = identify(path)
        assert time.perf_counter() - start < 2, label
        assert info.variant == (f"{variant} with LoRA (rank {rank})" if rank else variant), label
        assert info.naming == {"sat": "SAT", "t5": "transformers"}.get(name.partition("_")[0], "diffusers"), (
            label
        )
        counted = sum(math.prod(shape) for key, shape in shapes.items() if ".matrix_" not in key)
        optional = sum(math.prod(shapes[info.prefix + key]) for key in info.optional_keys)
        assert info.num_parameters == counted - optional, label
        if "safetensors" in label or "shards" in label:
            assert info.size_bytes > 2 * counted


def test_vae_and_t5_are_recognised(tmp_path: Path, reference: Path) -> None:
    vae = keys_of(reference, "sat_vae")
    with_loss = repeated({**vae, "loss.discriminator.main.0.weight": (64, 3, 4, 4)}, torch.float32)
    torch.save({"state_dict": with_loss, "epoch": 3}, tmp_path / "3d-vae.pt")
    info = identify(tmp_path / "3d-vae.pt")
    assert (info.family, info.variant, info.layout) == ("vae", "CogVideoX VAE", "SAT VAE file")
    assert (info.channels, info.channel_multipliers, info.num_res_blocks) == (128, (1, 2, 2, 4), 3)
    assert info.num_parameters == 215_583_907 and info.optional_keys == ["loss.discriminator.main.0.weight"]
    folder = tmp_path / "vae"
    sparse_safetensors(folder / "diffusion_pytorch_model.safetensors", keys_of(reference, "diffusers_vae"))
    (folder / "config.json").write_text(json.dumps({"scaling_factor": 1.15258426}))
    other = identify(folder)
    assert (other.channel_multipliers, other.z_channels, other.latent_scale) == ((1, 2, 2, 4), 16, 1.15258426)
    t5 = identify(sparse_safetensors(tmp_path / "t5.safetensors", keys_of(reference, "t5_v1_1_xxl_encoder")))
    assert (t5.variant, t5.num_layers, t5.num_attention_heads) == ("T5-v1.1-XXL encoder", 24, 64)
    assert t5.use == f"load.text_encoder={tmp_path}"  # the folder, where the tokenizer is


def test_an_unpublished_geometry_is_said_to_be_one(tmp_path: Path) -> None:
    state = tiny("1.5_i2v").state_dict()
    info = identify(
        sparse_safetensors(tmp_path / "w.safetensors", {k: tuple(v.shape) for k, v in state.items()})
    )
    assert (info.variant, info.config, info.latent_scale) == ("unknown CogVideoX-type", None, None)
    assert (info.num_layers, info.hidden_size, info.ofs_embed_dim, info.in_channels) == (2, 48, 20, 8)
    other = identify(sparse_safetensors(tmp_path / "o.safetensors", {"a.b": (3,)}))
    assert (
        other.family == "unknown" and "a.b" in other.variant and "none of its names is near" in other.variant
    )


def test_unknown_content_names_what_it_comes_nearest_to(tmp_path: Path) -> None:
    state = full("2b").state_dict()
    known = {k: tuple(v.shape) for k, v in state.items() if "pos_embed" not in k}
    part = {f"net.{k}": shape for k, shape in known.items() if "final_layer.linear" not in k} | {
        "net.extra": (1,)
    }
    info = identify(sparse_safetensors(tmp_path / "p.safetensors", part))
    number = f"{len(known) - 2} of {len(known)} keys of CogVideoX-2B, and 1 that it does not have"
    assert (
        info.family == "unknown"
        and f"looks like a CogVideoX transformer under SAT names: {number}" in info.variant
    )
    names = {"decoder.up.0.block.0.conv1.conv.weight": (1,), "decoder.up.0.block.0.conv1.conv.bias": (1,)}
    assert (
        "looks like a CogVideoX VAE under SAT"
        in identify(sparse_safetensors(tmp_path / "v.safetensors", names)).variant
    )
    typing_error = {"transformer.layers.0.attention.query_key_values.weight": (1,)}
    info = identify(sparse_safetensors(tmp_path / "t.safetensors", typing_error))
    assert "the nearest is 'transformer.layers.{}.attention.query_key_value.weight'" in info.variant


def test_every_wrapper_and_the_old_torch_format_read_alike(tmp_path: Path) -> None:
    state = tiny("2b").state_dict()
    want = {name: tuple(value.shape) for name, value in state.items()}
    for saved in (state, {"module": state}, {"state_dict": state, "lr": 1.0}, {"model": state}):
        for zipped in (True, False):
            torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
            headers = read_headers([tmp_path / "w.pt"])
            assert {name: tensor.shape for name, tensor in headers.tensors.items()} == want


def test_inspection_answers_at_once_and_without_torch(tmp_path: Path) -> None:
    """20 GB of weights in a process of its own; the issue allows two seconds, the start of Python included."""
    shapes = {k: tuple(v.shape) for k, v in full("5b").state_dict().items()}
    big = sparse_safetensors(tmp_path / "big.safetensors", shapes, torch.float32)
    sat = sat_folder(tmp_path / "sat", repeated(shapes))
    assert big.stat().st_size > 20e9
    code = (
        "import sys\nfrom scripts.inspect_weights import main\n"
        f"assert main([{str(big)!r}, '--json']) == 0 and main([{str(sat)!r}]) == 0\n"
        "assert not {'torch', 'numpy', 'sat', 'safetensors'} & set(sys.modules)"
    )
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'sat'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert time.perf_counter() - start < 2.0
    assert json.loads(run.stdout[: run.stdout.rindex("}") + 1])["variant"] == "CogVideoX-5B"
    assert "configs/cogvideox_5b.yaml" in run.stdout


def test_the_command_tells_everything_in_json_and_errors_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {k: v.contiguous() for k, v in tiny("2b").state_dict().items()}
    path = tmp_path / "w.pt"
    torch.save(state, path)
    assert main([str(path), "--json", "--check"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["damaged_values"] == [] and told["use"] == f"load.transformer={path}"
    state["time_embed.0.bias"][3] = torch.nan
    torch.save(state, path)
    assert main([str(path), "--check"]) == 1
    assert re.search(r"DAMAGED +time_embed\.0\.bias.* NaN", capsys.readouterr().out)
    for wrong in ("hf://THUDM/CogVideoX-2b", str(tmp_path / "CogVideoX-2b")):
        assert main([wrong]) == 2
        out, error = capsys.readouterr()
        assert not out and error.count("\n") == 1 and "hf download THUDM/CogVideoX-2b" in error


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_header_length_that_looks_like_a_pickle_or_a_zip_is_still_safetensors(
    length: int, tmp_path: Path
) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'.ljust(length)
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert read_headers([tmp_path / "w.safetensors"]).tensors["a"].shape == (1,)


class RunsCode:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def test_a_pickle_that_would_run_code_is_read_without_running_it(tmp_path: Path) -> None:
    proof = tmp_path / "it_ran"
    state = tiny("2b").state_dict()
    torch.save({"module": state, "extra": RunsCode(proof)}, tmp_path / "evil.pt")
    assert identify(tmp_path / "evil.pt").refused_globals == ["posix.system"]
    torch.save(RunsCode(proof), tmp_path / "only_evil.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(RunsCode(proof)))
    for name in ("only_evil.pt", "bare.pt"):
        with pytest.raises(ValueError, match="posix.system"):
            identify(tmp_path / name)
    assert not proof.exists()


def test_a_pickle_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD may set attributes on what find_class returns: nothing of it may last, or shadow a method."""

    class Stateful:
        def __reduce__(self):
            import collections

            return collections.OrderedDict, (), {"items": None, "get": None}

    state = {"w": torch.zeros(2), "s": Stateful()}
    torch.save({"module": state}, tmp_path / "w.pt")
    assert list(read_headers([tmp_path / "w.pt"]).tensors) == ["w"]


@pytest.mark.parametrize("format", ["safetensors", "torch", "old torch"])
def test_truncated_files_are_one_clear_error(format: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / ("w.safetensors" if format == "safetensors" else "w.pt")
    state = {k: v.contiguous() for k, v in tiny("2b").state_dict().items()}
    if format == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=format == "torch")
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 300, 20, 9, 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=str(path)):
            identify(path)
        assert main([str(path)]) == 2
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        identify(path)


@pytest.mark.parametrize(
    "content", [b"<html>404</html>", b"\x00" * 64, b"{}" * 40, b"PK\x05\x06" + b"\x00" * 18]
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_file_of_another_format_is_one_clear_error(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a "):
        identify(tmp_path / name)


@pytest.mark.parametrize(
    "path, advice",
    [
        ("weights/CogVideoX-2b-sat/transformer", "hf download THUDM/CogVideoX-2b --local-dir"),
        ("cogvideox-5b-i2v/transformer", "THUDM/CogVideoX-5b-I2V"),
        ("CogVideoX1.5-5B-I2V", "THUDM/CogVideoX1.5-5B-I2V"),
        ("t5-v1_1-xxl", "google/t5-v1_1-xxl"),
        ("my_run", "does not exist"),
    ],
)
def test_missing_weights_say_what_to_download(path: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights not found") as error:
        identify(tmp_path / path)
    assert advice in str(error.value)


def test_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no weights in this folder.*it holds nothing"):
        identify(tmp_path / "empty")
    broken = sat_folder(tmp_path / "sat", repeated({"a": (1,)}))
    (broken / "latest").write_text("2000")
    with pytest.raises(ValueError, match="names the step '2000'"):
        identify(broken)
    split = tmp_path / "split"
    split.mkdir()
    for rank in range(2):
        (split / f"mp_rank_{rank:02d}_model_states.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="model parallel size 2"):
        identify(split)
    both = tmp_path / "both"
    for name in ("transformer_t2v", "transformer_i2v"):
        sparse_safetensors(both / name / "w.safetensors", {"a": (1,)})
    with pytest.raises(ValueError, match="transformer_i2v and transformer_t2v: name one"):
        identify(both)
