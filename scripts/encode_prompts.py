"""Encoded prompts for sampling without a text encoder: ``python -m scripts.encode_prompts --base ... --output OUT``.

The same configuration then samples with ``sample.text_features=OUT``. Beside the prompts, the negative prompt of the
section ``sample`` and the empty one are encoded. ``sample.text_features`` may also name a folder of such files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cogvideox.command_line import add_config_arguments, parse, run_door
from cogvideox.config import load_config
from cogvideox.sampling.complete import complete_or_absent
from cogvideox.sampling.prompts import read_prompts


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.encode_prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    parser.add_argument("--prompt-file", metavar="FILE", help="one prompt per line; -: standard input")
    # Not under its own name: there `parse` expects a list.
    parser.add_argument("--output", dest="file", metavar="OUT", type=Path, required=True, help=".safetensors")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="overwrite OUT")
    existing.add_argument("--add", action="store_true", help="keep what OUT holds and add to it")
    run(*parse(parser, argv))


def run(arguments: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    path = arguments.file.expanduser()
    if not files:
        raise ValueError("--base is missing: name the YAML files, such as --base configs/cogvideox_2b.yaml")
    if path.suffix != ".safetensors":
        raise ValueError(f"--output {path}: expected a name that ends in .safetensors")
    if path.exists() and not (arguments.force or arguments.add):
        raise ValueError(
            f"{path} exists: choose another name, --add to add to it, or --force to overwrite it"
        )
    config = load_config(files, overrides)
    section = config.sample
    if section is None:
        raise ValueError("the section sample is missing: add an overlay such as configs/sample.yaml")
    prompt_file = arguments.prompt_file or (None if arguments.prompt else section.prompt_file)
    lines = read_prompts(arguments.prompt, prompt_file)
    # A line may name its image behind the prompt.
    prompts = [line.partition("@@")[0].strip() for line in lines]
    prompts = list(dict.fromkeys([*prompts, section.negative_prompt or "", ""]))
    if arguments.dry_run:
        print("\n".join(map(repr, prompts)))
        return
    import torch
    from tqdm import tqdm

    from cogvideox import dist
    from cogvideox.conditioning.features import TextFeatures, write_features
    from cogvideox.system_text import text_encoder_alone
    from cogvideox.weights import provenance

    text, sources, encoder = text_encoder_alone(config)
    text.tokenize(prompts, allow_empty=True)  # one that is too long is refused before any is encoded
    features: dict[str, torch.Tensor] = {}
    if arguments.add and path.exists():
        there = TextFeatures(path, text.max_length, text.hidden_size)
        if there.encoder != encoder:
            raise ValueError(f"{path} was made with another text encoder: choose another name, or --force")
        features = {prompt: there.encode([prompt])[0] for prompt in there.prompts}
    device = section.text_encoder_device or dist.device()
    text.stay_on(torch.device(device))
    missing = [prompt for prompt in prompts if prompt not in features]
    with torch.no_grad():
        for prompt in tqdm(missing, unit="prompt", dynamic_ncols=True):
            features[prompt] = text.encode([prompt], allow_empty=True)[0].cpu()
    with complete_or_absent(path) as partial:
        write_features(partial, features, encoder, provenance.stamp(sources))
    print(f"{path}: {len(features)} prompts, {len(missing)} of them new")


if __name__ == "__main__":
    sys.exit(run_door(main))
