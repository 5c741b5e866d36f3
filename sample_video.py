"""Sample videos: config -> build -> load -> prompts -> mp4 files, each with a sidecar json that makes it again.

python sample_video.py --base configs/cogvideox_5b.yaml load.transformer=... load.vae=... load.text_encoder=... \\
    --prompt "a cat rides a skateboard" --seed 1
python sample_video.py --from outputs/samples/0000-a-cat-rides-a-skateboard.json

Under torchrun the prompts are shared out over the ranks.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from cogvideox import environment
from cogvideox.command_line import add_config_arguments, leave, parse, run_door
from cogvideox.config import Config, ConfigError, config_from_dict, load_config, to_yaml
from cogvideox.plan import describe
from cogvideox.sampling.prompts import Request, make_requests, read_prompts


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--from", dest="sidecar", metavar="JSON", help="make the video of this sidecar again")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="one video per text")
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="one prompt per line; -: standard input; default: sample.prompt_file",
    )
    parser.add_argument(
        "--image", metavar="FILE", help="first frame (image-to-video); a line `prompt@@file` has its own"
    )
    parser.add_argument(
        "--lora",
        nargs="+",
        metavar="PATH[:STRENGTH]",
        help="any format, strength 1 by default; sets load.lora",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="overrides sample.output_dir")
    parser.add_argument("--seed", type=int, metavar="N", help="prompt i gets the seed N + i; overrides seed")
    parser.add_argument("--frames", type=int, metavar="N", help="overrides sample.num_frames")
    parser.add_argument(
        "--size", metavar="HxW", help="overrides sample.height and sample.width, such as 480x720"
    )
    config, requests, dry_run = read_arguments(parser, argv)
    if dry_run:
        print(to_yaml(config))
        print(describe(config, environment.world_size(), sampling=True))
        return 0

    # torch, SAT and transformers are imported only now: a mistake above answers at once.
    from cogvideox import dist
    from cogvideox.engine.logging import get_logger
    from cogvideox.sampling.run import sample_all
    from cogvideox.system import VideoDiffusion

    dist.init()
    get_logger()  # from here on rank 0 speaks
    dist.seed_everything(
        config.seed
    )  # parts without a checkpoint, such as an untrained network for comparison
    system = VideoDiffusion(config)
    system.check_prompts([r.prompt for r in requests])
    system.load_weights()
    system.prepare_sampling(dist.device())
    written = sample_all(
        system, requests, Path(config.sample.output_dir), rank=dist.rank(), world_size=dist.world_size()
    )
    for path in written:
        print(path)
    return 0


def read_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[Config, list[Request], bool]:
    """The merged config and the videos to make, from the command line or from a sidecar."""
    arguments, files, overrides = parse(parser, argv)
    flags = {
        "sample.output_dir": arguments.output_dir,
        "seed": arguments.seed,
        "sample.num_frames": arguments.frames,
    }
    if arguments.size:
        match = re.fullmatch(r"(\d+)x(\d+)", arguments.size)
        if not match:
            raise ConfigError(f"--size {arguments.size}: expected HEIGHTxWIDTH, such as 480x720")
        flags |= {"sample.height": match[1], "sample.width": match[2]}
    if arguments.lora:
        flags["load.lora"] = json.dumps([lora_entry(text) for text in arguments.lora])  # JSON is YAML
    overrides += [f"{key}={value}" for key, value in flags.items() if value is not None]
    if arguments.sidecar:
        sidecar = read_sidecar(arguments.sidecar)
        config = config_from_dict(sidecar["config"], overrides)
        seed = sidecar["seed"] if arguments.seed is None else arguments.seed
        return (
            config,
            [Request(0, sidecar["prompt"], seed, sidecar["image"] and Path(sidecar["image"]))],
            False,
        )
    if not files:
        parser.error("--base is missing: name the YAML files, such as --base configs/cogvideox_2b.yaml")
    config = load_config(files, overrides)
    if config.sample is None:
        raise ConfigError("the section sample is missing: add an overlay such as configs/sample.yaml")
    if arguments.dry_run:
        return config, [], True
    prompt_file = arguments.prompt_file or (None if arguments.prompt else config.sample.prompt_file)
    requests = make_requests(read_prompts(arguments.prompt, prompt_file), config.seed, arguments.image)
    has_image_condition = any("FirstFrame" in part.target for part in config.model.conditions)
    for request in requests:
        if (request.image is not None) != has_image_condition:
            expected = (
                "needs an image: --image FILE or prompt@@FILE" if has_image_condition else "takes no image"
            )
            raise ConfigError(f"prompt {request.index} ({request.prompt!r}): this model {expected}")
    return config, requests, False


def lora_entry(text: str) -> dict[str, str | float]:
    """``PATH`` or ``PATH:STRENGTH`` as an entry of load.lora. A tail that is no number belongs to the path."""
    path, _, strength = text.rpartition(":")
    try:
        return {"path": path or text, "strength": float(strength) if path else 1.0}
    except ValueError:
        return {"path": text, "strength": 1.0}


def read_sidecar(path: str) -> dict:
    try:
        sidecar = json.loads(Path(path).read_text())
        return {key: sidecar[key] for key in ("config", "prompt", "seed", "image")}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"--from {path}: not a sidecar that sample_video.py wrote ({error!r})") from error


if __name__ == "__main__":
    leave(run_door(main))
