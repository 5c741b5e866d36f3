"""Encode the clips and captions of a configuration ahead of training, on any number of ranks.

torchrun --standalone --nproc_per_node=8 -m scripts.cache_latents --base configs/cogvideox_5b.yaml configs/lora.yaml \\
    data.path=... data.latent_cache=cache data.text_cache=cache load.vae=... load.text_encoder=...

Training with the same keys then finds everything and reads neither VAE nor text encoder. Killed at any moment, the same
command goes on. Exit code 1: a clip or caption could not be encoded, or a check found something; 2: a mistake.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from cogvideox.command_line import add_config_arguments, leave, parse, run_door
from cogvideox.config import Config, ConfigError, load_config

_ABANDONED_SECONDS = 3600
# A partial file this old was left by a killed process; a younger one may be in the writing.


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.cache_latents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="read every entry and count what no clip needs")
    what.add_argument("--prune", action="store_true", help="list what --check finds of no use")
    parser.add_argument("--force", action="store_true", help="with --prune: delete what is listed")
    arguments, files, overrides = parse(parser, argv)
    if not files:
        parser.error("--base is missing: name the YAML files of the run that is to be trained")
    if arguments.force and not arguments.prune:
        parser.error("--force belongs to --prune")
    config = checked(load_config(files, overrides))
    return run(arguments, config)


def checked(config: Config) -> Config:
    data = config.data
    if data is None or data.path is None:
        raise ConfigError("data.path is missing: a folder of videos with captions (data/README.md)")
    if not data.latent_cache and not data.text_cache:
        raise ConfigError("data.latent_cache and data.text_cache are null: name the folder to fill")
    if data.latent_cache and config.load.vae is None:
        raise ConfigError(
            "load.vae is not set: latents of a VAE with random weights are of no use; set load.vae=PATH"
        )
    return config


def run(arguments: argparse.Namespace, config: Config) -> int:
    from cogvideox import dist
    from cogvideox.engine.logging import get_logger
    from cogvideox.sampling.prompts import make_requests
    from cogvideox.system_cache import Caches, captions_of, listed, run_ranks, sampling_prompts
    from train_video import open_data

    dist.init(config.train.timeout_minutes if config.train else 30.0, model_parallel=False)
    get_logger()
    data = config.data
    sets = [open_data(config, path) for path in (data.path, data.validation_path) if path]
    caches, captions = Caches(config, run_ranks()), captions_of(sets)
    requests = make_requests(config.train.preview_prompts if config.train else [], config.seed)
    prompts = sampling_prompts(config, [request.prompt for request in requests])
    if arguments.dry_run:
        if dist.is_main():
            print(f"{sum(map(len, sets))} clips, {len(captions)} captions, {len(prompts)} prompts")
        return 0
    if arguments.check or arguments.prune:
        found = [*check_latents(caches, sets)] if data.latent_cache else []
        found += check_text(caches, [*captions, *prompts]) if data.text_cache else []
        if not dist.is_main():
            return int(any(part.problems for part in found))
        return prune(found, arguments.force) if arguments.prune else verdict(found)
    failed: dict[str, str] = {}
    if data.text_cache:
        failed |= caches.fill_text(captions, prompts, skip=True)
    for dataset in sets if data.latent_cache else ():
        failed |= caches.fill_latents(caches.latent_cache(dataset))
    if dist.is_main():
        if failed:
            print(f"{len(failed)} could not be encoded:\n{listed(failed, limit=None)}")
        else:
            print("everything is encoded")
    return int(bool(failed))


class Found:
    """What a check found in one folder: a line that sums it up, what is wrong, and which files no run needs."""

    def __init__(
        self, title: str, problems: dict[str, str], entries: Any, used: set[Path], damaged: list[Path]
    ):
        from cogvideox.cache.entries import partial_files
        from cogvideox.system_cache import describe_other

        self.title, self.problems = title, problems
        self.orphans = sorted(set(entries.files()) - used)
        self.damaged = sorted(damaged)
        now = time.time()
        self.left = [
            path for path in partial_files(entries.root) if now - path.stat().st_mtime > _ABANDONED_SECONDS
        ]
        self.others = [f"{other.path}: {describe_other(other, entries)}" for other in entries.others()]


def check_latents(caches: Any, sets: list[Any]) -> list[Found]:
    from cogvideox.system_cache import listed

    sound, missing, damaged, used = 0, {}, {}, set()
    for dataset in sets:
        cache = caches.latent_cache(dataset)
        part = cache.check(caches.latent_shape())
        sound, missing, damaged = sound + part.sound, missing | part.missing, damaged | part.damaged
        used |= set(cache.paths)
    entries, shape = caches.latents, caches.latent_shape()
    title = (
        f"{entries.folder}: {sound} of {sum(map(len, sets))} latents are whole and finite, moments "
        f"{shape} {entries.maker['stored']}"
    )
    for name, reasons in (("missing", missing), ("damaged", damaged)):
        title += f"\n{len(reasons)} {name}:\n{listed(reasons, limit=None)}" if reasons else ""
    broken = [path for path in used if any(path.name in reason for reason in damaged.values())]
    return [Found(title, missing | damaged, entries, used, broken)]


def check_text(caches: Any, captions: list[str]) -> list[Found]:
    from cogvideox.system_cache import listed

    cache, problems, broken = caches.text, {}, []
    captions = list(dict.fromkeys(captions))
    for caption in captions:
        try:
            cache.read(caption)
        except ValueError as error:
            problems[caption] = str(error)
            broken += [cache.path(caption)] if cache.path(caption).is_file() else []
    sound = len(captions) - len(problems)
    title = f"{cache.entries.folder}: {sound} of {len(captions)} captions are whole and finite"
    if problems:
        title += f"\n{len(problems)} missing or damaged:\n{listed(problems, limit=None)}"
    return [Found(title, problems, cache.entries, {cache.path(caption) for caption in captions}, broken)]


def verdict(found: list[Found]) -> int:
    for part in found:
        print(part.title)
        print(
            f"{len(part.orphans)} entries that this configuration does not need; {len(part.left)} partial files"
        )
        for other in part.others:
            print(other)
    return int(any(part.problems for part in found))


def prune(found: list[Found], force: bool) -> int:
    """Delete damaged entries, those that this configuration does not need, and partial files. Without force: list."""
    paths = sorted({path for part in found for path in (*part.damaged, *part.orphans, *part.left)})
    size = sum(path.stat().st_size for path in paths) / 2**20
    for path in paths:
        print(path)
        if force:
            path.unlink()
    print(f"{len(paths)} files, {size:.1f} MiB, {'deleted' if force else 'would be deleted with --force'}")
    for part in found:
        for other in part.others:
            print(f"kept, as another configuration may use it: {other}")
    if not force and paths:
        print(
            "Entries of another dataset or size in this folder count as not needed: look at the list first."
        )
    return 0


if __name__ == "__main__":
    leave(run_door(main))
