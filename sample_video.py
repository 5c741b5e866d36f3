"""Sample videos: config -> build -> load -> prompts -> files, each with a sidecar json that makes it again.

python sample_video.py --base configs/cogvideox_5b.yaml load.transformer=... load.vae=... load.text_encoder=... \\
    --prompt "a cat rides a skateboard" --seed 1
python sample_video.py --from outputs/samples/0000-a-cat-rides-a-skateboard.json

Under torchrun the prompts are shared out over the ranks. A run that was cut off goes on with the same command: videos
that are there, made from the same inputs and settings, are left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox import environment
from cogvideox.command_line import add_config_arguments, leave, parse, path_and_strength, run_door
from cogvideox.config import Config, ConfigError, config_from_dict, load_config, to_yaml
from cogvideox.planning.description import describe
from cogvideox.sampling import interactive
from cogvideox.sampling.gallery import write_gallery
from cogvideox.sampling.policy import check_inputs, check_size, warn_about_size
from cogvideox.sampling.prompts import Request, make_requests, read_prompts
from cogvideox.sampling.sidecar import comparison, request_of
from cogvideox.sampling.sidecar import read as read_sidecar
from cogvideox.sampling.targets import OUTPUTS, Target, check_writable, plan

if TYPE_CHECKING:
    from cogvideox.system import VideoDiffusion

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in a shell: 128 + SIGINT."""


def main(argv: list[str]) -> int:
    try:
        return sample(argv)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted: nothing was made", file=sys.stderr)
        return INTERRUPTED


def sample(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--from", dest="sidecar", metavar="JSON", help="make the video of this sidecar again")
    add_input_arguments(parser)
    parser.add_argument(
        "--lora",
        nargs="+",
        metavar="PATH[:STRENGTH]",
        help="any format, strength 1 by default; sets load.lora",
    )
    add_output_arguments(parser)
    parser.add_argument("--seed", type=int, metavar="N", help="prompt i gets the seed N + i; overrides seed")
    parser.add_argument("--frames", type=int, metavar="N", help="overrides sample.num_frames")
    parser.add_argument(
        "--total-frames", type=int, metavar="N", help="a longer video, in windows of --frames"
    )
    parser.add_argument(
        "--size", metavar="HxW", help="overrides sample.height and sample.width, such as 480x720"
    )
    arguments, files, overrides = parse(parser, argv)
    if arguments.gallery:
        print(write_gallery(arguments.gallery))
        return 0
    if arguments.from_latents:
        return decode_latents(arguments, overrides)
    config, requests, dry_run = read_arguments(parser, arguments, files, overrides)
    check_size(config)  # what is impossible is refused before torch is loaded
    if dry_run:
        print(to_yaml(config))
        print(describe(config, environment.world_size(), sampling=True, gpu=arguments.gpu))
        return 0
    check_writable(config.sample.output_dir)
    todo, there = plan(config, requests, overwrite=arguments.overwrite, resume=not arguments.sidecar)
    if there and environment.rank() == 0:
        print(f"{len(there)} of {len(requests)} are there (--overwrite makes them again)", file=sys.stderr)
    if todo or arguments.interactive:
        make_videos(arguments, config, todo)
    if environment.rank() == 0:
        print_overviews(config)
    return 0


def make_videos(arguments: argparse.Namespace, config: Config, todo: list[Target]) -> None:
    """Load the models, make what there is to make, and print the paths."""
    # torch, SAT and transformers are imported only now: a mistake above answers at once.
    from cogvideox import dist
    from cogvideox.engine.logging import get_logger
    from cogvideox.sampling.memory import apply_memory, choose_memory
    from cogvideox.sampling.run import keeping, sample_all
    from cogvideox.system import VideoDiffusion
    from cogvideox.system_attention import settle_attention

    dist.init()
    get_logger()  # from here on rank 0 speaks
    warn_about_size(config)
    dist.seed_everything(
        config.seed
    )  # parts without a checkpoint, such as an untrained network for comparison
    memory = choose_memory(config, device=dist.device())
    recorded = read_sidecar(arguments.sidecar).get("attention") if arguments.sidecar else None
    attention = settle_attention(config, dist.device(), training=False, recorded=recorded)
    system = VideoDiffusion(config)
    system.use_attention(attention)
    if todo:
        requests = [target.request for target in todo]
        system.check_prompts([text for r in requests for text in (r.prompt, r.source_prompt) if text])
    with keeping([], todo, config):
        system.load_weights()
        system.prepare_sampling(dist.device(), place=False)
        apply_memory(system, memory, dist.device())
    if arguments.interactive:
        sample_interactively(system, config)
        return
    written = sample_all(system, todo, rank=dist.rank(), world_size=dist.world_size())
    print_files(written)
    if arguments.sidecar and written:  # one video: the other ranks have none
        print(comparison(read_sidecar(arguments.sidecar), read_sidecar(written[0].sidecar)))
    dist.barrier()  # overviews are of all ranks' videos


def sample_interactively(system: VideoDiffusion, config: Config) -> None:
    """A prompt loop; see ``sampling.interactive``."""
    from cogvideox.build import build
    from cogvideox.sampling.run import sample_all

    def make(request: Request, own: Config) -> list[Path]:
        check_inputs(own, request)
        check_size(own)
        system.check_prompts([request.prompt])
        todo, _ = plan(own, [request], resume=False)
        system.config, system.guidance = own, build(own.guidance)
        return [path for target in sample_all(system, todo, keep_text_encoder=True) for path in target.files]

    is_typed = sys.stdin.isatty()
    if is_typed:
        print(interactive.__doc__, file=sys.stderr)
    lines = interactive.typed_lines() if is_typed else sys.stdin
    first = interactive.next_index(Path(config.sample.output_dir).expanduser())
    interactive.prompt_loop(lines, config, make, say=print, first_index=first)


def decode_latents(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """``--from-latents``: the VAE alone is loaded."""
    overrides += output_overrides(arguments)
    for path in arguments.from_latents:
        check_writable(arguments.output_dir or Path(path).parent)
    from cogvideox import dist
    from cogvideox.engine.logging import get_logger
    from cogvideox.sampling.from_latents import decode_files

    dist.init()
    get_logger()
    share = arguments.from_latents[dist.rank() :: dist.world_size()]
    print_files(decode_files(share, overrides, dist.device(), is_shown=dist.is_main()))
    return 0


def print_files(targets: list[Target]) -> None:
    for target in targets:
        for path in target.files:
            print(path)


def print_overviews(config: Config) -> None:
    """What is made of a whole folder: its contact sheet and its page."""
    folder = Path(config.sample.output_dir).expanduser()
    if "sheet" in config.sample.outputs:
        from cogvideox.sampling.outputs import join_contact_sheets

        print(join_contact_sheets(folder))
    if config.sample.gallery:
        print(write_gallery(folder))


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What comes out, and where."""
    add = parser.add_argument
    add("--output-dir", metavar="DIR", help="overrides sample.output_dir")
    add("--output", nargs="+", metavar="KIND", help=f"of {', '.join(OUTPUTS)}; overrides sample.outputs")
    add("--overwrite", action="store_true", help="make videos again that are there")
    add("--preview-every", metavar="N", help="a picture of the unfinished video every N steps")
    add("--from-latents", nargs="+", metavar="FILE", help="decode what --output latents wrote")
    add("--gallery", metavar="DIR", help="write DIR/index.html over the videos in it, and nothing else")
    add("--interactive", action="store_true", help="keep the models loaded, read prompts with flags (--s 30)")


def output_overrides(arguments: argparse.Namespace) -> list[str]:
    """The configuration's keys behind the flags of outputs."""
    flags = {"sample.output_dir": arguments.output_dir, "sample.preview_every": arguments.preview_every}
    if arguments.output:
        flags["sample.outputs"] = json.dumps(arguments.output)  # JSON is YAML
    return [f"{key}={value}" for key, value in flags.items() if value is not None]


def read_arguments(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, files: list[str], overrides: list[str]
) -> tuple[Config, list[Request], bool]:
    """(the merged config, the videos to make, whether this is a dry run), from the command line or from a sidecar."""
    overrides = overrides + output_overrides(arguments)
    flags = {
        "seed": arguments.seed,
        "sample.num_frames": arguments.frames,
        "sample.total_frames": arguments.total_frames,
        "sample.strength": arguments.strength,
        "sample.keep_frames": arguments.keep_frames and json.dumps(arguments.keep_frames),
        "sample.invert": "true" if arguments.invert else None,
        "sample.negative_prompt": arguments.negative_prompt and json.dumps(arguments.negative_prompt),
    }
    if arguments.size:
        match = re.fullmatch(r"(\d+)x(\d+)", arguments.size)
        if not match:
            raise ConfigError(f"--size {arguments.size}: expected HEIGHTxWIDTH, such as 480x720")
        flags |= {"sample.height": match[1], "sample.width": match[2]}
    if arguments.lora:
        loras = map(path_and_strength, arguments.lora)
        flags["load.lora"] = json.dumps([{"path": p, "strength": s} for p, s in loras])  # JSON is YAML
    overrides += [f"{key}={value}" for key, value in flags.items() if value is not None]
    if arguments.sidecar:
        sidecar = read_sidecar(arguments.sidecar)
        return config_from_dict(sidecar["config"], overrides), [request_of(sidecar, arguments.seed)], False
    if not files:
        parser.error("--base is missing: name the YAML files, such as --base configs/cogvideox_2b.yaml")
    config = load_config(files, overrides)
    if config.sample is None:
        raise ConfigError("the section sample is missing: add an overlay such as configs/sample.yaml")
    if arguments.interactive and environment.world_size() > 1:
        raise ConfigError("--interactive runs on one rank: start it without torchrun")
    if arguments.dry_run or arguments.interactive:
        return config, [], arguments.dry_run
    prompt_file = arguments.prompt_file or (None if arguments.prompt else config.sample.prompt_file)
    prompts = read_prompts(arguments.prompt, prompt_file)
    interactive.refuse_flags(prompts)
    requests = make_requests(
        prompts,
        config.seed,
        arguments.image,
        samples=arguments.samples,
        last_image=arguments.last_image,
        video=arguments.video,
        continue_from=arguments.continue_from,
        source_prompt=arguments.source_prompt,
    )
    for request in requests:
        check_inputs(config, request)
    return config, requests, False


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """What a video is made from."""
    add = parser.add_argument
    add("--prompt", nargs="+", metavar="TEXT", help="one video per text")
    add(
        "--prompt-file",
        metavar="FILE",
        help="one prompt per line; -: standard input; default: sample.prompt_file",
    )
    add("--negative-prompt", metavar="TEXT", help="overrides sample.negative_prompt")
    add("--samples", type=int, default=1, metavar="N", help="videos per prompt, each with the next seed")
    add("--image", metavar="FILE", help="first frame (image-to-video); a line `prompt@@file` has its own")
    add(
        "--last-image",
        metavar="FILE",
        help="last frame, kept by force: works with any model, trained in none",
    )
    add("--video", metavar="FILE", help="video to video: start from this one, see --strength")
    add(
        "--strength",
        type=float,
        metavar="S",
        help="part of the steps that is run, 0 to 1 (0.8): the video's share shrinks",
    )
    add("--keep-frames", metavar="A-B,C-D", help="frames of --video that stay; the others are made to fit")
    add("--invert", action="store_true", help="start from the noise of --video (DDIM inversion): edit it")
    add(
        "--source-prompt",
        metavar="TEXT",
        help="with --invert: what --video shows; without it the video is reconstructed",
    )
    add(
        "--continue-from",
        metavar="FILE",
        help="go on from the end of this video or of latents (.safetensors)",
    )


if __name__ == "__main__":
    leave(run_door(main))
