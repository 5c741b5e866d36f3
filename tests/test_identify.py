"""Weights say what they are by names and shapes: each published variant at full size, and files that are none."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from stand_ins import repeated, sat_folder, sparse_safetensors
from transformer_cases import full, tiny

from cogvideox.weights.headers import read_headers
from cogvideox.weights.identify import identify
from scripts.inspect_weights import main

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "2b": "CogVideoX-2B",
    "5b": "CogVideoX-5B",
    "5b_i2v": "CogVideoX-5B-I2V",
    "1.5": "CogVideoX1.5-5B",
    "1.5_i2v": "CogVideoX1.5-5B-I2V",
}
PREFIX = "model.diffusion_model."


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


def test_lora_of_other_tools_is_told_by_its_names(tmp_path: Path) -> None:
    block = "transformer_blocks.29.attn1.to_q"
    cases = {
        "diffusers": {
            f"transformer.{block}.lora_A.weight": (64, 1920),
            f"transformer.{block}.lora_B.weight": (1920, 64),
        },
        "kohya": {f"lora_unet_{block.replace('.', '_')}.lora_down.weight": (64, 1920)},
    }
    for naming, shapes in cases.items():
        info = identify(sparse_safetensors(tmp_path / f"{naming}.safetensors", shapes))
        assert (info.family, info.naming, info.lora_rank) == ("lora", naming, 64)
        assert info.variant == "LoRA for CogVideoX-2B"


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


def test_an_unpublished_geometry_is_said_to_be_one(tmp_path: Path) -> None:
    state = tiny("1.5_i2v").state_dict()
    info = identify(
        sparse_safetensors(tmp_path / "w.safetensors", {k: tuple(v.shape) for k, v in state.items()})
    )
    assert (info.variant, info.config, info.latent_scale) == ("unknown CogVideoX-type", None, None)
    assert (info.num_layers, info.hidden_size, info.ofs_embed_dim, info.in_channels) == (2, 48, 20, 8)
    other = identify(sparse_safetensors(tmp_path / "o.safetensors", {"a.b": (3,)}))
    assert other.family == "unknown" and "a.b" in other.variant


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
        assert main([str(path)]) == 1
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
