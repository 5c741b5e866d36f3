"""Frechet video distance of two folders of videos, with a feature network from a TorchScript file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox import environment
from cogvideox.config import ConfigError
from scripts.evaluate.validation import write

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.evaluation.video_features import FeatureNetwork, NetworkInput


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if environment.world_size() > 1:
        raise ConfigError("evaluate fvd runs on one rank: start it without torchrun")
    # torch is imported only now
    from cogvideox import dist
    from cogvideox.evaluation.frechet import Gaussian, bias_of_unit_gaussians, frechet_distance
    from cogvideox.evaluation.video_features import FeatureNetwork, videos_in

    takes = network_input(arguments)
    network = FeatureNetwork(arguments.network, takes, dist.device())
    folders = {"real": arguments.real, "sampled": arguments.sampled}
    videos = {name: videos_in(folder)[: arguments.most] for name, folder in folders.items()}
    for name, paths in videos.items():
        print(f"{name}: {len(paths)} videos of {folders[name]}")
    report_frame_rates(videos, takes)
    features = extract(network, videos, arguments.cache)
    real, sampled = (Gaussian.of(features[name]) for name in ("real", "sampled"))
    distance = frechet_distance(real, sampled)
    print(f"Frechet video distance {distance:.6g}")
    width, floor = len(real.mean), None
    if len(features["real"]) >= 4:
        # Odd and even ones: what two sets of nothing but real videos are apart.
        halves = [Gaussian.of(features["real"][start::2]) for start in (0, 1)]
        floor = frechet_distance(*halves)
        print(
            f"two halves of the real videos are {floor:.6g} apart; of {halves[0].count} and {halves[1].count} videos, "
            f"that is more by bias than two whole sets would be"
        )
    for name, gaussian in (("real", real), ("sampled", sampled)):
        if gaussian.count < width + 1:
            print(
                f"{gaussian.count} {name} videos for {width} features: fewer than {width + 1} leave the covariance "
                f"singular, and the distance mostly bias; compare only with distances of as many videos"
            )
    if arguments.json is not None:
        write(
            arguments.json,
            {
                "distance": distance,
                "half_of_real_to_other_half": floor,
                "features": width,
                "videos": {name: [str(path) for path in paths] for name, paths in videos.items()},
                "network": str(arguments.network),
                "input": str(takes),
                "bias_of_unit_gaussians": bias_of_unit_gaussians(width, real.count, sampled.count),
            },
        )
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m scripts.evaluate fvd",
        description=__doc__,
        epilog="The defaults feed StyleGAN-V's i3d_torchscript.pt with --arguments "
        '\'{"rescale": false, "resize": false, "return_features": true}\'.',
    )
    add = result.add_argument
    add("real", type=Path, metavar="REAL", help="a folder of videos")
    add("sampled", type=Path, metavar="SAMPLED", help="another")
    add(
        "--network",
        type=Path,
        required=True,
        metavar="FILE",
        help="TorchScript: one video in, one vector out",
    )
    add("--frames", metavar="N", default="16", help="the first N frames of each video, or all (16)")
    add("--fps", type=float, metavar="X", help="take frames at this rate; default: every frame of the file")
    add(
        "--size",
        metavar="N",
        default="224",
        help="frames are resized to N x N, or keep their size: own (224)",
    )
    add(
        "--range",
        nargs=2,
        type=float,
        default=[-1.0, 1.0],
        metavar=("BLACK", "WHITE"),
        help="values of black and white (-1 1); 0 255 and 0 1 are others in use",
    )
    add(
        "--layout",
        default="NCTHW",
        help="order of batch, channels, time, height, width: also NTCHW, NTHWC (NCTHW)",
    )
    add("--arguments", default="{}", metavar="JSON", help="keyword arguments of the network")
    add("--most", type=int, metavar="N", help="of each folder at most N videos, the first by name")
    add("--cache", type=Path, metavar="DIR", help="keep features here, by the contents of the files")
    add("--json", type=Path, metavar="FILE", help="write the numbers and what they are of here")
    add("--traceback", action="store_true", help="show where an error was raised")
    return result


def network_input(arguments: argparse.Namespace) -> NetworkInput:
    """ValueError that names the option."""
    from cogvideox.evaluation.video_features import NetworkInput

    def number(name: str, word: str) -> int | None:
        text = getattr(arguments, name)
        if text != word and not text.isdigit():
            raise ValueError(f"--{name} {text}: expected a number, or {word}")
        return None if text == word else int(text)

    if arguments.most is not None and arguments.most < 2:
        raise ValueError(f"--most {arguments.most}: expected at least 2")
    try:
        keywords = json.loads(arguments.arguments)
    except ValueError as error:
        raise ValueError(f"--arguments {arguments.arguments}: not JSON ({error})") from error
    if not isinstance(keywords, dict):
        raise ValueError(f'--arguments {arguments.arguments}: expected {{"name": value}}')
    low, high = arguments.range
    return NetworkInput(
        number("frames", "all"), arguments.fps, number("size", "own"), low, high, arguments.layout, keywords
    )


def report_frame_rates(videos: dict[str, list[Path]], takes: NetworkInput) -> None:
    """Say where the folders differ in speed and nothing evens it out: their motion is then not comparable."""
    from cogvideox.evaluation.video_features import frame_rates

    if takes.fps is not None:
        return
    rates = {name: sorted({round(rate, 2) for rate in frame_rates(paths)}) for name, paths in videos.items()}
    if rates["real"] != rates["sampled"]:
        listed = "; ".join(
            f"{name} {', '.join(f'{r:g}' for r in found[:4])}" for name, found in rates.items()
        )
        print(
            f"frames per second differ ({listed}), so steps in time do too: --fps X takes frames at one rate"
        )


def extract(
    network: FeatureNetwork, videos: dict[str, list[Path]], cache: Path | None
) -> dict[str, np.ndarray]:
    """Folder -> features (videos, D)."""
    from tqdm import tqdm

    from cogvideox.evaluation.video_features import features_of

    print(f"{network.path} is fed with {network.takes}, one video at a time")
    features: dict[str, np.ndarray] = {}
    with tqdm(total=sum(map(len, videos.values())), unit="video", disable=None) as bar:
        for name, paths in videos.items():
            features[name] = features_of(paths, network, cache=cache, advance=bar.update)
    return features
