"""What a model can be asked for: native, extrapolated and impossible sizes, and inputs that do not go together."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cogvideox
from cogvideox.config import Config, ConfigError
from cogvideox.sampling.policy import check_inputs, check_size, published_variant
from cogvideox.sampling.prompts import Request, make_requests
from cogvideox.sampling.video_io import write_video

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PUBLISHED = {
    "cogvideox_2b": "CogVideoX-2B",
    "cogvideox_5b": "CogVideoX-5B",
    "cogvideox_5b_i2v": "CogVideoX-5B-I2V",
    "cogvideox1.5_5b": "CogVideoX1.5-5B",
    "cogvideox1.5_5b_i2v": "CogVideoX1.5-5B-I2V",
}


def config_of(name: str, *overrides: str) -> Config:
    return cogvideox.load_config([CONFIGS / f"{name}.yaml"], list(overrides))


def sized(name: str, frames: int, height: int, width: int) -> Config:
    return config_of(name, f"sample.num_frames={frames}", f"sample.height={height}", f"sample.width={width}")


@pytest.mark.parametrize(("name", "variant"), PUBLISHED.items())
def test_each_published_configuration_is_recognised_and_native(name: str, variant: str) -> None:
    config = config_of(name)
    assert published_variant(config).name == variant
    assert check_size(config) is None


@pytest.mark.parametrize(
    ("name", "frames", "height", "width"),
    [
        ("cogvideox_2b", 41, 480, 720),  # 8k + 1 up to 49: CogVideo's README
        ("cogvideox1.5_5b", 161, 768, 1360),  # 16k + 1 up to 161
        ("cogvideox1.5_5b_i2v", 81, 1360, 768),  # any size with a shorter side of 768
        ("cogvideox1.5_5b_i2v", 81, 768, 1024),
        ("cogvideox_5b_i2v", 33, 480, 720),
        ("tiny_t2v", 9, 32, 32),
    ],
)
def test_what_was_trained_is_native(name: str, frames: int, height: int, width: int) -> None:
    assert check_size(sized(name, frames, height, width)) is None


@pytest.mark.parametrize(
    ("name", "frames", "height", "width", "parts"),
    [
        (
            "cogvideox_5b",
            49,
            720,
            480,
            ["720x480 turned to portrait (480x720 is native)", "other_sizes=resize"],
        ),
        ("cogvideox_2b", 49, 240, 368, ["240x368 (480x720 is native)"]),
        ("cogvideox_5b", 97, 480, 720, ["97 frames (41 or 49 are native)"]),
        ("cogvideox_5b", 45, 480, 720, ["45 frames (41 or 49 are native)"]),
        ("cogvideox1.5_5b", 85, 768, 1360, ["85 frames (81 or 97 are native)"]),
        ("cogvideox1.5_5b", 81, 1360, 768, ["1360x768 turned to portrait"]),
        ("cogvideox1.5_5b_i2v", 81, 480, 720, ["480x720 (768x1360 is native)"]),
        ("tiny_t2v", 5, 16, 48, ["5 frames (9 are native) and 16x48 (32x32 is native)"]),
    ],
)
def test_what_was_not_trained_is_one_sentence(name, frames, height, width, parts) -> None:
    sentence = check_size(sized(name, frames, height, width))
    assert all(part in sentence for part in parts) and "extrapolated" in sentence
    # 2B's sines have no grid to choose, and a length has nothing to do with it.
    assert ("other_sizes" in sentence) == (f"{height}x{width}" in sentence and name != "cogvideox_2b")


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [
        (49, 720, 480, r"sample\.height=720, sample\.width=480: CogVideoX-5B-I2V .* knows 480x720 only"),
        (49, 240, 368, "knows 480x720 only"),
        (57, 480, 720, r"sample\.num_frames=57: .* ends at 49 frames; use 49, and sample\.total_frames=57"),
    ],
)
def test_a_learned_table_ends_where_it_was_trained(frames, height, width, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_size(sized("cogvideox_5b_i2v", frames, height, width))


def test_the_size_of_a_fine_tuning_is_native() -> None:
    config = sized("cogvideox_5b_i2v", 49, 240, 368)
    config.data = dataclasses.replace(config.data, height=240, width=368)
    assert check_size(config) is None


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("cogvideox_5b", "sample.num_frames=48", "use 45 or 49"),
        ("cogvideox_5b", "sample.height=500", r"multiple of 16 \(VAE 8 x patch 2\); use 496 or 512"),
        ("cogvideox1.5_5b", "sample.width=1366", "use 1360 or 1376"),
    ],
)
def test_what_cannot_be_divided_names_the_nearest_legal_values(name, override, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(name, override)


# ------------------------------------------------------------------------------------------------------- inputs


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A picture, a clip of 9 frames at 8 fps, one of 3, and what is neither."""
    Image.fromarray(np.zeros((17, 31, 3), np.uint8)).save(tmp_path / "odd.png")
    for frames, name in ((9, "clip"), (3, "short")):
        write_video(tmp_path / f"{name}.mp4", torch.zeros(frames, 3, 32, 32), fps=8)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    names = {"image": "odd.png", "clip": "clip.mp4", "short": "short.mp4", "bad_image": "broken.png",
             "bad_video": "broken.mp4"}  # fmt: skip
    return {key: tmp_path / name for key, name in names.items()}


T2V, I2V = "tiny_t2v", "tiny_i2v"


@pytest.mark.parametrize(
    ("name", "inputs", "overrides"),
    [
        (T2V, {}, []),
        (T2V, {"video": "clip"}, ["sample.strength=0"]),
        (T2V, {"video": "clip"}, ["sample.keep_frames=0-4"]),
        (T2V, {"video": "clip", "source_prompt": "a cat"}, ["sample.invert=true"]),
        (T2V, {"image": "image", "last_image": "image"}, []),
        (T2V, {"continue_from": "clip"}, ["sample.total_frames=20", "sample.overlap=2"]),
        (I2V, {"image": "image"}, ["sample.total_frames=30"]),
        (I2V, {"continue_from": "short"}, []),
        (I2V, {"video": "clip"}, []),
    ],
)
def test_every_way_in_is_accepted(name: str, inputs: dict, overrides: list[str], files) -> None:
    given = {k: files.get(v, v) for k, v in inputs.items()}
    check_inputs(config_of(name, *overrides), Request(0, "a dog", 0, **given))


@pytest.mark.parametrize(
    ("name", "inputs", "overrides", "message"),
    [
        (T2V, {"image": "image"}, [], r"prompt 0 \('a dog'\): this model takes no image \(together with --last-image"),
        (I2V, {}, [], "this model needs an image: --image FILE"),
        (I2V, {"image": "bad_image"}, [], r"cannot read the image .*broken\.png"),
        (T2V, {"video": "bad_video"}, [], r"broken\.mp4: damaged or not a video"),
        (T2V, {"video": "short"}, [],
         r"short\.mp4 has 3 frames at sample\.fps=8, 9 are needed: use --frames 1 or a longer video"),
        (T2V, {"continue_from": "short"}, ["sample.overlap=2"],
         r"short\.mp4 has 3 frames at sample\.fps=8, 5 are needed to continue it: lower sample\.overlap"),
        (T2V, {"video": "clip"}, ["sample.strength=1.5"], r"sample\.strength=1\.5: expected a number from 0"),
        (T2V, {"video": "clip"}, ["sample.strength=-0.1"], r"sample\.strength=-0\.1"),
        (T2V, {"video": "clip"}, ["sample.strength=0.02"], r"0\.02 of sample\.steps=20 is no step .* at least 0\.05"),
        (T2V, {}, ["sample.strength=0.5"], "strength is for video to video: give --video FILE"),
        (T2V, {}, ["sample.invert=true"], "--invert needs the video it starts from: --video FILE"),
        (T2V, {}, ["sample.keep_frames=0-4"], r"sample\.keep_frames needs the video"),
        (T2V, {"video": "clip"}, ["sample.keep_frames=0-4", "sample.invert=true"], "exclude each other"),
        (T2V, {"video": "clip"}, ["sample.keep_frames=0-9"], "0-9 is not within 0-8"),
        (T2V, {"video": "clip"}, ["sample.keep_frames=first"], "expected frames and ranges such as 0-8,40-48"),
        (T2V, {"video": "clip", "source_prompt": "a cat"}, [], "add --invert"),
        (T2V, {"video": "clip"}, ["sample.total_frames=30"], "--video is for one window"),
        (I2V, {"image": "image", "continue_from": "clip"}, [], "exclude each other"),
        (T2V, {"video": "clip", "last_image": "image"}, [], "exclude each other"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_one_clear_error(name, inputs, overrides, message, files) -> None:
    given = {k: files.get(v, v) for k, v in inputs.items()}
    with pytest.raises(ValueError, match=message):
        check_inputs(config_of(name, *overrides), Request(0, "a dog", 0, **given))


def test_a_missing_file_is_named_with_its_prompt(tmp_path: Path) -> None:
    for key in ("image", "last_image", "video", "continue_from"):
        with pytest.raises(
            ValueError, match=rf"{key.replace('_', ' ')} not found for prompt 0 \('a'\): .*gone"
        ):
            make_requests(["a"], 0, **{key: str(tmp_path / "gone")})


def test_each_sample_of_a_prompt_has_the_next_seed(files) -> None:
    requests = make_requests(["a", f"b@@{files['image']}"], 7, samples=2)
    assert [(r.index, r.prompt, r.seed) for r in requests] == [
        (0, "a", 7),
        (1, "a", 8),
        (2, "b", 9),
        (3, "b", 10),
    ]
    assert [r.way for r in requests][0] != requests[2].way == requests[3].way
    with pytest.raises(ValueError, match="--samples 0: expected at least 1"):
        make_requests(["a"], 0, samples=0)


def test_a_request_comes_back_from_its_record(files) -> None:
    request = Request(3, "a", 5, image=files["image"], last_image=files["image"], source_prompt="b")
    record = {"prompt": "a", "seed": 5, "source_prompt": "b", **request.files()}
    assert Request.from_sidecar(record) == dataclasses.replace(request, index=0)
    assert Request.from_sidecar({"prompt": "a", "seed": 5, "image": None}, seed=6) == Request(0, "a", 6)


def test_checks_need_no_torch() -> None:
    code = (
        "import sys, cogvideox.sampling.policy, cogvideox.sampling.windows; "
        "sys.exit(bool({'torch', 'sat', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
