"""What videos are made from: prompts from the command line, a file or standard input; images and videos beside them.

Files are looked at here, before anything heavy is loaded: torch is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox.config import Config

FILES = ("image", "last_image", "video", "continue_from")


@dataclass(frozen=True)
class Request:
    """One video to make. ``seed`` alone decides its noise, so that it can be made again alone.

    image: the first frame (image-to-video).  last_image: the last frame, kept by force in any model.
    video: what video-to-video starts from, inversion inverts, or ``sample.keep_frames`` keeps frames of.
    continue_from: a video (or latents, .safetensors) whose end this one goes on from.
    source_prompt: inversion only: what ``video`` shows. None: ``prompt`` does, and the video is reconstructed.
    """

    index: int
    prompt: str
    seed: int
    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    continue_from: Path | None = None
    source_prompt: str | None = None

    @property
    def way(self) -> tuple[bool, ...]:
        """Which inputs it has. Requests of one batch agree in it."""
        return (*(getattr(self, name) is not None for name in FILES), self.source_prompt is not None)

    def files(self) -> dict[str, str | None]:
        """Absolute paths of its files, for a sidecar."""
        paths = {name: getattr(self, name) for name in FILES}
        return {name: None if path is None else str(path.resolve()) for name, path in paths.items()}

    @classmethod
    def from_sidecar(cls, sidecar: Mapping[str, Any], seed: int | None = None) -> Request:
        """The request of a sidecar's ``prompt``, ``seed``, ``source_prompt`` and files. Raises KeyError."""
        paths = {name: Path(sidecar[name]) for name in FILES if sidecar.get(name)}
        seed = sidecar["seed"] if seed is None else seed
        return cls(0, sidecar["prompt"], seed, **paths, source_prompt=sidecar.get("source_prompt"))


def read_prompts(prompts: list[str] | None, prompt_file: str | None) -> list[str]:
    """``--prompt TEXT...`` or one prompt per line of ``--prompt-file`` (``-`` or none given: standard input).

    Empty lines are skipped. Raises ValueError where nothing is left.
    """
    if prompts and prompt_file:
        raise ValueError("--prompt and --prompt-file were both given: use one of them")
    if prompts:
        lines, source = prompts, "--prompt"
        if not all(p.strip() for p in prompts):
            raise ValueError("--prompt: an empty prompt was given; describe the video")
    elif prompt_file and prompt_file != "-":
        path = Path(prompt_file)
        if not path.is_file():
            raise ValueError(f"--prompt-file (sample.prompt_file) {path}: there is no such file")
        lines, source = path.read_text(encoding="utf-8").splitlines(), str(path)
    else:
        if sys.stdin.isatty():
            print("one prompt per line, then Ctrl-D:", file=sys.stderr)
        lines, source = sys.stdin.read().splitlines(), "standard input"
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{source} holds no prompt: expected one per line")
    return lines


def make_requests(
    prompts: list[str],
    seed: int,
    image: str | None = None,
    *,
    samples: int = 1,
    last_image: str | None = None,
    video: str | None = None,
    continue_from: str | None = None,
    source_prompt: str | None = None,
) -> list[Request]:
    """Number the videos, ``samples`` of each prompt in turn, and give video i the seed ``seed + i``.

    ``prompt@@image.png`` names its own image. The other inputs are shared by all prompts.
    """
    if samples < 1:
        raise ValueError(f"--samples {samples}: expected at least 1 video per prompt")
    shared = {"last_image": last_image, "video": video, "continue_from": continue_from}
    shared = {name: Path(path) for name, path in shared.items() if path}
    requests = []
    for number, line in enumerate(prompts):
        prompt, separator, own_image = line.partition("@@")
        prompt, path = (
            prompt.strip(),
            Path(own_image.strip()) if separator else (Path(image) if image else None),
        )
        for name, file in {"image": path, **shared}.items():
            if file is not None and not file.is_file():
                raise ValueError(
                    f"{name.replace('_', ' ')} not found for prompt {number} ({prompt!r}): {file}"
                )
        if not prompt:
            raise ValueError(f"prompt {number} is empty: {line!r}")
        for _ in range(samples):
            index = len(requests)
            requests.append(Request(index, prompt, seed + index, path, **shared, source_prompt=source_prompt))
    return requests


def takes_image(config: Config) -> bool:
    """Whether the model has an image condition (image-to-video)."""
    return any("FirstFrame" in part.target for part in config.model.conditions)
