"""The main job end to end on a CPU: draw clips, train VAE, transformer and LoRA, sample, score, show.

python -m scripts.demo                # outputs/demo/report.html; running it again continues where it stopped
python -m scripts.demo --long         # longer clips, more steps
python -m scripts.demo --quick        # a few steps of everything: does it run at all?

Training and sampling are ``train_video.py`` and ``sample_video.py`` under torchrun; the report lists the commands.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.demo.plan import SCALES, Demo, available_cores, choose_ranks
from scripts.demo.results import write_results
from scripts.demo.stage import StageError, run_stage, say
from scripts.demo.vae import read_measurement

ROOT = Path(__file__).resolve().parents[2]


def run_demo(demo: Demo) -> Path:
    """Run what is left to do and write the results. Returns the report's path."""
    demo.write_prompt_files()
    clips = demo.clips_stage()
    vae = demo.vae_stage(clips)
    reconstruction = demo.reconstruction_stage(vae)
    records = {stage.name: run_stage(stage, demo.output) for stage in (clips, vae, reconstruction)}
    for stage in demo.generation_stages(reconstruction, read_measurement(demo)["scale_factor"]):
        records[stage.name] = run_stage(stage, demo.output)
    return write_results(demo, records)


def prepare_output(output: Path, fresh: bool) -> None:
    """Refuse a folder with other things in it: stages that start afresh remove their folders."""
    if output.is_dir() and any(output.iterdir()):
        if not (output / "stages").is_dir():
            raise ValueError(
                f"--output {output} holds files that no demo wrote; name an empty or a new folder"
            )
        if fresh:
            shutil.rmtree(output)
    (output / "stages").mkdir(parents=True, exist_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--long", dest="scale", action="store_const", const="long", help="17 frames, 3 times the steps"
    )
    size.add_argument(
        "--quick", dest="scale", action="store_const", const="quick", help="a few steps of everything"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: outputs/demo, outputs/demo-long, ..."
    )
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier demo left in the folder")
    arguments = parser.parse_args(argv)
    scale = arguments.scale or "normal"
    default = ROOT / "outputs" / ("demo" if scale == "normal" else f"demo-{scale}")
    output = (arguments.output or default).absolute()
    # Commands name paths as seen from the repository's root, where they run and where a reader will run them.
    os.chdir(ROOT)
    if output.is_relative_to(ROOT):
        output = output.relative_to(ROOT)
    # As Ctrl-C: the running stage is stopped in good order (SIGHUP: the terminal was closed).
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        prepare_output(output, arguments.fresh)
        demo = Demo(output, SCALES[scale], choose_ranks(available_cores()))
        say(f"demo ({scale}) in {demo.output}: {demo.ranks} ranks on {available_cores()} cores")
        report = run_demo(demo)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (StageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"done: open {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
