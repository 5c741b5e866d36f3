"""Timestep bands: names and assignment agree, whatever the numbers."""

from __future__ import annotations

import pytest
import torch

from cogvideox.diffusion.bands import band_names, band_of


def test_four_bands_of_a_thousand_have_the_agreed_names() -> None:
    assert band_names(1000, 4) == ["0000-0249", "0250-0499", "0500-0749", "0750-0999"]


@pytest.mark.parametrize(("num_timesteps", "bands"), [(1000, 4), (1000, 3), (7, 7), (10, 1), (20000, 6)])
def test_each_timestep_lies_in_the_band_whose_name_says_so(num_timesteps: int, bands: int) -> None:
    t = torch.arange(num_timesteps)
    found = band_of(t, num_timesteps, bands)
    for index, name in enumerate(band_names(num_timesteps, bands)):
        first, last = map(int, name.split("-"))
        assert t[found == index].tolist() == list(range(first, last + 1))
    sizes = found.bincount(minlength=bands)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("bands", [0, 11])
def test_bands_without_a_timestep_are_an_error(bands: int) -> None:
    with pytest.raises(ValueError, match=f"train.timestep_bands={bands}: expected 1 to 10"):
        band_of(torch.arange(10), 10, bands)
