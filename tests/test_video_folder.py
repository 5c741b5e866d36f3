"""Folders of videos: every layout, every way in which one can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cogvideox.data.layouts import find_clips, label_path
from cogvideox.data.video_folder import VideoFolder
from cogvideox.sampling.video_io import write_video

CAPTIONS = {"a": "a red circle", "b": "a blue square, moving"}
SIZE = dict(num_frames=9, height=32, width=32, fps=8)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    """9 frames at 8 fps, 32 x 48, brightness rising by 20 a frame."""
    path = tmp_path_factory.mktemp("mp4") / "x.mp4"
    levels = torch.arange(9, dtype=torch.uint8) * 20 + 20
    write_video(path, levels[:, None, None, None].expand(9, 3, 32, 48), 8)
    return path.read_bytes()


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def rows(video_column="file_name", caption_column="caption", prefix="clips/") -> list[dict]:
    return [{video_column: f"{prefix}{name}.mp4", caption_column: text} for name, text in CAPTIONS.items()]


def layout_files(layout: str, mp4: bytes) -> dict[str, bytes | str]:
    a, b = CAPTIONS.values()
    clips = {"clips/a.mp4": mp4, "clips/b.mp4": mp4}
    match layout:
        case "labels":
            return {"videos/a.mp4": mp4, "videos/b.mp4": mp4, "labels/a.txt": a, "labels/b.txt": f"{b}\n"}
        case "deep labels":
            return {
                "s/videos/a.mp4": mp4,
                "t/videos/u/b.mp4": mp4,
                "s/labels/a.txt": a,
                "t/labels/u/b.txt": b,
            }
        case "same_stem":
            return {"a.mp4": mp4, "deep/b.mp4": mp4, "a.txt": a, "deep/b.txt": b}
        case "prompts":
            return clips | {"prompts.txt": f"{a}\n{b}\n", "videos.txt": "clips/a.mp4\nclips/b.mp4\n"}
        case "prompt":
            return clips | {"prompt.txt": f"{a}\n{b}\n\n", "videos.txt": "clips/a.mp4\nclips/b.mp4"}
        case "csv":
            return clips | {"metadata.csv": f'\ufefffile_name,caption\nclips/a.mp4,{a}\nclips/b.mp4,"{b}"\n'}
        case "json":
            return clips | {"metadata.json": json.dumps(rows("path", "text"))}
        case "jsonl":
            return clips | {
                "metadata.jsonl": "\n".join(json.dumps(r) for r in rows("video", "prompt")) + "\n"
            }
    raise AssertionError(layout)


LAYOUTS = ["labels", "deep labels", "same_stem", "prompts", "prompt", "csv", "json", "jsonl"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised(tmp_path, mp4, layout):
    dataset = VideoFolder(put(tmp_path, layout_files(layout, mp4)), **SIZE)
    found = {Path(dataset[i]["key"]).stem: dataset[i]["caption"] for i in range(len(dataset))}
    assert found == CAPTIONS
    item = dataset[0]
    assert item["video"].shape == (9, 3, 32, 32) and item["video"].dtype == torch.uint8
    levels = item["video"].float().mean((1, 2, 3))
    torch.testing.assert_close(levels, torch.arange(9) * 20.0 + 20, atol=3, rtol=0)  # H.264 at quality 17
    assert item["fps"] == pytest.approx(8)


def test_only_the_last_folder_called_videos_is_exchanged(tmp_path, mp4):
    root = tmp_path / "videos" / "set videos"
    put(root, {"videos/videos_of_me/videos.mp4": mp4, "labels/videos_of_me/videos.txt": "me"})
    assert [clip.caption for clip in find_clips(root)[1]] == ["me"]
    nested = root / "videos" / "videos" / "x.mp4"
    assert label_path(nested, root) == root / "videos" / "labels" / "x.txt"
    assert label_path(root / "x.mp4", root) is None  # the folder above the data is none of ours
    put(tmp_path / "set", {"videos/a.mp4": mp4, "labels/a.txt": "a"})
    assert [clip.caption for clip in find_clips(tmp_path / "set" / "videos")[1]] == [
        "a"
    ]  # the folder itself is given


def test_two_layouts_at_once_are_an_error_that_names_both(tmp_path, mp4):
    put(tmp_path, layout_files("labels", mp4) | {"videos/a.txt": "another caption"})
    with pytest.raises(ValueError, match="layouts labels and same_stem"):
        VideoFolder(tmp_path, **SIZE)
    with pytest.raises(ValueError, match="1 of 2 clips cannot be used"):
        VideoFolder(tmp_path, layout="same_stem", **SIZE)
    assert len(VideoFolder(tmp_path, layout="labels", **SIZE)) == 2
    put(tmp_path / "m", layout_files("csv", mp4) | layout_files("jsonl", mp4))
    with pytest.raises(ValueError, match="metadata.csv and metadata.jsonl"):
        find_clips(tmp_path / "m")
    assert len(find_clips(tmp_path / "m" / "metadata.jsonl")[1]) == 2


def test_metadata_errors_name_file_and_column(tmp_path, mp4):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"clip": "a.mp4", "caption": "x"}')
    with pytest.raises(ValueError, match=r"none of file_name.*\(clip, caption\); set video_column"):
        find_clips(tmp_path)
    assert find_clips(tmp_path, video_column="clip")[1][0].path == tmp_path / "a.mp4"
    path.write_text('{"path": "a.mp4", "caption": "x", "text": "y"}')
    with pytest.raises(ValueError, match="caption and text both.*set caption_column"):
        find_clips(tmp_path)
    assert find_clips(tmp_path, caption_column="text")[1][0].caption == "y"
    with pytest.raises(ValueError, match="no column 'words'"):
        find_clips(tmp_path, caption_column="words")
    path.write_text("{broken")
    with pytest.raises(ValueError, match="not valid jsonl"):
        find_clips(tmp_path)


def test_lists_of_different_length_are_an_error(tmp_path, mp4):
    put(tmp_path, {"prompts.txt": "a\nb\nc\n", "videos.txt": "a.mp4\nb.mp4\n"})
    with pytest.raises(ValueError, match="prompts.txt has 3 lines, videos.txt has 2"):
        find_clips(tmp_path)


def test_nothing_found_says_what_was_looked_for(tmp_path, mp4):
    with pytest.raises(ValueError, match="holds no videos.*metadata.csv.*videos.txt.*labels/"):
        VideoFolder(tmp_path, **SIZE)
    with pytest.raises(ValueError, match="no such folder"):
        VideoFolder(tmp_path / "gone", **SIZE)
    put(tmp_path, {"videos/a.mp4": mp4})
    with pytest.raises(ValueError, match="holds 1 videos but no captions"):
        VideoFolder(tmp_path, **SIZE)


def test_a_missing_caption_is_an_error_or_a_listed_skip(tmp_path, mp4):
    put(
        tmp_path,
        layout_files("labels", mp4) | {"videos/c.mp4": mp4, "videos/d.mp4": mp4, "labels/d.txt": " \n"},
    )
    with pytest.raises(
        ValueError, match=r"2 of 4 clips(.|\n)*videos/c.mp4: has no caption(.|\n)*on_missing_caption"
    ):
        VideoFolder(tmp_path, **SIZE)
    dataset = VideoFolder(tmp_path, on_missing_caption="skip", max_bad_fraction=0.5, **SIZE)
    assert len(dataset) == 2 and set(dataset.skipped) == {"videos/c.mp4", "videos/d.mp4"}
    assert "2 skipped" in dataset.report() and "videos/d.mp4: has no caption" in dataset.report()


def test_bad_clips_are_an_error_or_a_listed_skip_until_they_are_too_many(tmp_path, mp4, caplog):
    files = layout_files("labels", mp4) | {"videos/cut.mp4": mp4[:500], "labels/cut.txt": "cut"}
    put(tmp_path, files | {"videos/short.mp4": mp4, "labels/short.txt": "short"})
    write_video(tmp_path / "videos" / "short.mp4", torch.zeros(8, 3, 32, 32), 8)
    with pytest.raises(
        ValueError, match=r"2 of 4 clips(.|\n)*damaged(.|\n)*too short(.|\n)*on_bad_clip=skip"
    ):
        VideoFolder(tmp_path, **SIZE)
    dataset = VideoFolder(tmp_path, on_bad_clip="skip", max_bad_fraction=0.5, **SIZE)
    assert [clip.path.stem for clip in dataset.clips] == ["a", "b"]
    assert "8 usable frames at 8 fps give 5 frames" in dataset.skipped["videos/short.mp4"]
    assert "videos/cut.mp4" in caplog.text  # said without being asked
    with pytest.raises(ValueError, match="more than data.max_bad_fraction=0.4"):
        VideoFolder(tmp_path, on_bad_clip="skip", max_bad_fraction=0.4, **SIZE)


def test_clips_slower_than_asked_are_flagged(tmp_path, mp4):
    put(tmp_path, layout_files("labels", mp4))
    dataset = VideoFolder(tmp_path, 9, 32, 32, fps=16)
    assert set(dataset.flagged) == {"videos/a.mp4", "videos/b.mp4"} and "instead of 16" in dataset.report()


def test_wrong_settings_are_named(tmp_path, mp4):
    put(tmp_path, layout_files("labels", mp4))
    with pytest.raises(ValueError, match="data.num_frames=8: .*5 or 9"):
        VideoFolder(tmp_path, 8, 32, 32, 8)
    with pytest.raises(ValueError, match="data.on_bad_clip='ignore': expected one of error, skip"):
        VideoFolder(tmp_path, on_bad_clip="ignore", **SIZE)


def test_several_folders_make_one_dataset(tmp_path, mp4):
    put(tmp_path / "one", layout_files("labels", mp4))
    put(tmp_path / "two", layout_files("csv", mp4))
    dataset = VideoFolder([tmp_path / "one", tmp_path / "two"], **SIZE)
    assert len(dataset) == 4 and len({dataset[i]["key"] for i in range(4)}) == 4
    with pytest.raises(ValueError, match="listed more than once"):
        VideoFolder([tmp_path / "one", tmp_path / "one"], **SIZE)


def test_random_crops_change_with_the_epoch_and_repeat_with_the_seed(tmp_path):
    write_video(tmp_path / "a.mp4", torch.randint(0, 256, (9, 3, 32, 128), dtype=torch.uint8), 8)
    put(tmp_path, {"a.txt": "noise"})
    dataset = VideoFolder(tmp_path, crop="random", seed=3, **SIZE)
    epochs = [dataset.item(0, epoch)["video"] for epoch in range(4)]
    assert any(not torch.equal(epochs[0], other) for other in epochs[1:])
    again = VideoFolder(tmp_path, crop="random", seed=3, **SIZE)
    assert torch.equal(again.item(0, 2)["video"], epochs[2])


def test_fingerprints_follow_contents_and_settings_and_not_the_name(tmp_path, mp4):
    put(tmp_path, layout_files("labels", mp4))
    dataset = VideoFolder(tmp_path, **SIZE)
    assert dataset.clip_fingerprint(0) == dataset.clip_fingerprint(1)  # the same bytes
    assert VideoFolder(tmp_path, 5, 32, 32, 8).clip_fingerprint(0) != dataset.clip_fingerprint(0)
    assert VideoFolder(tmp_path, **SIZE, seed=1).clip_fingerprint(0) == dataset.clip_fingerprint(
        0
    )  # a central crop has no seed
    write_video(tmp_path / "videos" / "a.mp4", torch.zeros(9, 3, 32, 48), 8)
    assert dataset.clip_fingerprint(0) != dataset.clip_fingerprint(1)


def test_the_sample_set_of_the_repository_reads():
    root = Path(__file__).resolve().parents[1] / "data" / "sample"
    dataset = VideoFolder(root, **SIZE)
    assert len(dataset) == 8 and dataset.layouts == ["labels"] and not dataset.skipped and not dataset.flagged
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 200_000
