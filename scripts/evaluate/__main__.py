"""How good is a checkpoint, in numbers: held-out loss, prompt scores, Frechet video distance.

python -m scripts.evaluate validation RUN [OTHER]            the numbers of training's validation, of one or of two
torchrun --nproc_per_node=8 -m scripts.evaluate validation --base configs/cogvideox_5b.yaml configs/sft.yaml \\
    load.transformer=... load.vae=... load.text_encoder=... data.path=... data.validation_path=...
python -m scripts.evaluate prompts RUN                       the demo's scores: does a video show what its prompt says?
python -m scripts.evaluate prompts --videos outputs/samples  the same of videos that are there
python -m scripts.evaluate fvd REAL SAMPLED --network i3d_torchscript.pt

docs/evaluation.md says what the numbers mean. Exit code 1: the second of two checkpoints is worse by more than two
standard errors; 2: a mistake in what was asked for; else 0.
"""

from __future__ import annotations

import argparse
from typing import Any

from cogvideox.command_line import leave, run_door
from scripts.evaluate import fvd, prompts, validation

MEASURES = {"validation": validation, "prompts": prompts, "fvd": fvd}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("measure", choices=MEASURES, help="what to measure; MEASURE --help says more")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="what it takes")
    arguments = parser.parse_args(argv)
    measure: Any = MEASURES[arguments.measure]
    return measure.main(arguments.rest)


if __name__ == "__main__":
    leave(run_door(main))
