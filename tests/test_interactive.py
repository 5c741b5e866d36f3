"""The prompt loop: its flags, and that one prompt's error does not end it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import cogvideox.system  # noqa: F401  SAT's log handler keeps the stderr of its first import, which capsys closes
import sample_video
from cogvideox.command_line import run_door
from cogvideox.config import Config, load_config
from cogvideox.sampling import sidecar
from cogvideox.sampling.interactive import next_index, parse_line, prompt_loop, refuse_flags, typed_lines
from cogvideox.sampling.prompts import Request

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny_t2v.yaml"
SMALL = ["model.transformer.num_layers=1", "model.conditions.0.params.config.num_layers=1", "sample.steps=2"]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config([TINY], ["seed=10"])


def test_the_flags_are_those_of_musubi(config: Config, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "first frame.png")
    line = (
        "a cat -- it rides, 2-3 times --s 30 --d 7 --w 48 --h 40 --f 13 --g 2.5 --n dark: [grey], #5 "
        f"--i {tmp_path}/first frame.png"
    )
    request, own = parse_line(line, config, 4)
    assert request == Request(4, "a cat -- it rides, 2-3 times", 7, tmp_path / "first frame.png")
    sample = own.sample
    assert (sample.steps, sample.width, sample.height, sample.num_frames) == (30, 48, 40, 13)
    assert sample.negative_prompt == "dark: [grey], #5" and own.guidance.params == {"scale": 2.5}
    assert own.seed == 10  # what untrained parts are drawn from stays


def test_a_flag_holds_for_its_line_and_seeds_count_on(config: Config) -> None:
    parse_line("a cat --s 3 --g 9", config, 0)
    request, own = parse_line("a dog", config, 2)
    assert (own.sample.steps, own.guidance.params["scale"], request.seed) == (20, 2.0, 12)


BAD = {
    "a cat --q 3": r"--q: the flags of a line are --s --d",
    "a cat --steps 3": r"--steps: the flags.*did you mean --s\?|--steps: the flags",
    "a cat --s many": r"sample\.steps='many'.*whole number",
    "a cat --s": r"--s: a value is missing",
    "--s 3": r"no prompt before the flags",
    "a cat --w 33": r"sample\.width=33.*multiple of 8",
    "a cat --i nowhere.png": r"--i nowhere\.png: there is no such file",
}


@pytest.mark.parametrize("line", BAD)
def test_a_mistake_in_a_line_is_named(line: str, config: Config) -> None:
    with pytest.raises(ValueError, match=BAD[line]):
        parse_line(line, config, 0)


def test_one_prompts_error_does_not_end_the_loop(config: Config) -> None:
    def make(request: Request, own: Config) -> list[Path]:
        if "memory" in request.prompt:
            raise torch.OutOfMemoryError("out of memory")
        if "stop" in request.prompt:
            raise KeyboardInterrupt
        return [Path(f"{request.index}-{request.prompt}-{own.sample.steps}")]

    said: list[str] = []
    lines = ["one", "", "much memory", "two --s x", "stop", "three --s 4", "exit", "four"]
    written = prompt_loop(iter(lines), config, make, said.append, first_index=5)
    assert [str(path) for path in written] == ["5-one-20", "6-three-4"]
    assert [text.split(":")[0] for text in said] == ["5-one-20", "error", "error", "interrupted", "6-three-4"]


def test_typed_lines_end_with_ctrl_d_and_ctrl_c() -> None:
    for end in (EOFError, KeyboardInterrupt):
        typed = iter(["a", "b"])

        def ask(prompt: str, typed=typed, end=end) -> str:
            line = next(typed, None)
            if line is None:
                raise end
            return line

        assert list(typed_lines(ask)) == ["a", "b"]


def test_flags_elsewhere_are_refused() -> None:
    refuse_flags(["a cat -- and a dog", "--verbose is a word", "a--s 3"])
    with pytest.raises(ValueError, match=r"'a cat --w 48': flags such as --w belong to the interactive mode"):
        refuse_flags(["fine", "a cat --w 48"])


def test_the_door_reads_lines_and_keeps_its_models(tmp_path: Path, monkeypatch, capsys) -> None:
    lines = "a dot --s 3 --d 7\na dot --w 33\na dot --g 1 --h 16\na dot --s 3 --d 7\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    out = tmp_path / "out"
    argv = [
        "--base",
        str(TINY),
        *SMALL,
        "--frames",
        "5",
        "--output-dir",
        str(out),
        "--interactive",
        "--output",
        "gif",
    ]
    assert run_door(sample_video.main, ["--traceback", *argv]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(?:error: sample\.width=33|.*\.gif$)", printed, re.M) == [
        str(out / "0000-a-dot.gif"),
        "error: sample.width=33",
        str(out / "0001-a-dot.gif"),
        str(out / "0002-a-dot.gif"),
    ]
    records = [sidecar.read(out / f"000{i}-a-dot.json") for i in range(3)]
    assert [(r["seed"], r["steps"], r["height"]) for r in records] == [(7, 3, 32), (1, 2, 16), (7, 3, 32)]
    assert records[1]["config"]["guidance"]["params"]["scale"] == 1
    assert records[0]["pixels_sha256"] == records[2]["pixels_sha256"]  # nothing is left of the line between
    assert next_index(out) == 3
    assert (
        run_door(sample_video.main, ["--from", str(out / "0001-a-dot.json"), "--output-dir", str(tmp_path)])
        == 0
    )
    assert "\nthe same pixels\n" in capsys.readouterr().out
