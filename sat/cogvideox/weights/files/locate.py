"""From the path that a user gives to the files that hold the weights.

Known layouts: SAT (`latest` + `N/mp_rank_00_model_states.pt`, `vae/3d-vae.pt`), run folders of this project
(`RUN/checkpoints/` in DeepSpeed's layout, of any ZeRO stage, EMA beside it), diffusers (a pipeline or one of its
components), transformers, and plain files: safetensors or torch, single or in shards with an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogvideox.weights.files.headers import is_file_name, shards_of
from cogvideox.weights.files.hub import resolve
from cogvideox.weights.files.zero import is_partitioned, rank_files
from cogvideox.weights.variants import download_advice

STATES = "mp_rank_00_model_states.pt"
COMPONENTS = ("transformer", "vae", "text_encoder")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# The usual names first: a folder may also hold `*.fp16.safetensors` or a training state.
_USUAL_NAMES = (
    "diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors", "3d-vae.pt", "diffusion_pytorch_model.bin", "pytorch_model.bin",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    path: Path
    layout: str
    # "SAT or DeepSpeed folder", "diffusers folder", "file", "shards": what the path turned out to be.
    files: tuple[Path, ...]
    ema_files: tuple[Path, ...] = ()
    # Averaged weights, under the same names, in fp32; they may cover a part of the names.

    @property
    def folder(self) -> Path:
        return self.files[0].parent


def locate(path: str | Path, component: str | None = None) -> Source:
    """Find the weight files of a path, or of an ``hf://`` address (hub.py).

    component: which part to take where a folder holds several (COMPONENTS). Raises ValueError: nothing there (with what
    to download), a folder without weights, a step that `latest` names and that does not exist, a missing shard or rank,
    weights split over model-parallel ranks.
    """
    path = resolve(path, component)
    if not path.exists():
        advice = download_advice(path)
        raise ValueError(f"weights not found: {path} does not exist{'. ' + advice if advice else ''}")
    if path.is_file():
        return _locate_file(path)
    return _locate_folder(path, path, component)


def is_pipeline(path: Path) -> bool:
    """Whether a folder holds several models: diffusers' index, or a transformer and a VAE beside each other."""
    if not path.is_dir():
        return False
    return (path / "model_index.json").is_file() or (
        (path / "vae").is_dir() and any(p.is_dir() for p in path.glob("transformer*"))
    )


def _locate_file(path: Path) -> Source:
    if path.name == "latest":
        return _locate_folder(path, path.parent, None)
    if path.name.endswith(".index.json"):
        return Source(path, "shards", tuple(shards_of(path)))
    if path.name == STATES or is_partitioned([path]):
        return _states(path, path.parent)
    return Source(path, "file", (path,))


def _locate_folder(path: Path, folder: Path, component: str | None) -> Source:
    if (folder / "latest").is_file():
        tag = (folder / "latest").read_text().strip()
        if not is_file_name(tag) or not (folder / tag).is_dir():
            raise ValueError(
                f"{folder / 'latest'} names the step {tag!r}, but there is no folder {folder / tag}"
            )
        return _locate_folder(path, folder / tag, component)
    if any(folder.glob("*_model_states.pt")):
        return _states(path, folder)
    if (folder / "checkpoints").is_dir():
        return _locate_folder(path, folder / "checkpoints", component)
    found = _weights_in(path, folder)
    if found is not None:
        return found
    for name in [component] if component else COMPONENTS:
        # `transformer`, or the `transformer_t2v` and `transformer_i2v` of the published 1.5 in SAT format
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith(name))
        if len(inside) > 1 and folder / name not in inside:
            raise ValueError(f"{folder} holds {' and '.join(p.name for p in inside)}: name one of them")
        if inside:
            return _locate_folder(path, folder / name if folder / name in inside else inside[0], None)
    wanted = f" for the {component}" if component else ""
    entries = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(entries[:6]) + (" ..." if len(entries) > 6 else "") if entries else "nothing"
    raise ValueError(
        f"{folder}: no weights{wanted} in this folder. Expected `latest` with N/{STATES}, or *.safetensors, *.pt, "
        f"*.bin, or a folder {'/, '.join(COMPONENTS)}/; it holds {shown}"
    )


def _states(path: Path, folder: Path) -> Source:
    ranks = sorted(folder.glob("mp_rank_*_model_states.pt"))
    split = sorted({p.name.partition("_mp_rank_")[2] for p in folder.glob("*zero_pp_rank_*_model_states.pt")})
    size = len(ranks) or len(split)
    if size > 1:
        raise ValueError(f"{folder}: saved with model parallel size {size}; only size 1 can be read")
    files = tuple(ranks) or tuple(rank_files(folder, "model"))
    return Source(
        path, "SAT or DeepSpeed folder", files, tuple(sorted(folder.glob("ema_rank_*.safetensors")))
    )


def _weights_in(path: Path, folder: Path) -> Source | None:
    layout = "diffusers folder" if (folder / "config.json").is_file() else "file"
    indices = sorted(folder.glob("*.index.json"), key=lambda p: (".safetensors." not in p.name, len(p.name)))
    if indices:
        return Source(path, layout if layout != "file" else "shards", tuple(shards_of(indices[0])))
    for name in _USUAL_NAMES:
        if (folder / name).is_file():
            return Source(path, layout, (folder / name,))
    files = [p for p in sorted(folder.iterdir()) if p.suffix in _SUFFIXES and p.is_file()]
    if len(files) > 1:
        raise ValueError(
            f"{folder}: several weight files ({', '.join(p.name for p in files[:4])}); name one of them"
        )
    return Source(path, layout, tuple(files)) if files else None
