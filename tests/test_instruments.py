"""Rates, losses by timestep band, what trackers are given, and that nothing waits between two log lines."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from workers.train_toy import SEED, ToyLoader, make_trainer, train_config

import cogvideox
from cogvideox import dist, flops
from cogvideox.dist import RandomStreams
from cogvideox.engine import instruments
from cogvideox.engine.instruments import Work, peak_tflops
from cogvideox.engine.logging import Means, console_line, read_metrics
from cogvideox.engine.trainer import Trainer
from cogvideox.system import VAESystem, VideoDiffusion
from train_video import work_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = ["model.transformer.num_layers=2", "model.conditions.0.params.config.num_layers=1"]


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0)


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


# ----------------------------------------------------------------------------------------------------------- rates


def test_rates_follow_from_the_time_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "peak_tflops", lambda device: 989.0)
    trainer = make_trainer({"run_dir": str(tmp_path), "train": {"steps": 4, "log_every": 2, "batch_size": 3}})
    trainer.instruments.work = Work(flops=2.5e12, tokens=1000)
    trainer.run()
    for line in lines(tmp_path):
        seconds = line["perf/step_s"]
        assert line["perf/samples_s"] == pytest.approx(3 / seconds)
        assert line["perf/tokens_s"] == pytest.approx(3000 / seconds)
        assert line["perf/tflops"] == pytest.approx(7.5 / seconds)
        assert line["perf/mfu"] == pytest.approx(7.5 / seconds / 989)
        assert line["train/samples"] == 3 * line["step"]


def test_on_a_cpu_there_are_flops_but_no_mfu_and_without_work_neither(tmp_path: Path) -> None:
    assert peak_tflops(torch.device("cpu")) is None
    trainer = make_trainer({"run_dir": str(tmp_path), "train": {"steps": 2}})
    trainer.run()
    assert not {"perf/mfu", "perf/tflops", "perf/tokens_s"} & lines(tmp_path)[0].keys()
    other = tmp_path / "with"
    trainer = make_trainer({"run_dir": str(other), "train": {"steps": 2}})
    trainer.instruments.work = Work(1e9, 10)
    trainer.run()
    assert "perf/tflops" in lines(other)[0] and "perf/mfu" not in lines(other)[0]


@pytest.mark.parametrize(
    "name, peak", [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA A100-SXM4-40GB", 312.0), ("GeForce 9", None)]
)
def test_a_gpu_is_known_by_its_drivers_name(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        get_device_name = staticmethod(lambda device: name)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Backend)
    assert peak_tflops(torch.device("cuda", 0)) == peak


def test_the_work_of_a_run_is_that_of_its_clips(tmp_path: Path) -> None:
    config = cogvideox.load_config([CONFIGS / "cogvideox_5b.yaml", CONFIGS / "sft.yaml"])
    work = work_of(config)
    assert work.tokens == 17_776 and work.flops / 1e12 == pytest.approx(997, rel=1e-3)
    lora = work_of(cogvideox.load_config([CONFIGS / "cogvideox_5b.yaml", CONFIGS / "lora.yaml"]))
    forward = flops.forward_flops(config.model.transformer, flops.clip_of(config, config.data))
    adapters = 2 * 17_776 * 132_120_576  # published: rank 128 on q, k, v and the output of 42 layers
    assert lora.flops == 2 * forward.matmul + 3 * forward.attention + 3 * adapters
    assert work_of(cogvideox.load_config([CONFIGS / "tiny_vae.yaml"])) is None


# ----------------------------------------------------------------------------------------------------- loss by band


def make_system(*overrides: str) -> VideoDiffusion:
    torch.manual_seed(0)
    return VideoDiffusion(cogvideox.load_config([CONFIGS / "tiny_t2v.yaml"], [*SMALL, *overrides]))


def batch(clips: int = 3) -> dict[str, Any]:
    video = torch.randint(
        0, 256, (clips, 9, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    return {"video": video, "caption": ["a red circle"] * clips}


def test_the_loss_of_each_clip_is_logged_in_its_band_of_timesteps() -> None:
    system = make_system("train.timestep_bands=3")
    system.timesteps.sample = lambda count, rng, steps: torch.tensor([10, 700, 999])
    total, metrics = system(batch(), RandomStreams.at(3, 0))
    assert list(metrics) == ["loss_by_t/0000-0333", "loss_by_t/0334-0666", "loss_by_t/0667-0999"]
    means = Means()
    means.add(metrics)
    found = means.flush()
    assert found["loss_by_t/0334-0666"] is None  # no clip there
    # The loss is the mean over clips: one in the first band, two in the last.
    expected = (found["loss_by_t/0000-0333"] + 2 * found["loss_by_t/0667-0999"]) / 3
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_a_band_is_the_mean_over_its_clips_and_not_over_steps() -> None:
    means = Means()
    nan = math.nan
    means.add({"band": torch.tensor([1.0, 2.0, 3.0])})
    means.add({"band": torch.tensor([nan, 10.0, nan])})
    means.add({"band": torch.tensor([nan, nan, nan])})
    assert means.flush() == {"band": 4.0}


def test_the_real_system_names_its_groups_and_logs_text_and_vae_time(tmp_path: Path) -> None:
    class Clips(ToyLoader):
        def iterate(self, start: int):
            while True:
                yield batch()

    trainer = Trainer(
        make_system(), Clips(3), train_config(steps=2, batch_size=3), tmp_path, seed=SEED, work=Work(1e9, 80)
    )
    trainer.run()
    line = lines(tmp_path)[-1]
    groups = {name.removeprefix("train/grad_norm/") for name in line if name.startswith("train/grad_norm/")}
    assert groups == {"attention", "mlp", "adaln", "embeddings", "final", "text_encoder"}
    parts = ("data", "text", "vae", "forward", "backward", "optimizer", "communication")
    assert all(line[f"perf/{part}_s"] > 0 for part in parts[:-1]) and line["perf/communication_s"] == 0
    assert sum(line[f"perf/{part}_s"] for part in parts) <= line["perf/step_s"] * 1.0001
    assert sum(name.startswith("train/loss_by_t/") for name in line) == 4
    assert {"mem/rss_gib", "mem/train_rss_gib", "mem/load_rss_gib"} <= line.keys()


def test_the_vae_names_its_two_halves() -> None:
    system = VAESystem(cogvideox.load_config([CONFIGS / "tiny_vae.yaml"]))
    groups = {system.parameter_group(name) for name, p in system.named_parameters() if p.requires_grad}
    assert groups == {"encoder", "decoder"}


# -------------------------------------------------------------------------------------------------- what they are for


def test_the_console_line_has_tokens_and_mfu_where_they_are_known() -> None:
    record = {
        "train/loss": 0.1,
        "perf/step_s": 2.0,
        "perf/data_s": 0.0,
        "perf/tokens_s": 8888.0,
        "perf/mfu": 0.4123,
    }
    assert "2.000 s/step  data 0.000 s    8888 tok/s  MFU 41.2%" in console_line(1, 10, record, 0.0)


def test_trackers_get_the_instruments_under_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboardX import SummaryWriter

    written: dict[int, dict[str, float]] = {}

    class Recorder(SummaryWriter):
        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.setdefault(step, {"step": step})[name] = value
            super().add_scalar(name, value, step)

    monkeypatch.setattr("tensorboardX.SummaryWriter", Recorder)
    make_trainer({"run_dir": str(tmp_path), "train": {"steps": 2, "trackers": ["tensorboard"]}}).run()
    stored = [{k: v for k, v in line.items() if v is not None} for line in lines(tmp_path)]
    assert list(written.values()) == stored
    assert {
        "perf/forward_s",
        "train/grad_norm/first",
        "train/update_ratio/last",
        "mem/train_rss_gib",
    } <= stored[0].keys()


class Waits(TorchDispatchMode):
    """Counts the operations that wait for a device: reading a number, and choosing by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_between_two_log_lines_the_instruments_wait_for_nothing(tmp_path: Path) -> None:
    def waits(instrumented: bool) -> list[str]:
        system = make_system()
        folder = tmp_path / str(instrumented)
        trainer = Trainer(system, ToyLoader(3), train_config(steps=99, log_every=50), folder, seed=SEED)
        if not instrumented:
            system._losses_by_band = lambda *_: {}
        batches = iter([batch() for _ in range(3)])
        with Waits() as found:
            for step in (1, 2, 3):
                if instrumented:
                    with trainer.instruments.step(step, is_logged=False):
                        trainer._train_step(batches)
                else:
                    trainer._train_step(batches)
        with Waits() as at_log_line:
            trainer.means.flush()
        assert len(at_log_line.found) >= 2  # a reading is seen where there is one
        return found.found

    # What is left is DeepSpeed's own: whether the gradients are finite.
    assert waits(True) == waits(False)


def test_every_logged_name_is_explained_on_the_page(tmp_path: Path) -> None:
    page = (CONFIGS.parent / "docs" / "instruments.md").read_text()
    names = re.findall(r"`((?:train|perf|mem)/[\w/<>]+)`", page)
    patterns = [re.sub("<(group|band|phase)>", r"[\\w-]+", name) for name in names]
    make_trainer({"run_dir": str(tmp_path), "train": {"steps": 1}}).run()
    logged = [name for name in lines(tmp_path)[0] if name.startswith(("train/", "perf/", "mem/"))]
    logged.remove("train/mean")  # the toy's own
    unknown = [name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert len(logged) > 15 and not unknown
