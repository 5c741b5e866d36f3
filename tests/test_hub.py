"""``hf://`` addresses: out of huggingface_hub's own cache, from a hub played by a local server, or one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from stand_ins import sparse_safetensors

from cogvideox.weights.files.hub import is_address, parse, resolve
from cogvideox.weights.identify import identify

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache. The library reads HF_HUB_CACHE when it is imported, so its constant is set."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, repo: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """The library's layout: blobs by hash, a snapshot of links by commit, the branch's commit in refs."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        link = folder / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


@pytest.fixture
def weights(tmp_path: Path) -> bytes:
    return sparse_safetensors(
        tmp_path / "w.safetensors", {"time_embedding.linear_1.weight": (4, 4)}
    ).read_bytes()


def pipeline(weights: bytes) -> dict[str, bytes]:
    parts = ("transformer", "vae", "text_encoder")
    index = json.dumps({"_class_name": "CogVideoXPipeline", **{p: ["diffusers", "X"] for p in parts}})
    return {
        "model_index.json": index.encode(),
        "tokenizer/spiece.model": b"t",
        **{f"{part}/model.safetensors": weights for part in parts},
    }


def test_a_path_that_is_no_address_stays_as_it_is() -> None:
    assert resolve("weights/CogVideoX-2b") == Path("weights/CogVideoX-2b")
    assert resolve("~/w") == Path.home() / "w"
    assert not is_address("weights/hf") and is_address(Path("hf://THUDM/CogVideoX-2b"))


def test_an_address_has_a_revision_and_a_place_inside() -> None:
    for form in ("hf://THUDM/CogVideoX-2b@v1.0/vae/3d.pt", Path("hf://THUDM/CogVideoX-2b@v1.0/vae/3d.pt")):
        address = parse(form)
        assert (address.repo, address.revision, address.inside) == ("THUDM/CogVideoX-2b", "v1.0", "vae/3d.pt")
    assert parse("hf://THUDM/CogVideoX-2b/").inside == ""
    for wrong in ("hf://CogVideoX-2b", "hf://", "hf://a/b/../../c", "hf://a b/c"):
        with pytest.raises(ValueError, match="expected hf://ORG/NAME"):
            resolve(wrong)


def test_what_the_cache_holds_needs_no_network(cache: Path, weights: bytes) -> None:
    snapshot = cached(cache, "THUDM/CogVideoX-2b", pipeline(weights))
    for component in (None, "transformer", "vae", "text_encoder"):
        assert resolve("hf://THUDM/CogVideoX-2b", component) == snapshot
    assert resolve(f"hf://THUDM/CogVideoX-2b@{COMMIT}/vae") == snapshot / "vae"
    assert identify(resolve("hf://THUDM/CogVideoX-2b", "transformer")).naming == "diffusers"


def test_a_sat_repository_is_found_by_its_own_layout(cache: Path) -> None:
    snapshot = cached(cache, "THUDM/CogVideoX-2b-sat", {"transformer/1/mp_rank_00_model_states.pt": b"x"})
    assert resolve("hf://THUDM/CogVideoX-2b-sat", "transformer") == snapshot
    flat = cached(cache, "google/t5-v1_1-xxl", {"pytorch_model.bin": b"x", "spiece.model": b"t"})
    assert resolve("hf://google/t5-v1_1-xxl", "text_encoder") == flat


@pytest.mark.parametrize("component, missing", [
    (None, "vae/model.safetensors"),
    ("vae", "vae/model.safetensors"),
    ("text_encoder", "tokenizer/spiece.model"),
])  # fmt: skip
def test_a_part_that_was_not_downloaded_is_not_taken_for_found(
    component: str | None, missing: str, cache: Path, weights: bytes
) -> None:
    files = pipeline(weights)
    del files[missing]
    cached(cache, "THUDM/CogVideoX-2b", files)
    assert resolve("hf://THUDM/CogVideoX-2b", "transformer")
    with pytest.raises(ValueError, match="not in the cache"):
        resolve("hf://THUDM/CogVideoX-2b", component)


def test_an_interrupted_download_is_not_taken_for_found(cache: Path, weights: bytes) -> None:
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode()
    name = "diffusion_pytorch_model.safetensors.index.json"
    cached(cache, "o/n", {f"transformer/{name}": index, "transformer/1.safetensors": weights})
    with pytest.raises(ValueError, match="not in the cache"):
        resolve("hf://o/n", "transformer")


def test_offline_is_one_line_with_the_command_and_the_place(cache: Path, weights: bytes) -> None:
    with pytest.raises(ValueError) as error:
        resolve("hf://THUDM/CogVideoX-2b", "transformer")
    text = str(error.value)
    assert "\n" not in text and "HF_HUB_OFFLINE" in text and str(cache) in text
    assert "hf download THUDM/CogVideoX-2b --local-dir weights/CogVideoX-2b" in text
    assert "load.transformer=weights/CogVideoX-2b" in text and "zai-org" not in text
    with pytest.raises(ValueError, match=r"--revision v1 .*give weights/CogVideoX-2b/vae instead"):
        resolve("hf://THUDM/CogVideoX-2b@v1/vae")
    cached(cache, "zai-org/CogVideoX-2b", pipeline(weights))
    with pytest.raises(ValueError, match="the cache has it as hf://zai-org/CogVideoX-2b"):
        resolve("hf://THUDM/CogVideoX-2b", "transformer")


class Hub(ThreadingHTTPServer):
    """The few answers of the hub's interface that a download asks for; ``asked`` notes the files sent."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files, self.asked = files, set()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/gated"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not path.startswith(("/api/models/org/name", "/org/name/")):
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in self.server.files.items()
            ]
            self._send(200, json.dumps(entries).encode())
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._send(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            content = self.server.files[name]
            self.server.asked |= {name}
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(200, content, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(weights: bytes) -> Iterator[Hub]:
    server = Hub({**pipeline(weights), "transformer/tf_model.h5": b"not wanted"})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def resolve_online(home: Path, endpoint: str, *calls: tuple[str, str | None]) -> list[str]:
    """In a process of its own, where the library reads its environment: a line per address, path or error."""
    code = (
        "import json, sys\nfrom cogvideox.weights.files import hub\nfrom cogvideox.weights.files.hub import resolve\n"
        "hub._TIMEOUT_SECONDS = min(hub._TIMEOUT_SECONDS, 1)\n"
        "for address, component in json.loads(sys.argv[1]):\n"
        "    try:\n        print(resolve(address, component))\n"
        "    except ValueError as error:\n        print('error:', error)\n"
    )
    kept = {
        k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")
    }
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)],
        env={**kept, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT / "sat")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_only_the_wanted_part_is_downloaded_and_then_kept(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    lines = resolve_online(
        tmp_path, endpoint, ("hf://org/name", "transformer"), ("hf://org/name", "transformer")
    )
    assert lines == [str(snapshot)] * 2
    assert hub.asked == {"transformer/model.safetensors", "model_index.json"}
    assert (snapshot / "transformer" / "model.safetensors").is_file()
    lines = resolve_online(
        tmp_path,
        endpoint,
        ("hf://org/name", "text_encoder"),
        ("hf://org/name/vae", None),
        ("hf://org/name/no", None),
    )
    assert (
        lines[:2] == [str(snapshot), str(snapshot / "vae")] and "there is no no in the repository" in lines[2]
    )
    assert {"tokenizer/spiece.model", "vae/model.safetensors"} <= hub.asked


def test_a_repository_of_two_transformers_is_not_downloaded_twofold(hub: Hub, tmp_path: Path) -> None:
    """CogVideoX1.5-5B-SAT, 20 GB each."""
    hub.files = {"transformer_t2v/1.pt": b"x", "transformer_i2v/1.pt": b"x", "vae/3d-vae.pt": b"x"}
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    both, one = resolve_online(
        tmp_path, endpoint, ("hf://org/name", "transformer"), ("hf://org/name/transformer_i2v", "transformer")
    )
    assert "transformer_i2v and transformer_t2v: name one, hf://org/name/transformer_i2v" in both
    assert one.endswith("transformer_i2v") and hub.asked == {"transformer_i2v/1.pt"}


def test_no_access_and_no_network_are_told_apart_within_seconds(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    gated, missing = resolve_online(
        tmp_path, endpoint, ("hf://org/gated", "vae"), ("hf://org/missing", "vae")
    )
    assert "gated: accept its terms" in gated and "load.vae=weights/gated" in gated
    assert "no such repository" in missing
    start = time.perf_counter()
    (line,) = resolve_online(tmp_path, "http://127.0.0.1:9", ("hf://org/name", "vae"))
    assert "the hub cannot be reached (Connect" in line and "hf download org/name" in line
    assert time.perf_counter() - start < 10  # the process's start and imports included; about 1 s
    with socket.create_server(("127.0.0.1", 0)) as silent:  # as behind a firewall: nobody ever answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.perf_counter()
        (line,) = resolve_online(tmp_path, endpoint, ("hf://org/name", "vae"))
        assert "the hub cannot be reached" in line and time.perf_counter() - start < 10
