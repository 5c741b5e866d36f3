"""Videos longer than the window: which frames come from where, and how the seams are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cogvideox
from cogvideox.config import ConfigError
from cogvideox.sampling.windows import Plan, SeamMeter, joined, plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def plan_of(*overrides: str, model: str = "tiny_t2v", continued: bool = False) -> Plan:
    return plan(cogvideox.load_config([CONFIGS / f"{model}.yaml"], list(overrides)), continued)


def test_one_window_is_the_whole_video() -> None:
    for overrides in ([], ["sample.total_frames=9"]):
        one = plan_of(*overrides)
        assert (one.windows, one.total, one.seams, one.drops) == (1, 9, [], [0])
    assert plan_of("sample.total_frames=6").total == 6  # cut


@pytest.mark.parametrize(
    ("overrides", "model", "continued", "expected"),
    [
        # 9 frames, then 8 new ones each: the last frame is shared.
        (["sample.total_frames=25"], "tiny_i2v", False, ("image", 3, [9, 17], [0, 1, 1])),
        # 2 of 3 latents are shared, 4 frames are new; one stream of latents.
        (["sample.total_frames=20", "sample.overlap=2"], "tiny_t2v", False, ("latents", 4, [9, 13, 17], [0])),
        (["sample.total_frames=20", "sample.overlap=2", "sample.continue_by=frames"], "tiny_t2v", False,
         ("frames", 4, [9, 13, 17], [0, 5, 5, 5])),
        ([], "tiny_i2v", True, ("image", 1, [0], [1])),
        (["sample.total_frames=10", "sample.overlap=2"], "tiny_t2v", True, ("latents", 3, [0, 4, 8], [5])),
        (["sample.total_frames=97", "sample.num_frames=49"], "cogvideox_5b", False, ("latents", 3, [49, 89], [0])),
    ],
)  # fmt: skip
def test_windows_cover_the_video_once(overrides, model, continued, expected) -> None:
    found = plan_of(*overrides, model=model, continued=continued)
    assert (found.by, found.windows, found.seams, found.drops) == expected
    made = (0 if continued else found.window - found.added) + found.windows * found.added
    assert made >= found.total > made - found.added  # enough, and no window too many


@pytest.mark.parametrize("by", ["image", "frames"])
@pytest.mark.parametrize("continued", [False, True])
def test_joined_windows_show_each_frame_once_and_stop_at_the_total(by: str, continued: bool) -> None:
    shared = 1 if by == "image" else 5
    windows = Plan(by, 0, shared, 9, 22, continued)
    first = -shared if continued else 0  # frames are numbered by what the result should show
    segments, start = [], first
    for _ in range(windows.windows):
        frames = torch.arange(start, start + 9.0).view(9, 1, 1, 1)
        segments.append(frames.split([1, 4, 4]))
        start += 9 - shared
    shown = torch.cat(list(joined(segments, windows))).flatten().tolist()
    assert shown == list(range(22))


def test_windows_that_are_not_shown_are_not_decoded() -> None:
    decoded = []

    def segment():
        for _ in range(3):
            decoded.append(1)
            yield torch.zeros(4, 3, 2, 2)

    assert sum(len(chunk) for chunk in joined([segment()], Plan("latents", 1, 1, 12, 5, False))) == 5
    assert len(decoded) == 2


def test_a_seam_is_measured_against_the_motion_inside() -> None:
    steps = torch.tensor([0.0, 1, 2, 3, 9, 10, 11, 12])  # a jump of 6 where the others are 1
    video = steps.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    for sizes in ([8], [3, 1, 4], [1] * 8):
        meter = SeamMeter([4])
        assert torch.equal(torch.cat(list(meter.watch(video.split(sizes)))), video)
        assert meter.report() == {"inside": 1.0, "seams": [{"frame": 4, "difference": 6.0, "ratio": 6.0}]}
    meter = SeamMeter([0], before=torch.full((3, 2, 2), -2.0))
    list(meter.watch([video[:4]]))
    assert meter.report()["seams"] == [{"frame": 0, "difference": 2.0, "ratio": 2.0}]


def test_no_seam_no_report_and_still_windows_have_no_ratio() -> None:
    meter = SeamMeter([])
    list(meter.watch([torch.zeros(4, 3, 2, 2)]))
    assert meter.report() is None
    meter = SeamMeter([2])
    list(meter.watch([torch.zeros(4, 3, 2, 2)]))
    assert meter.report()["seams"] == [{"frame": 2, "difference": 0.0, "ratio": None}]


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    [
        (["sample.continue_by=magic"], "tiny_t2v", "expected one of image, frames, latents"),
        (["sample.continue_by=image"], "tiny_t2v", "needs an image-to-video model; this one takes frames or latents"),
        (["sample.continue_by=latents"], "tiny_i2v", "use image or frames"),
        (["sample.total_frames=0"], "tiny_t2v", r"sample\.total_frames=0: expected at least 1"),
        (["sample.total_frames=20", "sample.overlap=3"], "tiny_t2v",
         r"sample\.overlap=3: a window of sample\.num_frames=9 has 3 latent frames, of which 1 to 2 can be shared"),
        (["sample.total_frames=20", "sample.overlap=0"], "tiny_t2v", r"sample\.overlap=0"),
        (["sample.total_frames=20", "sample.num_frames=1"], "tiny_i2v", r"sample\.num_frames=1: a window of one frame"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_work_is_one_clear_error(overrides, model, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(*overrides, model=model)
