"""Reading processes: what hangs is cut off, what dies is replaced, and nothing is left behind."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from workers.launch import descendants

from cogvideox.data.loader import ResumableLoader
from cogvideox.data.reader import VideoError
from cogvideox.data.worker_pool import Outcome, WorkerPool

FOR_EVER = 1000.0


def read(index: int, epoch: int) -> dict[str, Any]:
    """Index 10 n + k reads in the way k, and gives n."""
    way, number = index % 10, index // 10
    if way == 1:
        time.sleep(FOR_EVER)
    if way == 2:
        faulthandler.disable()  # pytest's, whose account of this crash would look like one of the tests
        os.kill(os.getpid(), signal.SIGSEGV)  # what a crash in native code looks like
    if way == 3:
        raise VideoError(f"clip {number}: damaged")
    if way == 4:
        raise KeyError(f"no such key in clip {number}")
    if way == 5:
        signal.raise_signal(signal.SIGSTOP)
    return {"number": torch.tensor([number]), "epoch": epoch}


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[WorkerPool]:
    before = descendants(os.getpid())
    pool = WorkerPool(read, workers=2, timeout_seconds=getattr(request, "param", 60.0))
    yield pool
    pool.close()
    pool.close()
    assert descendants(os.getpid()) == before


def numbers(outcomes: list[Outcome]) -> list[int | str]:
    return [o.failure or o.item["number"].item() for o in outcomes]


def test_every_kind_of_value_comes_through_bitwise() -> None:
    item = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "turned": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flag": torch.tensor([True, False]),
        "nested": [{"x": torch.tensor([1, 2], dtype=torch.uint8)}, ("text" * 100_000, None)],
    }
    pool = WorkerPool(lambda index, epoch: item, workers=1)
    found = pool.take(pool.submit(0, 0)).item
    pool.close()  # the tensors outlive their process
    found["bf16"] += 0  # and can be written
    for name in ("bf16", "turned", "empty", "scalar", "flag"):
        assert found[name].dtype == item[name].dtype and torch.equal(found[name], item[name])
    assert torch.equal(found["nested"][0]["x"], item["nested"][0]["x"])
    assert found["nested"][1] == item["nested"][1]


def test_results_are_had_in_any_order(pool: WorkerPool) -> None:
    tickets = [pool.submit(10 * i, epoch=3) for i in range(20)]
    pool.forget(tickets[7])
    order = [t for t in reversed(tickets) if t != tickets[7]]
    assert numbers([pool.take(t) for t in order]) == [i for i in range(19, -1, -1) if i != 7]


@pytest.mark.parametrize("pool", [1.0], indirect=True)
@pytest.mark.parametrize("way", [1, 5], ids=["sleeps", "is stopped"])
def test_a_clip_that_hangs_is_cut_off_and_those_behind_it_are_read(pool: WorkerPool, way: int) -> None:
    before, start = pool.pids, time.monotonic()
    tickets = [pool.submit(i, 0) for i in (10, way, 20, 30, 40)]
    found = numbers([pool.take(t) for t in tickets])
    assert found == [1, "not read within 1 s (data.clip_timeout_seconds)", 2, 3, 4]
    # A second, one of grace, and as many for a machine that is five times slower than it should be.
    assert 1.0 < time.monotonic() - start < 15.0
    assert len(pool.pids) == 2 and len(set(pool.pids) - set(before)) == 1


@pytest.mark.parametrize("pool", [1.0], indirect=True)
def test_clips_read_in_time_do_not_count_as_late_when_they_are_fetched_late(pool: WorkerPool) -> None:
    before = pool.pids
    tickets = [pool.submit(10 * i, 0) for i in range(6)]
    time.sleep(2.5)  # a long step
    found = []
    for ticket in tickets:
        found.append(pool.take(ticket))
        time.sleep(0.3)
    assert numbers(found) == list(range(6)) and pool.pids == before


def test_a_killed_process_is_replaced_and_its_clip_tried_again(pool: WorkerPool) -> None:
    tickets = [pool.submit(10 * i, 0) for i in range(8)]
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    assert numbers([pool.take(t) for t in tickets]) == list(range(8))


def test_a_clip_that_kills_its_reader_three_times_is_to_blame(pool: WorkerPool, caplog) -> None:
    tickets = [pool.submit(i, 0) for i in (10, 2, 20, 30)]
    found = numbers([pool.take(t) for t in tickets])
    assert found == [1, "3 processes that read it died, the last by SIGSEGV", 2, 3]
    assert caplog.text.count("a loader process died (SIGSEGV) and is replaced") == 3


def test_an_error_of_the_dataset_is_no_bad_clip(pool: WorkerPool) -> None:
    assert pool.take(pool.submit(13, 0)).failure == "clip 1: damaged"
    with pytest.raises(RuntimeError, match="Traceback(.|\n)*KeyError: 'no such key in clip 1'"):
        pool.take(pool.submit(14, 0))


def test_processes_that_die_without_reading_end_the_run_and_not_in_a_loop(monkeypatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda n: os._exit(3))
    pool = WorkerPool(read, workers=1)
    with pytest.raises(RuntimeError, match="20 loader processes in a row ended without reading.*exit code 3"):
        pool.take(pool.submit(0, 0))
    pool.close()


def test_processes_outlive_the_signals_that_launchers_send_to_whole_sessions(pool: WorkerPool) -> None:
    pool.take(pool.submit(0, 0))  # both have begun their life
    pool.take(pool.submit(0, 0))
    before = pool.pids
    for pid in before:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    assert numbers([pool.take(pool.submit(10 * i, 0)) for i in range(5)]) == list(range(5))
    assert pool.pids == before


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit(0)", "os._exit(1)"])
def test_processes_end_with_the_one_that_made_them_however_that_ends(end: str) -> None:
    code = (
        "import os, sys, time\nfrom cogvideox.data.worker_pool import WorkerPool\n"
        "pool = WorkerPool(lambda index, epoch: time.sleep(1000), 2)\n"
        f"pool.submit(0, 0)\nprint(*pool.pids, flush=True)\n{end}\n"
    )
    source = str(Path(__file__).resolve().parents[1] / "sat")
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=120,
    )
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 2, run.stderr
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Clips(torch.utils.data.Dataset):
    """Clip 3 hangs, clip 5 crashes its reader, clip 6 is damaged."""

    max_bad_fraction = 0.4

    def __len__(self) -> int:
        return 8

    def describe(self, index: int) -> dict[str, Any]:
        return {"key": f"clip{index}"}

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        return read(10 * index + {3: 1, 5: 2, 6: 3}.get(index, 0), epoch)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_loader_goes_on_without_clips_that_hang_crash_or_are_damaged(num_workers: int) -> None:
    loader = ResumableLoader(
        Clips(), 2, seed=4, num_workers=num_workers, shuffle=False, clip_timeout_seconds=1.0
    )
    batches = loader.iterate()
    found = [next(batches)["number"].flatten().tolist() for _ in range(6)]
    batches.close()
    assert found == [[0, 1], [2, 4], [4, 7], [7, 7], [0, 1], [2, 4]]
    assert [entry["clip"] for entry in loader.quarantine.entries] == ["clip3", "clip5", "clip6"]
