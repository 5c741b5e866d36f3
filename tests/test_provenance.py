"""Records of where weights come from: the object in every file, the fingerprint of a dataset, the hashes of sources."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from cogvideox.cache.entries import EntryFolder
from cogvideox.data.fingerprint import clips_fingerprint, dataset_fingerprint
from cogvideox.data.latent_cache import LatentCache
from cogvideox.data.layouts import Clip
from cogvideox.data.video_folder import VideoFolder
from cogvideox.weights import provenance
from cogvideox.weights.files.headers import read_headers
from cogvideox.weights.sources import Sources

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"
SIZE = dict(num_frames=9, height=32, width=32, fps=8)


# -------------------------------------------------------------------------------------------------------- the object


def test_a_stamp_survives_a_safetensors_file_and_is_read_from_its_header(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"weights")
    known = {"config": {"lora": {"rank": 4}}, "step": 7, "seed": 0, "dataset": None}
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors", provenance.stamp([source], **known))
    record = provenance.read(read_headers([tmp_path / "x.safetensors"]).metadata)
    assert record.pop("version")
    assert record == {
        "source": str(source),
        "source_sha256": hashlib.sha256(b"weights").hexdigest(),
        "config": {"lora": {"rank": 4}},
        "step": 7,
        "seed": 0,  # a value, unlike the dataset that is not known
    }


def test_what_is_made_from_a_file_inherits_the_run_and_not_the_file(tmp_path: Path) -> None:
    record = {
        "version": "0",
        "source": "a",
        "source_sha256": "b",
        "command": "c",
        "step": 3,
        "preview": {"step": 3},
    }
    assert provenance.inherited(record) == {"step": 3, "preview": {"step": 3}}


@pytest.mark.parametrize("text", [None, "no json", "[1]", 3])
def test_metadata_of_others_is_no_record_and_no_error(text: object) -> None:
    assert provenance.read({} if text is None else {provenance.KEY: text}) == {}


def test_several_files_have_one_hash_whatever_order_they_come_in(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text(path.name)
    both = "".join(hashlib.sha256(name.encode()).hexdigest() for name in "ab")
    assert provenance.sha256(reversed(paths)) == hashlib.sha256(both.encode()).hexdigest()


# ------------------------------------------------------------------------------------------- fingerprint of a dataset


def test_a_fingerprint_is_its_definition(tmp_path: Path) -> None:
    for name, size in (("b.mp4", 3), ("deep/a.mp4", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    clips = [Clip("b", tmp_path / "b.mp4", "blau, größer"), Clip("a", tmp_path / "deep/a.mp4", "red")]
    rows = [["0/b.mp4", 3, "blau, größer"], ["0/deep/a.mp4", 5, "red"]]
    expected = hashlib.sha256(json.dumps([rows, [9, [32, 32]]]).encode()).hexdigest()
    assert clips_fingerprint(clips, [tmp_path], [9, (32, 32)]) == expected
    assert clips_fingerprint(reversed(clips), [tmp_path], [9, (32, 32)]) == expected


def test_a_copy_on_another_machine_has_the_same_fingerprint(tmp_path: Path) -> None:
    first = VideoFolder(SAMPLE, **SIZE).fingerprint()
    shutil.copytree(SAMPLE, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
    assert VideoFolder(tmp_path / "elsewhere", **SIZE).fingerprint() == first
    two = [
        VideoFolder([root, tmp_path / "elsewhere"], **SIZE).fingerprint() for root in (SAMPLE, f"{SAMPLE}/.")
    ]
    assert two[0] == two[1] != first


@pytest.mark.parametrize("change", ["caption", "clip", "size", "fps", "random crops", "skip"])
def test_what_changes_the_training_changes_the_fingerprint(tmp_path: Path, change: str) -> None:
    root = shutil.copytree(SAMPLE, tmp_path / "clips")
    before = VideoFolder(root, **SIZE).fingerprint()
    changed = {"size": {"height": 16}, "fps": {"fps": 10}, "random crops": {"crop": "random"}}
    if change == "caption":
        label = next(root.rglob("*.txt"))
        label.write_text(label.read_text() + " slowly")
    if change == "clip":
        next(root.rglob("*.mp4")).unlink()
    if change == "skip":
        changed["skip"] = {"skip_frames": 1, "num_frames": 5}
    assert VideoFolder(root, **SIZE | changed.get(change, {})).fingerprint() != before


def test_cached_latents_have_the_fingerprint_of_their_videos_and_other_datasets_may_have_none(
    tmp_path: Path,
) -> None:
    dataset = VideoFolder(SAMPLE, **SIZE)
    assert (
        dataset_fingerprint(LatentCache(dataset, EntryFolder(tmp_path, "latents", {}, config_key="x")))
        == dataset.fingerprint()
    )
    assert dataset_fingerprint(Dataset()) is None


# --------------------------------------------------------------------------------------------------- hashes of sources


def sources(paths: dict[str, Path], cache: Path) -> dict:
    made = Sources(paths, cache)
    made.start()
    return made.records()


def test_sources_are_named_and_hashed_whole(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"conv.weight": torch.arange(4.0)}, path)
    found = sources({"transformer": path}, tmp_path / "sources.json")["transformer"]
    assert found.pop("variant").startswith("unknown")
    # The same number as `sha256sum` gives, and as a hub shows beside the file.
    assert found == {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_file_that_stayed_is_not_read_again_and_one_that_changed_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "some.safetensors", tmp_path / "sources.json"
    save_file({"x": torch.zeros(4)}, path)
    first = sources({"vae": path}, cache)
    hashed = []
    sha256 = provenance.sha256
    monkeypatch.setattr(provenance, "sha256", lambda files: hashed.append(1) or sha256(files))
    assert sources({"vae": path}, cache) == first and not hashed
    save_file({"x": torch.ones(4)}, path)
    os.utime(path, (1, 1))
    assert sources({"vae": path}, cache)["vae"]["sha256"] != first["vae"]["sha256"] and hashed


def test_a_source_that_cannot_be_found_is_recorded_and_stops_nothing(tmp_path: Path) -> None:
    found = sources({"vae": tmp_path / "gone"}, tmp_path / "sources.json")["vae"]
    assert "gone does not exist" in found["error"] and "sha256" not in found


def test_safetensors_metadata_is_text_only_as_the_format_wants_it(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", provenance.stamp(config={"a": [1, None]}))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()[provenance.KEY])["config"] == {"a": [1, None]}
