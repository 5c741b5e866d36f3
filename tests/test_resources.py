"""Seconds and peak memory by phase, against a meter that the test turns, and against memory that is really taken."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from cogvideox.engine import resources
from cogvideox.engine.resources import DeviceMeter, ResidentMeter, Resources, memory_metrics

CPU = torch.device("cpu")


class HandMeter:
    """``now`` is set by the test; the peak is that since the last reset."""

    def __init__(self) -> None:
        self.now = self.peak = 1.0

    def take(self, size: float) -> None:
        self.now = size
        self.peak = max(self.peak, size)

    def reset(self) -> None:
        self.peak = self.now

    def peaks(self) -> dict[str, float]:
        return {"alloc": self.peak, "reserved": 2 * self.peak}


def test_each_phase_has_its_own_peak_and_the_one_around_it_goes_on() -> None:
    meter = HandMeter()
    account = Resources(CPU, meter=meter)
    meter.take(5.0)
    meter.take(2.0)
    account.begin("train")
    meter.take(4.0)
    meter.take(2.0)
    with account("validate"):
        meter.take(9.0)
        meter.take(2.0)
    assert account.phase == "train"
    meter.take(3.0)
    found = {phase: kinds["alloc"] for phase, kinds in account.peaks().items()}
    assert found == {"load": 5.0, "train": 4.0, "validate": 9.0}
    metrics = account.metrics()
    assert metrics["mem/alloc_gib"] == 9.0 and metrics["mem/reserved_gib"] == 18.0
    assert metrics["mem/validate_reserved_gib"] == 18.0 and metrics["mem/train_alloc_gib"] == 4.0


def test_the_seconds_of_all_phases_are_those_since_the_start_of_the_process() -> None:
    before = resources._seconds_since_start()
    account = Resources(CPU, meter=HandMeter())
    with account("cache"):
        time.sleep(0.05)
    account.begin("train")
    time.sleep(0.02)
    seconds = account.seconds()
    assert seconds["cache"] >= 0.05 and seconds["train"] >= 0.02
    # The kernel counts starts in hundredths of a second.
    assert sum(seconds.values()) == pytest.approx(resources._seconds_since_start(), abs=0.05)
    assert before > 0.1 and seconds["load"] >= before - 0.02  # importing torch alone takes longer


def test_earlier_lives_of_a_run_are_added() -> None:
    first = Resources(CPU, meter=HandMeter())
    first._seconds, first._peaks = {"train": 100.0, "save": 3.0}, {"train": {"alloc": 7.0, "reserved": 8.0}}
    second = Resources(CPU, phase="train", meter=HandMeter())
    alone = second.seconds()["train"]
    second.load(first.state())
    assert second.seconds()["train"] == pytest.approx(alone + 100.0, abs=5.0)
    assert second.seconds()["save"] == 3.0 and second.peaks()["train"]["alloc"] == 7.0


def test_a_phase_that_raises_is_over() -> None:
    account = Resources(CPU, meter=HandMeter())
    with pytest.raises(KeyError), account("save"):
        raise KeyError
    assert account.phase == "load" and account.seconds()["save"] >= 0.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system counts no peak of its own")
def test_on_a_cpu_a_phase_has_the_resident_size_that_it_takes_for_a_moment() -> None:
    meter = ResidentMeter()
    if not meter._resets:
        pytest.skip("the system does not let a process reset its peak")
    account = Resources(CPU, meter=meter)
    account.begin("train")
    with account("validate"):
        block = torch.ones(64 * 2**20 // 4)  # 64 MiB, written
        del block
    with account("save"):
        pass
    peaks = {phase: kinds["rss"] for phase, kinds in account.peaks().items()}
    # The kernel adds up the counts of its cores in steps: within some MiB.
    assert peaks["validate"] - peaks["save"] == pytest.approx(1 / 16, abs=1 / 64)
    assert account.metrics()["mem/rss_gib"] >= peaks["validate"]


def test_where_no_peak_can_be_reset_the_size_at_the_end_of_the_phase_counts(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(resources, "_CLEAR", tmp_path / "missing" / "clear_refs")
    meter = ResidentMeter()
    meter.reset()
    resident = meter.peaks()["rss"]
    block = torch.ones(64 * 2**20 // 4)
    assert meter.peaks()["rss"] - resident == pytest.approx(1 / 16, abs=1 / 64)
    del block


def test_a_device_is_asked_for_the_peaks_of_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        resets = 0

        @classmethod
        def reset_peak_memory_stats(cls, device):
            cls.resets += 1

        max_memory_allocated = staticmethod(lambda device: 3 * 2**30)
        max_memory_reserved = staticmethod(lambda device: 5 * 2**30)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Backend)
    account = Resources(CPU, meter=DeviceMeter(CPU))
    account.begin("train")
    assert Backend.resets == 1
    assert account.metrics() == memory_metrics(
        dict.fromkeys(("load", "train"), {"alloc": 3.0, "reserved": 5.0})
    )
