"""The demo's prompt scores for any checkpoint, or for videos that are there: the fraction of right colours, shapes and
directions, measured on the pixels. They need prompts such as "a red circle moving left"."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cogvideox import environment
from cogvideox.config import ConfigError, save_config, to_yaml
from cogvideox.sampling import sidecar
from scripts.evaluate.subject import Subject, add_subject_arguments, read_subjects
from scripts.evaluate.validation import write


def main(argv: list[str]) -> int:
    """0: what is a good score depends on the model; the demo's aims are those of its own."""
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate prompts", description=__doc__)
    add_subject_arguments(parser, most=1)
    add = parser.add_argument
    add("--videos", type=Path, metavar="DIR", help="judge these videos of sample_video.py, sample none")
    add(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one prompt per line; default: all 48 of the demo's base combinations",
    )
    add(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="keep the sampled videos here; what is finished there is not made again",
    )
    add("--seed", type=int, default=0, metavar="N", help="video i gets the seed N + i")
    add("--json", type=Path, metavar="FILE", help="write all numbers, video by video, here")
    if "--videos" in argv or any(text.startswith("--videos=") for text in argv):
        arguments = parser.parse_args(argv)
        if arguments.overrides or arguments.base or arguments.prompt_file:
            parser.error("--videos judges what is there: it takes no checkpoint, --base or --prompt-file")
        return report(arguments, pairs_in(arguments.videos)) if environment.rank() == 0 else 0
    arguments, [subject] = read_subjects(parser, argv, most=1)
    if subject.config.sample is None:
        raise ConfigError("the section sample is missing: add an overlay such as configs/sample.yaml")
    prompts = captions(arguments.prompt_file)
    if arguments.dry_run:
        print(f"# {subject.name}: {len(prompts)} videos\n{to_yaml(subject.config)}")
        return 0
    if arguments.output_dir is None and environment.world_size() > 1:
        raise ConfigError("--output-dir DIR is missing: several ranks sample into one folder")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output_dir or Path(scratch) / "videos"
        sample(subject, prompts, folder, arguments.seed, Path(scratch))
        return report(arguments, sampled_pairs(folder, prompts)) if environment.rank() == 0 else 0


def captions(prompt_file: Path | None) -> list[str]:
    """The prompts, each a caption of the demo's clips. ValueError for another one."""
    from cogvideox.data.moving_shapes import Combination, combinations
    from cogvideox.sampling.prompts import read_prompts

    if prompt_file is None:
        return [combination.caption for group in combinations() for combination in group]
    return [Combination.of_caption(line).caption for line in read_prompts(None, str(prompt_file))]


def sample(subject: Subject, prompts: Sequence[str], folder: Path, seed: int, scratch: Path) -> None:
    """Through ``sample_video.py`` itself: ranks, batches, and going on where it was cut off."""
    import sample_video

    config, listing = scratch / "config.yaml", scratch / "prompts.txt"
    save_config(subject.config, config)
    listing.write_text("".join(f"{prompt}\n" for prompt in prompts))
    where = ["--prompt-file", str(listing), "--output-dir", str(folder), "--seed", str(seed)]
    sample_video.main(["--base", str(config), *where])


def sampled_pairs(folder: Path, prompts: Sequence[str]) -> list[tuple[Path, str]]:
    """(video, prompt) of what ``sample`` has made."""
    from cogvideox.data.moving_shapes import Combination
    from scripts.demo.scores import sampled_videos

    videos = sampled_videos(folder, [Combination.of_caption(prompt) for prompt in prompts])
    return list(zip(videos, prompts, strict=True))


def pairs_in(folder: Path) -> list[tuple[Path, str]]:
    """(video, prompt) of a folder that ``sample_video.py`` wrote into, by its sidecars."""
    if not folder.is_dir():
        raise ValueError(f"--videos {folder}: there is no such folder")
    pairs, without = [], []
    for path in sorted(folder.glob("*.json")):
        record = sidecar.read_if_any(path)
        if record is None:
            continue
        video = folder / record.get("files", {}).get("mp4", f"{path.stem}.mp4")
        (pairs if video.is_file() else without).append((video, record["prompt"]))
    if not pairs:
        raise ValueError(
            f"--videos {folder} holds no mp4 with a sidecar json, as sample_video.py writes them"
        )
    if without:
        print(f"{len(without)} sidecars without their mp4 are left out, first {without[0][0].name}")
    return pairs


def report(arguments: argparse.Namespace, pairs: Sequence[tuple[Path, str]]) -> int:
    """Judge, print a row for seen, held-out and other combinations, write what was asked for."""
    from cogvideox.data.moving_shapes import Combination, combinations
    from scripts.demo.scores import ATTRIBUTES, judge, score

    wanted = [Combination.of_caption(prompt) for _, prompt in pairs]
    verdicts = [judge(video, combination) for (video, _), combination in zip(pairs, wanted, strict=True)]
    seen, held_out = combinations()
    groups = {
        "seen combinations": [v for v in verdicts if v.wanted in seen],
        "held-out combinations": [v for v in verdicts if v.wanted in held_out],
        "others": [v for v in verdicts if v.wanted not in seen and v.wanted not in held_out],
        "all": verdicts,
    }
    scores = {name: score(group) for name, group in groups.items() if group}
    columns = [*ATTRIBUTES, "all"]
    print(f"{'':24}{'videos':>8}" + "".join(f"{column:>11}" for column in columns))
    for name, row in scores.items():
        print(f"{name:24}{row['n']:>8}" + "".join(f"{row[column]:>11.2f}" for column in columns))
    if arguments.json is not None:
        videos = [{"video": str(v.video), "wanted": v.wanted, "found": v.found} for v in verdicts]
        write(arguments.json, {"scores": scores, "videos": videos})
    return 0
