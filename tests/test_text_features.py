"""Encoded prompts from a file, and the text encoder on the CPU: the same videos without T5 on the device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cogvideox
from cogvideox.command_line import run_door
from cogvideox.conditioning.features import TextFeatures
from cogvideox.conditioning.text import TextCondition
from cogvideox.config import ConfigError
from cogvideox.planning.sampling import text_bytes
from cogvideox.sampling.memory import apply_memory, choose_memory
from cogvideox.sampling.targets import settings_fingerprint
from cogvideox.system import VideoDiffusion
from cogvideox.weights import provenance
from scripts import encode_prompts

BASE = Path(__file__).resolve().parents[1] / "configs" / "tiny_t2v.yaml"
SMALL = ["model.transformer.num_layers=2", "sample.steps=2", "model.conditions.0.params.config.num_layers=1",
    "model.conditions.0.params.trainable=false"]  # fmt: skip
PROMPTS = ["a red circle moving right", "a blue square moving up"]
NEGATIVE = "a green triangle"
CPU = torch.device("cpu")


def config_of(*overrides: str) -> cogvideox.Config:
    return cogvideox.load_config([BASE], [*SMALL, *overrides])


def make_system(*overrides: str) -> VideoDiffusion:
    torch.manual_seed(0)
    system = VideoDiffusion(config_of(*overrides))
    generator = torch.Generator().manual_seed(1)
    for parameter in system.transformer.parameters():  # adaLN starts at zero, which would hide the text
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return system


def encode(output: Path, *arguments: str) -> int:
    """The door, with the exit code that a shell sees."""
    return run_door(encode_prompts.main, ["--base", str(BASE), *SMALL, "--output", str(output), *arguments])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "@@image.png\n")
    output = folder / "features.safetensors"
    assert (
        encode(output, "--prompt-file", str(folder / "prompts.txt"), f"sample.negative_prompt={NEGATIVE}")
        == 0
    )
    return output


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a text encoder or a tokenizer is built")

    for name in ("_build", "_load_tokenizer"):
        monkeypatch.setattr(TextCondition, name, refuse)


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "copy.safetensors"))


# ------------------------------------------------------------------------------------------------ the same video


@pytest.mark.parametrize(
    "setting",
    ["sample.unconditional=zeros", "sample.unconditional=empty_prompt", "sample.negative_prompt=" + NEGATIVE],
)
def test_features_give_the_video_of_the_encoder_bit_by_bit(
    setting: str, written: Path, request: pytest.FixtureRequest
) -> None:
    expected = make_system(setting).sample(PROMPTS)
    request.getfixturevalue("no_encoder")
    system = make_system(setting, f"sample.text_features={written}")
    system.check_prompts(PROMPTS)
    system.load_weights()
    system.prepare_sampling(CPU)
    assert torch.equal(system.sample(PROMPTS), expected)


def test_the_text_decides_the_video_and_each_unconditional_branch_is_another(written: Path) -> None:
    """What the test above compares could otherwise be equal for want of any effect."""
    system = make_system(f"sample.text_features={written}")
    videos = [system.sample([prompt], seeds=[0]) for prompt in PROMPTS]
    videos.append(system.sample(PROMPTS[:1], negative_prompt=NEGATIVE))
    videos.append(
        make_system("sample.unconditional=empty_prompt", f"sample.text_features={written}").sample(
            PROMPTS[:1]
        )
    )
    for i, video in enumerate(videos):
        assert not any(torch.equal(video, other) for other in videos[:i])


@pytest.mark.parametrize("memory", ["balanced", "small"])
@pytest.mark.parametrize("key", ["text_features", "text_encoder_device"])
def test_every_memory_setting_takes_text_from_elsewhere(key: str, memory: str, written: Path) -> None:
    plain = make_system()
    plain.prepare_sampling(CPU)
    value = written if key == "text_features" else "cpu"
    system = make_system(f"sample.{key}={value}")
    system.prepare_sampling(CPU, place=False)
    apply_memory(system, choose_memory(system.config, memory, CPU), CPU)
    expected, found = (s.sample(PROMPTS, negative_prompt=NEGATIVE) for s in (plain, system))
    torch.testing.assert_close(
        found, expected, atol=2e-5, rtol=0
    )  # as tests/test_memory.py: the network's rounding


def test_no_weights_no_tokenizer_and_no_folder_are_needed(written: Path, no_encoder: None) -> None:
    """A published model: load.text_encoder may be unset, or name what is not on this machine."""
    width = config_of().model.transformer.text_hidden_size
    features = TextFeatures(written, 32, width)
    for path in (None, "/not/on/this/machine"):
        condition = TextCondition(32, model=path, features=features)
        assert condition.encode(PROMPTS).shape == (2, 32, width)
        condition.release()
        assert condition.is_placed and not list(condition.parameters())


def test_a_pretrained_encoder_is_needed_for_writing_only(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    encoder = tmp_path / "t5"
    make_system().conditioner.embedders[0].transformer.save_pretrained(encoder)
    pretrained = [
        "model.conditions.0.params.config=null",
        "model.conditions.0.params.dtype=bf16",
    ]
    output, loaded = tmp_path / "features.safetensors", f"load.text_encoder={encoder}"
    expected = make_system(*pretrained, loaded, "sample.text_encoder_device=cpu")
    expected.prepare_sampling(CPU)
    assert encode(output, "--prompt", *PROMPTS, *pretrained, loaded) == 0
    stamp = provenance.read(metadata_of(output))
    weights = json.loads(metadata_of(output)["text_features"])["encoder"]["weights"]
    assert stamp["source"].startswith(str(encoder)) and stamp["source_sha256"] == weights
    assert len(weights) == 64
    video = expected.sample(PROMPTS[:1])
    expected.conditioner.release()  # freed, and read again where it was
    assert torch.equal(expected.sample(PROMPTS[:1]), video)
    shutil.rmtree(encoder)
    request.getfixturevalue("no_encoder")
    system = make_system(*pretrained, loaded, f"sample.text_features={output}")
    system.check_prompts(PROMPTS)
    assert torch.equal(system.sample(PROMPTS[:1]), video)


# -------------------------------------------------------------------------------------------- the encoder on the CPU


@pytest.mark.parametrize("trainable", ["false", "true"])
def test_an_encoder_on_the_cpu_gives_the_same_video_and_stays_when_the_system_moves(trainable: str) -> None:
    setting = f"model.conditions.0.params.trainable={trainable}"
    plain, system = make_system(setting), make_system(setting, "sample.text_encoder_device=cpu")
    plain.prepare_sampling(CPU)
    system.prepare_sampling(CPU)
    assert torch.equal(plain.sample(PROMPTS), system.sample(PROMPTS))
    text = system.conditioner.embedders[0]
    system.to("meta")  # stands for another device
    assert {p.device.type for p in text.transformer.parameters()} == {"cpu"}
    assert text.encode(PROMPTS, "meta").device.type == "meta"


def test_the_memory_plan_counts_no_text_encoder_that_is_elsewhere(written: Path) -> None:
    assert text_bytes(config_of())["whole"] > 0
    for setting in (f"sample.text_features={written}", "sample.text_encoder_device=cpu"):
        config = config_of(setting)
        assert text_bytes(config)["whole"] == 0


def test_another_device_than_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_encoder_device='cuda:1': expected cpu"):
        config_of("sample.text_encoder_device=cuda:1")


# ----------------------------------------------------------------------------------------------------- bad input


def test_a_prompt_that_is_not_there_is_one_error_with_the_command_that_adds_it(
    written: Path, copy: Path
) -> None:
    system = make_system(f"sample.text_features={copy}")
    message = f"no features of 'a white star'.*scripts.encode_prompts .*--output {copy} --add"
    with pytest.raises(ValueError, match=message):
        system.check_prompts([*PROMPTS, "a white star"])
    with pytest.raises(ValueError, match=message):
        system.sample(["a white star"])
    before = settings_fingerprint(system.config)
    assert encode(copy, "--prompt", "a white star", "--add") == 0
    system = make_system(f"sample.text_features={copy}")
    system.check_prompts([*PROMPTS, "a white star"])
    assert torch.equal(system.sample(["a white star"]), make_system().sample(["a white star"]))
    assert settings_fingerprint(system.config) == before  # finished videos stay finished


def test_negative_and_empty_prompts_are_asked_for_before_anything_heavy_runs(
    tmp_path: Path, copy: Path
) -> None:
    with pytest.raises(ValueError, match="no features of 'blurry'"):
        make_system(f"sample.text_features={copy}", "sample.negative_prompt=blurry").check_prompts(PROMPTS)
    features = TextFeatures(copy, 32, 64)
    del features._files[""]
    system = make_system(f"sample.text_features={copy}", "sample.unconditional=empty_prompt")
    system.conditioner.embedders[0].features = features
    with pytest.raises(ValueError, match="no features of ''"):
        system.check_prompts(PROMPTS)


def test_an_empty_prompt_stays_an_error(written: Path) -> None:
    with pytest.raises(ValueError, match="position 0 is empty"):
        make_system(f"sample.text_features={written}").sample([" "])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.conditions.0.params.dtype=bf16", "its dtype is fp32, expected bf16"),
        (
            "model.conditions.0.params.init_seed=1",
            "another text encoder than model.conditions says: its config",
        ),
    ],
)
def test_features_of_another_encoder_are_refused(setting: str, message: str, written: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_system(setting, f"sample.text_features={written}")


def test_another_length_or_width_is_refused(written: Path) -> None:
    lengths = ["model.transformer.text_length=40", "model.conditions.0.params.max_length=40"]
    with pytest.raises(ValueError, match="32 tokens x 64, the model takes 40 x 64"):
        make_system(*lengths, f"sample.text_features={written}")
    with pytest.raises(ValueError, match="32 tokens x 64, the model takes 32 x 96"):
        make_system("model.transformer.text_hidden_size=96", f"sample.text_features={written}")


def test_damaged_and_foreign_files_are_one_clear_error(copy: Path) -> None:
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        TextFeatures(copy, 32, 64)
    copy.write_bytes(whole)
    tensors, text = load_file(copy), metadata_of(copy)
    save_file(tensors, copy)
    with pytest.raises(ValueError, match="holds no encoded prompts"):
        TextFeatures(copy, 32, 64)
    first = next(iter(tensors))
    save_file({name: value for name, value in tensors.items() if name != first}, copy, text)
    with pytest.raises(ValueError, match="lists the prompt .* and lacks its tensor"):
        TextFeatures(copy, 32, 64)
    for wrong in (tensors[first][:5].clone(), tensors[first] * float("nan")):
        save_file({**tensors, first: wrong}, copy, text)
        with pytest.raises(ValueError, match=r"is damaged: the features of .* expected finite numbers"):
            features = TextFeatures(copy, 32, 64)
            features.encode(features.prompts)
    with pytest.raises(ValueError, match="there is no such file"):
        TextFeatures(copy.with_name("missing.safetensors"), 32, 64)


def test_training_refuses_features(written: Path) -> None:
    with pytest.raises(ValueError, match="training encodes its captions"):
        make_system(f"sample.text_features={written}").prepare_training(CPU)


# ----------------------------------------------------------------------------------------------- file and folder


def metadata_of(path: Path) -> dict[str, str]:
    header = path.read_bytes()
    return json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]


def test_the_file_says_what_it_holds_and_where_it_comes_from(written: Path) -> None:
    record = json.loads(metadata_of(written)["text_features"])
    assert record["prompts"] == [*PROMPTS, NEGATIVE, ""]
    assert (record["max_length"], record["width"]) == (32, 64)
    assert record["encoder"]["dtype"] == "fp32"
    assert "version" in provenance.read(metadata_of(written))
    assert len(load_file(written)) == 4


def test_a_folder_holds_the_prompts_of_all_its_files(written: Path, tmp_path: Path) -> None:
    shutil.copy(written, tmp_path / "a.safetensors")
    assert encode(tmp_path / "b.safetensors", "--prompt", "a white star") == 0
    features = TextFeatures(tmp_path, 32, 64)
    assert features.encode([PROMPTS[0], "a white star"]).shape == (2, 32, 64)
    with pytest.raises(ValueError, match=r"--output .*NAME.safetensors"):
        features.check(["another"])
    other = ["--prompt", "x", "model.conditions.0.params.init_seed=1"]
    assert encode(tmp_path / "c.safetensors", *other) == 0
    with pytest.raises(ValueError, match=r"two text encoders, c\.safetensors"):
        TextFeatures(tmp_path, 32, 64)


def test_an_existing_file_is_neither_replaced_nor_mixed_by_accident(
    copy: Path, capsys: pytest.CaptureFixture
) -> None:
    before = copy.read_bytes()
    assert encode(copy, "--prompt", "x") == 2
    assert "exists: choose another name, --add" in capsys.readouterr().err
    assert encode(copy, "--prompt", "x", "--add", "model.conditions.0.params.init_seed=1") == 2
    assert "another text encoder" in capsys.readouterr().err
    assert encode(copy, "--prompt", "far too long for thirty-two bytes", "--add") == 2
    assert "32 fit" in capsys.readouterr().err
    assert copy.read_bytes() == before
    assert encode(copy, "--prompt", "x", "--force") == 0
    assert TextFeatures(copy, 32, 64).prompts == ["x", ""]
