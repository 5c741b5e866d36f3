"""Render a run's previews again and compare: do these weights still make the videos that they made in training?

python -m scripts.reproduce RUN [--step N]       a run folder: its newest checkpoint, or that of step N
python -m scripts.reproduce WEIGHTS              an exported LoRA, merged or converted model that carries its provenance

What is compared is the final latents, as numbers. On the same machine a run's own checkpoint gives them bitwise
(ZeRO-3, which adds in another order: to 2e-7); merged adapters, files in another precision and other machines round
differently. Exit code 0: bitwise equal, or a relative error (RMS of the difference over RMS of the latents) within the
tolerance: 0.001 where training and file are in fp32, else 0.05. 1: not. 2: it could not be rendered.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox import environment
from cogvideox.command_line import leave, parse, run_door
from cogvideox.config import Config, ConfigError, config_from_dict
from cogvideox.weights import provenance
from cogvideox.weights.files import hub
from cogvideox.weights.files.headers import read_headers
from cogvideox.weights.files.locate import locate
from cogvideox.weights.identify import WeightsInfo, identify

if TYPE_CHECKING:
    from torch import Tensor

    from cogvideox.system import VideoDiffusion

TOLERANCE, TOLERANCE_OF_16_BITS = 1e-3, 0.05


@dataclass(frozen=True)
class Subject:
    """What is rendered: weights, and what is known of them."""

    weights: Path
    record: dict[str, Any]
    # Of ``weights.provenance``.
    previews: Path
    # Folder of the run's own latents, if it still exists.
    info: WeightsInfo | None
    # Of an exported file; None for a checkpoint in its run folder.


@dataclass(frozen=True)
class Comparison:
    is_bitwise: bool
    relative: float
    max_difference: float
    compared: str
    # "all latents", or that only the recorded values were there.
    psnr: float | None

    def __str__(self) -> str:
        if self.is_bitwise:
            return "latents bitwise equal"
        psnr = "" if self.psnr is None else f", PSNR of the pixels {self.psnr:.1f} dB"
        return (
            f"latents max |difference| {self.max_difference:.3g}, relative error {self.relative:.3g} "
            f"({self.compared}){psnr}"
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="RUN_OR_WEIGHTS", help="a run folder, a checkpoint in it, or a file")
    parser.add_argument(
        "--step", type=int, metavar="N", help="checkpoint of a run folder; default: the newest"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="keep the new videos and latents here")
    parser.add_argument("--tolerance", type=float, metavar="X", help="relative error that still passes")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as load.vae=PATH, if it moved"
    )
    arguments, _, overrides = parse(parser, argv)
    subject = find(Path(arguments.path).expanduser(), arguments.step)
    config = config_of(subject, overrides)
    print(f"{subject.weights}: step {subject.record['step']}, {dataset_state(config, subject.record)}")
    tolerance = tolerance_of(subject, config) if arguments.tolerance is None else arguments.tolerance
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.output_dir or scratch)
        comparisons = [
            show(video, comparison) for video, comparison in rendered_again(subject, config, folder)
        ]
    worst = max(comparison.relative for comparison in comparisons)
    bitwise = sum(comparison.is_bitwise for comparison in comparisons)
    verdict = "reproduced" if worst <= tolerance else "NOT reproduced"
    print(
        f"{verdict}: {bitwise} of {len(comparisons)} previews bitwise equal, worst relative error {worst:.3g} "
        f"(tolerance {tolerance:g})"
    )
    return 0 if worst <= tolerance else 1


def tolerance_of(subject: Subject, config: Config) -> float:
    is_rounded = subject.info is not None and subject.info.dtype != "float32"
    return TOLERANCE if config.sample.precision == "fp32" and not is_rounded else TOLERANCE_OF_16_BITS


def show(video: dict[str, Any], comparison: Comparison) -> Comparison:
    print(f"{video['name']} (seed {video['seed']}): {comparison}")
    return comparison


# ------------------------------------------------------------------------------------------ what there is to render


def find(path: Path, step: int | None) -> Subject:
    """ValueError in one sentence where there is nothing to compare with."""
    if (path / "state.json").is_file():
        run, folder = path.parent.parent, path
    elif (path / "checkpoints").is_dir():
        run = path
        folder = run / "checkpoints" / str(step) if step is not None else locate(path).folder
        if not (folder / "state.json").is_file():
            raise ValueError(f"--step {step}: {run} has no such checkpoint; it has {_steps(run)}")
    else:
        return _find_export(path)
    record = provenance.read({}, folder)
    _check_record(folder, record, f"; checkpoints with their own previews: {_steps(run, with_preview=True)}")
    return Subject(folder, record, run / "previews" / folder.name, None)


def _find_export(path: Path) -> Subject:
    source = locate(path, "transformer")
    record = provenance.read(read_headers(source.files).metadata, source.folder)
    _check_record(path, record, "")
    info = identify(path)
    if info.family not in ("transformer", "lora"):
        raise ValueError(
            f"{path} is {info.variant}: only a transformer or a LoRA has previews to render again"
        )
    run = Path(record["config"]["run"]["dir"])
    return Subject(path, record, run / "previews" / str(record["step"]), info)


def _check_record(path: Path, record: dict[str, Any], advice: str) -> None:
    if not record.keys() >= {"config", "step"}:
        raise ValueError(
            f"{path} carries no record of a training run: expected a run folder of this project, or a file that was "
            f"exported from one"
        )
    preview = record.get("preview")
    if preview is None:
        raise ValueError(
            f"{path}: its run rendered no previews up to step {record['step']}, there is nothing to compare with; "
            f"train.preview_prompts asks for them"
        )
    if preview["step"] != record["step"]:
        raise ValueError(
            f"{path}: these are the weights of step {record['step']}, the last preview is of step "
            f"{preview['step']}{advice}"
        )


def _steps(run: Path, with_preview: bool = False) -> str:
    steps = []
    for folder in (run / "checkpoints").iterdir():
        if folder.name.isdigit() and (folder / "state.json").is_file():
            record = provenance.read({}, folder)
            if not with_preview or (record.get("preview") or {}).get("step") == record.get("step"):
                steps.append(int(folder.name))
    return ", ".join(map(str, sorted(steps))) or "none"


def config_of(subject: Subject, overrides: list[str]) -> Config:
    """What renders the preview: the run's configuration with the weights in their place. All of them must be there."""
    from cogvideox.config import trains_text_encoder
    from cogvideox.sampling.preview import as_trained, sampling_from

    config = config_from_dict(subject.record["config"], overrides)
    if subject.info is None:
        config = as_trained(config, subject.weights)
    else:
        weights = str(subject.weights)
        load = {"lora": weights} if subject.info.family == "lora" else {"transformer": weights, "lora": None}
        is_said = any(override.startswith("load.text_encoder=") for override in overrides)
        if trains_text_encoder(config) and not is_said:
            load["text_encoder"] = _trained_text_encoder(subject, config)
        if config.lora is not None:  # its run froze the text encoder, whatever the model's file says
            for part in config.model.conditions:
                part.params |= {"trainable": False} if "trainable" in part.params else {}
        # A LoRA, alone or merged, brings its own rank and scale.
        config = sampling_from(dataclasses.replace(config, lora=None), **load)
    paths = {name: getattr(config.load, name) for name in ("transformer", "vae", "text_encoder")}
    for name, path in [*paths.items(), *(("lora", lora.path) for lora in config.load.loras)]:
        if path and not hub.is_address(path) and not Path(path).expanduser().exists():
            raise ConfigError(f"load.{name}={path}: not there any more; say where it is: load.{name}=PATH")
    return config


def _trained_text_encoder(subject: Subject, config: Config) -> str:
    """The run trained its text encoder too, which an exported transformer need not hold."""
    if subject.info.others.keys() & {"t5", "text_encoder"}:
        return str(subject.weights)
    checkpoint = Path(config.run.dir) / "checkpoints" / str(subject.record["step"])
    if checkpoint.is_dir():
        return str(checkpoint)
    raise ConfigError(
        f"{subject.weights}: the run trained its text encoder too, which is not in this file, and {checkpoint} is not "
        f"there any more; say where it is: load.text_encoder=PATH"
    )


def dataset_state(config: Config, record: dict[str, Any]) -> str:
    """Rendering needs no clips; that they changed is worth knowing all the same."""
    known, path = record.get("dataset"), config.data.path
    if known is None:
        return "trained on clips without a fingerprint"
    if not Path(path).exists():
        return f"trained on {path}, which is not there any more"
    from cogvideox.data.fingerprint import dataset_fingerprint
    from train_video import open_data

    try:
        found = dataset_fingerprint(open_data(config, path))
    except (ValueError, OSError) as error:
        return (
            f"trained on {path}, which has changed and cannot be read any more ({str(error).splitlines()[0]})"
        )
    return f"trained on {path}, {'unchanged' if found == known else 'which has changed since'}"


# ------------------------------------------------------------------------------------------------ render and compare


def rendered_again(
    subject: Subject, config: Config, folder: Path
) -> Iterator[tuple[dict[str, Any], Comparison]]:
    """(record of the video then, comparison) one by one; the new videos lie in ``folder``."""
    from cogvideox import dist
    from cogvideox.engine.logging import get_logger
    from cogvideox.sampling.preview import device_name, final_latents, write_preview
    from cogvideox.sampling.prompts import Request
    from cogvideox.sampling.ways_in import denoise, prepare

    dist.init()
    get_logger()
    system = load_system(config)
    preview = subject.record["preview"]
    for what, now in (("device", device_name(system.device)), ("versions", environment.versions())):
        if preview[what] != now:
            print(f"{what} then: {preview[what]}; now: {now}")
    if config.load.vae is None:
        print("the run's VAE had random weights (load.vae is not set): pixels are not compared")
    for index, then in enumerate(preview["videos"]):
        if then["image"] and not Path(then["image"]).is_file():
            raise ConfigError(f"{then['name']}: its image {then['image']} is not there any more")
        request = Request(index, then["prompt"], then["seed"], then["image"] and Path(then["image"]))
        start = time.perf_counter()
        sampled = denoise(system, [request], prepare(system, [request]))
        now = write_preview(system, sampled, request, folder, start, config)
        if then["latents"]["shape"] != now["latents"]["shape"]:
            raise ConfigError(
                f"{then['name']}: latents of shape {then['latents']['shape']} then, {now['latents']['shape']} now: "
                f"an override changed the size of the section sample"
            )
        recorded = _read_latents(subject.previews / f"{then['name']}.safetensors", then)
        yield then, compare(system, then, now, final_latents(sampled), recorded)


def load_system(config: Config) -> VideoDiffusion:
    """The network as its run held it: the adapters beside the weights, all that was trained in the training's dtype."""
    from cogvideox import dist
    from cogvideox.build import build
    from cogvideox.sampling.memory import OncePerRun
    from cogvideox.system import DTYPES

    dist.seed_everything(config.seed)  # parts without a checkpoint
    system = build(config.system, config=config)
    system.load_weights()
    system.prepare_sampling(dist.device())
    system.to(DTYPES[config.sample.precision])
    system.once_per_run = OncePerRun(system)
    return system


def _read_latents(path: Path, then: dict[str, Any]) -> Tensor | None:
    """The run's own latents, if they are still those of the record."""
    from safetensors.torch import load_file

    from cogvideox.sampling.preview import summary

    if not path.is_file():
        return None
    latents = load_file(path)["latents"]
    if summary(latents)["sha256"] != then["latents"]["sha256"]:
        print(f"{path} is not what the record describes (rendered again since?): its values are left out")
        return None
    return latents


def compare(
    system: VideoDiffusion,
    then: dict[str, Any],
    now: dict[str, Any],
    latents: Tensor,
    recorded: Tensor | None,
) -> Comparison:
    """latents, recorded: (T, C, h, w) float32; without the latter, the values in the record are what there is."""
    import torch

    from cogvideox.sampling.preview import recorded_values

    is_bitwise = then["latents"]["sha256"] == now["latents"]["sha256"]
    has_vae = system.config.load.vae is not None
    if is_bitwise:
        if has_vae and then["pixels_sha256"] != now["pixels_sha256"]:
            print(f"{then['name']}: the latents are equal, their pixels are not: another VAE or device")
        return Comparison(True, 0.0, 0.0, "", None)
    if recorded is None:
        ours, theirs = recorded_values(latents), torch.tensor(then["latents"]["values"])
        compared, psnr = f"of {len(ours)} recorded values", None
    else:
        ours, theirs, compared = latents, recorded, "of all values"
        psnr = pixel_psnr(system, latents, recorded) if has_vae else None
    difference = ours - theirs
    relative = difference.square().mean().sqrt() / theirs.square().mean().sqrt()
    return Comparison(False, float(relative), float(difference.abs().max()), compared, psnr)


def pixel_psnr(system: VideoDiffusion, latents: Tensor, recorded: Tensor) -> float:
    """20 log10(2 / RMSE) over the decoded videos, whose pixels run from -1 to 1."""
    import torch

    pair = (torch.cat(list(system.decode(x[None].to(system.device))), dim=1) for x in (latents, recorded))
    ours, theirs = pair
    rmse = (ours - theirs).square().mean().sqrt().clamp_min(1e-12)
    return float(20 * torch.log10(2 / rmse))


if __name__ == "__main__":
    leave(run_door(main))
