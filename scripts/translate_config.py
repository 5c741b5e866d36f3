"""Write YAML files of CogVideo's sat/ folder as one file of this project:

python -m scripts.translate_config cogvideox_5b_lora.yaml sft.yaml -o configs/mine.yaml data.path=data/mine

Keys that have no effect here, or another one, are listed on stderr with the reason. Files of this project may be among
the others; key=value overrides come last.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import yaml

from cogvideox.command_line import run_door
from cogvideox.config import Config, ConfigError, load_config
from cogvideox.config_text import concise_yaml
from cogvideox.upstream_yaml import is_upstream


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.translate_config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="YAML files, merged left to right; key=value"
    )
    parser.add_argument("-o", "--output", metavar="OUT.yaml", type=Path, help="default: standard output")
    parser.add_argument("--force", action="store_true", help="overwrite OUT.yaml")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    files = [Path(name) for name in arguments.files if "=" not in name]
    overrides = [text for text in arguments.files if "=" in text]
    output = arguments.output
    if output is not None and output.exists() and not arguments.force:
        raise ConfigError(f"{output} exists: choose another name, or overwrite it with --force")
    if not files:
        parser.error("there is no file among the arguments")
    config = load_config(files, overrides)
    sources = [path for path in files if is_upstream(yaml.safe_load(path.read_text()) or {})]
    if not sources:
        names = ", ".join(map(str, files))
        raise ConfigError(f"{names}: not for CogVideo's sat/ folder; this project reads it as it is")
    text = f"# From {', '.join(path.name for path in files)} of CogVideo's sat/ folder.\n\n{concise_yaml(config)}"
    if output is None:
        print(text, end="")
    else:
        write(text, output, config)
    return 0


def write(text: str, output: Path, config: Config) -> None:
    """Write ``text``, once it is known to be read back as ``config``."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp")
    temporary.write_text(text)
    try:
        assert load_config([temporary]) == config, f"{temporary} is read as another configuration"
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run_door(main))
