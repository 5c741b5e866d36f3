"""What may go wrong while a run trains, each with its end. The list of it: ``fault_matrix.py``, ``docs/faults.md``."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_matrix import MATRIX, table
from torch import Tensor, nn
from workers.launch import end, launch, search_path, start
from workers.train_toy import make_trainer

from cogvideox import dist
from cogvideox.data.moving_shapes import combinations, make_dataset
from cogvideox.dist import RandomStreams
from cogvideox.engine import trackers
from cogvideox.engine.events import Events, read_events
from cogvideox.engine.logging import read_metrics
from cogvideox.engine.nonfinite import first_bad_layer
from cogvideox.engine.watchdog import Place, describe, suspect
from cogvideox.sampling.video_io import write_video

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "workers" / "train_faults.py"

NAN_RUNS = {  # name -> (ZeRO stage, precision, where it breaks, the layer that must be named)
    "zero0_fp32_forward": (0, "fp32", "forward", "norm.1 (Fragile), in the forward pass"),
    "zero2_bf16_forward": (2, "bf16", "forward", "norm.1 (Fragile), in the forward pass"),
    "zero3_fp32_forward": (3, "fp32", "forward", "norm.1 (Fragile), in the forward pass"),
    "zero0_fp32_backward": (
        0,
        "fp32",
        "backward",
        "norm.1 (Fragile), in the backward pass: the gradient of its input",
    ),
    "zero2_fp32_backward": (
        2,
        "fp32",
        "backward",
        "norm.1 (Fragile), in the backward pass: the gradient of its input",
    ),
    "zero3_fp32_backward": (3, "fp32", "backward", "not looked for: the gradients of ZeRO-3 are in parts"),
}


def metrics(folder: Path, *names: str) -> list[list[Any]]:
    """Of every line, what must be bitwise the same: the step, losses, norms, counts."""
    wanted = names or (
        "step",
        "train/loss",
        "train/mean",
        "train/grad_norm",
        "train/skipped_steps",
        "val/loss",
    )
    return [[record.get(name) for name in wanted] for record in read_metrics(folder / "metrics.jsonl")]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["kind"] == kind]


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"result_{rank}.json").read_text())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    make_dataset(folder, combinations()[0][:12], 1, seed=0, write_video=write_video)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """All accidents after which both ranks live, in one launch of two."""
    root = tmp_path_factory.mktemp("faults")
    runs: list[dict[str, Any]] = []
    for name, (stage, precision, way, _) in NAN_RUNS.items():
        for search in (True, False):
            train = {"steps": 5, "precision": precision, "gradient_accumulation_steps": 2}
            runs.append(
                {
                    "run_dir": str(root / f"{name}_{search}"),
                    "train": train,
                    "deepspeed": {"zero_optimization": {"stage": stage}},
                    "fragile": {"4": way},  # the first of the two batches of step 3
                    "search": search,
                }
            )
    mend = damage(clips, root / "whole")
    video = {"clips": str(clips), "hangs": [names(clips)[HANGING]]}
    train = {"steps": 12, "batch_size": 2, "save_every": 4}
    runs += [
        {"run_dir": str(root / "quarantine"), "train": train, **video},
        {"run_dir": str(root / "mended"), "train": train | {"steps": 7}, **video},
        {"run_dir": str(root / "mended"), "train": train, "clips": str(clips), "mend": mend},
    ]
    train = {"steps": 6, "validate_every": 3, "preview_every": 3, "ema_decay": 0.9}
    runs.append({"run_dir": str(root / "undisturbed"), "train": train})
    for place in ("validation", "preview"):
        runs += [
            {"run_dir": str(root / place), "train": train, "slow": 0.1, "signal_in": place},
            {"run_dir": str(root / place), "train": train},
        ]
    done = launch(runs, 2, root, WORKER)
    assert done.returncode == 0, done.stdout
    (root / "output.txt").write_text(done.stdout)
    return root


# ------------------------------------------------------------------------------------------------ clips and readers


def names(clips: Path) -> list[str]:
    return sorted(path.name for path in clips.rglob("*.mp4"))


HANGING = 4  # which of ``names``


def damage(clips: Path, whole: Path) -> dict[str, str]:
    """Ruin three clips in three ways; returns what to copy over what to mend them."""
    whole.mkdir()
    paths = [path for path in sorted(clips.rglob("*.mp4"))][:3]
    for path, ruin in zip(paths, (truncated, empty, rubbish), strict=True):
        shutil.copy(path, whole / path.name)
        path.write_bytes(ruin(path.read_bytes()))
    return {str(whole / path.name): str(path) for path in paths}


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    return b""


def rubbish(content: bytes) -> bytes:
    return random.Random(0).randbytes(len(content))


def test_clips_that_fail_while_training_are_put_aside_listed_and_the_run_goes_on(
    two_ranks: Path, clips: Path
) -> None:
    folder = two_ranks / "quarantine"
    assert result(folder)["finished"]
    assert [row[0] for row in metrics(folder)] == list(range(1, 13))
    listed = json.loads((folder / "quarantine.json").read_text())
    reasons = {Path(entry["clip"]).name: entry["reason"] for entry in listed}
    cut, nothing, noise, _, hanging = names(clips)[:5]
    assert reasons.keys() == {cut, nothing, noise, hanging} and hanging == names(clips)[HANGING]
    assert "truncated" in reasons[cut] and "0 bytes" in reasons[nothing] and "damaged" in reasons[noise]
    assert reasons[hanging] == "not read within 1.5 s (data.clip_timeout_seconds)"
    told = {Path(event["clip"]).name for event in events(folder, "quarantined")}
    assert told == reasons.keys() and {entry["rank"] for entry in listed} == {0, 1}
    # Two ranks with two clips each go through twelve clips in three steps.
    assert all(1 <= entry["step"] <= 3 for entry in listed)


def test_a_resumed_run_keeps_out_what_was_put_aside_though_it_could_be_read_again(two_ranks: Path) -> None:
    whole, joined = two_ranks / "quarantine", two_ranks / "mended"
    assert [e["step"] for e in events(joined, "started")] == [
        0,
        7,
    ]  # the second with whole files, none hanging
    assert metrics(joined) == metrics(whole) and len(metrics(joined)) == 12
    ours, theirs = (json.loads((folder / "quarantine.json").read_text()) for folder in (joined, whole))
    assert ours == theirs


def test_a_run_with_too_many_failing_clips_stops_and_lists_them(tmp_path: Path) -> None:
    from workers.train_faults import make

    dist.init(timeout_minutes=2.0, model_parallel=False)
    make_dataset(tmp_path / "clips", combinations()[0][:8], 1, seed=0, write_video=write_video)
    for path in sorted((tmp_path / "clips").rglob("*.mp4"))[:5]:
        path.write_bytes(b"")
    trainer = make({"run_dir": str(tmp_path / "run"), "clips": str(tmp_path / "clips")})
    with pytest.raises(ValueError, match="5 of 8 clips failed while training, more than") as caught:
        trainer.run()
    assert str(caught.value).count("the file is empty (0 bytes)") == 5
    (failed,) = events(tmp_path / "run", "failed")
    assert failed["error"] == f"VideoError: {caught.value}" and failed["where"].endswith("data")


# -------------------------------------------------------------------------------------------------- non-finite steps


@pytest.mark.parametrize("name", NAN_RUNS)
def test_a_skipped_step_names_its_clips_and_the_first_bad_layer(two_ranks: Path, name: str) -> None:
    folder, (stage, _, way, layer) = two_ranks / f"{name}_True", NAN_RUNS[name]
    assert result(folder)["finished"]
    found = events(folder, "skipped_step")
    assert all(event["step"] == 3 for event in found)
    if way == "forward":
        (event,) = found
        # Batch 4 of rank 1 of 2, two clips each: 4 * 2 * 2 + 2.
        assert (
            event["rank"] == 1 and event["clips"] == ["clip18", "clip19"] and event["loss"] in ("nan", "inf")
        )
    elif stage == 3:
        assert [event["rank"] for event in found] == [0, 1]
    else:
        (event,) = found
        assert event["rank"] == 1 and isinstance(event["loss"], float)
        assert event["clips"] == ["clip18", "clip19", "clip22", "clip23"]
    assert {event["first_bad_layer"] for event in found} == {layer}
    assert [row[-2] for row in metrics(folder)] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", NAN_RUNS)
def test_the_search_for_the_bad_layer_leaves_no_trace_in_the_run(two_ranks: Path, name: str) -> None:
    with_search, without = two_ranks / f"{name}_True", two_ranks / f"{name}_False"
    assert metrics(with_search) == metrics(without)
    checkpoint = Path("checkpoints") / "5"
    for path in sorted((with_search / checkpoint).glob("*.pt")):
        ours, theirs = (
            torch.load(f / checkpoint / path.name, weights_only=False) for f in (with_search, without)
        )
        if "zero3" in name and "optim" in path.name:
            for state in (ours, theirs):  # ends in padding that nobody has written
                del state["optimizer_state_dict"]["fp32_flat_groups"]
        assert same(ours, theirs), path.name


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or type(a).__module__ != "builtins"  # DeepSpeed's own small objects, which do not compare


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
        self.mean = nn.BatchNorm1d(2)

    def forward(self, batch: dict[str, Tensor], rng: RandomStreams) -> tuple[Tensor, dict]:
        return batch["scale"] * self.third(self.second(self.mean(self.first(batch["x"])))).sum(), {}


def searched(module: nn.Module, backward: bool, **batch: Tensor) -> str:
    values = {"x": torch.randn(4, 2), "scale": torch.tensor(1.0)} | batch
    return first_bad_layer(module, values, lambda: RandomStreams.at(0, 0), backward=backward)


def test_the_search_tells_weights_batches_gradients_of_parameters_and_the_rest_apart() -> None:
    module = Three()
    module.second.bias.data[0] = torch.nan
    found = searched(module, backward=False)
    assert found == "second (Linear), in the forward pass, whose own bias is not finite"
    assert searched(module, False, x=torch.full((4, 2), torch.inf)) == "the batch itself (x)"
    module = Three()
    assert searched(module, False) == "not found: done once more, the forward pass is finite"
    assert searched(module, True).startswith(
        "not found: done once more, the gradients of this rank are finite"
    )
    # 1e10 comes from above and 1e30 from below: their product, in the weight's gradient alone, is too much for float32.
    module = nn.Module()
    module.only = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.only.weight, 1e-20)
    module.forward = lambda batch, rng: ((module.only(batch["x"]) * batch["scale"]).sum(), {})
    found = searched(module, True, x=torch.tensor([[1e30]]), scale=torch.tensor(1e10))
    assert found == "only (Linear), in the backward pass: the gradient of weight"

    def refuses(batch: dict, rng: RandomStreams) -> None:
        raise RuntimeError("not twice\nsecond line")

    module.forward = refuses
    assert searched(module, False) == "not found: RuntimeError: not twice"


def test_the_search_disturbs_neither_random_states_nor_buffers_nor_gradients() -> None:
    module = Three()
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), module.mean.running_mean.clone()
    for backward in (False, True):
        searched_module = first_bad_layer(
            module,
            {
                "x": torch.randn(4, 2, generator=torch.Generator().manual_seed(1)),
                "scale": torch.tensor(torch.inf),
            },
            lambda: RandomStreams.at(0, 0),
            backward=backward,
        )
        assert searched_module
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.equal(module.mean.running_mean, before[2]) and module.mean.num_batches_tracked == 0
    assert all(p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())


# ------------------------------------------------------------------------------------------- ranks that die or hang


def test_when_a_rank_is_killed_the_others_end_soon_with_one_clear_line(tmp_path: Path) -> None:
    began = time.monotonic()
    done = launch(
        [{"run_dir": str(tmp_path), "train": {"steps": 9, "save_every": 2}, "kill_at": 5}],
        2,
        tmp_path,
        WORKER,
    )
    assert (
        done.returncode != 0 and time.monotonic() - began < 100
    )  # the collectives' own limit is five minutes
    assert "error: rank 0 ends in step 6" in done.stdout and "another rank has ended" in done.stdout
    assert "goes on from the last checkpoint" in done.stdout
    (failed,) = events(tmp_path, "failed")
    assert failed["rank"] == 0 and failed["where"].startswith("step 6")
    assert (tmp_path / "checkpoints" / "latest").read_text() == "4"  # test_resume.py goes on from such


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are killed, stopped ones too, at the end of the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def start_rank(rank: int, listing: Path, port: int) -> subprocess.Popen[str]:
    """Without torchrun, which would wait 30 s for a process that is stopped."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(listing)],
        env=os.environ
        | {key: str(value) for key, value in own.items()}
        | {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": search_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("way", "phase"),
    [("sleep", "data"), ("spin", "forward"), ("stop", "forward")],
    ids=["sleeps", "spins", "is stopped"],
)
def test_a_rank_that_hangs_is_named_in_time_with_its_last_step_and_phase(
    tmp_path: Path, ranks: list[subprocess.Popen[str]], free_port: int, way: str, phase: str
) -> None:
    limit = 8.0  # a machine under load takes seconds for a step
    train = {"steps": 9, "save_every": 100, "timeout_minutes": limit / 60}
    listing = tmp_path / "runs.json"
    listing.write_text(json.dumps([{"run_dir": str(tmp_path), "train": train, "halt_at": {"3": way}}]))
    ranks += [start_rank(rank, listing, free_port) for rank in (0, 1)]
    output, _ = ranks[0].communicate(timeout=150)
    assert ranks[0].returncode == 4, output
    (line,) = [line for line in output.splitlines() if line.startswith("stalled")]
    place = f"has been in step 4, {phase}, for "
    silent = f"was last heard of in step 4, {phase};"
    assert line.startswith("stalled: rank 1 ") and (silent if way == "stop" else place) in line
    assert "rank 0 waits in step 4, " in line and "timeout_minutes" in line
    (event,) = events(tmp_path, "stalled")
    assert (event["rank"], event["step"], event["phase"]) == (1, 4, phase)
    # The limit is that of whichever rank has waited longest, who may have begun a reading (1 s) before the one that
    # hangs; two readings come on top of it, and a machine under load may take longer to wake the thread.
    assert limit - 1.0 <= event["seconds"] < limit + 10.0
    if way != "stop":
        ranks[1].wait(timeout=60)
        assert ranks[1].returncode != 0


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def places(*marks: tuple[int, int, str, float, float, bool]) -> dict[int, Place]:
    return {rank: Place(*mark) for rank, mark in enumerate(marks)}


def test_the_suspect_is_the_silent_rank_else_the_one_behind_and_nobody_while_one_is_paused() -> None:
    waits, behind = (118, 2, "backward", 30.9, 0.2, False), (118, 0, "data", 31.0, 0.2, False)
    silent = (118, 2, "backward", 40.0, 39.0, False)
    assert suspect(places(waits, waits, waits, behind), 30.0, 1.0) == 3
    assert suspect(places(waits, silent, waits, behind), 30.0, 1.0) == 1
    assert suspect(places(waits, behind), 60.0, 1.0) is None
    saving = (118, 5, "save", 500.0, 0.2, True)
    assert suspect(places(saving, (119, 0, "data", 400.0, 0.1, False)), 30.0, 1.0) is None
    assert suspect(places((118, 5, "save", 500.0, 400.0, True), waits), 30.0, 1.0) == 0
    text = describe(3, places(waits, waits, waits, behind), 30.0)
    assert text == "rank 3 has been in step 118, data, for 31 s; the others wait in step 118, backward"


def test_long_validations_previews_and_saves_are_no_stall(tmp_path: Path) -> None:
    # Each takes several times the limit; what progress they make is marked, a save is left alone.
    from workers.train_faults import make

    dist.init(timeout_minutes=2.0, model_parallel=False)
    train = {
        "steps": 2,
        "validate_every": 1,
        "preview_every": 1,
        "save_every": 1,
        "timeout_minutes": 0.5 / 60,
    }
    trainer = make({"run_dir": str(tmp_path), "train": train, "slow": 0.03})
    save = trainer.checkpoints.save
    trainer.checkpoints.save = lambda *arguments: (time.sleep(1.5), save(*arguments))
    assert trainer.run().finished  # the watchdog would have ended this process
    assert not events(tmp_path, "stalled") and len(events(tmp_path, "finished")) == 1


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("place", ["validation", "preview"])
def test_a_signal_ends_a_validation_or_preview_at_its_next_piece_and_the_next_start_makes_up_for_it(
    two_ranks: Path, place: str
) -> None:
    folder, undisturbed = two_ranks / place, two_ranks / "undisturbed"
    (stopped,) = events(folder, "stopped")
    assert stopped["step"] == 3
    # What was left would have taken more than 3 s on either rank.
    text = (two_ranks / "output.txt").read_text()
    assert f"a signal ends the {place} of step 3 before its time" in text
    assert metrics(folder) == metrics(undisturbed)
    assert [row[-1] is not None for row in metrics(folder)] == [True, False, False, True, False, False, True]
    assert result(folder)["previews"] == [3, 6]  # of the second start; the first one's was abandoned


def test_torchrun_under_sigterm_in_a_long_validation_is_saved_and_gone_well_within_its_grace(
    tmp_path: Path,
) -> None:
    train = {"steps": 5, "validate_every": 2, "save_every": 100}
    process = start([{"run_dir": str(tmp_path), "train": train, "slow": 3.0}], 2, tmp_path, WORKER)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path / "metrics.jsonl"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        time.sleep(1.0)  # into the validation of step 2, which takes a minute
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        output, _ = process.communicate(timeout=60)
        seconds = time.monotonic() - began
    finally:
        end(process)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "2", output
    (stopped,) = events(tmp_path, "stopped")
    assert stopped["signal"] == "SIGTERM" and stopped["step"] == 2
    assert seconds < 25, output  # torchrun kills after 30; a batch takes 3 s, saving and leaving less


# -------------------------------------------------------------------------------------------------------- trackers


class Flaky:
    """Fails at the steps 2 and 3; at step 5 it never returns."""

    def __init__(self, run_dir: Path):
        self.steps: list[int] = []
        _FLAKY.append(self)

    def log(self, step: int, values: dict[str, float]) -> None:
        if step in (2, 3):
            raise ConnectionResetError("the server is gone")
        if step == 5:
            time.sleep(1000)
        self.steps.append(step)

    def close(self) -> None: ...


_FLAKY: list[Flaky] = []


def test_a_tracker_that_goes_away_costs_a_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)
    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", Flaky)
    monkeypatch.setattr(trackers, "_WAITING_RECORDS", 2)
    lost = make_trainer(
        {"run_dir": str(tmp_path / "lost"), "train": {"steps": 12, "trackers": ["tensorboard"]}}
    )
    close = trackers.Trackers.close
    monkeypatch.setattr(trackers.Trackers, "close", lambda self, seconds: close(self, 0.5))
    train_step = lost._train_step
    monkeypatch.setattr(lost, "_train_step", lambda batches: (time.sleep(0.05), train_step(batches)))
    assert lost.run().finished
    make_trainer({"run_dir": str(tmp_path / "none"), "train": {"steps": 12}}).run()
    assert metrics(tmp_path / "lost") == metrics(tmp_path / "none")
    assert _FLAKY.pop().steps == [1, 4]
    first, second = events(tmp_path / "lost", "tracker_lost")
    assert (first["tracker"], first["step"]) == ("tensorboard", 2)
    assert first["error"] == "ConnectionResetError: the server is gone"
    assert second["error"] == "it is 2 records behind" and second["step"] > 5
    output = capsys.readouterr().out
    assert (
        output.count("lost the tracker tensorboard") == 2 and "tensorboard answers again at step 4" in output
    )
    assert "tensorboard did not finish within 0.5 s" in output


def test_tensorboard_goes_on_in_a_new_file_after_a_full_disk(tmp_path: Path) -> None:
    import resource

    from cogvideox.engine.trackers import TensorBoardTracker

    tracker = TensorBoardTracker(tmp_path)
    tracker.log(1, {"a": 1.0})
    (first,) = (tmp_path / "tensorboard").iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (first.stat().st_size, limits[1])
    )  # what a full disk does to it
    try:
        with pytest.raises(OSError):
            for step in range(2, 50):
                tracker.log(step, {f"value/{i}": 1.0 for i in range(100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    time.sleep(1.1)  # names of event files count seconds
    tracker.log(51, {"a": 1.0})
    tracker.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2 and files[1].stat().st_size > 0


def test_wandb_without_a_key_is_one_clear_error_before_anything_is_built(tmp_path: Path, clips: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "sat")}
    command = [sys.executable, "train_video.py", "--base", "configs/tiny_t2v.yaml", f"data.path={clips}"]
    # Weights that do not exist: they would be the error if anything were loaded before.
    command += ["train.trackers=[wandb]", "load.vae=/nowhere/vae", f"run.dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "error: train.trackers has wandb, which cannot start: it has no API key" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr and not (tmp_path / "run").exists()


def test_events_may_be_written_by_any_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    Events(tmp_path).write("started", step=0)
    assert read_events(tmp_path) == []
    Events(tmp_path).append("stalled", rank=0)
    assert [event["kind"] for event in read_events(tmp_path)] == ["stalled"]


# ---------------------------------------------------------------------------------------------------------- the list


def test_the_page_lists_exactly_the_faults_that_are_tested() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    begin, end_ = "<!-- the matrix: python tests/fault_matrix.py -->\n", "<!-- end -->"
    assert page.split(begin)[1].split(end_)[0].strip() == table()
    assert len({fault.what for fault in MATRIX}) == len(MATRIX)


@pytest.mark.parametrize("fault", MATRIX, ids=lambda fault: fault.what)
def test_each_fault_has_its_test(fault: Any) -> None:
    for place in fault.tests:
        file, name = place.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), place
