"""Larger videos and more GPUs, calculated: against figures that were worked out by hand."""

from __future__ import annotations

import pytest

from cogvideox.gpus import gpu_named
from cogvideox.planning.communication import EFFICIENCY, Cluster
from scripts.benchmark import scaling
from scripts.benchmark.scaling import Split, fastest, rows, sample_time, sampling_config, splits

H200 = Cluster(gpu_named("H200"))


@pytest.mark.parametrize(
    ("case", "tokens", "teraflops", "share", "decode"),
    [
        ("2B, 97x480x720", 33_976, 356, 0.75, 624),
        ("2B, 49x720x1280", 47_026, 634, 0.80, 840),
        ("5B, 49x480x720", 17_776, 332, 0.49, 315),
        ("1.5-5B, 161x768x1360", 85_904, 4626, 0.82, 3128),  # two text tokens fewer than in diffusers
    ],
)
def test_the_published_sizes_are_those_of_the_reference(case, tokens, teraflops, share, decode) -> None:
    (row,) = [row for row in rows() if row.case == f"size: {case}"]
    assert row.counted["tokens"] == tokens
    assert row.counted["forward TFLOP"] == pytest.approx(teraflops, rel=2e-3)  # whole TFLOP
    assert row.counted["attention share"] == pytest.approx(share, abs=0.006)
    assert row.counted["decode TFLOP"] == pytest.approx(decode, rel=2e-3)


def test_heads_are_shared_out_evenly() -> None:
    assert {way.heads for way in splits(30, 8) if way.guidance == 2} == {
        1,
        2,
        3,
    }  # 2 x 4 would leave heads over
    assert {way.heads for way in splits(48, 8) if way.guidance == 2} == {1, 2, 3, 4}
    assert all(way.gpus <= 8 and 30 % way.heads == 0 for way in splits(30, 8))


def test_a_video_of_the_5b_on_eight_gpus_sends_172_gigabytes_from_each() -> None:
    """4 tensors of S x d in bf16 / 4 GPUs, 3/4 of it to others, in 42 layers and 50 steps: 82 MB a layer."""
    time = sample_time(sampling_config("5B", 49, 480, 720), H200, Split(2, 4))
    layer = 4 * 17_776 * 3072 * 2 / 4 * 3 / 4
    latents = 50 * 4 * 13 * 16 * 60 * 90
    assert layer == pytest.approx(82e6, rel=2e-3)
    assert time.sent == pytest.approx(50 * 42 * layer + latents)
    inside = 50 * 42 * (layer / (EFFICIENCY * 450e9) + 2 * scaling.CALL_SECONDS)
    assert time.communication == pytest.approx(inside + latents / (EFFICIENCY * 50e9), rel=1e-3)


def test_without_a_split_nothing_is_sent_and_a_split_divides_the_network() -> None:
    config = sampling_config("2B", 49, 480, 720)
    alone, pair = (sample_time(config, H200, Split(g, 1)) for g in (1, 2))
    assert alone.sent == alone.communication == 0
    assert pair.network == alone.network / 2 and pair.decode == alone.decode
    assert sample_time(config, H200, Split(2, 3)).network == pytest.approx(alone.network / 6)
    # 8 of the 15 others stand in another machine, behind a card that is nine times as slow as the links inside.
    assert scaling._all_to_all_rate(H200, 16) == pytest.approx(EFFICIENCY * 50e9 * 15 / 8)


def test_more_gpus_are_never_slower_and_communication_is_counted_in_seconds() -> None:
    config = sampling_config("5B", 49, 480, 720)
    times = [fastest(config, H200, gpus).total for gpus in (1, 2, 8, 64)]
    assert times == sorted(times, reverse=True)
    for row in rows():
        if row.case.startswith(("sampling", "training")) and row.counted["gpus"] > 1:
            assert row.counted["sent GB per GPU"] > 0 and row.counted["communication seconds"] > 0
