"""Names of GPUs, as people and as drivers write them."""

from __future__ import annotations

import pytest

from cogvideox.gpus import find, gpu_named


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h200", "H200"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("a100", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_a_gpu_is_found_by_the_name_that_people_and_drivers_give_it(written: str, name: str) -> None:
    assert gpu_named(written).name == name


def test_an_unknown_gpu_is_one_clear_error() -> None:
    assert find("NVIDIA GeForce GTX 1080") is None
    with pytest.raises(
        ValueError, match=r"no data of a GPU called 'H20'; did you mean H200\? Known are B200"
    ):
        gpu_named("H20")
