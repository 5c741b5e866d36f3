"""Saturation, brightness and motion of videos whose numbers are known in closed form, and their drift."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import pytest
import torch

from cogvideox.sampling.drift import Appearance, base_of, beyond, metrics


def looks(video: torch.Tensor, cuts: tuple[int, ...] = ()) -> dict[str, float | None]:
    appearance = Appearance()
    for chunk in torch.tensor_split(video, cuts):
        appearance.add(chunk)
    return appearance.result()


def flat(red: int, green: int, blue: int, frames: int = 3) -> torch.Tensor:
    """(frames, 3, 8, 10) of one colour."""
    return torch.tensor([red, green, blue], dtype=torch.uint8).view(1, 3, 1, 1).expand(frames, 3, 8, 10)


@pytest.mark.parametrize("level", [0, 51, 255])
def test_a_grey_video_has_no_saturation_no_motion_and_its_level_as_brightness(level: int) -> None:
    found = looks(flat(level, level, level))
    assert found == {"saturation": 0.0, "brightness": pytest.approx(level / 255), "motion": 0.0}


# Uniform colours have no variance: 0.3 |(rg, yb)| remains of the formula. Luma is the weight of the primary.
@pytest.mark.parametrize(
    ("colour", "rg", "yb", "luma"),
    [
        ((255, 0, 0), 1.0, 0.5, 0.2126),
        ((0, 255, 0), -1.0, 0.5, 0.7152),
        ((0, 0, 255), 0.0, -1.0, 0.0722),
        ((255, 255, 0), 0.0, 1.0, 0.9278),
    ],
)
def test_a_pure_colour_has_the_published_formulas_value(colour, rg: float, yb: float, luma: float) -> None:
    found = looks(flat(*colour))
    assert found["saturation"] == pytest.approx(0.3 * math.hypot(rg, yb), abs=1e-9)
    assert found["brightness"] == pytest.approx(luma, abs=1e-9)


def test_two_halves_add_the_spread_of_their_colours() -> None:
    video = flat(255, 0, 0).clone()
    video[..., 5:] = flat(0, 255, 0)[..., 5:]  # rg is +1 or -1 (mean 0, variance 1), yb is 1/2 everywhere
    assert looks(video)["saturation"] == pytest.approx(1.0 + 0.3 * 0.5, abs=1e-9)


def test_saturation_agrees_with_the_formula_in_plain_floating_point() -> None:
    video = torch.randint(0, 256, (4, 3, 16, 12), generator=torch.Generator().manual_seed(0))
    red, green, blue = (video.double() / 255).unbind(dim=1)
    expected = []
    for rg, yb in zip(red - green, (red + green) / 2 - blue, strict=True):
        spread = (rg.var(correction=0) + yb.var(correction=0)).sqrt()
        expected.append(float(spread + 0.3 * (rg.mean() ** 2 + yb.mean() ** 2).sqrt()))
    assert looks(video.to(torch.uint8))["saturation"] == pytest.approx(sum(expected) / 4, abs=1e-9)


def test_stronger_colours_are_more_saturated_than_pale_ones() -> None:
    strengths = [0.0, 0.3, 0.6, 1.0]
    colours = [[round(255 * c) for c in colorsys.hsv_to_rgb(0.1, s, 0.8)] for s in strengths]
    found = [looks(flat(*colour))["saturation"] for colour in colours]
    assert found == sorted(found) and len(set(found)) == 4


def test_a_moving_bar_has_the_motion_of_its_two_edges() -> None:
    video = torch.zeros(5, 3, 8, 20, dtype=torch.uint8)
    for k in range(5):
        video[k, :, :, 2 * k : 2 * k + 4] = 255  # each frame two columns darken and two brighten, of twenty
    assert looks(video)["motion"] == pytest.approx(4 / 20, abs=1e-9)
    assert looks(video[:1])["motion"] is None


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (1, 2, 3, 4, 5)])
def test_the_numbers_do_not_depend_on_how_the_stream_is_cut(cuts: tuple[int, ...]) -> None:
    video = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert looks(video, cuts) == looks(video)


# ------------------------------------------------------------------------------------------------------------- drift


def video(
    seed: int, saturation: float, motion: float | None = 0.1, shape: tuple = (3, 8, 8, 8)
) -> dict[str, Any]:
    appearance = {"saturation": saturation, "brightness": 0.5, "motion": motion}
    return {
        "prompt": "a dot",
        "seed": seed,
        "image": None,
        "appearance": appearance,
        "latents": {"shape": list(shape)},
    }


def test_drift_is_relative_to_the_base_models_mean() -> None:
    base = base_of([video(0, 0.1), video(1, 0.3)])
    found = metrics([video(0, 0.3), video(1, 0.3)], base)
    assert found["preview/saturation"] == pytest.approx(0.3)
    assert found["preview/saturation_drift"] == pytest.approx(0.3 / 0.2 - 1)
    assert found["preview/brightness_drift"] == found["preview/motion_drift"] == 0.0
    assert beyond(found, 0.4) == {"saturation": pytest.approx(0.5)} and beyond(found, 0.6) == {}


def test_the_base_model_itself_has_no_drift() -> None:
    videos = [video(0, 0.1), video(1, 0.3)]
    found = metrics(videos, base_of(videos))
    assert [found[f"preview/{name}_drift"] for name in ("saturation", "brightness", "motion")] == [0.0] * 3


def test_only_the_same_videos_are_compared() -> None:
    others = [video(1, 0.1), video(0, 0.1, shape=(5, 8, 8, 8)), video(0, 0.1) | {"prompt": "a line"}]
    found = metrics([video(0, 0.3)], base_of(others))
    assert found == {"preview/saturation": 0.3, "preview/brightness": 0.5, "preview/motion": 0.1}
    found = metrics([video(0, 0.3), video(1, 0.1)], base_of(others))
    assert found["preview/saturation"] == pytest.approx(0.2) and found["preview/saturation_drift"] == 0.0
    assert metrics([video(0, 0.3)], None).keys() == {
        f"preview/{n}" for n in ("saturation", "brightness", "motion")
    }


def test_a_grey_base_counts_as_one_level_of_eight_bits() -> None:
    found = metrics([video(0, 2 / 255)], base_of([video(0, 0.0)]))
    assert found["preview/saturation_drift"] == pytest.approx(2.0)


def test_a_video_of_one_frame_has_no_motion_to_drift() -> None:
    found = metrics([video(0, 0.2, motion=None)], base_of([video(0, 0.2, motion=None)]))
    assert "preview/motion" not in found and "preview/motion_drift" not in found
