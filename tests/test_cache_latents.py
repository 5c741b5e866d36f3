"""scripts.cache_latents and training from its caches: the same losses, no VAE, no T5, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cache_case import ROOT, SAMPLE, Materials, entries

import train_video
from cogvideox import dist
from cogvideox.cache.entries import is_whole
from cogvideox.command_line import run_door
from cogvideox.config import ConfigError, load_config
from cogvideox.data.moving_shapes import combinations, make_dataset
from cogvideox.engine.logging import read_metrics
from cogvideox.sampling.video_io import write_video
from cogvideox.system_cache import Caches, run_ranks
from cogvideox.weights import load
from scripts import cache_latents


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Materials:
    return Materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="module")
def root(materials: Materials) -> Path:
    """A complete cache of the sample clips, made by the script."""
    folder = materials.folder / "cache"
    assert materials.fill(*materials.cached(folder), "train.preview_prompts=[a red star]") == 0
    return folder


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No text encoder and no tokenizer may be built; which VAEs are loaded is noted."""
    import transformers

    def refuse(*arguments, **options):
        raise AssertionError("a text encoder or a tokenizer is read")

    for name in ("T5EncoderModel", "T5Tokenizer", "ByT5Tokenizer"):
        monkeypatch.setattr(transformers, name, refuse)
    loaded, load_vae = [], load.load_vae

    def noted(vae, path, **options):
        loaded.append(str(path))
        return load_vae(vae, path, **options)

    monkeypatch.setattr(load, "load_vae", noted)
    return loaded


@pytest.fixture(scope="module")
def raw_losses(materials: Materials) -> list[float]:
    return materials.train(materials.folder / "raw")


@contextmanager
def zeros_behind(places: dict[Path, int]) -> Iterator[None]:
    """Files with zeros from a place on, for a while; size, time stamp and inode stay: whoever reads them notices."""
    contents = {path: path.read_bytes() for path in places}

    def write(path: Path, data: bytes) -> None:
        stamp = path.stat()
        with path.open("r+b") as file:
            file.write(data)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    for path, place in places.items():
        write(path, contents[path][:place] + bytes(len(contents[path]) - place))
    try:
        yield
    finally:
        for path, data in contents.items():
            write(path, data)


# ---------------------------------------------------------------------------------------------- the same training


def test_training_from_caches_has_the_losses_of_raw_training_and_reads_neither_vae_nor_t5(
    materials, root, raw_losses, tmp_path, nothing_is_read
):
    files = {"text_encoder": materials.t5 / "model.safetensors", "vae": materials.vae}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    # Headers stay: they are compared with the configuration at every start.
    headers = {path: 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files.values()}
    with zeros_behind(headers):
        losses = materials.train(tmp_path / "run", *materials.cached(root), "data.num_workers=1")
    # fp32, batches of one as the entries were made: not one bit differs.
    assert losses == raw_losses and nothing_is_read == []
    # Not even for the record of what the run started from: the digests are those of the files as they were.
    sources = json.loads((tmp_path / "run" / "sources.json").read_text())
    assert {name: sources[name]["sha256"] for name in files} == digests


def test_previews_read_the_vae_while_they_decode_and_find_their_prompts_in_the_cache(
    materials, root, tmp_path, nothing_is_read, monkeypatch
):
    systems = []
    build = train_video.build
    monkeypatch.setattr(train_video, "build", lambda *a, **k: systems.append(build(*a, **k)) or systems[-1])
    sample = ["sample.steps=1", "train.steps=1", "train.preview_prompts=[a red star]"]
    materials.train(tmp_path / "run", *materials.cached(root), *sample)
    assert list((tmp_path / "run" / "previews").rglob("*.mp4"))
    assert nothing_is_read == [str(materials.vae)] * 2  # for the previews before and after the only step
    system = next(s for s in systems if hasattr(s, "frozen_vae"))
    assert all(p.is_meta for p in system.vae.parameters())  # and it is gone again


def test_image_to_video_trains_from_cached_latents_with_the_losses_of_raw_training(materials, tmp_path):
    base = [
        "--base",
        str(ROOT / "configs" / "tiny_i2v.yaml"),
        f"data.path={SAMPLE}",
        f"load.vae={materials.vae}",
    ]
    small = ["model.transformer.num_layers=1", "train.batch_size=1", "train.steps=2", "train.log_every=1"]
    losses = []
    for name, cache in (("raw", []), ("cached", [f"data.latent_cache={tmp_path}/cache"])):
        run = [*base, *small, f"run.dir={tmp_path}/{name}", *cache]
        assert run_door(train_video.main, ["--traceback", *run]) == 0
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([r["train/loss"] for r in records if "train/loss" in r])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_moments_stored_in_bf16_change_the_loss_by_their_rounding_alone(materials, raw_losses, tmp_path):
    options = [f"data.latent_cache={tmp_path}/cache", "data.latent_cache_precision=bf16"]
    losses = materials.train(tmp_path / "run", *options)
    # bf16 has 8 bits: each latent is off by 2^-9 at most, relatively; a mean over all of them by much less.
    assert losses != raw_losses and losses == pytest.approx(raw_losses, rel=2**-8)


def test_random_weights_of_a_vae_are_cached_too(materials, tmp_path):
    options = ["load.vae=null", "train.steps=2"]
    raw = materials.train(tmp_path / "raw", *options)
    cached = materials.train(tmp_path / "cached", *options, f"data.latent_cache={tmp_path}/cache")
    assert raw == cached and len(entries(tmp_path / "cache")) == 8


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def many(materials) -> Path:
    folder = materials.folder / "many"
    for path in make_dataset(folder, combinations()[0], 1, seed=0, write_video=write_video):
        # Older than two seconds, as files are that are not being written: their digests are remembered.
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))
    return folder


_KILLED_WHILE_WRITING = """
import os, signal, sys
from cogvideox.cache import entries
from cogvideox.command_line import run_door
from scripts import cache_latents

save, count = entries.save_file, 0

def save_half(tensors, path, metadata):
    global count
    save(tensors, path, metadata)
    count += 1
    if count == 5:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

entries.save_file = save_half
run_door(cache_latents.main, sys.argv[1:])
"""


def test_killed_while_it_writes_two_ranks_go_on_where_it_was(materials, many, tmp_path):
    arguments = materials.arguments(*materials.cached(tmp_path), data=many)
    variables = os.environ | {
        "PYTHONPATH": str(ROOT / "sat"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True,
            timeout=400,
        )  # fmt: skip

    assert run("-c", _KILLED_WHILE_WRITING).returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in entries(tmp_path)}
    assert len(before) == 4 and all(is_whole(path, {"moments"}, deep=True) for path in before)
    assert len(list(tmp_path.rglob(".*.partial"))) == 1

    shutil.rmtree(tmp_path / "digests")  # so that it shows who reads the videos again
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run(*launcher, "-m", "scripts.cache_latents")
    assert done.returncode == 0, done.stderr
    assert (
        "everything is encoded" in done.stdout and "32 of 36 clips are missing" in done.stdout + done.stderr
    )
    after = {path: path.stat().st_mtime_ns for path in entries(tmp_path)}
    assert len(after) == len(entries(tmp_path, "text")) == 36 and before.items() <= after.items()
    assert {p.name for p in (tmp_path / "digests").iterdir()} == {"0.jsonl", "1.jsonl"}  # both ranks read
    assert materials.fill(*materials.cached(tmp_path), "--check", data=many) == 0


def test_clips_and_captions_that_fail_are_listed_at_the_end_and_the_others_are_kept(
    materials, tmp_path, capsys, caplog
):
    data = tmp_path / "data"
    shutil.copytree(SAMPLE, data)
    video = data / "videos" / "red_circle_right_000.mp4"
    video.write_bytes(video.read_bytes()[:900])
    (data / "labels" / "red_triangle_up_000.txt").write_text("much too long for the encoder " * 9)
    params = "data.params={scan: null}"
    assert materials.fill(*materials.cached(tmp_path / "cache"), params, data=data) == 1
    output = capsys.readouterr().out
    assert "2 could not be encoded" in output and "red_circle_right_000" in output and "32 fit" in output
    assert len(entries(tmp_path / "cache")) == len(entries(tmp_path / "cache", "text")) == 7
    # Training says the same, before anything is loaded; skipping is the user's decision.
    arguments = materials.arguments(f"data.latent_cache={tmp_path}/cache", params, "train.steps=1", data=data)
    assert run_door(train_video.main, [*arguments, f"run.dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert "1 of 8 clips have no latents" in error and "on_bad_clip=skip" in error
    assert not (tmp_path / "run").exists()


def test_check_and_prune_find_what_is_damaged_and_what_no_clip_needs(materials, root, tmp_path, capsys):
    copy, data = tmp_path / "cache", tmp_path / "data"
    shutil.copytree(root, copy)
    shutil.copytree(SAMPLE, data)
    (data / "videos" / "red_circle_right_000.mp4").unlink()
    cached = materials.cached(copy)
    broken = next(p for p in entries(copy) if p.name.startswith("green_circle"))
    content = bytearray(broken.read_bytes())
    content[-3] ^= 4
    broken.write_bytes(content)
    assert materials.fill(*cached, "--check", data=data) == 1
    output = capsys.readouterr().out
    assert "6 of 7 latents are whole and finite" in output and "its checksum is wrong" in output
    assert "1 entries that this configuration does not need" in output
    assert "7 of 7 captions are whole and finite" in output

    before = entries(copy)
    assert materials.fill(*cached, "--prune", data=data) == 0
    assert "would be deleted with --force" in capsys.readouterr().out and entries(copy) == before
    assert materials.fill(*cached, "--prune", "--force", data=data) == 0
    assert {p.name.partition("-")[0] for p in before} - {p.name.partition("-")[0] for p in entries(copy)} == {
        "green_circle_left_000", "red_circle_right_000"
    }  # fmt: skip
    assert materials.fill(*cached, data=data) == 0 and materials.fill(*cached, "--check", data=data) == 0


def test_entries_of_another_vae_are_told_of_and_stay(materials, root, tmp_path, caplog):
    copy, other = tmp_path / "cache", tmp_path / "other.safetensors"
    shutil.copytree(root, copy)
    materials.make_vae(other, seed=8)
    logging.getLogger("cogvideox").propagate = True
    dist.init(model_parallel=False)
    caches = Caches(materials.config(*materials.cached(copy), f"load.vae={other}"), run_ranks())
    cache = caches.latent_cache(train_video.open_data(caches.config, caches.config.data.path))
    with caplog.at_level(logging.INFO, logger="cogvideox"):
        assert caches.fill_latents(cache) == {}
    assert "8 of 8 clips are missing" in caplog.text
    assert (
        f"holds 8 entries (0.00 GiB, {entries(copy)[0].parents[1].name}" in caplog.text
        or "8 entries" in caplog.text
    )
    assert f"by another encoder of {materials.vae}: weights " in caplog.text
    assert len(entries(copy)) == 16


@pytest.mark.parametrize(
    "change", ["vae.precision=bf16", "vae.encode_frames_per_pass=4", "vae.tile_latent_height=6",
    "vae.norm_groups=4", "data.latent_cache_precision=bf16"],
)  # fmt: skip
def test_what_changes_the_moments_changes_the_folder(materials, root, change):
    dist.init(model_parallel=False)
    folders = [
        Caches(materials.config(*materials.cached(root), *extra), run_ranks()).latents.folder
        for extra in ([], [change], ["vae.scale_factor=0.5", "vae.slice_batch=true"])
    ]
    assert folders[0] != folders[1] and folders[0] == folders[2]


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data.latent_cache and data.text_cache are null"),
        (
            ["data.latent_cache=x", "load.vae=null"],
            "load.vae is not set: latents of a VAE with random weights",
        ),
        (["data.latent_cache=x", "data.path=null"], "data.path is missing"),
        (["data.latent_cache=x", "data.params={crop: random}"], "crop=random asks for another one"),
        (["data.latent_cache=x", "load.vae=nowhere.pt"], "nowhere.pt does not exist"),
        (["data.latent_cache=x", "data.latent_cache_precision=int8"], "expected fp32, bf16 or fp16"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    materials, arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert materials.fill(*arguments) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.rglob("*.safetensors"))


def test_a_trained_text_encoder_cannot_be_cached_and_lora_freezes_it():
    tiny = ROOT / "configs" / "tiny_t2v.yaml"
    with pytest.raises(ConfigError, match=r"data\.text_cache cannot be used while the text encoder trains"):
        load_config([tiny], ["data.text_cache=x"])
    load_config([tiny, ROOT / "configs" / "lora.yaml"], ["data.text_cache=x"])


def test_a_mistake_in_the_weights_comes_before_the_encoding(materials, tmp_path, capsys):
    arguments = materials.arguments(*materials.cached(tmp_path / "cache"), "load.transformer=nowhere")
    assert run_door(train_video.main, arguments) == 2
    assert "nowhere does not exist" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_a_system_without_latents_refuses_the_caches(materials, tmp_path, capsys):
    arguments = ["--base", str(ROOT / "configs" / "tiny_vae.yaml"), f"data.path={SAMPLE}"]
    assert run_door(train_video.main, [*arguments, f"data.latent_cache={tmp_path}/cache"]) == 2
    assert "data.latent_cache: cogvideox.system.VAESystem cannot use it" in capsys.readouterr().err


def test_the_command_tells_how_much_there_is_before_it_runs(materials, tmp_path, capsys):
    assert materials.fill(*materials.cached(tmp_path), "--dry-run") == 0
    assert capsys.readouterr().out.strip() == "8 clips, 8 captions, 0 prompts"
    with pytest.raises(SystemExit):
        cache_latents.main(["--base", "x.yaml", "--force"])


def test_a_vae_that_is_late_has_sizes_and_no_weights(materials, root):
    from cogvideox.system import VideoDiffusion

    config = materials.config(*materials.cached(root))
    system = VideoDiffusion(config)
    system.load_weights()
    assert system.vae.num_latents(9) == 3 and all(p.is_meta for p in system.vae.parameters())
    video = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = system.vae_moments(video)
    plain = VideoDiffusion(materials.config())
    plain.load_weights()
    assert torch.equal(moments, plain.vae_moments(video)) and all(p.is_meta for p in system.vae.parameters())
    system.prepare_sampling(torch.device("cpu"))
    assert not any(p.is_meta for p in system.vae.parameters())
    assert torch.equal(system.vae_moments(video), moments)
