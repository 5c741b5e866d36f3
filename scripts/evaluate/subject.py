"""What is evaluated: a run, a checkpoint or weights of any format, as the configuration that loads them."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cogvideox.command_line import add_config_arguments, parse
from cogvideox.config import Config, ConfigError, SampleConfig, load_config
from cogvideox.weights.files.locate import locate
from cogvideox.weights.identify import identify


@dataclass(frozen=True)
class Subject:
    name: str
    config: Config
    # Its section ``load`` names the weights, its section ``sample`` the precision that they were trained in.


def add_subject_arguments(parser: argparse.ArgumentParser, most: int) -> None:
    """``PATH ... --base ... key=value``, with at most ``most`` paths."""
    add_config_arguments(parser)
    action = next(action for action in parser._actions if action.dest == "overrides")
    action.metavar = "PATH | key=value"
    action.help = (
        f"up to {most} of: a run folder, a checkpoint in it, weights of any format (with --base FILE...); none: what "
        f"load.* names. And overrides such as data.validation_path=DIR"
    )


def read_subjects(
    parser: argparse.ArgumentParser, argv: list[str], most: int
) -> tuple[argparse.Namespace, list[Subject]]:
    """ConfigError where a path is none of those, or says too little."""
    arguments, files, rest = parse(parser, argv)
    paths = [text for text in rest if "=" not in text or Path(text).expanduser().exists()]
    overrides = [text for text in rest if text not in paths]
    if len(paths) > most:
        raise ConfigError(
            f"{len(paths)} checkpoints were named ({', '.join(paths)}): expected at most {most}"
        )
    return arguments, [subject_of(path, files, overrides) for path in paths or [None]]


def subject_of(path: str | None, files: list[str], overrides: list[str]) -> Subject:
    """``path``: None takes what the configuration itself loads."""
    if path is None:
        if not files:
            raise ConfigError("nothing to evaluate: name a run folder or a checkpoint, or --base FILE...")
        config = _of_a_transformer(load_config(files, overrides), files[0])
        return Subject(config.load.transformer or "random weights", _as_is(config))
    checkpoint = _checkpoint(Path(path).expanduser())
    if checkpoint is None:
        return _weights(path, files, overrides)
    from cogvideox.sampling.preview import as_trained  # torch

    recorded = checkpoint / "config.yaml"
    if not files and not recorded.is_file():
        raise ConfigError(f"{checkpoint} holds no config.yaml: name the configuration with --base FILE...")
    config = _of_a_transformer(load_config(files or [recorded], overrides), path)
    name = f"{path}@{checkpoint.name}" + ("" if config.load.ema else ", not averaged")
    return Subject(name, _with_ema_of(config, as_trained(_with_sample(config), checkpoint)))


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint's folder of a run or of one of its checkpoints; None for other weights."""
    if (path / "state.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        return locate(path).folder
    return None


def _weights(path: str, files: list[str], overrides: list[str]) -> Subject:
    info = identify(path)
    if not files:
        raise ConfigError(
            f"{path} is {info.variant}, and no run that says how it was trained: name its configuration with --base, "
            f"such as --base configs/cogvideox_2b.yaml configs/sft.yaml"
        )
    if info.family not in ("transformer", "lora"):
        raise ConfigError(f"{path} is {info.variant}: expected a transformer or a LoRA")
    config = _of_a_transformer(load_config(files, overrides), files[0])
    name = info.family
    # A LoRA brings its own rank and scale.
    lora = None if name == "lora" else config.lora
    load = dataclasses.replace(config.load, **{name: path})
    return Subject(path, _as_is(dataclasses.replace(config, load=load, lora=lora)))


def _of_a_transformer(config: Config, source: str) -> Config:
    if config.model.transformer is None:
        raise ConfigError(
            f"{source} is of a VAE alone: expected a model that makes videos, with a transformer"
        )
    return config


def _as_is(config: Config) -> Config:
    from cogvideox.sampling.preview import sampling_from

    return _with_ema_of(config, sampling_from(_with_sample(config))) if config.train is not None else config


def _with_ema_of(asked: Config, config: Config) -> Config:
    """load.ema=false takes a run's last weights instead of the averaged ones."""
    return dataclasses.replace(config, load=dataclasses.replace(config.load, ema=asked.load.ema))


def _with_sample(config: Config) -> Config:
    """A run without previews has no section sample, which also says how weights are held."""
    if config.sample is not None or config.data is None:
        return config
    size = {name: getattr(config.data, name) for name in ("num_frames", "height", "width", "fps")}
    return dataclasses.replace(config, sample=SampleConfig(steps=50, **size))
