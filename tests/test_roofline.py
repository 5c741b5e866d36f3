"""The bound that times are given as a fraction of, and that it is measured of everything it is made of."""

from __future__ import annotations

import pytest
import torch

from scripts.benchmark import roofline
from scripts.benchmark.roofline import RATE, Rates, fastest, rates, run
from scripts.benchmark.settings import Settings

TERA = Rates(matmul=2e12, attention=1e12, memory=1e11)


def test_products_and_attention_follow_each_other_and_hide_what_is_moved_or_are_hidden_by_it() -> None:
    assert TERA.bound_seconds(4e12, 3e12, 0) == 2 + 3
    assert TERA.bound_seconds(4e12, 3e12, 4.9e11) == 2 + 3  # moved in 4.9 s, meanwhile
    assert TERA.bound_seconds(4e12, 3e12, 7e11) == 7


def test_every_product_of_the_model_and_attention_and_copies_have_a_rate() -> None:
    rows = run(Settings(quick=True))
    for dtype in ("float32", "bfloat16"):
        mine = [row for row in rows if row.case.endswith(dtype)]
        products = {row.case.split(", ")[1] for row in mine if row.case.startswith("product")}
        assert products == {"square", "qkv", "out", "h to 4h", "4h to h"}
        assert any(row.case.startswith("attention") for row in mine)
    assert any(row.case.startswith("triad") for row in rows)
    assert all(row.seconds > 0 and row.counted[RATE] > 0 for row in rows if not row.note)


def test_a_rate_is_work_over_time() -> None:
    (row,) = [
        row
        for row in run(Settings(quick=True))
        if row.case.startswith("product, 4h to h") and "float32" in row.case
    ]
    assert row.counted[RATE] * 1e9 * row.seconds == pytest.approx(2 * 64 * 256 * 64)
    (row,) = [row for row in run(Settings(quick=True)) if row.case.startswith("triad")]
    assert row.counted[RATE] * 1e9 * row.seconds == pytest.approx(
        3 * 2**10 * 4
    )  # two arrays read, one written


def test_bf16_is_bound_by_the_faster_way_of_multiplying_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bf16 instructions that is float32, where a bound of bf16 alone could be beaten."""

    def row(case: str, rate: float) -> roofline.Row:
        return roofline.Row("roofline", case, "torch", 1.0, counted={RATE: rate})

    found = [row(f"{kind}, {dtype}", rate) for kind in ("product", "attention") for dtype, rate in
             (("float32", 70.0), ("bfloat16", 17.0))]  # fmt: skip
    found += [
        row("triad, float32", 20.0),
        roofline.Row("roofline", "attention, bfloat16", "cuDNN", note="refused"),
    ]
    monkeypatch.setattr(roofline, "measured", lambda device, quick: tuple(found))
    rates.cache_clear()
    try:
        assert rates("cpu", "bfloat16") == Rates(70e9, 70e9, 20e9)
        found[:] = [r if "bfloat16" not in r.case else row(r.case, 170.0) for r in found]
        rates.cache_clear()
        assert rates("cpu", "float32") == Rates(70e9, 70e9, 20e9)
        assert rates("cpu", "bfloat16") == Rates(170e9, 170e9, 20e9)
    finally:
        rates.cache_clear()


def test_the_fastest_of_several_runs_counts_and_the_first_never_does() -> None:
    times = iter([9.0, 3.0, 2.0])
    seconds = []

    def work() -> None:
        seconds.append(next(times))

    assert fastest(work, "cpu", 0.0) > 0
    assert seconds == [9.0, 3.0, 2.0]  # one to warm up, then FEWEST


def test_the_bound_of_work_is_its_products_and_attention_at_their_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline, "rates", lambda device, dtype: roofline.Rates(100.0, 10.0, 1.0))
    a, b, q = torch.ones(2, 3), torch.ones(3, 4), torch.ones(1, 2, 5, 8)

    def work() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        (a @ b).relu()

    products, attention = 2 * 2 * 3 * 4, 4 * 2 * 5 * 5 * 8  # 2 m k n;  4 heads S^2 d
    assert roofline.bound_of(work, "cpu", "float32") == pytest.approx(products / 100 + attention / 10)
