"""YAML files of CogVideo's own sat/ folder, written as files of this project and given to the two doors."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import yaml
from upstream_files import MODELS, inference_file, model_file, sft_file

import sample_video
import train_video
from cogvideox.command_line import run_door
from cogvideox.config import load_config
from cogvideox.upstream_yaml import is_upstream
from scripts import translate_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNS = [(*model, method) for model in MODELS for method in ("sft", "inference")]


def write(tmp_path: Path, line: str, model: str, method: str) -> list[Path]:
    trees = {f"{model}.yaml": model_file(model), f"{method}.yaml": {}}
    trees[f"{method}.yaml"] = sft_file() if method == "sft" else inference_file(line)
    for name, tree in trees.items():
        (tmp_path / name).write_text(yaml.safe_dump(tree))
    return [tmp_path / name for name in trees]


translate_files = functools.partial(run_door, translate_config.main)


@pytest.mark.parametrize("line, model, method", RUNS)
def test_the_written_file_is_read_back_as_the_same_configuration(tmp_path, line, model, method):
    sources, output = write(tmp_path, line, model, method), tmp_path / "new" / "ours.yaml"
    assert translate_files([*map(str, sources), "-o", str(output), "sample.steps=7"]) == 0
    assert load_config([output]) == load_config(sources, ["sample.steps=7"])
    assert not is_upstream(yaml.safe_load(output.read_text()))
    assert [p.name for p in output.parent.iterdir()] == ["ours.yaml"]


def test_the_written_file_names_its_sources_and_holds_no_defaults(tmp_path, capsys):
    sources = write(tmp_path, "v1.0", "5b_lora", "sft")
    assert translate_files([str(path) for path in sources]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# From 5b_lora.yaml, sft.yaml of CogVideo's sat/ folder.\n")
    assert "patch_size: [1, 2, 2]" in text
    tree = yaml.safe_load(text)
    assert list(tree) == [
        "run",
        "model",
        "vae",
        "load",
        "lora",
        "data",
        "train",
        "deepspeed",
        "guidance",
        "sample",
    ]
    assert tree["lora"] == {"rank": 128}  # alpha 1 is the default
    assert "save_every" not in tree["train"] and "patch_embed" not in tree["model"]["transformer"]


def test_the_written_file_takes_overlays_of_this_project(tmp_path):
    output = tmp_path / "ours.yaml"
    sources = [*write(tmp_path, "v1.0", "2b", "sft"), CONFIGS / "lora.yaml"]
    assert translate_files([*map(str, sources), "-o", str(output)]) == 0
    assert load_config([output]).lora.rank == 128


def test_mistakes_are_one_line_and_leave_an_existing_file_alone(tmp_path, capsys):
    sources = [str(path) for path in write(tmp_path, "v1.0", "5b", "sft")]
    output = tmp_path / "ours.yaml"
    output.write_text("kept")
    ours = str(CONFIGS / "tiny_t2v.yaml")
    for arguments, message in (
        ([*sources, "-o", str(output)], f"error: {output} exists: .*--force"),
        ([ours], "tiny_t2v.yaml: not for CogVideo's sat/ folder; this project reads it as it is"),
        (["missing.yaml"], "error: configuration file not found: missing.yaml"),
        ([*sources, "train.stepz=3"], "error: unknown key train.stepz: did you mean train.steps"),
    ):
        assert translate_files(arguments) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(message, last)
    assert output.read_text() == "kept"
    assert translate_files([*sources, "-o", str(output), "--force"]) == 0
    assert load_config([output]).train.steps == 1000


@pytest.mark.parametrize("line, model", [("v1.0", "5b_i2v_lora"), ("main", "1.5_5b")])
def test_train_video_shows_the_plan_of_upstreams_files(tmp_path, capsys, line, model):
    sources = [str(path) for path in write(tmp_path, line, model, "sft")]
    arguments = ["--base", *sources, "--dry-run", "train.steps=3"]
    assert run_door(train_video.main, arguments) == 0
    out = capsys.readouterr().out
    assert "steps: 3" in out and "disney" in out


@pytest.mark.parametrize("line, model", [("v1.0", "2b_lora"), ("main", "1.5_5b_i2v")])
def test_sample_video_shows_the_plan_of_upstreams_files(tmp_path, capsys, line, model):
    sources = [str(path) for path in write(tmp_path, line, model, "inference")]
    assert run_door(sample_video.main, ["--base", *sources, "--dry-run", "sample.steps=3"]) == 0
    out = capsys.readouterr().out
    assert "steps: 3" in out and "dpmpp_2m_sde" in out
