"""What the doors share: ``--base``, ``--dry-run``, ``key=value``, and one clear line for a user's mistake."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from cogvideox import environment
from cogvideox.config_merge import ConfigError

USER_ERRORS = (ValueError, OSError, FloatingPointError)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML files, merged left to right; key=value overrides may follow",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the merged config and the plan, run nothing"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="with --dry-run: plan for this GPU, such as h200, with times"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides such as train.steps=10")


def parse(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(arguments, YAML files, overrides). Overrides may stand anywhere, with or without leading dashes."""
    arguments, unknown = parser.parse_known_args(argv)
    if getattr(arguments, "gpu", None) and not arguments.dry_run:
        parser.error("--gpu names the GPU of a plan: add --dry-run")
    overrides = list(arguments.overrides)
    for name in ("base", "prompt", "lora", "output", "from_latents"):
        # Options that take several values also swallow the overrides behind them.
        values = getattr(arguments, name, None) or []
        overrides += [value for value in values if _is_override(value)]
        setattr(arguments, name, [value for value in values if not _is_override(value)])
    dashed = [u.removeprefix("--") for u in unknown if _is_override(u.removeprefix("--"))]
    stray = [u for u in unknown if u.removeprefix("--") not in dashed]
    if stray:
        known = [o for action in parser._actions for o in action.option_strings]
        near = difflib.get_close_matches(stray[0].split("=")[0], known, n=1)
        parser.error(
            f"unknown argument {stray[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        )
    return arguments, arguments.base, overrides + dashed


def path_and_strength(text: str) -> tuple[str, float]:
    """``PATH`` or ``PATH:STRENGTH`` of a LoRA. A tail that is no number belongs to the path; without one it is 1."""
    path, _, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def _is_override(text: str) -> bool:
    """``key.path=value``, not a prompt that happens to hold an equals sign."""
    return re.match(r"[a-z]\w*(\.\w+)*=", text) is not None


def run_door(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a door's ``main``. A user's mistake ends in one line on stderr and exit code 2, not in a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return main(argv) or 0
    except USER_ERRORS as error:
        if "--traceback" in argv:
            raise
        # Every rank meets the same mistake in the configuration; one of them says so. The rest is that rank's own.
        if environment.rank() == 0 or not isinstance(error, ConfigError):
            print(f"error: {str(error) or repr(error)}", file=sys.stderr, flush=True)
        return 2
    finally:
        if "cogvideox.dist" in sys.modules:
            sys.modules["cogvideox.dist"].shutdown()


def leave(code: int) -> NoReturn:
    """End the process with ``code`` and without tearing the libraries down.

    Everything is written by now, and gloo's threads sometimes abort a rank at the interpreter's exit (SIGABRT,
    "terminate called without an active exception"): a finished run would be reported as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
