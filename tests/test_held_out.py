"""Validation on fixed clips, noise and timesteps: closed forms, the same numbers on any ranks, training untouched."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from workers import launch as launcher

import cogvideox
import train_video
from cogvideox import dist
from cogvideox.command_line import run_door
from cogvideox.config import ConfigError
from cogvideox.data.moving_shapes import combinations, make_dataset
from cogvideox.data.overlap import shared_clips, warn_of_overlap
from cogvideox.data.reader import VideoError
from cogvideox.data.video_folder import VideoFolder
from cogvideox.diffusion.schedule import ZeroSNRSchedule
from cogvideox.engine.logging import read_metrics
from cogvideox.evaluation.clips import FixedClips, drawn_clips, first_clips
from cogvideox.evaluation.held_out import FixedNoiseLosses, HeldOutValidation
from cogvideox.evaluation.paired import paired_difference, unpaired_error
from cogvideox.evaluation.timestep_grid import TimestepGrid
from cogvideox.sampling.video_io import write_video
from cogvideox.system import VideoDiffusion, build_vae
from cogvideox.vae.autoencoder import split_moments
from scripts.evaluate.__main__ import main as evaluate

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
SMALL = ["model.transformer.num_layers=1", "model.conditions.0.params.config.num_layers=1"]
GRID = TimestepGrid(1000, 8, 4)


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0)


class Clips(Dataset):
    """Clip i is the number i + 1. Those of ``bad`` cannot be read."""

    def __init__(self, count: int, bad: tuple[int, ...] = (), on_bad_clip: str = "error"):
        self.count, self.bad, self.on_bad_clip = count, bad, on_bad_clip

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise VideoError(f"clip {index} is damaged")
        return {"x": torch.tensor(index + 1.0), "key": f"clip {index}"}

    def describe(self, index: int) -> dict[str, str]:
        return {"key": f"clip {index}"}


class Scaled(nn.Module):
    """The loss of clip x at timestep t is ``weight * x * (1 + t)``, plus noise of the given size."""

    def __init__(self, weight: float = 1.0, noise: float = 0.0):
        super().__init__()
        self.weight, self.noise = nn.Parameter(torch.tensor(weight)), noise
        self.seen: list[bool] = []

    def losses_at(self, batch: dict[str, Any], t: Tensor, generator: torch.Generator, at_once: int) -> Tensor:
        self.seen.append(self.training)
        loss = self.weight * batch["x"] * (1 + t.double())
        return loss + self.noise * torch.randn(len(t), generator=generator) + 0 * torch.randn(())


def validation(count: int = 5, seed: int = 3, training: int | None = None) -> HeldOutValidation:
    compared = None if training is None else drawn_clips(Clips(training), count, seed, "data.path")
    return HeldOutValidation(FixedNoiseLosses(GRID, seed), first_clips(Clips(count), count, "held"), compared)


# ---------------------------------------------------------------------------------------------------------- timesteps


def test_nine_timesteps_are_the_middles_of_eighths_and_the_pure_noise_at_the_end() -> None:
    assert GRID.timesteps.tolist() == [62, 187, 312, 437, 562, 687, 812, 936, 999]
    assert GRID.weights * 1000 == pytest.approx([125, 125, 125, 125, 125, 125, 125, 124, 1])
    assert ZeroSNRSchedule().table[GRID.timesteps[-1]] == 0


@pytest.mark.parametrize("num_timesteps", [5, 10, 37, 1000])
def test_means_over_the_grid_are_those_of_a_straight_line_over_all_timesteps(num_timesteps: int) -> None:
    for count in range(1, min(num_timesteps, 20)):
        for bands in range(1, count + 1):
            grid = TimestepGrid(num_timesteps, count, bands)
            line = grid.timesteps.double().numpy()[None]
            assert len(set(grid.timesteps.tolist())) == count + 1 and grid.weights.sum() == pytest.approx(1)
            # The middle of a part with an even number of timesteps is half a timestep off.
            assert abs(grid.mean(line)[0] - (num_timesteps - 1) / 2) <= 0.5
            by_band = grid.by_band(line)
            assert len(by_band) == bands + 1 and all(np.isfinite(v).all() for v in by_band.values())


def test_a_band_is_the_weighted_mean_of_its_own_timesteps() -> None:
    losses = np.arange(9.0)[None] ** 2
    bands = GRID.by_band(losses)
    assert list(bands) == ["0000-0249", "0250-0499", "0500-0749", "0750-0999", "0999"]
    assert bands["0250-0499"][0] == pytest.approx((4 + 9) / 2)
    assert bands["0750-0999"][0] == pytest.approx((125 * 36 + 124 * 49 + 64) / 250)
    assert bands["0999"][0] == 64


def test_fewer_timesteps_than_bands_are_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match="validation_timesteps=3: expected at least train.timestep_bands=4"):
        cogvideox.load_config([CONFIGS / "tiny_t2v.yaml"], ["train.validation_timesteps=3"])
    with pytest.raises(ValueError, match="validation_timesteps=10: expected .* fewer than the 10 timesteps"):
        TimestepGrid(10, 10, 4)


# -------------------------------------------------------------------------------------------------------- differences


def test_the_paired_error_is_the_textbook_one() -> None:
    before, after = np.array([3.0, 5, 8, 4]), np.array([2.5, 5.5, 7, 3])
    d = [-0.5, 0.5, -1.0, -1.0]
    found = paired_difference(before, after)
    assert found.mean == pytest.approx(-0.5)
    assert found.standard_error == pytest.approx(statistics.stdev(d) / 2)
    unpaired = (statistics.variance(before) / 4 + statistics.variance(after) / 4) ** 0.5
    assert unpaired_error(before, after) == pytest.approx(unpaired)
    assert not found.is_worse and paired_difference(after - 1, before + 1).is_worse


def test_one_clip_has_a_difference_and_no_error() -> None:
    found = paired_difference(np.array([2.0]), np.array([1.5]))
    assert (found.mean, found.standard_error, found.is_worse) == (-0.5, None, False)
    with pytest.raises(ValueError, match="another set of clips"):
        paired_difference(np.zeros(2), np.zeros(3))


def test_the_metrics_of_a_known_loss_are_its_closed_forms() -> None:
    """Clip i of 5 has the loss w i (1 + t): its mean over clips is 3 w (1 + t), its deviation sqrt(2.5) w (1 + t)."""
    validate, system = validation(training=20), Scaled()
    validate(system)
    system.weight.data.fill_(0.5)
    found = validate(system)
    mean_t = float(GRID.mean(1 + GRID.timesteps.double().numpy()[None])[0])
    assert found["val/loss"] == pytest.approx(0.5 * 3 * mean_t)
    assert found["val/loss_by_t/0000-0249"] == pytest.approx(0.5 * 3 * (1 + (62 + 187) / 2))
    assert found["val/loss_by_t/0999"] == pytest.approx(0.5 * 3 * 1000)
    assert found["val/delta"] == pytest.approx(-0.5 * 3 * mean_t)
    assert found["val/delta_se"] == pytest.approx(0.5 * mean_t * (2.5 / 5) ** 0.5)
    trained = np.mean([index + 1 for index in validate.training.indices])
    assert found["val/train_loss"] == pytest.approx(0.5 * trained * mean_t)
    assert found["val/gap"] == pytest.approx(found["val/loss"] - found["val/train_loss"])
    assert len(set(validate.training.indices)) == 5


def test_noise_is_the_same_each_time_and_another_one_for_each_clip_timestep_and_seed() -> None:
    clips = first_clips(Clips(4), 4, "held")
    system = Scaled(weight=0.0, noise=1.0)
    first = FixedNoiseLosses(GRID, 3)(system, clips)
    assert np.array_equal(FixedNoiseLosses(GRID, 3)(system, clips), first)
    assert len(np.unique(first)) == 36 and not np.isin(FixedNoiseLosses(GRID, 4)(system, clips), first).any()
    fewer = FixedNoiseLosses(GRID, 3)(system, FixedClips(clips.dataset, [0, 1]))
    assert np.array_equal(fewer, first[:2])  # a clip's noise does not depend on how many there are


def test_modes_gradients_and_the_random_state_are_as_they_were() -> None:
    system = Scaled()
    system.train()
    state = torch.get_rng_state()
    validation()(system)
    assert torch.equal(torch.get_rng_state(), state)
    assert system.training and system.weight.grad is None and not any(system.seen)


# ------------------------------------------------------------------------------------------------- clips and resuming


def test_a_training_set_smaller_than_the_held_out_one_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert sorted(drawn_clips(Clips(3), 5, 0, "data.path").indices) == [0, 1, 2]
    assert "data.path has 3 clips, fewer than the 5 held-out ones" in caplog.text


def test_clips_that_cannot_be_read_are_left_out_and_listed_or_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = first_clips(Clips(6, bad=(1, 2), on_bad_clip="skip"), 3, "data.validation_path")
    assert chosen.indices == [0, 3, 4] and chosen.keys == ["clip 0", "clip 3", "clip 4"]
    assert "2 clips cannot be read" in caplog.text and "clip 1 is damaged" in caplog.text
    with pytest.raises(ValueError, match="data.validation_path: clip 1 is damaged.*on_bad_clip=skip"):
        first_clips(Clips(6, bad=(1,)), 3, "data.validation_path")


@pytest.mark.parametrize("dataset", [Clips(0), Clips(2, bad=(0, 1), on_bad_clip="skip")])
def test_an_empty_validation_set_is_an_error(dataset: Clips) -> None:
    with pytest.raises(ValueError, match="data.validation_path holds no clip that can be read"):
        first_clips(dataset, 3, "data.validation_path")


def test_a_resumed_run_compares_with_the_step_0_of_its_beginning() -> None:
    validate, system = validation(), Scaled()
    validate(system)
    state = json.loads(json.dumps(validate.state()))
    system.weight.data.fill_(0.7)
    before, resumed = validate(system), validation()
    resumed.load(state)
    assert resumed(system) == before and before["val/delta"] < 0
    assert {**resumed.state(), "now": None} == {**state, "now": None}
    # Of the last call: that of step 0 is kept apart.
    assert state["now"] == state["start"] != resumed.state()["now"] == validate.state()["now"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"start": None}, "it was not measured then"),
        ({"clips": ["other", "clip 1", "clip 2", "clip 3", "clip 4"]}, "other clips than then"),
        ({"seed": 4, "timesteps": [1, 999]}, "other timesteps and seed than then"),
        (None, "it was not measured then"),
    ],
)
def test_a_step_0_of_something_else_is_not_compared_with(
    change: dict[str, Any] | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    validate, resumed = validation(), validation()
    validate(Scaled())
    resumed.load(None if change is None else validate.state() | change)
    assert f"left out from here on: {reason}" in caplog.text and "val/delta" not in resumed(Scaled())


def test_a_run_resumed_with_another_batch_size_compares_the_clips_that_are_in_both(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for before, now in ((5, 3), (3, 5)):
        start, resumed, system = validation(before), validation(now), Scaled()
        start(system)
        resumed.load(start.state())
        system.weight.data.fill_(0.5)
        mean_t = float(GRID.mean(1 + GRID.timesteps.double().numpy()[None])[0])
        assert resumed(system)["val/delta"] == pytest.approx(-0.5 * 2 * mean_t)  # of the clips 1, 2 and 3
        assert len(resumed.state()["clips"]) == len(resumed.state()["start"]) == 3
        assert f"is of 3 clips from here on: there were {before} then, and are {now} now" in caplog.text


# ------------------------------------------------------------------------------------------------- the system's losses


def make_system(base: str = "tiny_t2v.yaml", *overrides: str) -> VideoDiffusion:
    torch.manual_seed(0)
    system = VideoDiffusion(cogvideox.load_config([CONFIGS / base], [*SMALL, *overrides]))
    for parameter in system.model.parameters():  # adaLN starts at zero, which would hide the conditions
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return system.eval()


def one_clip() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (1, 9, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {"video": video, "caption": ["a red circle moving right"], "key": ["a"]}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_losses_are_the_squared_errors_of_the_velocity_of_the_clip_in_fixed_noise() -> None:
    """By hand, from the schedule's definition; at the last timestep the input is the noise and the target is -x0."""
    system, batch, t = make_system(), one_clip(), torch.tensor([0, 500, 999])
    found = system.losses_at(batch, t, generator(), at_once=2)
    g = generator()
    moments = system.vae.encode(batch["video"].float() / 127.5 - 1)
    mean, logvar = split_moments(moments)
    x0 = (
        mean + torch.exp(logvar / 2) * torch.randn(mean.shape, generator=g)
    ) * system.config.vae.scale_factor
    tokens = system.conditioner(batch)["tokens"]
    for step, loss in zip(t.tolist(), found, strict=True):
        noise = torch.randn(x0.shape, generator=g)
        a = system.schedule.table[step].item()
        s = (1 - a * a) ** 0.5
        target = a * noise - s * x0
        if step == 999:
            assert torch.equal(a * x0 + s * noise, noise) and torch.equal(target, -x0)
        with torch.no_grad():
            v = system.transformer(a * x0 + s * noise, torch.tensor([step]), tokens)
        assert loss.item() == pytest.approx((v - target).square().mean().item(), rel=1e-5)  # float32


def test_how_many_timesteps_go_through_at_once_changes_only_the_rounding() -> None:
    system, batch = make_system(), one_clip()
    one, all_ = (system.losses_at(batch, GRID.timesteps, generator(), at_once=n) for n in (1, 9))
    torch.testing.assert_close(one, all_, rtol=1e-5, atol=0)


def test_cached_moments_give_the_losses_of_the_video() -> None:
    system, batch = make_system(), one_clip()
    from_video = system.losses_at(batch, GRID.timesteps, generator())
    cached = {"moments": system.vae_moments(batch["video"]), "caption": batch["caption"]}
    assert torch.equal(system.losses_at(cached, GRID.timesteps, generator()), from_video)


def test_conditions_are_those_of_sampling_nothing_is_dropped_and_the_first_frame_is_clean() -> None:
    system, batch = make_system("tiny_i2v.yaml"), one_clip()
    for embedder in system.conditioner.embedders:
        embedder.dropout = 1.0
    losses = system.losses_at(batch, GRID.timesteps, generator(), at_once=4)
    for embedder in system.conditioner.embedders:
        embedder.dropout = 0.0
    assert torch.equal(system.losses_at(batch, GRID.timesteps, generator(), at_once=4), losses)
    other = {**batch, "caption": ["a blue square moving up"]}
    assert not torch.equal(system.losses_at(other, GRID.timesteps, generator(), at_once=4), losses)


# -------------------------------------------------------------------------------------------------- overlapping sets


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, seed in (("train", 0), ("held_out", 1)):
        make_dataset(root / name, combinations()[0][:6], 1, seed=seed, write_video=write_video)
    torch.manual_seed(0)
    save_file(
        build_vae(cogvideox.load_config([CONFIGS / "tiny_t2v.yaml"])).state_dict(), root / "vae.safetensors"
    )
    return root


def folder(path: Path) -> VideoFolder:
    return VideoFolder(path, 9, 32, 32, 8.0)


def test_held_out_clips_that_are_trained_on_are_named_whatever_they_are_called(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(data / "held_out", tmp_path / "mixed")
    copied = sorted((data / "train" / "videos").iterdir())[:2]
    for number, video in enumerate(copied):
        shutil.copy(video, tmp_path / "mixed" / "videos" / f"copy_{number}.mp4")
        (tmp_path / "mixed" / "labels" / f"copy_{number}.txt").write_text("a copy")
    training, mixed = folder(data / "train"), folder(tmp_path / "mixed")
    assert [Path(key).stem for key in shared_clips(mixed, training)] == ["copy_0", "copy_1"]
    warn_of_overlap(training, mixed)
    assert "2 of the 8 clips of data.validation_path are also in data.path (" in caplog.text
    assert "copy_0.mp4, " in caplog.text and "copy_1.mp4): val/loss" in caplog.text


def test_sets_apart_are_not_warned_of_and_only_files_of_one_size_are_opened(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training, held_out = folder(data / "train"), folder(data / "held_out")
    sizes = [{clip.path.stat().st_size for clip in d.clips} for d in (training, held_out)]
    opened: list[int] = []
    real = VideoFolder.clip_fingerprint

    def counted(self: VideoFolder, index: int) -> str:
        opened.append(self.clips[index].path.stat().st_size)
        return real(self, index)

    monkeypatch.setattr(VideoFolder, "clip_fingerprint", counted)
    warn_of_overlap(training, held_out)
    assert "also in data.path" not in caplog.text and set(opened) <= sizes[0] & sizes[1]
    warn_of_overlap(Clips(3), held_out)
    assert "held-out clips that are also trained on go unnoticed" in caplog.text


# ---------------------------------------------------------------------------------------------------- in the trainer


def arguments(data: Path, run: Path, *overrides: str) -> list[str]:
    paths = [f"data.path={data}/train", f"data.validation_path={data}/held_out", f"run.dir={run}"]
    paths.append(f"load.vae={data}/vae.safetensors")
    sizes = ["train.batch_size=2", "train.validation_batches=2", "train.steps=2", "train.log_every=1"]
    # A rate at which two steps move the loss visibly.
    rate = ["train.warmup_steps=0", "train.ema_decay=0.5", "train.validate_every=2"]
    return ["--base", str(CONFIGS / "tiny_t2v.yaml"), *SMALL, *paths, *sizes, *rate, *overrides]


@pytest.fixture(scope="module")
def one_rank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one_rank")
    for name, extra in (("with", []), ("without", ["train.validate_every=null"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "shutdown", lambda: None)
            assert run_door(train_video.main, arguments(data, root / name, *extra)) == 0
    return root


@pytest.fixture(scope="module")
def two_ranks(data: Path, one_rank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training with ZeRO-2 and ZeRO-3, and ``scripts.evaluate`` of the run of one rank, all on two."""
    root = tmp_path_factory.mktemp("two_ranks")
    runs = [
        ["train_video", arguments(data, root / f"zero{n}", f"deepspeed.zero_optimization.stage={n}")]
        for n in (2, 3)
    ]
    runs.append(
        ["scripts.evaluate.__main__", ["validation", str(one_rank / "with"), "--json", f"{root}/found.json"]]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "WORKER", Path(__file__).parent / "workers" / "doors.py")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setattr(launcher, "SECONDS", 400)
        done = launcher.launch(runs, 2, root)
    assert done.returncode == 0, done.stdout
    return root


def lines(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def values(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("val/")}


def test_a_run_begins_with_its_validation_and_ends_with_the_change_since(one_rank: Path) -> None:
    start, *_, end = lines(one_rank / "with")
    assert start.keys() - values(start).keys() == {"step"} and start["step"] == 0
    bands = [*(f"{a:04d}-{a + 249:04d}" for a in range(0, 1000, 250)), "0999"]
    assert values(start).keys() == {
        *("val/loss", "val/train_loss", "val/gap", "val/delta", "val/delta_se"),
        *(f"val/{name}_by_t/{band}" for name in ("loss", "train_loss") for band in bands),
    }
    assert start["val/delta"] == 0 and end["step"] == 2
    assert end["val/delta"] == pytest.approx(end["val/loss"] - start["val/loss"], abs=1e-9)
    assert end["val/delta"] != 0 and end["val/delta_se"] > 0
    # Zero-initialised, the network predicts 0: at pure noise the loss is the clips' own square, of a random VAE.
    assert start["val/loss_by_t/0999"] > 0


def test_validation_leaves_the_training_bitwise_as_it_is(one_rank: Path) -> None:
    trained = [
        [
            (r["step"], r["train/loss"], r["train/grad_norm"])
            for r in lines(one_rank / name)
            if "train/loss" in r
        ]
        for name in ("with", "without")
    ]
    assert trained[0] == trained[1] and len(trained[0]) == 2
    assert not any("val/loss" in record for record in lines(one_rank / "without"))


@pytest.mark.parametrize("stage", [2, 3])
def test_the_numbers_before_training_are_bitwise_the_same_on_two_ranks(
    one_rank: Path, two_ranks: Path, stage: int
) -> None:
    assert values(lines(two_ranks / f"zero{stage}")[0]) == values(lines(one_rank / "with")[0])


def test_the_checkpoint_keeps_the_losses_of_step_0_by_clip(one_rank: Path) -> None:
    state = json.loads((one_rank / "with" / "checkpoints" / "2" / "state.json").read_text())["validation"]
    assert len(state["clips"]) == len(state["start"]) == 4 and state["timesteps"] == GRID.timesteps.tolist()
    assert sum(state["start"]) / 4 == pytest.approx(lines(one_rank / "with")[0]["val/loss"], rel=1e-12)


def test_evaluate_on_two_ranks_gives_the_last_numbers_of_the_training(
    one_rank: Path, two_ranks: Path
) -> None:
    found = json.loads((two_ranks / "found.json").read_text())["checkpoints"][0]
    last = values(lines(one_rank / "with")[-1])
    assert found["name"].endswith("with@2")
    for name in last.keys() - {"val/delta", "val/delta_se"}:
        # The averaged weights are stored in float32, as they were applied; kernels may still add in another order where
        # a tensor lies elsewhere in memory. abs: the gap is a small difference of losses near 1.
        assert found[name] == pytest.approx(last[name], rel=1e-6, abs=1e-6), name


def test_evaluate_takes_the_last_weights_where_it_is_asked_to(
    one_rank: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "shutdown", lambda: None)
    common = ["validation", str(one_rank / "with"), "--json", str(tmp_path / "found.json")]
    assert run_door(evaluate, [*common, "load.ema=false"]) == 0
    [found] = json.loads((tmp_path / "found.json").read_text())["checkpoints"]
    averaged = lines(one_rank / "with")[-1]["val/loss"]
    assert found["val/loss"] != pytest.approx(averaged, rel=1e-4)
    assert "with@2, not averaged" in capsys.readouterr().out


def test_a_run_that_is_resumed_goes_on_comparing_with_its_beginning(
    one_rank: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "shutdown", lambda: None)
    shutil.copytree(one_rank / "with", tmp_path / "run")
    more = arguments(data, tmp_path / "run", "train.steps=3", "train.validate_every=1")
    assert run_door(train_video.main, more) == 0
    records = lines(tmp_path / "run")
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    assert records[-1]["val/delta"] == pytest.approx(
        records[-1]["val/loss"] - records[0]["val/loss"], abs=1e-9
    )


def test_a_path_without_a_time_to_validate_is_reported(
    one_rank: Path,
    capsys: pytest.CaptureFixture[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "shutdown", lambda: None)
    never = arguments(data, tmp_path / "run", "train.validate_every=null", "train.steps=1")
    assert run_door(train_video.main, never) == 0
    assert "train.validate_every is null: no validation" in capsys.readouterr().out
