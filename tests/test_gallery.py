"""``index.html`` of a folder: what it shows, that it is whole by itself, and that texts cannot break it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import sample_video
from cogvideox.command_line import run_door
from cogvideox.sampling.gallery import write_gallery

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest; collects attributes that name files, the text, and the tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def record(prompt: str, files: dict[str, str], **config: Any) -> dict[str, Any]:
    sample = {
        "steps": config.pop("steps", 50),
        "negative_prompt": None,
        "output_dir": config.pop("folder", "x"),
    }
    tree = {
        "sample": sample,
        "sampler": {"target": "cogvideox.diffusion.samplers.ddim", "params": {}},
        "guidance": {"target": "cogvideox.diffusion.guidance.ConstantGuidance", "params": {"scale": 6.0}},
        "load": {"lora": [{"path": "runs/style", "strength": 0.8}]},
    } | config
    size = {"num_frames": 49, "height": 480, "width": 720, "fps": 8, "steps": sample["steps"]}
    return {"prompt": prompt, "seed": 7, "files": files, "config": tree} | size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    videos = {
        "0000-cat": record("a cat", {"mp4": "0000-cat.mp4", "gif": "0000-cat.gif"}),
        "0000-cat-2": record("a cat", {"mp4": "0000-cat-2.mp4"}, steps=30, folder="y"),
        "0001-odd": record('<script>alert("x")</script> & "more"', {"gif": "0001 #1?.gif"}, steps=30),
        "0002-frames": record("frames", {"frames": "0002-frames"}, steps=30),
        "0003-latents": record("latents", {"latents": "0003-latents.safetensors"}, steps=30),
        "0004-gone": record("gone", {"mp4": "0004-gone.mp4"}, steps=30),
    }
    for name, known in videos.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(known))
        for file in known["files"].values():
            if name not in ("0004-gone", "0002-frames"):
                (tmp_path / file).touch()
    (tmp_path / "0002-frames").mkdir()
    (tmp_path / "0002-frames" / "0000.png").touch()
    (tmp_path / "other.json").write_text("[1, 2]")  # not ours
    return tmp_path


def test_the_page_is_well_formed_and_every_address_is_a_file_beside_it(folder: Path) -> None:
    page = Page(write_gallery(folder).read_text())
    assert page.tags.count("article") == 6 and page.tags.count("video") == 2 and page.tags.count("img") == 2
    assert all((folder / unquote(address)).exists() for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http" not in (folder / "index.html").read_text()


def test_it_tells_what_made_each_video(folder: Path) -> None:
    text = Page(write_gallery(folder).read_text()).text
    for fact in ("a cat", "49 x 480 x 720, 8 fps", "ddim", "ConstantGuidance(scale=6.0)", "runs/style x 0.8"):
        assert fact in text
    assert "latents only" in text and "its files are gone" in text


def test_neighbours_are_compared_by_their_settings(folder: Path) -> None:
    page = write_gallery(folder).read_text()
    assert page.count("changed from the one before") == 1  # the folder they went to is no difference
    assert "<th>sample.steps</th><td>50</td><td>30</td>" in page


def test_texts_are_escaped(folder: Path) -> None:
    page = write_gallery(folder).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert '<script>alert("x")</script> & "more"' in Page(page).text


def test_the_door_writes_it_without_loading_anything(folder: Path, capsys) -> None:
    assert run_door(sample_video.main, ["--gallery", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "index.html")
