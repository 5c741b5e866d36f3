"""Frame selection: the fixtures' `right` column, and properties that hold for any rate."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cogvideox.data.frames import check_frame_count, largest_legal_count, select_frames
from cogvideox.data.reader import open_video


def times(fps: float, n: int) -> np.ndarray:
    return np.arange(n) / fps


def test_selection_is_the_right_one_for_every_reference_case(reference):
    """105 cases (35 videos x 3 lengths), all equal. Exact ties (30 fps at 8: step 3.75, so 7.5) go to the later frame,
    as in the reference; in the one file of varying rate float rounding decides them, also as in the reference."""
    folder = reference / "fixtures" / "dataset"
    config = json.loads((folder / "config.json").read_text())
    cases = json.loads((folder / "frames.json").read_text())
    assert len(cases) == 105
    readers = {case["video"]: open_video(folder / "videos" / case["video"]) for case in cases}
    ties = 0
    for case in cases:
        stamps = readers[case["video"]].timestamps
        assert len(stamps) == case["len"]
        chosen = select_frames(stamps, config["fps"], case["max_num_frames"], config["skip_frms_num"]).indices
        right = case["right"] or []
        assert chosen == right, case["video"]
        assert len(chosen) == case["right_num_frames"]
        start = config["skip_frms_num"]
        for k, index in enumerate(right[:-1]):
            error = abs(stamps[index] - stamps[start] - k / config["fps"])
            ties += (
                abs(error - abs(stamps[index - 1] - stamps[start] - k / config["fps"])) < 1e-9
                and error > 1e-3
            )
    assert ties > 50  # the rule at a tie is really exercised


@pytest.mark.parametrize("source", [8, 10, 12, 15, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60])
@pytest.mark.parametrize("wanted", [8, 16])
def test_each_frame_is_the_nearest_to_its_time(source, wanted):
    stamps = times(source, 400)
    selection = select_frames(stamps, wanted, 49, skip=3)
    assert len(selection.indices) == 49
    targets = stamps[3] + np.arange(49) / wanted
    errors = np.abs(stamps[selection.indices] - targets)
    assert errors.max() <= 0.5 / source + 1e-9  # half a source frame: nothing is nearer
    if source >= wanted:
        assert abs(selection.fps / wanted - 1) < 0.02 and not selection.has_wrong_fps


def test_milliseconds_of_matroska_are_a_constant_rate():
    exact, rounded = times(30, 200), np.round(times(30, 200), 3)
    assert select_frames(exact, 8, 49).indices == select_frames(rounded, 8, 49).indices


def test_skip_holds_at_both_ends():
    indices = select_frames(times(8, 60), 8, 49, skip=5).indices
    assert indices[0] == 5 and indices[-1] == 53 and len(indices) == 49
    assert select_frames(times(8, 57), 8, 49, skip=5).indices[-1] <= 51  # 47 usable frames: 45 are taken
    assert select_frames(times(8, 6), 8, 49, skip=3).indices == []


def test_a_slow_source_repeats_frames_and_is_flagged():
    selection = select_frames(times(6, 60), 8, 49)
    assert selection.has_wrong_fps and selection.fps == pytest.approx(6, rel=0.02)
    assert len(selection.indices) == 49 and len(set(selection.indices)) < 49


def test_counts_follow_the_frame_multiple():
    assert [largest_legal_count(n) for n in (0, 1, 4, 5, 49, 52)] == [0, 1, 1, 5, 49, 49]
    assert [largest_legal_count(n, 16) for n in (16, 17, 81, 96, 161)] == [1, 17, 81, 81, 161]
    assert len(select_frames(times(16, 100), 16, 161, frame_multiple=16).indices) == 97


def test_an_illegal_count_names_its_neighbours():
    check_frame_count(49)
    check_frame_count(81, 16)
    with pytest.raises(ValueError, match=r"data.num_frames=48: .*4k\+1.*45 or 49"):
        check_frame_count(48, key="data.num_frames")
    with pytest.raises(ValueError, match=r"16k\+1.*65 or 81"):
        check_frame_count(80, 16)
    with pytest.raises(ValueError, match="fps=0"):
        select_frames(times(8, 9), 0, 9)
