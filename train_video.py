"""Train a CogVideoX-type model: config -> data and system -> weights -> Trainer.run.

torchrun --standalone --nproc_per_node=8 train_video.py --base configs/cogvideox_5b.yaml configs/lora.yaml data.path=...

The same command resumes. ``--dry-run`` prints the merged configuration and what it will cost, and runs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from cogvideox import environment
from cogvideox.build import build
from cogvideox.command_line import add_config_arguments, leave, parse, run_door
from cogvideox.config import Config, ConfigError, Part, load_config, save_config, to_yaml
from cogvideox.flops import clip_of, model_flops
from cogvideox.plan import lora_parameters
from cogvideox.planning.choices import resolve_budget
from cogvideox.planning.description import describe
from cogvideox.sampling.prompts import make_requests


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--seed", type=int, metavar="N", help="overrides seed")
    arguments, files, overrides = parse(parser, argv)
    if arguments.seed is not None:
        overrides.append(f"seed={arguments.seed}")
    if not files:
        parser.error(
            "--base is missing: name the YAML files, such as configs/cogvideox_5b.yaml configs/lora.yaml"
        )
    config = load_config(files, overrides)
    for section in ("train", "data"):
        if getattr(config, section) is None:
            raise ConfigError(
                f"the section {section} is missing: add an overlay such as configs/sft.yaml or lora.yaml"
            )
    if arguments.dry_run:
        print(to_yaml(config))
        print(describe(config, environment.world_size(), gpu=arguments.gpu))
        return 0
    resolve_budget(config, environment.world_size())  # one that cannot be met is an error now
    if config.data.path is None:
        raise ConfigError(
            "data.path is missing: a folder of videos with captions (data/README.md shows the layouts)"
        )
    train(config)
    return 0


def train(config: Config) -> None:
    # torch, SAT and DeepSpeed are imported only now: a mistake in the configuration answers at once.
    from cogvideox import dist
    from cogvideox.data.fingerprint import dataset_fingerprint
    from cogvideox.data.loader import ResumableLoader
    from cogvideox.data.overlap import warn_of_overlap
    from cogvideox.engine.logging import get_logger
    from cogvideox.engine.optim import check_train_config
    from cogvideox.engine.resources import Resources
    from cogvideox.engine.same_config import check_same_clips, check_same_run, recorded
    from cogvideox.engine.shared_folder import check_shared
    from cogvideox.engine.trackers import check_trackers_start
    from cogvideox.engine.trainer import Trainer
    from cogvideox.evaluation.held_out import build_validation
    from cogvideox.report.run_report import write_report_if_possible
    from cogvideox.sampling.preview import Previews
    from cogvideox.system_attention import settle_attention
    from cogvideox.system_cache import weights_digests, with_caches
    from cogvideox.weights.sources import Sources

    dist.init(config.train.timeout_minutes)
    resources = Resources(dist.device())  # counts from the start of the process
    logger = get_logger()  # from here on rank 0 speaks
    check_train_config(config.train, dist.device())
    if dist.is_main():
        check_trackers_start(config.train.trackers)
    accepted = check_same_run(config)
    requests = make_requests(config.train.preview_prompts, config.seed)
    train_set = open_data(config, config.data.path)
    fingerprint = dataset_fingerprint(train_set) if dist.is_main() else None
    accepted += check_same_clips(config, fingerprint)
    for difference in accepted:
        logger.info(f"other than at the checkpoint: {difference}")
    validation_set = None
    if config.data.validation_path and config.train.validate_every is None:
        logger.warning("data.validation_path is given, but train.validate_every is null: no validation")
    elif config.data.validation_path:
        validation_set = open_data(config, config.data.validation_path)
        if dist.is_main():
            warn_of_overlap(train_set, validation_set)

    attention = settle_attention(config, dist.device(), training=True, recorded=recorded(config, "attention"))
    dist.seed_everything(config.seed)
    system = build(config.system, config=config)
    if hasattr(system, "use_attention"):
        system.use_attention(attention)
    if requests:
        if not hasattr(system, "sample_latents"):
            raise ConfigError(f"train.preview_prompts: {config.system.target} makes no videos; set it to []")
    prompts = [request.prompt for request in requests]
    if config.data.latent_cache or config.data.text_cache:
        # Before the network's weights are there: the memory that encoding needs is free, and none of it stays.
        sets = [train_set] if validation_set is None else [train_set, validation_set]
        with resources("cache"):
            train_set, validation_set = [*with_caches(system, sets, prompts), None][:2]
    if prompts:
        system.check_prompts(prompts)
    system.load_weights()
    system.prepare_training(dist.device())

    loader = ResumableLoader(
        train_set,
        config.train.batch_size,
        config.seed,
        dist.rank(),
        dist.world_size(),
        config.data.num_workers,
        clip_timeout_seconds=config.data.clip_timeout_seconds,
    )
    validate = None
    if validation_set is not None:
        validate = build_validation(config, system, validation_set, train_set)

    sources = Sources(loaded_paths(config), Path(config.run.dir) / "sources.json", weights_digests(config))
    previews = Previews(requests, config, config.run.dir) if requests else None
    trainer = Trainer(
        system,
        loader,
        config.train,
        config.run.dir,
        deepspeed_overrides=config.deepspeed,
        seed=config.seed,
        validate=validate,
        preview=previews,
        facts=lambda: {
            "config": dataclasses.asdict(config),
            "dataset": fingerprint,
            "sources": sources.records(),
            "command": shlex.join(sys.argv),
            "attention": attention,
        },
        work=work_of(config),
        resources=resources,
        accepted=accepted,
    )
    check_shared(config.run.dir)
    if previews is not None and trainer.looks.previewed is not None:
        previews.go_on_from(trainer.looks.previewed)
    if dist.is_main():
        describe_run(config)  # only now: a mistake above leaves no folder behind
        sources.start()
        if fingerprint is None:
            logger.warning(
                "%s has no fingerprint(): checkpoints will not say which clips these were", config.data.target
            )
    try:
        trainer.run()
    finally:
        if dist.is_main():
            write_report_if_possible(config.run.dir)


def describe_run(config: Config) -> None:
    """The run folder's own account: the merged configuration, and each command that worked on it."""
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    with (folder / "command.txt").open("a") as file:
        ranks = f"{environment.world_size()} ranks, {environment.versions()}"
        file.write(f"{shlex.join(sys.argv)}\n  {ranks}\n")


def work_of(config: Config):
    """What a training step does for one clip; None where no transformer is trained."""
    from cogvideox.engine.instruments import Work

    if config.model.transformer is None or config.vae is None:
        return None
    clip = clip_of(config, config.data)
    adapters = lora_parameters(config) if config.lora else 0
    return Work(model_flops(config, clip, adapters), clip.tokens)


def loaded_paths(config: Config) -> dict[str, str]:
    """What the run starts from, by component; several LoRAs are numbered."""
    paths = {name: getattr(config.load, name) for name in ("transformer", "vae", "text_encoder")}
    paths |= {f"lora.{index}": lora.path for index, lora in enumerate(config.load.loras)}
    return {name: path for name, path in paths.items() if path}


def open_data(config: Config, path: str):
    """The dataset of the section ``data`` at ``path``. A clip that cannot be used is an error now, not in step 1000."""
    section = config.data
    size = {name: getattr(section, name) for name in ("num_frames", "height", "width", "fps")}
    return build(Part(section.target, section.params), path=path, **size, seed=config.seed)


if __name__ == "__main__":
    leave(run_door(main))
