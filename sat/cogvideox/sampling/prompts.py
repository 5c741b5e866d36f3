"""Prompts from the command line, a file or standard input, and the image that an image-to-video prompt names."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One video to make. ``seed`` alone decides its noise, so that it can be made again alone."""

    index: int
    prompt: str
    seed: int
    image: Path | None = None


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


def make_requests(prompts: list[str], seed: int, image: str | None = None) -> list[Request]:
    """Number the prompts and give prompt i the seed ``seed + i``. ``prompt@@image.png`` names its own image."""
    requests = []
    for index, line in enumerate(prompts):
        prompt, separator, own_image = line.partition("@@")
        path = Path(own_image.strip()) if separator else (Path(image) if image else None)
        if path is not None and not path.is_file():
            raise ValueError(f"image not found for prompt {index} ({prompt.strip()!r}): {path}")
        if not prompt.strip():
            raise ValueError(f"prompt {index} is empty: {line!r}")
        requests.append(Request(index, prompt.strip(), seed + index, path))
    return requests
