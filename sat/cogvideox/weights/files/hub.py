"""``hf://ORG/NAME[@REVISION][/SUB/PATH]``: weights on huggingface.co, through huggingface_hub and its cache.

The cache comes first, so that what has been downloaded once needs no network; ``HF_HOME``, ``HF_HUB_OFFLINE`` and the
token act as everywhere. Nothing waits long: without a network the answer is one line that says what to download.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cogvideox.weights.files.headers import shards_of

# A pathlib.Path makes one slash of two.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inside>[^@]+?))?/?")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_IGNORED = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.mp4", "*.gif"]  # other frameworks, pictures
_PARTS = ("transformer", "vae", "text_encoder")
_RENAMED = {"THUDM": "zai-org", "zai-org": "THUDM"}  # one organisation; the cache keeps them apart
_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Address:
    repo: str
    revision: str | None
    inside: str
    """A folder or file in the repository, or ""."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}{'/' if self.inside else ''}{self.inside}"


def resolve(path: str | Path, component: str | None = None) -> Path:
    """The local place of ``path``: an ``hf://`` address is looked up in the cache, else downloaded; others stay.

    component: transformer, vae or text_encoder: only its folder of the repository is fetched (the tokenizer comes with
    the text encoder); without it, or where the repository has no such folder, everything. Returns the snapshot's
    folder, or the place inside it that the address names. Raises ValueError: not an address; no network and not in the
    cache, no such repository, or no access to it, with the command that downloads it and where to put it.
    """
    if not is_address(path):
        return Path(path).expanduser()
    address = parse(path)
    snapshot = _cached(address, component)
    if snapshot is None:
        snapshot = _download(address, component)
        if not _is_complete(snapshot, address.inside, component):
            raise ValueError(f"{address}: there are no weights in it{_shown(snapshot)}")
    return snapshot / address.inside


def is_address(path: str | Path) -> bool:
    return str(path).startswith("hf:/")


def parse(path: str | Path) -> Address:
    match = _ADDRESS.fullmatch(str(path))
    if match is None or ".." in str(path):
        raise ValueError(f"{path}: expected hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME/SUB/PATH")
    return Address(match["repo"], match["revision"], match["inside"] or "")


def _cached(address: Address, component: str | None) -> Path | None:
    """The snapshot in the cache, if what is wanted of it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = [f"{address.inside or component}*"] if address.inside or component else None
    try:
        snapshot = snapshot_download(
            address.repo,
            revision=address.revision,
            local_files_only=True,
            allow_patterns=wanted,
            ignore_patterns=_IGNORED,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(snapshot) if _is_complete(Path(snapshot), address.inside, component) else None


def _download(address: Address, component: str | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cache = constants.HF_HUB_CACHE
    if constants.HF_HUB_OFFLINE:
        raise _unavailable(address, component, f"not in the cache ({cache}), and HF_HUB_OFFLINE is set")
    try:
        # Asked first and with a limit of its own: the download retries for long where there is no network.
        listing = HfApi().model_info(address.repo, revision=address.revision, timeout=_TIMEOUT_SECONDS)
        wanted = _patterns([file.rfilename for file in listing.siblings or []], address, component)
        return Path(
            snapshot_download(
                address.repo,
                revision=address.revision,
                allow_patterns=wanted,
                ignore_patterns=_IGNORED,
                etag_timeout=_TIMEOUT_SECONDS,
            )
        )
    except GatedRepoError as error:
        reason = "gated: accept its terms on its page at huggingface.co, then `hf auth login`"
        raise _unavailable(address, component, reason) from error
    except RepositoryNotFoundError as error:
        reason = "no such repository, or a private one (`hf auth login`)"
        raise _unavailable(address, component, reason) from error
    except RevisionNotFoundError as error:
        raise _unavailable(
            address, component, f"the repository has no revision {address.revision}"
        ) from error
    except ValueError:
        raise
    # The library's transport differs by version (requests, httpx), and with it the errors of a missing network.
    except Exception as error:
        reason = f"not in the cache ({cache}), and the hub cannot be reached ({_first_line(error)})"
        raise _unavailable(address, component, reason) from error


def _patterns(names: Iterable[str], address: Address, component: str | None) -> list[str] | None:
    """Which files of the repository to fetch; None: all."""
    names = list(names)
    if address.inside:
        if not any(f"{name}/".startswith(f"{address.inside}/") for name in names):
            folders = ", ".join(sorted({name.partition("/")[0] for name in names})[:8])
            raise ValueError(f"{address}: there is no {address.inside} in the repository; it has {folders}")
        return [address.inside, f"{address.inside}/*"]
    # `transformer`, or the `transformer_t2v` and `transformer_i2v` of 1.5 in SAT format
    folders = sorted(
        {n.partition("/")[0] for n in names if component and "/" in n and n.startswith(component)}
    )
    if len(folders) > 1 and component not in folders:
        raise ValueError(f"{address} holds {' and '.join(folders)}: name one, {address}/{folders[0]}")
    if not folders:
        return None
    further = ["tokenizer/*"] if component == "text_encoder" else []
    folder = component if component in folders else folders[0]
    return [f"{folder}/*", *further, "scheduler/*", "model_index.json"]


def _is_complete(snapshot: Path, inside: str, component: str | None) -> bool:
    """Whether the wanted part of a snapshot is there: weights, and every shard that an index names.

    The hub's library puts a file into the snapshot when all of it has arrived, so no file is a part of one.
    """
    place = snapshot / inside
    if place.is_file():
        return True
    if not place.is_dir():
        return False
    parts = [p for p in place.iterdir() if p.is_dir() and p.name.startswith(component or _PARTS)]
    if component and not inside:
        own = [p for p in parts if p.name.startswith(component)]
        is_pipeline = any(p.name.startswith(_PARTS) for p in place.iterdir())
        if not own and is_pipeline:
            return False
        if component == "text_encoder" and own and not (place / "tokenizer").is_dir():
            return False
        return all(_has_weights(part) for part in own or [place])
    named = _named_by_pipeline(place)
    return all(_has_weights(part) for part in parts or [place]) and all((place / n).is_dir() for n in named)


def _named_by_pipeline(folder: Path) -> list[str]:
    """The components with weights that a pipeline's ``model_index.json`` speaks of."""
    index = folder / "model_index.json"
    if not index.is_file():
        return []
    return [name for name in json.loads(index.read_text()) if name in _PARTS]


def _has_weights(folder: Path) -> bool:
    try:
        for index in folder.rglob("*.safetensors.index.json"):
            shards_of(index)
    except ValueError:
        return False
    return any(p.suffix in _WEIGHTS and p.is_file() for p in folder.rglob("*"))


def _unavailable(address: Address, component: str | None, reason: str) -> ValueError:
    """One line: what happened, what to download, where to put it."""
    name = address.repo.partition("/")[2]
    place = "/".join(part for part in ("weights", name, address.inside) if part)
    revision = f" --revision {address.revision}" if address.revision else ""
    use = f"set load.{component}={place}" if component else f"give {place} instead"
    return ValueError(
        f"{address}: {reason}{_other_name(address, component)}; run `hf download {address.repo}{revision} --local-dir "
        f"weights/{name}` where there is a network, and {use}"
    )


def _other_name(address: Address, component: str | None) -> str:
    """THUDM became zai-org: said where the cache has the repository under its other name."""
    organisation, _, name = address.repo.partition("/")
    if organisation not in _RENAMED:
        return ""
    other = Address(f"{_RENAMED[organisation]}/{name}", address.revision, address.inside)
    return f"; the cache has it as {other}" if _cached(other, component) else ""


def _shown(snapshot: Path) -> str:
    entries = sorted(entry.name for entry in snapshot.iterdir())
    return f"; it holds {', '.join(entries[:8]) or 'nothing'}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
