"""sample_video.py's way out, by real commands on random tiny weights: files, sidecars, going on, giving up."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample_video
from cogvideox import dist
from cogvideox.command_line import run_door
from cogvideox.config import load_config
from cogvideox.sampling import run, sidecar, targets, ways_in
from cogvideox.sampling.prompts import Request, make_requests
from cogvideox.system import build_vae

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny_t2v.yaml"
SMALL = [
    "model.transformer.num_layers=1",
    "model.conditions.0.params.config.num_layers=1",
    "sample.steps=2",
    "sample.num_frames=5",
    "sample.batch_size=1",
]
NAMES = ["0000-a-red-circle", "0001-a-blue-square", "0002-a-dot"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vae.safetensors"
    torch.manual_seed(0)
    save_file(build_vae(load_config([TINY])).state_dict(), path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue square\na dot\n")
    return path


def sample(*argv: object) -> int:
    return run_door(sample_video.main, ["--traceback", *map(str, argv)])


def base(vae: Path, folder: Path) -> list[object]:
    return ["--base", TINY, *SMALL, f"load.vae={vae}", "--output-dir", folder]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels_of(folder: Path) -> np.ndarray:
    """(F, H, W, 3) of a folder of png frames."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


# ------------------------------------------------------------------------------------------------------ what comes out


def test_all_outputs_show_the_same_pixels(vae: Path, tmp_path: Path, capsys) -> None:
    kinds = ["mp4", "gif", "frames", "latents", "sheet"]
    out, name = tmp_path / "out", "0000-a-dot"
    assert sample(*base(vae, out), "--prompt", "a dot", "--output", *kinds, "sample.gallery=true") == 0
    own = [name] + [f"{name}{end}" for end in (".gif", ".json", ".mp4", ".safetensors", ".sheet.png")]
    assert names(out) == sorted([*own, "index.html", "sheet.png"])
    record = sidecar.read(out / f"{name}.json")
    assert record["files"]["frames"] == name and set(record["files"]) == set(kinds)
    frames = pixels_of(out / name)
    assert frames.shape == (5, 32, 32, 3)
    planes_first = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    assert hashlib.sha256(planes_first.tobytes()).hexdigest() == record["pixels_sha256"]
    with Image.open(out / f"{name}.gif") as gif:
        assert gif.n_frames == 5
    assert load_file(out / f"{name}.safetensors")["latents"].shape == (2, 8, 8, 8)
    printed = capsys.readouterr().out
    assert all(str(out / file) in printed for file in (f"{name}.mp4", "sheet.png", "index.html"))


def test_latents_are_decoded_later_to_the_same_pixels(vae: Path, tmp_path: Path) -> None:
    both, later = tmp_path / "both", tmp_path / "later"
    assert sample(*base(vae, both), "--prompt", "a dot", "--output", "frames", "latents") == 0
    assert sample(*base(vae, later), "--prompt", "a dot", "--output", "latents") == 0
    assert names(later) == ["0000-a-dot.json", "0000-a-dot.safetensors"]
    file = later / "0000-a-dot.safetensors"
    assert sample("--from-latents", file, "--output", "frames", "mp4") == 0
    assert (pixels_of(later / "0000-a-dot") == pixels_of(both / "0000-a-dot")).all()
    ours, theirs = (sidecar.read(folder / "0000-a-dot.json") for folder in (later, both))
    assert ours["pixels_sha256"] == theirs["pixels_sha256"]
    assert set(ours["files"]) == {"frames", "mp4", "latents"}
    assert sample("--from-latents", file, "--output-dir", tmp_path / "else") == 0
    assert names(tmp_path / "else") == ["0000-a-dot.json", "0000-a-dot.mp4"]


def test_from_says_whether_the_pixels_are_the_same(vae: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert sample(*base(vae, out), "--prompt", "a red circle", "a dot", "--seed", 3) == 0
    made = out / "0001-a-dot.json"
    assert sample("--from", made, "--output-dir", tmp_path / "again") == 0
    assert "\nthe same pixels\n" in capsys.readouterr().out
    again = sidecar.read(tmp_path / "again" / "0000-a-dot.json")
    assert again["pixels_sha256"] == sidecar.read(made)["pixels_sha256"]
    assert again["seed"] == 4 and again["attention"] == "auto"
    assert sample("--from", made, "sample.steps=3", "--output-dir", tmp_path / "again") == 0
    assert "NOT the same pixels (sample.steps: 2 -> 3" in capsys.readouterr().out
    assert "0000-a-dot-2.mp4" in names(tmp_path / "again")


def test_pictures_of_the_unfinished_video_come_every_n_steps(vae: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []
    before = ways_in.denoise

    def watched(system, requests, prepared, callback):
        def both(state):
            callback(state)
            picture = tmp_path / "out" / "0000-a-dot.preview.png"
            seen.append(np.asarray(Image.open(picture)) if picture.exists() else None)

        return before(system, requests, prepared, both)

    monkeypatch.setattr(ways_in, "denoise", watched)
    argv = [*base(vae, tmp_path / "out"), "--prompt", "a dot", "sample.steps=5", "--preview-every", 2]
    assert sample(*argv, "--output", "frames") == 0
    assert [picture is None for picture in seen] == [True, False, False, False, False]
    assert seen[1].shape == (32, 64, 3)  # two latent frames: the first is the middle one too
    assert (seen[1] == seen[2]).all() and (seen[2] != seen[3]).any()
    assert names(tmp_path / "out") == ["0000-a-dot", "0000-a-dot.json"]  # the video took their place


def test_the_line_shows_stage_memory_and_time_left(vae: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert sample(*base(vae, tmp_path), "--prompt", "a red circle", "a dot", "sample.steps=9") == 0
    lines = capsys.readouterr().err
    assert "prompts and pictures" in lines and "denoising 2/2" in lines and "decoding 2/2" in lines
    assert " GiB" in lines and "all videos " in lines


# --------------------------------------------------------------------------------------------------------- going on


class Stop:
    """``denoise`` that fails with ``error`` at its n-th call."""

    def __init__(self, error: BaseException, call: int):
        self.error, self.left, self.denoise = error, call, ways_in.denoise

    def __call__(self, *arguments: object) -> object:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.denoise(*arguments)


STOPS = {
    "Ctrl-C": (
        KeyboardInterrupt(),
        130,
        "interrupted: 1 of 3 videos are finished in {out}; the same command",
    ),
    "GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        2,
        "out of memory: 1 of 3 videos",
    ),
    "CPU": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        2,
        "sample.memory=balanced (now fast)",
    ),
    "frames": (RuntimeError("HIP out of memory"), 2, "fewer frames (--frames 1, now 5)"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_what_is_finished_is_kept_and_the_same_command_goes_on(
    stop: str, vae: Path, prompts: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    error, code, message = STOPS[stop]
    out = tmp_path / "out"
    argv = [*map(str, base(vae, out)), "--prompt-file", str(prompts)]
    with monkeypatch.context() as patch:
        patch.setattr(ways_in, "denoise", Stop(error, 2))
        assert run_door(sample_video.main, argv) == code
        dist.shutdown()
    assert message.format(out=out) in capsys.readouterr().err
    assert names(out) == [f"{NAMES[0]}.json", f"{NAMES[0]}.mp4"]
    first = (out / f"{NAMES[0]}.mp4").stat().st_mtime_ns
    assert run_door(sample_video.main, argv) == 0
    assert "1 of 3 are there" in capsys.readouterr().err
    assert names(out) == sorted(f"{name}.{end}" for name in NAMES for end in ("json", "mp4"))
    assert (out / f"{NAMES[0]}.mp4").stat().st_mtime_ns == first


def test_nothing_is_loaded_where_everything_is_there(
    vae: Path, prompts: Path, tmp_path: Path, capsys
) -> None:
    argv = [*base(vae, tmp_path / "out"), "--prompt-file", prompts]
    assert sample(*argv) == 0
    loaded = capsys.readouterr().out
    assert sample(*argv) == 0
    printed = capsys.readouterr()
    assert "tensors loaded" in loaded and printed.out == "" and "3 of 3 are there" in printed.err
    assert sample(*argv, "--overwrite") == 0
    assert names(tmp_path / "out") == sorted(f"{name}.{end}" for name in NAMES for end in ("json", "mp4"))


def test_an_error_while_decoding_leaves_nothing_behind(vae: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(self, latents):
        yield torch.zeros(1, 1, 3, 32, 32)
        yield torch.full((1, 4, 3, 32, 32), float("nan"))

    monkeypatch.setattr("cogvideox.system.VideoDiffusion.decode", broken)
    argv = [
        *map(str, base(vae, tmp_path / "out")),
        "--prompt",
        "a dot",
        "--output",
        "mp4",
        "gif",
        "frames",
        "sheet",
    ]
    assert run_door(sample_video.main, argv) == 2
    dist.shutdown()
    assert names(tmp_path / "out") == []


# ------------------------------------------------------------------------------------------------ what counts as there


def config_of(vae: Path, *overrides: str):
    return load_config([TINY], [*SMALL, f"load.vae={vae}", *overrides])


def test_the_fingerprint_knows_what_changes_pixels(vae: Path, tmp_path: Path) -> None:
    shutil.copy(vae, tmp_path / "vae.safetensors")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def key(*overrides: str, **fields: object) -> str:
        config = config_of(tmp_path / "vae.safetensors", *overrides)
        request = Request(**({"index": 0, "prompt": "a dot", "seed": 1} | fields))
        return targets.fingerprint(targets.settings_fingerprint(config), request)

    same, image = key(), key(image=tmp_path / "a.png")
    for quiet in ("output_dir=x", "outputs=[gif]", "batch_size=4", "memory=small", "preview_every=2"):
        assert key(f"sample.{quiet}") == same, quiet
    assert key("train.steps=1", "run.dir=x") == same and key(index=7) == same
    others = [key("sample.steps=3"), key("guidance.params.scale=3"), key(seed=2), key(prompt="dots"), image]
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    others.append(key(image=tmp_path / "a.png"))
    os.utime(tmp_path / "vae.safetensors", (1, 1))  # weights that were written again
    others.append(key())
    assert len({same, *others}) == len(others) + 1


def record_at(target: targets.Target, **known: object) -> None:
    target.folder.mkdir(exist_ok=True)
    request = sidecar.request_record(target.request)
    files = {kind: target.path(kind).name for kind in target.outputs}
    for name in files.values():
        (target.folder / name).touch()
    tree = {"sample": {"steps": 2}}
    sidecar.write(
        target.sidecar, request | {"files": files, "config": tree, "fingerprint": target.fingerprint} | known
    )


def test_a_video_of_other_settings_is_never_replaced_unasked(vae: Path, tmp_path: Path) -> None:
    requests = make_requests(["a dot"], 0)
    where = f"sample.output_dir={tmp_path}/out"
    first, there = targets.plan(config_of(vae, where), requests)
    assert [target.name for target in first] == ["0000-a-dot"] and not there
    record_at(first[0])
    other = config_of(vae, where, "sample.steps=3")
    second, there = targets.plan(other, requests)
    assert [target.name for target in second] == ["0000-a-dot-2"] and not there
    record_at(second[0])
    assert [t.name for t in targets.plan(other, requests)[1]] == ["0000-a-dot-2"]
    assert [t.name for t in targets.plan(other, requests, overwrite=True)[0]] == ["0000-a-dot"]
    assert [t.name for t in targets.plan(other, requests, resume=False)[0]] == ["0000-a-dot-3"]
    more, there = targets.plan(config_of(vae, where, "sample.outputs=[gif]"), requests)
    assert [(target.name, target.outputs) for target in more] == [
        ("0000-a-dot", ("gif", "mp4"))
    ] and not there
    (tmp_path / "out" / "0000-a-dot.mp4").unlink()
    assert [t.name for t in targets.plan(config_of(vae, where), requests)[0]] == ["0000-a-dot"]


def test_overwriting_removes_the_files_that_showed_the_older_video(tmp_path: Path) -> None:
    target = targets.Target(Request(0, "a dot", 0), tmp_path, "0000-a-dot", ("mp4", "gif"))
    record_at(target)
    (tmp_path / "0000-a-dot").mkdir()
    run._remove_others(target, {"mp4": "0000-a-dot.mp4"})
    assert names(tmp_path) == ["0000-a-dot", "0000-a-dot.json", "0000-a-dot.mp4"]


def test_sidecars_of_the_first_version_still_make_their_video(tmp_path: Path) -> None:
    old = {"prompt": "a dot", "seed": 5, "image": None, "video": "0000-a-dot.mp4", "config": {"seed": 0}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert sidecar.request_of(sidecar.read(tmp_path / "old.json")) == Request(0, "a dot", 5)
    assert sidecar.comparison(old, old) == "no record of the pixels to compare with"


def test_an_input_that_is_gone_is_named(tmp_path: Path) -> None:
    record = {"prompt": "a", "seed": 0, "files": {}, "image": str(tmp_path / "gone.png"), "config": {}}
    with pytest.raises(ValueError, match=r"its image .*gone\.png is not there any more"):
        sidecar.request_of(record)


# ------------------------------------------------------------------------------------------------------------ bad input

MISTAKES = {
    "an unknown output": (["--output", "mp4", "avi"], r"sample\.outputs .*'avi' is none of mp4, gif"),
    "no output": (["sample.outputs=[]"], r"expected at least one of mp4"),
    "a file for a folder": (
        ["--output-dir", "{tmp}/file/out"],
        r"not writable: .*file is a file.*--output-dir",
    ),
    "no steps between pictures": (["--preview-every", "0"], r"preview_every=0: expected .* 1 or more"),
    "flags outside the interactive mode": (
        ["--prompt", "a cat --s 30"],
        r"--s belong to the interactive mode",
    ),
    "latents that are none": (["--from-latents", "{tmp}/file"], r"--from-latents .*file: cannot be read"),
    "weights for latents": (["--from-latents", "{vae}"], r"not latents that sample_video\.py wrote"),
    "a gallery of nothing": (["--gallery", "{tmp}"], r"--gallery .*no sidecar"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_loaded(
    mistake: str, vae: Path, tmp_path: Path, capsys
) -> None:
    arguments, message = MISTAKES[mistake]
    (tmp_path / "file").write_text("")
    argv = [*map(str, base(vae, tmp_path / "out")), "--prompt", "a dot"]
    argv += [argument.format(tmp=tmp_path, vae=vae) for argument in arguments]
    assert run_door(sample_video.main, argv) == 2
    dist.shutdown()
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), errors
    assert "loaded" not in captured.out and not (tmp_path / "out").exists()


def test_a_folder_without_permission_is_refused_before_weights(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=r"no permission to write in .*--output-dir"):
        targets.check_writable(tmp_path / "new" / "folder")
