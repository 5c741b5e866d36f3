"""A run folder of another configuration: what may differ passes and is listed, anything else is refused by its key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from workers.train_toy import make_trainer

from cogvideox import dist
from cogvideox.config import Config, ConfigError, load_config, save_config
from cogvideox.engine.events import read_events
from cogvideox.engine.integrity import facts, seal
from cogvideox.engine.same_config import check_same_clips, check_same_run, differences

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(autouse=True)
def _alone() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)


def config(folder: Path, *overrides: str, lora: bool = True) -> Config:
    files = [CONFIGS / "tiny_t2v.yaml", *([CONFIGS / "lora.yaml"] if lora else [])]
    return load_config(files, [f"run.dir={folder}", "data.path=clips", "load.vae=vae", *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of step 2, as if it had been trained with ``config``."""
    dist.init(timeout_minutes=2.0, model_parallel=False)
    folder = tmp_path_factory.mktemp("trained")
    save_config(config(folder), folder / "config.yaml")
    trainer = make_trainer({"run_dir": str(folder), "train": {"steps": 2, "batch_size": 1}})
    trainer.facts = lambda: {"dataset": "a1" * 32, "sources": {"vae": {"path": "vae", "sha256": "0" * 64}}}
    trainer.run()
    return folder


def refused(folder: Path, *overrides: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check_same_run(config(folder, *overrides, **more))
    return str(error.value)


def test_the_same_configuration_differs_in_nothing(trained: Path) -> None:
    assert check_same_run(config(trained)) == []


def test_without_a_checkpoint_there_is_nothing_to_compare_with(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "config.yaml", tmp_path / "config.yaml")
    assert check_same_run(config(tmp_path, "seed=5")) == []


@pytest.mark.parametrize(
    ("override", "listed"),
    [
        ("train.log_every=7", "train.log_every: 20 -> 7"),
        ("train.save_every=7", "train.save_every: 500 -> 7"),
        ("train.keep_every=100", "train.keep_every: null -> 100"),
        ("train.keep_best=false", "train.keep_best: True -> False"),
        ("train.validate_every=null", "train.validate_every: 100 -> null"),
        ("train.trackers=[tensorboard]", "train.trackers: [] -> ['tensorboard']"),
        ("train.timeout_minutes=5", "train.timeout_minutes: 30.0 -> 5.0"),
        ("train.preview_prompts=[a cat]", "train.preview_prompts: [] -> ['a cat']"),
        ("data.num_workers=3", "data.num_workers: 0 -> 3"),
        ("data.path=moved", "data.path: clips -> moved (the clips are compared by their fingerprint)"),
        ("sample.steps=9", "sample.steps: 20 -> 9"),
        ("guidance.params.scale=3.0", "guidance.params.scale: 2.0 -> 3.0"),
        ("model.transformer.checkpoint_activations=true", "checkpoint_activations: False -> True"),
        ("deepspeed.zero_optimization.overlap_comm=true", "overlap_comm: null -> True"),
        ("train.steps=2000", "train.steps: 1000 -> 2000 (where the training ends)"),
        ("train.global_batch_size=1", "global_batch_size: null -> 1 (still 1 clips per step)"),
    ],
)
def test_what_leaves_the_training_as_it_is_passes_and_is_listed(
    trained: Path, override: str, listed: str
) -> None:
    (said,) = check_same_run(config(trained, override))
    assert listed in said


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("lora.rank=64", "lora.rank: 128 -> 64"),
        ("lora.layers=[dense]", "lora.layers: ['query_key_value', 'dense'] -> ['dense']"),
        ("model.transformer.num_layers=3", "model.transformer.num_layers: 4 -> 3"),
        ("train.optimizer.params.lr=0.5", "train.optimizer.params.lr: 0.001 -> 0.5"),
        ("train.lr_schedule=linear", "train.lr_schedule: constant -> linear"),
        ("train.batch_size=2", "train.batch_size: 1 -> 2"),
        ("train.precision=fp32", "train.precision: bf16 -> fp32"),
        ("train.ema_decay=0.9", "train.ema_decay: null -> 0.9"),
        ("model.schedule.params.snr_shift=2.0", "model.schedule.params.snr_shift: null -> 2.0"),
        ("data.fps=4", "data.fps: 8.0 -> 4.0"),
        ("data.latent_cache=latents", "data.latent_cache: null -> latents"),
        ("load.vae=other", "load.vae: vae -> other"),
        ("deepspeed.zero_optimization.stage=1", "deepspeed.zero_optimization.stage: 2 -> 1"),
    ],
)
def test_what_changes_the_training_is_refused_by_its_key_with_the_ways_out(
    trained: Path, override: str, named: str
) -> None:
    message = refused(trained, override)
    assert named in message and f"{trained}/checkpoints/2 was made with another configuration" in message
    assert "another run.dir" in message and "run.force=true" in message and "\n" not in message
    (accepted,) = [d for d in check_same_run(config(trained, override, "run.force=true")) if named in d]
    assert accepted.endswith("(changes the training; run.force)")


def test_every_refused_key_is_in_the_one_error(trained: Path) -> None:
    message = refused(trained, "seed=1", "train.lr_schedule=linear", "train.log_every=1")
    assert "seed: 0 -> 1; " in message and "train.lr_schedule" in message and "log_every" not in message
    assert "lora: " in refused(trained, lora=False)  # full fine-tuning in the folder of a LoRA


def test_more_steps_of_a_schedule_that_decays_are_let_pass_with_the_new_learning_rate(
    trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    linear = ("train.lr_schedule=linear", "train.warmup_steps=0", "train.min_lr_ratio=0.0")
    save_config(config(folder, *linear, "train.steps=4"), folder / "checkpoints" / "2" / "config.yaml")
    (said,) = check_same_run(config(folder, *linear, "train.steps=8"))
    # Linear from 1 to 0: of step 2, the next one, 1 - 2/4 before and 1 - 2/8 now.
    assert "the next step has 0.75 of the full learning rate, 0.5 before" in said


def test_weights_that_moved_are_the_same_by_their_sha256(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import ones

    weights = tmp_path / "moved.safetensors"
    save_file({"decoder.conv_in.weight": ones(3)}, weights)
    folder = shutil.copytree(trained, tmp_path / "run")
    assert "load.vae: vae -> " in refused(folder, f"load.vae={weights}")
    checkpoint = folder / "checkpoints" / "2"
    state = json.loads((checkpoint / "state.json").read_text())
    state["cogvideox"]["sources"]["vae"]["sha256"] = facts(weights)[1]
    (checkpoint / "state.json").write_text(seal(state))
    said = check_same_run(config(folder, f"load.vae={weights}"))
    assert [text.partition(":")[0] for text in said] == ["run.dir", "load.vae"]
    assert said[1].endswith("(moved: the same files by SHA-256)")


def test_other_clips_are_refused_by_their_fingerprint(trained: Path) -> None:
    assert check_same_clips(config(trained), "a1" * 32) == []
    assert check_same_clips(config(trained), None) == []
    with pytest.raises(
        ConfigError, match=r"data\.path=clips: fingerprint a1a1.* -> b2b2.*other clips.*run\.force"
    ):
        check_same_clips(config(trained), "b2" * 32)
    (accepted,) = check_same_clips(config(trained, "run.force=true"), "b2" * 32)
    assert "other clips" in accepted


def test_a_configuration_that_is_no_longer_understood_is_said(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    with (folder / "checkpoints" / "2" / "config.yaml").open("a") as file:
        file.write("colour: green\n")
    assert "cannot be compared" in refused(folder) and "colour" in refused(folder)
    (said,) = check_same_run(config(folder, "run.force=true"))
    assert "was not compared" in said


def test_what_was_accepted_is_an_event_of_the_resume(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    trainer = make_trainer({"run_dir": str(folder), "train": {"steps": 3, "batch_size": 1}})
    trainer.accepted.append("seed: 0 -> 1 (changes the training; run.force)")
    trainer.run()
    resumed = next(e for e in read_events(folder) if e["kind"] == "resumed")
    assert resumed["accepted"] == ["seed: 0 -> 1 (changes the training; run.force)"]
    assert (resumed["step"], resumed["samples"]) == (2, 2)


def test_hyperparameters_that_were_accepted_take_effect(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    adamw = {"target": "torch.optim.AdamW", "params": {"lr": 0.01, "betas": [0.5, 0.6], "weight_decay": 0.3}}
    trainer = make_trainer(
        {"run_dir": str(folder), "train": {"steps": 3, "batch_size": 1, "optimizer": adamw}}
    )
    groups = trainer.engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]  # norms and biases stay without
    assert [list(group["betas"]) for group in groups] == [[0.5, 0.6]] * 2


def test_differences_are_named_leaf_by_leaf() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": {"f": 1}}
    new = {"a": 1, "b": {"c": [1, 3], "d": {"x": 1}}, "g": 2}
    assert [str(d) for d in differences(old, new)] == [
        "b.c: [1, 2] -> [1, 3]",
        "b.d: null -> {'x': 1}",
        "e: {'f': 1} -> null",
        "g: null -> 2",
    ]
