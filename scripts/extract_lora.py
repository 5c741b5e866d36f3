"""A LoRA from the difference of two checkpoints: ``python -m scripts.extract_lora BASE TUNED OUT --rank 64``.

The update of each layer is the best of its rank (truncated singular value decomposition); what it misses is printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cogvideox.command_line import run_door
from cogvideox.weights.lora.formats import BY_OPTION


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.extract_lora", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "base", metavar="BASE", help="the model before: any format that load.transformer reads"
    )
    parser.add_argument("tuned", metavar="TUNED", help="the model after, of the same variant; any format")
    parser.add_argument("output", metavar="OUT", type=Path, help="the LoRA to write")
    parser.add_argument("--rank", type=int, required=True, help="of every layer's update")
    parser.add_argument("--to", choices=tuple(BY_OPTION), default="diffusers")
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        help="layers of a block, under SAT's or diffusers' names (default: attention and MLP); all: every linear layer",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the LoRA")
    parser.add_argument("--no-ema", action="store_true", help="a run's last weights, not its averaged ones")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> None:
    if arguments.rank < 1:
        raise ValueError(f"--rank {arguments.rank}: expected at least 1")
    if arguments.output.exists() and not arguments.force:
        raise ValueError(f"{arguments.output} exists: choose another name, or --force to overwrite it")
    from cogvideox.convert.extract import extract_lora, modules_of, open_pair

    modules = None if arguments.layers == ["all"] else list(modules_of(arguments.layers))
    base, tuned = open_pair(arguments.base, arguments.tuned, ema=not arguments.no_ema)
    if base.info.dtype != tuned.info.dtype:
        print(
            f"note: BASE is {base.info.dtype}, TUNED {tuned.info.dtype}: rounding is part of their difference"
        )

    import torch
    from tqdm import tqdm

    from cogvideox.convert.lora import write_lora
    from cogvideox.convert.writer import PRECISIONS
    from cogvideox.weights import provenance

    with torch.no_grad():
        found = extract_lora(
            base,
            tuned,
            arguments.rank,
            modules,
            progress=lambda blocks: tqdm(blocks, unit="layer", dynamic_ncols=True),
        )
    sources = {
        name: sorted({h.file for h in r.tensors.values()}) for name, r in (("base", base), ("tuned", tuned))
    }
    metadata = provenance.stamp(
        sources["tuned"],
        base=str(base.path),
        base_sha256=provenance.sha256(sources["base"]),
        extracted={"rank": arguments.rank, "relative_error": round(found.error(), 6)},
        lora={"alpha_mode": "fold", "scale": 1.0},  # what read_lora looks for under SAT names
        **provenance.inherited(tuned.info.provenance),
    )
    dtype = PRECISIONS[arguments.dtype]
    written = write_lora(
        found.lora,
        arguments.output,
        BY_OPTION[arguments.to],
        dtype=dtype,
        metadata=metadata,
        force=arguments.force,
    )
    print(f"{'layer':<24} relative error at rank {arguments.rank}")
    for kind in found.squares:
        print(f"{kind:<24} {found.error(kind):.4f}")
    print(f"{'all':<24} {found.error():.4f}")
    if found.left_out:
        print(f"differ and are not in the LoRA: {len(found.left_out)} tensors (first {found.left_out[0]})")
    print(f"{written}: {len(found.lora)} layers, {arguments.to}, strength 1 is the whole difference")


if __name__ == "__main__":
    sys.exit(run_door(main))
