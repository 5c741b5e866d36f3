"""Weights from any format to any other: ``python -m scripts.convert_weights IN OUT --to {sat,diffusers,...}``.

A transformer, a VAE, a whole pipeline folder or a LoRA; from SAT, a run of this project, diffusers or safetensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from cogvideox.command_line import path_and_strength, run_door
from cogvideox.weights.lora.formats import BY_OPTION

TARGETS = ("sat", "diffusers", "safetensors", "kohya", "comfyui")
_LORA_FORMATS = BY_OPTION | {"safetensors": "SAT"}
VERIFY_LIMIT = 200_000_000
"""Parameters of the transformer below which a conversion is verified without being asked."""


def main(argv: list[str]) -> int:
    """0; 1 where what was written does not compute what was read; 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted: what had been written of the output was removed", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert_weights", description=__doc__.partition(":")[0]
    )
    parser.add_argument("source", metavar="IN", help="a file or folder, of any format, or hf://ORG/NAME")
    parser.add_argument("output", metavar="OUT", type=Path, help="a folder; also FILE.safetensors or FILE.pt")
    parser.add_argument("--to", choices=TARGETS, required=True, help="safetensors: under SAT's names")
    group = parser.add_argument_group("what to take")
    group.add_argument("--component", choices=("transformer", "vae", "lora"), help="one part of IN")
    group.add_argument("--vae", metavar="PATH", help="make a pipeline folder with this VAE")
    group.add_argument("--text-encoder", metavar="PATH", help="and with this folder of T5 and its tokenizer")
    group.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a run's averaged weights, where it has them, or its last ones",
    )
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--lora", nargs="+", default=[], metavar="PATH[:STRENGTH]", help="merge into the weights"
    )
    group.add_argument("--merge", action="store_true", help="merge the LoRA that IN is or holds")
    group.add_argument(
        "--base", metavar="PATH", help="the model that the LoRA IN is merged into (default: its run's)"
    )
    group.add_argument(
        "--alpha",
        choices=("fold", "metadata", "external"),
        default="fold",
        help="how a LoRA file tells its scale",
    )
    group.add_argument(
        "--lora-alpha", type=float, metavar="N", help="the alpha of the LoRA, where no file tells it"
    )
    group = parser.add_argument_group("what to write")
    group.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: as stored")
    group.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (5GB, 500MB)")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="what no tensor tells: a YAML file of a run, or diffusers' config.json",
    )
    group.add_argument("--scaling-factor", type=float, metavar="X", help="the VAE's latent scale")
    link = group.add_mutually_exclusive_group()
    link.add_argument("--link", action="store_true", default=None, help="link the text encoder's files")
    link.add_argument("--copy", dest="link", action="store_false", help="copy them (default up to 1 GiB)")
    group.add_argument("--force", action="store_true", help="replace OUT")
    group = parser.add_argument_group("checks")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    group.add_argument("--check", action="store_true", help="read all of IN first; refuse NaN and infinity")
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare one forward pass of IN and OUT (default: for transformers under 200 M parameters, and LoRA)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    from cogvideox.weights.files import hub
    from cogvideox.weights.files.locate import is_pipeline
    from cogvideox.weights.identify import identify

    wanted = arguments.component if arguments.component in ("transformer", "vae") else None
    source = hub.resolve(arguments.source, wanted)
    if arguments.component == "lora" or arguments.to in ("kohya", "comfyui"):
        return write_lora_file(arguments, source)
    if arguments.vae or arguments.text_encoder or (is_pipeline(source) and wanted is None):
        return write_pipeline_folder(arguments, source)
    info = identify(source, wanted)
    if info.family == "lora":
        if arguments.merge or arguments.base:
            return write_models(arguments, _base_of(arguments, source), "transformer", source)
        return write_lora_file(arguments, source)
    component = wanted or info.family
    if component not in ("transformer", "vae"):
        raise ValueError(
            f"{source} is {info.variant}: expected a transformer, a VAE or a LoRA. (A text encoder has the same files "
            f"for SAT and diffusers.)"
        )
    return write_models(arguments, source, component)


def write_lora_file(arguments: argparse.Namespace, source: Path) -> int:
    """Only the LoRA of ``source``, in one safetensors file."""
    from cogvideox.convert.lora import strength, write_lora
    from cogvideox.weights.lora.file import read_lora

    if arguments.lora or arguments.merge or arguments.base:
        raise ValueError("--lora, --merge and --base write merged weights; here the LoRA alone is written")
    lora = read_lora(source, alpha=arguments.lora_alpha, ema=arguments.ema)
    to = _LORA_FORMATS[arguments.to]
    written = write_lora(
        lora,
        arguments.output,
        to,
        alpha_mode=arguments.alpha,
        dtype=_dtype(arguments),
        force=arguments.force,
    )
    ranks = "/".join(map(str, lora.ranks))
    print(
        f"lora: {lora.format} LoRA (rank {ranks}, {lora.tensors} tensors, alpha {lora.alpha_source}) to {to}, "
        f"alpha by {arguments.alpha}: {written}"
    )
    needed = strength(lora.modules, to, arguments.alpha)
    print(f"  strength {needed:g} is the trained strength")
    return 0 if arguments.verify is False else _read_back(lora, written)


def _read_back(lora: Any, written: Path) -> int:
    """Compare the updates in the file with those that were to be written. 1 where rounding does not explain them."""
    import torch

    from cogvideox.convert.lora import largest_difference
    from cogvideox.weights.lora.file import read_lora

    found = read_lora(written)
    difference, largest = largest_difference(lora.modules, found.modules)
    dtype = next(iter(found.modules.values())).up.dtype
    print(f"read back: {len(found.modules)} updates, max |difference| {difference:.1e} of {largest:.1e}")
    if difference > 8 * torch.finfo(dtype).eps * largest:
        print(f"error: that is more than {dtype} rounds", file=sys.stderr)
        return 1
    return 0


def write_models(
    arguments: argparse.Namespace, source: Path, component: str, lora: Path | None = None
) -> int:
    """One model. lora: a LoRA that is merged into it besides those of ``--lora``."""
    _prepare(arguments, source)
    from cogvideox.convert.models import parse_size, write_model

    plan = _plan(arguments, source, component, lora)
    done = write_model(
        plan,
        arguments.output,
        max_shard_bytes=parse_size(arguments.max_shard_size),
        force=arguments.force,
    )
    print("\n".join(done.lines))
    return _verify(arguments, [(source, plan, done.output)])


def write_pipeline_folder(arguments: argparse.Namespace, source: Path) -> int:
    """Transformer, VAE, text encoder, and for diffusers the scheduler."""
    _prepare(arguments, source)
    from cogvideox.convert.models import parse_size
    from cogvideox.convert.pipeline import find_parts, write_pipeline
    from cogvideox.weights.files import hub

    given = {"vae": arguments.vae, "text_encoder": arguments.text_encoder}
    parts = find_parts(source, **{name: path and hub.resolve(path, name) for name, path in given.items()})
    transformer = _plan(arguments, parts.transformer, "transformer")
    plans = [transformer]
    if parts.vae is not None:
        plans.append(_plan(arguments, parts.vae, "vae", transformer=transformer))
    results, lines = write_pipeline(
        parts,
        transformer,
        plans[1] if parts.vae is not None else None,
        arguments.output,
        max_shard_bytes=parse_size(arguments.max_shard_size),
        link=arguments.link,
        force=arguments.force,
    )
    print("\n".join([line for result in results for line in result.lines] + lines))
    sides = [(plan.model.path, plan, result.output) for plan, result in zip(plans, results, strict=True)]
    return _verify(arguments, sides)


def _prepare(arguments: argparse.Namespace, source: Path) -> None:
    """Refuse an existing output at once, before torch and the libraries of the network are imported."""
    from cogvideox.convert.staging import refuse_existing

    refuse_existing(arguments.output, [source], arguments.force)
    import torch

    from cogvideox.environment import quieten_libraries

    quieten_libraries(has_gpu=torch.cuda.is_available())


def _plan(
    arguments: argparse.Namespace, source: Path, component: str, lora: Path | None = None, **known: Any
) -> Any:
    from cogvideox.convert.models import plan_model
    from cogvideox.weights.lora.file import read_lora

    if arguments.check:
        _refuse_bad_values(source, component)
    options: dict[str, Any] = {"known": _stated(arguments, component), "ema": arguments.ema, **known}
    if component == "transformer":
        sources = [(lora, 1.0)] if lora is not None else []
        sources += [_with_strength(text) for text in arguments.lora]
        options["loras"] = [
            (read_lora(path, alpha=arguments.lora_alpha, ema=arguments.ema), strength)
            for path, strength in sources
        ]
        options |= {"merge": arguments.merge and lora is None, "alpha": arguments.lora_alpha}
    return plan_model(source, arguments.to, component=component, dtype=_dtype(arguments), **options)


def _with_strength(text: str) -> tuple[Path, float]:
    from cogvideox.weights.files import hub

    path, strength = path_and_strength(text)
    return hub.resolve(path, "transformer"), strength


def _stated(arguments: argparse.Namespace, component: str) -> dict[str, Any]:
    """What ``--config`` and ``--scaling-factor`` say, as keys of diffusers' config.json."""
    known: dict[str, Any] = {}
    if arguments.config and arguments.config.endswith(".json"):
        config = json.loads(Path(arguments.config).read_text())
        is_vae = "latent_channels" in config
        known = config if is_vae == (component == "vae") else {}
    elif arguments.config:
        import dataclasses

        from cogvideox.config import load_config
        from cogvideox.convert.diffusers_config import from_our_config

        tree = dataclasses.asdict(load_config([arguments.config]))
        known = from_our_config(tree)[component == "vae"]
    if component == "vae" and arguments.scaling_factor is not None:
        known = {**known, "scaling_factor": arguments.scaling_factor}
    return known


def _base_of(arguments: argparse.Namespace, run: Path) -> Path:
    """The model that a LoRA run started from: ``--base``, or ``load.transformer`` in the run's configuration."""
    from cogvideox.weights.files import hub
    from cogvideox.weights.files.locate import locate

    base = arguments.base
    if base is None:
        import yaml

        folder = locate(run).folder
        files = [place / "config.yaml" for place in (folder, folder.parent, folder.parent.parent)]
        trees = [yaml.safe_load(file.read_text()) for file in files if file.is_file()]
        base = next(
            (t["load"]["transformer"] for t in trees if (t.get("load") or {}).get("transformer")), None
        )
    if base is None:
        raise ValueError(
            f"{run} is a LoRA, and no config.yaml beside it says what it was trained on (load.transformer): name it "
            f"with --base PATH"
        )
    return hub.resolve(base, "transformer")


def _refuse_bad_values(source: Path, component: str) -> None:
    from cogvideox.weights.check import check_values

    if lines := check_values(source, component):
        shown = "\n  ".join(lines[:8]) + (f"\n  {len(lines) - 8} more" if len(lines) > 8 else "")
        raise ValueError(
            f"{source}: {len(lines)} tensors hold NaN or infinity; nothing was written\n  {shown}"
        )


def _verify(arguments: argparse.Namespace, sides: list[tuple[Path, Any, Path]]) -> int:
    """One forward pass through each model before and after. 1 where they differ."""
    if arguments.verify is False:
        return 0
    if arguments.verify is None:
        if sides[0][1].num_parameters >= VERIFY_LIMIT:
            return 0
        if importlib.util.find_spec("diffusers") is None and any(
            plan.to == "diffusers" for _, plan, _ in sides
        ):
            print("not verified: diffusers is not installed")
            return 0
    from cogvideox.convert.verify import first_failure, format_stages, verify

    failed = False
    for source, plan, output in sides:
        component = plan.model.family
        stages = verify(
            source,
            output,
            component,
            ema=arguments.ema,
            masters=plan.model.masters,
            loras=plan.loras,
        )
        failed |= first_failure(stages) is not None
        print(f"verified {component}: {format_stages(stages)}")
    if failed:
        print("error: IN and OUT do not compute the same", file=sys.stderr)
    return int(failed)


def _dtype(arguments: argparse.Namespace) -> Any:
    from cogvideox.convert.writer import PRECISIONS

    return PRECISIONS.get(arguments.dtype)  # None: as stored


if __name__ == "__main__":
    sys.exit(run_door(main))
