"""``index.html`` for a folder of videos: each with its prompt and settings, and what changed from one to the next.

One file without scripts or addresses outside the folder: it opens from a disk, a mail or a web server alike.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cogvideox.config import ConfigError
from cogvideox.page import page
from cogvideox.sampling import sidecar
from cogvideox.sampling.complete import complete_or_absent
from cogvideox.sampling.targets import WITHOUT_EFFECT, in_order

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; background: #f6f6f4; color: #222; }
h1 { font-size: 1.2rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
article { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .8rem; overflow-wrap: anywhere; }
video, img { width: 100%; max-height: 24rem; object-fit: contain; background: #111; image-rendering: auto; }
h2 { font-size: 1rem; margin: .5rem 0; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .8rem; margin: 0; font-size: .85rem; }
dt { color: #666; } dd { margin: 0; }
table { font-size: .8rem; border-collapse: collapse; margin-top: .3rem; }
td, th { border: 1px solid #ddd; padding: .1rem .4rem; text-align: left; vertical-align: top; }
summary { font-size: .85rem; margin-top: .5rem; cursor: pointer; }
"""


def write_gallery(folder: str | Path) -> Path:
    """Write ``folder/index.html`` over all sidecars in ``folder``, by name. Returns its path.

    ConfigError where the folder holds none.
    """
    folder = Path(folder).expanduser()
    found = [(path, sidecar.read_if_any(path)) for path in in_order(folder.glob("*.json"))]
    entries = [(path, record) for path, record in found if record is not None]
    if not entries:
        raise ConfigError(f"--gallery {folder}: there is no sidecar (json) of a video in this folder")
    articles, before = [], None
    for path, record in entries:
        articles.append(_article(path, record, before))
        before = record
    title = f"{folder.resolve().name}: {len(entries)} videos"
    body = f"<h1>{escape(title)}</h1>\n<main>\n{''.join(articles)}</main>\n"
    with complete_or_absent(folder / "index.html") as partial:
        partial.write_text(page(title, body, _STYLE), encoding="utf-8")
    return folder / "index.html"


def _article(path: Path, record: dict[str, Any], before: dict[str, Any] | None) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(record))
    links = "".join(
        f' <a href="{_url(name)}">{escape(kind)}</a>' for kind, name in _files(path, record).items()
    )
    return (
        f'<article id="{escape(path.stem)}">\n{_picture(path, record)}\n<h2>{escape(record["prompt"])}</h2>\n'
        f'<dl>{facts}<dt>files</dt><dd>{links} <a href="{_url(path.name)}">json</a></dd></dl>\n'
        f"{_changes(record, before)}</article>\n"
    )


def _files(path: Path, record: dict[str, Any]) -> dict[str, str]:
    """Kind -> name of the files that are there. The first sidecars named their mp4 ``video``."""
    files = record.get("files") or {"mp4": record.get("video") or f"{path.stem}.mp4"}
    return {kind: name for kind, name in files.items() if (path.parent / name).exists()}


def _picture(path: Path, record: dict[str, Any]) -> str:
    files = _files(path, record)
    if "mp4" in files:
        return (
            f'<video src="{_url(files["mp4"])}" controls loop muted playsinline preload="metadata"></video>'
        )
    still = files.get("gif") or files.get("sheet") or (files.get("frames") and f"{files['frames']}/0000.png")
    if still:
        return f'<img src="{_url(still)}" alt="{escape(record["prompt"])}" loading="lazy">'
    return "<p>no pictures: " + ("latents only" if "latents" in files else "its files are gone") + "</p>"


def _facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    config = record["config"]
    sample, guidance, load = (config.get(key) or {} for key in ("sample", "guidance", "load"))
    loras = load.get("lora") or []
    loras = [{"path": loras}] if isinstance(loras, str) else loras
    size = " x ".join(str(record.get(key)) for key in ("num_frames", "height", "width"))
    facts = [
        ("seed", record["seed"]),
        ("size", f"{size}, {record.get('fps')} fps"),
        ("steps", record.get("steps")),
        ("sampler", _part(config.get("sampler") or {})),
        ("guidance", _part(guidance)),
        ("negative prompt", sample.get("negative_prompt")),
        ("LoRA", ", ".join(f"{lora['path']} x {lora.get('strength', 1)}" for lora in loras)),
        *((name.replace("_", " "), record.get(name)) for name in ("image", "last_image", "continue_from")),
        ("source video", record.get("video") if "files" in record else None),
        ("seconds", record.get("seconds")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _part(part: dict[str, Any]) -> str:
    """``ConstantGuidance(scale=6.0)`` of a target and its params."""
    params = ", ".join(f"{key}={value}" for key, value in (part.get("params") or {}).items())
    return str(part.get("target", "")).rpartition(".")[2] + (f"({params})" if params else "")


def _changes(record: dict[str, Any], before: dict[str, Any] | None) -> str:
    """The keys of the configuration that differ from the video before."""
    if before is None:
        return ""
    trees = [dict(r["config"]) for r in (before, record)]
    for tree in trees:  # where its files went is seen on the page
        tree["sample"] = {k: v for k, v in (tree.get("sample") or {}).items() if k not in WITHOUT_EFFECT}
    changed = sidecar.config_difference(*trees)
    if not changed:
        return ""
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(json.dumps(old))}</td><td>{escape(json.dumps(new))}</td></tr>"
        for key, (old, new) in changed.items()
    )
    return (
        f"<details open><summary>{len(changed)} setting{'s' * (len(changed) > 1)} changed from the one before</summary>"
        f"<table><tr><th>key</th><th>before</th><th>here</th></tr>{rows}</table></details>\n"
    )


def _url(name: str) -> str:
    return escape(quote(name))
