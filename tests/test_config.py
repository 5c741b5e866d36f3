"""Merging, checking and saving configurations; every mistake is named before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cogvideox.config import ConfigError, load_config, save_config
from cogvideox.config_merge import merge

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = CONFIGS / "tiny_t2v.yaml"


def write(folder: Path, name: str, **sections) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(sections))
    return path


# ------------------------------------------------------------------------------------------------------- merging


def test_later_files_and_then_overrides_win(tmp_path):
    first = write(tmp_path, "a.yaml", seed=1, train={"steps": 5})
    second = write(tmp_path, "b.yaml", train={"steps": 6, "batch_size": 7})
    config = load_config([TINY, first, second], ["train.steps=8"])
    assert (config.seed, config.train.batch_size, config.train.steps) == (1, 7, 8)
    assert config.train.precision == "fp32"  # from the first file, untouched


def test_lists_are_replaced_whole():
    assert merge({"a": [1, 2, 3]}, {"a": [4]}) == {"a": [4]}


def test_a_list_item_is_reached_by_its_index():
    config = load_config(
        [TINY], ["model.conditions.0.params.dropout=0.25", "model.transformer.patch_size.0=3"]
    )
    assert config.model.conditions[0].params["dropout"] == 0.25
    assert config.model.conditions[0].params["max_length"] == 32
    assert config.model.transformer.patch_size == [3, 2, 2]


def test_the_index_past_the_last_one_appends():
    assert merge({"a": [{"x": 1}]}, {"a": {1: {"x": 2}}}) == {"a": [{"x": 1}, {"x": 2}]}
    with pytest.raises(ConfigError, match="a is a list of 1 items"):
        merge({"a": [1]}, {"a": {"2": 3}})


def test_a_part_whose_target_changes_loses_its_old_params():
    dynamic = "cogvideox.diffusion.guidance.DynamicStepGuidance"
    config = load_config([TINY], [f"guidance.target={dynamic}"])
    assert (config.guidance.target, config.guidance.params) == (dynamic, {})
    same = load_config([TINY], ["guidance.target=cogvideox.diffusion.guidance.ConstantGuidance"])
    assert same.guidance.params == {"scale": 2.0}


def test_a_part_may_be_written_as_its_target_alone():
    config = load_config([TINY], ["sampler=cogvideox.diffusion.samplers.dpmpp_2m"])
    assert (config.sampler.target, config.sampler.params) == ("cogvideox.diffusion.samplers.dpmpp_2m", {})


def test_samplers_and_guidances_have_short_names():
    config = load_config([TINY], ["sampler=heun", "guidance=constant", "guidance.params.scale=3"])
    assert config.sampler.target == "cogvideox.diffusion.heun.heun"
    assert config.guidance.target == "cogvideox.diffusion.guidance.ConstantGuidance"
    assert config.guidance.params == {"scale": 3}
    assert load_config([TINY], ["sampler.target=unipc"]).sampler.target.endswith(".unipc")


def test_interpolation_copies_a_value():
    config = load_config([TINY], ["sample.num_frames=${data.num_frames}", "data.num_frames=5"])
    assert config.sample.num_frames == 5


def test_scientific_notation_without_a_dot_is_a_number():
    config = load_config([TINY], ["train.optimizer.params.lr=1e-4", "train.gradient_clipping=5e-1"])
    assert config.train.optimizer.params["lr"] == 1e-4
    assert config.train.gradient_clipping == 0.5


def test_a_section_can_be_switched_off():
    assert load_config([TINY], ["sample=null"]).sample is None


def test_the_run_folder_is_named_after_the_files():
    assert load_config([TINY, CONFIGS / "lora.yaml"]).run.dir == "runs/tiny_t2v-lora"
    assert load_config([TINY], ["run.dir=elsewhere"]).run.dir == "elsewhere"


@pytest.mark.parametrize(
    "names", [["tiny_t2v"], ["tiny_vae"], ["cogvideox1.5_5b_i2v"], ["cogvideox_5b", "lora"]]
)
def test_the_saved_yaml_reloads_identically(tmp_path, names):
    config = load_config([CONFIGS / f"{name}.yaml" for name in names])
    save_config(config, tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]) == config


# ------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "misspelt key": ("train.stepz=3", "unknown key train.stepz: did you mean train.steps?"),
    "misspelt section": ("trian.steps=3", "unknown key trian: did you mean train?"),
    "right key, wrong section": ("model.steps=3", "unknown key model.steps: did you mean"),
    "key of a part": ("guidance.scale=3", "unknown key guidance.scale"),
    "wrong type": ("train.steps=many", "train.steps='many': expected a whole number"),
    "fraction for a whole number": ("train.steps=2.5", "train.steps=2.5: expected a whole number"),
    "number for a switch": ("sample.merge_lora=1", "sample.merge_lora=1: expected true or false"),
    "scalar for a section": ("train=3", "train: expected a mapping"),
    "scalar for a list": (
        "model.transformer.patch_size=2",
        "model.transformer.patch_size=2: expected a list",
    ),
    "wrong item of a list": ("model.transformer.patch_size=[1,2,x]", "model.transformer.patch_size.2='x'"),
    "index past the end": ("model.conditions.7.target=x", "model.conditions is a list of 1 items"),
    "no module of that name": (
        "sampler.target=cogvideox.difusion.ddim",
        "there is no module cogvideox.difusion",
    ),
    "no such name in the module": (
        "sampler.target=cogvideox.diffusion.samplers.ddmi",
        "cogvideox.diffusion.samplers has no ddmi; did you mean ddim?",
    ),
    "unknown short name": ("sampler=henu", "sampler=henu: did you mean heun? the known ones are ddim, "),
    "target without a module": ("model.schedule.target=mse", "expected an importable path"),
    "unknown argument of a part": ("guidance.params.scael=3", "guidance.params.scael: .*did you mean scale?"),
    "unknown argument of the dataset": (
        "data.params.skip_frame=3",
        "data.params.skip_frame: .*did you mean skip_frames?",
    ),
    "frames not 4k+1": ("data.num_frames=11", "data.num_frames=11: the VAE needs 4k.1 frames; use 9 or 13"),
    "size not divisible": ("sample.width=36", "sample.width=36: it must be a multiple of 8 .* use 32 or 40"),
    "heads not dividing": ("model.transformer.num_attention_heads=5", "the nearest that does is 4"),
    "channels that disagree": ("model.transformer.out_channels=16", "vae.z_channels=8"),
    "text lengths that disagree": ("model.conditions.0.params.max_length=64", "text_length=32"),
    "unknown precision": (
        "train.precision=float16",
        "train.precision='float16': expected fp32, bf16 or fp16",
    ),
    "no value": ("train.steps", "key.path=value"),
    "not YAML": ("train.steps=[1", "is not a YAML value"),
    "dangling interpolation": ("train.steps=${train.step}", "cannot resolve an interpolation"),
}


@pytest.mark.parametrize("override, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_clear_error(override, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("[", r"\[")) as error:
        load_config([TINY], [override])
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_value_is_named(tmp_path):
    overlay = write(tmp_path, "a.yaml", train={"steps": 3})
    with pytest.raises(ConfigError, match="train.batch_size is missing: expected a whole number"):
        load_config([overlay])


def test_an_architecture_has_no_defaults(tmp_path):
    overlay = write(tmp_path, "a.yaml", model={"transformer": {"num_layers": 2}})
    with pytest.raises(ConfigError, match="model.transformer.hidden_size is missing"):
        load_config([overlay])


def test_a_file_that_is_missing_or_not_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match="not found: nowhere.yaml"):
        load_config(["nowhere.yaml"])
    (tmp_path / "bad.yaml").write_text("train: [1\n")
    with pytest.raises(ConfigError, match="bad.yaml is not valid YAML"):
        load_config([tmp_path / "bad.yaml"])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping of sections, found a list"):
        load_config([tmp_path / "list.yaml"])


def test_a_part_outside_the_package_is_checked_too(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "import nothing_of_this_name\ndef sampler(denoise, x, *, order): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_config([TINY], ["sampler.target=my_parts.sampler", "sampler.params.order=2"])
    with pytest.raises(ConfigError, match="sampler has no such argument; did you mean order"):
        load_config([TINY], ["sampler.target=my_parts.sampler", "sampler.params.ordre=2"])


def test_a_mistake_answers_within_two_seconds_and_without_torch():
    program = (
        "import sys, resource, cogvideox\n"
        "try: cogvideox.load_config([sys.argv[1]], ['train.stepz=1'])\n"
        "except ValueError as error: print(error)\n"
        "print(sorted({'torch', 'sat', 'deepspeed', 'transformers'} & sys.modules.keys()))\n"
        "print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))\n"  # CPU seconds: other jobs do not count
    )
    run = subprocess.run([sys.executable, "-c", program, TINY], capture_output=True, text=True, check=True)
    message, heavy, seconds = run.stdout.splitlines()
    assert "did you mean train.steps?" in message
    assert heavy == "[]"
    assert float(seconds) < 2
