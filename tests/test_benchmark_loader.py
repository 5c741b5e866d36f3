"""The loader's benchmark: both sides deliver the same clip, and ours keeps little beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cogvideox.data.reader import open_video
from scripts.benchmark import __main__ as command
from scripts.benchmark import loader, results

pytest.importorskip("decord")


def test_the_loader_benchmark_compares_the_same_frames(tmp_path: Path) -> None:
    command.main(["loader", "--quick", "--rounds", "3", "--output", str(tmp_path)])
    ours, published, wanted = results.load(tmp_path)["loader"]
    assert ours.candidate == "ours" and ours.ratio is None and ours.max_difference is None
    assert published.ratio.low <= published.ratio.median <= published.ratio.high
    # Floats against uint8 that is rounded and cut between the two directions of the filter.
    assert published.max_difference <= 6
    assert wanted.max_difference == 0  # decord at its best: the same frames, the same resize
    assert all(row.memory["total"] > row.memory["above"] > 0 for row in (ours, published, wanted))


def test_the_clip_is_what_the_benchmark_says() -> None:
    case = loader.QUICK
    video = open_video(loader.clip_folder(case) / "videos" / "clip.mp4")
    assert video.size == (case.source_height, case.source_width)
    assert video.num_frames == case.seconds * case.source_fps and video.average_fps == case.source_fps


def test_textures_have_the_spectrum_of_natural_pictures() -> None:
    """Amplitude falls as 1/f^1.2, so from one octave to the next by 2^1.2 (Field 1987: natural scenes near 1/f)."""
    grey = loader.texture(np.random.default_rng(0), 128, 128).mean(axis=2)
    amplitude = np.abs(np.fft.rfft2(grey))
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.rfftfreq(128)[None])
    octaves = [amplitude[(frequency >= f) & (frequency < 2 * f)].mean() for f in (1 / 32, 1 / 16, 1 / 8)]
    assert octaves[0] / octaves[1] == pytest.approx(2**1.2, rel=0.1)  # some hundred values each
    assert octaves[1] / octaves[2] == pytest.approx(2**1.2, rel=0.1)
