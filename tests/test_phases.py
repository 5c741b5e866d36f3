"""Where the time of a step goes: the parts add up, each counts its own time, and nothing waits for the device."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from workers.launch import launch
from workers.slow_toy import slow_trainer

from cogvideox import dist
from cogvideox.engine.logging import read_metrics
from cogvideox.phases import DeviceClock, Phases

CPU = torch.device("cpu")
WORKER = Path(__file__).with_name("workers") / "slow_toy.py"
PARTS = ("data", "text", "vae", "forward", "backward", "optimizer", "communication")


class HandClock:
    """A clock that the test turns; ``elsewhere``: another stream is current."""

    def __init__(self) -> None:
        self.time, self.elsewhere = 0.0, False

    def now(self) -> float | None:
        return None if self.elsewhere else self.time

    def is_past(self, moment: float) -> bool:
        return True

    def wait(self, moment: float) -> None: ...

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def release(self, moment: float) -> None: ...


def test_the_time_of_an_inner_phase_is_not_that_of_the_outer_one() -> None:
    clock = HandClock()
    phases = Phases(CPU, clock)
    for _ in range(2):
        with phases.step():
            clock.time += 1
            with phases("forward"):
                clock.time += 2
                with phases("text"):
                    clock.time += 4
                    with phases("vae"):
                        clock.time += 8
                    clock.time += 16
                clock.time += 32
            clock.time += 64
        clock.time += 1000  # between two steps
    assert phases.read() == (2, {"rest": 130, "forward": 68, "text": 40, "vae": 16})
    assert phases.read() == (0, {})


def test_a_name_outside_of_a_step_records_nothing() -> None:
    clock = HandClock()
    phases = Phases(CPU, clock)
    with phases("vae"):
        clock.time += 1
    assert phases.read() == (0, {})


def test_what_another_stream_does_is_no_time_of_the_step() -> None:
    clock = HandClock()
    phases = Phases(CPU, clock)
    with phases.step():
        with phases("backward"):
            clock.time += 1
            clock.elsewhere = True
            with phases("communication"):
                clock.time += 2
            clock.elsewhere = False
            clock.time += 4
    assert phases.read() == (1, {"rest": 0, "backward": 7})


class FakeEvent:
    made = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing
        FakeEvent.made += 1

    def record(self, stream: str) -> None:
        self.at = FakeDevice.time

    def query(self) -> bool:
        return self.at <= FakeDevice.reached

    def synchronize(self) -> None:
        FakeDevice.waits += 1
        FakeDevice.reached = max(FakeDevice.reached, self.at)

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.query() and other.query(), "would wait"
        return 1000.0 * (other.at - self.at)


class FakeDevice:
    time = reached = 0.0
    waits = 0
    Event = FakeEvent

    @staticmethod
    def current_stream(device: torch.device) -> str:
        return "main"


def test_on_a_device_nothing_waits_until_the_log_line_and_events_are_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeDevice)
    monkeypatch.setattr("cogvideox.phases._MOST_MOMENTS", 50)
    phases = Phases(CPU, DeviceClock(CPU))
    for line in range(5):
        for step in range(100):
            with phases.step():
                with phases("forward"):
                    FakeDevice.time += 2.0
                FakeDevice.time += 1.0
            if step % 2:  # the device runs behind the host
                FakeDevice.reached = FakeDevice.time - 30.0
        assert FakeDevice.waits == line
        steps, seconds = phases.read()
        assert (steps, seconds["forward"], seconds["rest"]) == (100, 200.0, 100.0)
    assert FakeEvent.made <= 60  # 4 a step: 2,000 were needed, most at a time 50 and those that are not past


def test_a_step_that_fails_inside_a_phase_raises_its_own_error() -> None:
    phases = Phases(CPU)
    with pytest.raises(KeyError), phases.step(), phases("forward"):
        raise KeyError


# ------------------------------------------------------------------------------------------------ a real training step

SECONDS = 0.15


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each slow part, on two gloo ranks; "peer": rank 1 alone is slow, in its forward pass."""
    root = tmp_path_factory.mktemp("slow")
    common = {"seconds": SECONDS, "train": {"steps": 4, "batch_size": 2}}
    runs = [
        {**common, "run_dir": str(root / f"{part}_{stage}"), "slow": part, "deepspeed": zero(stage)}
        for part, stage in [*((part, 2) for part in PARTS[:-1]), ("backward", 3), ("optimizer", 1)]
    ]
    runs += [
        {
            **common,
            "run_dir": str(root / f"peer_{stage}"),
            "slow": "forward",
            "on_rank": 1,
            "deepspeed": zero(stage),
        }
        for stage in (0, 1, 2, 3)
    ]
    done = launch(runs, 2, root, WORKER)
    assert done.returncode == 0, done.stdout
    return root


def zero(stage: int) -> dict:
    return {"zero_optimization": {"stage": stage}}


def typical(folder: Path) -> dict[str, float]:
    """The step with the median duration, without the first, which also builds things."""
    records = read_metrics(folder / "metrics.jsonl")[1:]
    record = sorted(records, key=lambda record: record["perf/step_s"])[len(records) // 2]
    return {name: record[f"perf/{name}_s"] for name in ("step", *PARTS)}


@pytest.mark.parametrize(
    "run, column",
    [*((f"{part}_2", part) for part in PARTS[:-1]), ("backward_3", "backward"), ("optimizer_1", "optimizer")]
    + [(f"peer_{stage}", "communication") for stage in (0, 1, 2, 3)],
)
def test_a_slow_part_shows_in_its_own_column_and_the_parts_add_up(
    two_ranks: Path, run: str, column: str
) -> None:
    found = typical(two_ranks / run)
    parts = sum(found[part] for part in PARTS)
    # ZeRO-1 and 2 run the optimizer once per parameter group (two), ZeRO-3 once per slice of each.
    times = 2 if column == "optimizer" else 1
    # A rank waits for another one only once it has done its own work, which it does while the other one is slow.
    meanwhile = found["forward"] + found["backward"] if column == "communication" else 0.0
    assert found[column] + meanwhile >= 0.95 * times * SECONDS
    assert max(PARTS, key=lambda part: found[part]) == column
    assert parts <= found["step"] * 1.0001
    # Outside of all parts lie random streams and means: 2 ms where the machine is idle, more where it is shared.
    assert parts >= 0.85 * found["step"]


def test_alone_there_is_no_communication(tmp_path: Path) -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)
    slow_trainer({"run_dir": str(tmp_path), "slow": "text", "seconds": 0.05, "train": {"steps": 2}}).run()
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        assert record["perf/communication_s"] == 0.0
        assert record["perf/text_s"] >= 0.0475 and record["perf/step_s"] >= record["perf/text_s"]
        assert record["perf/samples_s"] == pytest.approx(2 / record["perf/step_s"])


def test_the_clock_of_a_cpu_is_that_of_the_host() -> None:
    phases = Phases(CPU)
    start = time.perf_counter()
    with phases.step(), phases("forward"):
        time.sleep(0.02)
    elapsed = time.perf_counter() - start
    _, seconds = phases.read()
    assert 0.02 <= seconds["forward"] <= sum(seconds.values()) <= elapsed
