"""Interactive sampling: the models stay loaded, and one line makes one video.

A line is a prompt with flags behind it, as in musubi-tuner:

    a cat rides a skateboard --s 30 --d 7 --w 720 --h 480 --f 49 --g 6 --n blurry, dark --i first.png

``--s`` steps, ``--d`` seed, ``--w`` ``--h`` size in pixels, ``--f`` frames, ``--g`` guidance scale, ``--n`` negative
prompt, ``--i`` first frame. What a line leaves out is as in the configuration; a flag holds for its own line only.
Prompt files know no flags (their lines share one configuration, so that they can share batches); such a file is piped
into the interactive mode instead: ``sample_video.py ... --interactive < lines.txt``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from cogvideox.config import Config, ConfigError, config_from_dict
from cogvideox.sampling.prompts import Request

KEYS = {
    "s": "sample.steps",
    "d": "seed",
    "w": "sample.width",
    "h": "sample.height",
    "f": "sample.num_frames",
    "g": "guidance.params.scale",
    "n": "sample.negative_prompt",
}
"""Flag -> key of the configuration. ``--i`` is an input of the request."""

_FLAG = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?=\s|=|$)")
_LEAVE = ("exit", "quit", ":q")


def parse_line(line: str, config: Config, index: int) -> tuple[Request, Config]:
    """The request of a line, as number ``index``, and the configuration that it is made with.

    Without ``--d`` the seed is ``config.seed + index``. ConfigError for an unknown flag, a value that does not fit, an
    image that is not there.
    """
    prompt, *parts = _FLAG.split(line)
    flags = {
        name: value.strip().removeprefix("=").strip()
        for name, value in zip(parts[::2], parts[1::2], strict=True)
    }
    unknown = [name for name in flags if name not in KEYS and name != "i"]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*KEYS, "i"], n=1)
        advice = f"; did you mean --{near[0]}?" if near else ""
        raise ConfigError(f"--{unknown[0]}: the flags of a line are --{' --'.join([*KEYS, 'i'])}{advice}")
    empty = [name for name, value in flags.items() if not value]
    if empty:
        raise ConfigError(f"--{empty[0]}: a value is missing behind it")
    image = flags.pop("i", None)
    prompt, separator, own_image = prompt.strip().partition("@@")
    image = image or (own_image.strip() if separator else None)
    if not prompt.strip():
        raise ConfigError(f"no prompt before the flags: {line.strip()!r}")
    if image and not Path(image).expanduser().is_file():
        raise ConfigError(f"--i {image}: there is no such file")
    if "seed" not in {KEYS[name] for name in flags}:
        flags["d"] = str(config.seed + index)
    # Through YAML, as on the command line; a negative prompt is a text, whatever it looks like.
    overrides = [f"{KEYS[n]}={json.dumps(value) if n == 'n' else value}" for n, value in flags.items()]
    own = config_from_dict(dataclasses.asdict(config), overrides)
    request = Request(index, prompt.strip(), own.seed, Path(image).expanduser() if image else None)
    return request, dataclasses.replace(own, seed=config.seed)


def refuse_flags(prompts: Iterable[str]) -> None:
    """ConfigError for a prompt with flags outside the interactive mode: the text encoder would read them."""
    for prompt in prompts:
        found = [name for name in _FLAG.findall(prompt) if name in KEYS or name == "i"]
        if found:
            raise ConfigError(
                f"prompt {prompt!r}: flags such as --{found[0]} belong to the interactive mode; such a file is piped "
                f"into it: sample_video.py ... --interactive < FILE"
            )


def prompt_loop(
    lines: Iterable[str],
    config: Config,
    make: Callable[[Request, Config], list[Path]],
    say: Callable[[str], None],
    first_index: int = 0,
) -> list[Path]:
    """Make a video for each line until there is none, or until ``exit``. Returns the paths.

    make: (request, its configuration) -> the files. What it or the line raises is said, and the next line is read;
    Ctrl-C while it works ends this video only.
    """
    written: list[Path] = []
    index = first_index
    for line in lines:
        if line.strip().lower() in _LEAVE:
            break
        if not line.strip():
            continue
        try:
            paths = make(*parse_line(line, config, index))
        except KeyboardInterrupt:
            say("interrupted: the next prompt, or exit")
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            say(f"error: {str(error) or repr(error)}")
        else:
            index += 1
            written += paths
            for path in paths:
                say(str(path))
    return written


def typed_lines(ask: Callable[[str], str] = input) -> Iterable[str]:
    """Lines from a person, until Ctrl-D or Ctrl-C at the empty prompt."""
    while True:
        try:
            yield ask("prompt> ")
        except (EOFError, KeyboardInterrupt):
            return


def next_index(folder: Path) -> int:
    """The first number above those of the videos in ``folder``."""
    numbers = [int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]-*.json")]
    return max(numbers, default=-1) + 1
