"""The demo's own parts: its commands, scores and report on drawn clips. Nothing is trained here."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from cogvideox.config import load_config
from cogvideox.data.moving_shapes import COLOURS, FPS, Combination, combinations, draw_clip
from cogvideox.sampling.video_io import write_video
from scripts.demo.__main__ import prepare_output
from scripts.demo.clips import check, draw_and_check
from scripts.demo.plan import SCALES, Demo, Scale, choose_ranks, spread
from scripts.demo.results import drawn, write_results
from scripts.demo.scores import Verdict, judge, missed_aims, sampled_videos, score
from scripts.demo.stage import Stage, StageError, descendants, own_lines, run_stage
from scripts.demo.vae import MEASUREMENT

ROOT = Path(__file__).resolve().parents[1]
RED_CIRCLE = Combination("red", "circle", "right")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    """Two combinations of each set, one clip of each."""
    return Demo(tmp_path, Scale(clips=1, vae_clips=1, few_clips=1, repeats=2, max_combinations=2), ranks=2)


def draw(path: Path, combination: Combination, seed: int = 0) -> Path:
    clip = draw_clip(*combination, num_frames=9, size=32, generator=torch.Generator().manual_seed(seed))
    write_video(path, clip, FPS)
    return path


def pretend_to_sample(demo: Demo, model: str, shown: list[Combination]) -> None:
    """The files of ``sample_video.py`` for a model's prompts, where video i shows ``shown[i]``."""
    for i, (wanted, combination) in enumerate(zip(demo.prompts[model], shown, strict=True)):
        video = draw(
            demo.samples(model) / f"{i:04d}-{wanted.caption.replace(' ', '-')}.mp4", combination, seed=i
        )
        video.with_suffix(".json").write_text(json.dumps({"prompt": wanted.caption, "video": video.name}))


# --- plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("scale", SCALES)
def test_every_command_is_one_that_the_configuration_accepts(tmp_path: Path, scale: str, ranks: int) -> None:
    demo = Demo(tmp_path, SCALES[scale], ranks)
    demo.write_prompt_files()
    clips = demo.clips_stage()
    vae = demo.vae_stage(clips)
    stages = [vae, *demo.generation_stages(demo.reconstruction_stage(vae), scale_factor=0.5)]
    for stage in stages:
        arguments = stage.action[stage.action.index("--base") + 1 :]
        files = list(itertools.takewhile(lambda word: word.endswith(".yaml"), arguments))
        overrides = list(itertools.takewhile(lambda word: "=" in word, arguments[len(files) :]))
        config = load_config(files, overrides)
        if stage is not vae:
            assert config.vae.scale_factor == 0.5
        if "train_video.py" in stage.action:
            assert config.run.dir == str(stage.folder)
            assert config.train.batch_size * ranks == {"vae": max(2, ranks), "lora": 16}.get(stage.name, 32)
    assert (
        len({stage.name for stage in stages}) == len({stage.folder for stage in stages}) == len(stages) == 6
    )


def test_held_out_combinations_and_the_new_colour_are_in_no_training_clip(tmp_path: Path) -> None:
    demo = Demo(tmp_path, SCALES["normal"], 2)
    assert not set(demo.seen) & set(demo.held_out)
    assert {c.colour for c in demo.new}.isdisjoint(COLOURS)
    assert len(demo.new) * demo.scale.few_clips == 24
    assert set(demo.seen) | set(demo.held_out) == {c for part in combinations() for c in part}


@pytest.mark.parametrize(("cores", "ranks"), [(1, 1), (2, 2), (3, 2), (4, 4), (64, 4)])
def test_ranks_suit_the_cores_and_divide_the_batch(cores: int, ranks: int) -> None:
    assert choose_ranks(cores) == ranks


def test_spread_takes_first_last_and_what_lies_evenly_between() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(3), 8) == [0, 1, 2]
    assert spread(range(3), 1) == [0]


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no demo wrote"):
        prepare_output(tmp_path, fresh=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


# --- stages --------------------------------------------------------------------------------------------------------


def command_stage(tmp_path: Path, code: str, **arguments) -> Stage:
    return Stage("probe", "a probe", [sys.executable, "-u", "-c", code], tmp_path / "folder", **arguments)


def test_a_finished_stage_is_not_run_again_and_a_changed_one_starts_afresh(tmp_path: Path) -> None:
    marker = tmp_path / "folder" / "runs.txt"
    setting = tmp_path / "setting.yaml"
    setting.write_text("a: 1")

    def action() -> None:
        marker.parent.mkdir(exist_ok=True)
        with marker.open("a") as file:
            file.write("x")

    stage = Stage("probe", "a probe", action, tmp_path / "folder", inputs=[setting])
    assert run_stage(stage, tmp_path)["finished"]
    run_stage(stage, tmp_path)
    assert marker.read_text() == "x"
    setting.write_text("a: 2")
    run_stage(stage, tmp_path)
    assert marker.read_text() == "x", "its folder was removed before it ran again"
    marker.unlink()
    later = Stage("later", "later", action, tmp_path / "folder", after=[stage])
    key = later.key
    setting.write_text("a: 3")
    assert later.key != key, "a stage is outdated with the stages before it"


def test_an_interrupted_stage_keeps_its_folder(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.makedirs(sys.argv[1], exist_ok=True); open(sys.argv[1] + '/c', 'a').write('x'); "
    )
    code += "sys.exit(len(open(sys.argv[1] + '/c').read()) < 2)"
    stage = Stage(
        "probe", "a probe", [sys.executable, "-c", code, str(tmp_path / "folder")], tmp_path / "folder"
    )
    with pytest.raises(StageError):
        run_stage(stage, tmp_path)
    assert run_stage(stage, tmp_path)["finished"]


def test_a_failed_stage_names_exit_code_log_and_last_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    code = "import sys; print('10%\\r20%\\r30%'); print('error: no such key', file=sys.stderr); sys.exit(3)"
    with pytest.raises(StageError) as failure:
        run_stage(command_stage(tmp_path, code), tmp_path)
    message, log = str(failure.value), tmp_path / "logs" / "probe.log"
    assert "'probe'" in message and "exit code 3" in message and str(log) in message
    assert message.endswith("| error: no such key")
    assert "error: no such key" in capfd.readouterr().out, "the console shows it too"
    assert log.read_text().splitlines()[1:] == ["30%", "error: no such key"], (
        "a bar leaves its last state in the log"
    )


def test_torchruns_own_report_is_left_out() -> None:
    log = "$ old\nold error\n$ new\nerror: data.path\nE1 /x/torch/distributed/elastic/api.py] failed\nTraceback\n"
    assert own_lines(log) == ["error: data.path"]


def test_peak_memory_counts_grandchildren(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs /proc/PID/smaps_rollup (Linux)")
    hold = "import time; x = bytearray(300 * 2**20); x[::4096] = b'1' * len(x[::4096]); time.sleep(2.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], start_new_session=True)"
    before = run_stage(Stage("idle", "idle", lambda: None, tmp_path / "idle"), tmp_path)["peak_memory_gib"]
    record = run_stage(command_stage(tmp_path, code), tmp_path)
    assert record["peak_memory_gib"] - before > 0.28  # 300 MiB are 0.293 GiB


def is_running(pid: int) -> bool:
    """Ended processes wait as zombies (Z) until init collects them."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_stopping_the_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    hold = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], start_new_session=True)"
    program = (
        # A shell starts its background jobs with SIGINT ignored, and Python keeps it so.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from scripts.demo.stage import Stage, run_stage\n"
        f"run_stage(Stage('probe', 'probe', [sys.executable, '-c', {code!r}], Path({str(tmp_path / 'f')!r})), "
        f"Path({str(tmp_path)!r}))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    below: dict[int, str] = {}
    try:
        deadline = time.monotonic() + 30
        while len(below) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            below = descendants(run.pid)
        assert len(below) == 2
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=30) != 0
        time.sleep(0.2)
        assert not [pid for pid in below if is_running(pid)]
    finally:
        for pid in [run.pid, *below]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.wait()


# --- scores --------------------------------------------------------------------------------------------------------


def test_scores_count_what_the_detector_finds(tmp_path: Path) -> None:
    wanted = [RED_CIRCLE] * 4
    shown = [RED_CIRCLE, RED_CIRCLE._replace(colour="blue"), RED_CIRCLE._replace(direction="up"), RED_CIRCLE]
    verdicts = [
        judge(draw(tmp_path / f"{i}.mp4", s, i), w)
        for i, (w, s) in enumerate(zip(wanted, shown, strict=True))
    ]
    assert [v.found for v in verdicts] == shown
    assert score(verdicts) == {"n": 4, "colour": 0.75, "shape": 1.0, "direction": 0.75, "all": 0.5}


def test_noise_scores_nothing(tmp_path: Path) -> None:
    noise = torch.randint(
        0, 256, (9, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    write_video(tmp_path / "noise.mp4", noise, FPS)
    assert score([judge(tmp_path / "noise.mp4", RED_CIRCLE)])["all"] == 0.0


def test_missed_aims_are_named() -> None:
    reached = {"n": 9, "colour": 0.95, "shape": 0.8, "direction": 1.0, "all": 0.7}
    assert missed_aims({"seen": reached, "held_out": reached, "untrained": {"colour": 0.0}}) == []
    missed = missed_aims({"seen": reached | {"shape": 0.5}, "held_out": reached | {"colour": 0.7}})
    assert missed == ["seen shape: 0.50, aim 0.70", "held-out colour: 0.70, aim 0.75"]


def test_a_missing_or_mistaken_sample_is_an_error(demo: Demo) -> None:
    wanted = demo.prompts["lora"]
    pretend_to_sample(demo, "lora", wanted)
    videos = sampled_videos(demo.samples("lora"), wanted)
    assert [int(v.name[:4]) for v in videos] == list(range(len(wanted)))
    with pytest.raises(ValueError, match="made for 'a purple"):
        sampled_videos(demo.samples("lora"), [RED_CIRCLE])
    videos[1].with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="0 sampled videos for prompt 1"):
        sampled_videos(demo.samples("lora"), wanted)


def test_clips_that_the_detector_does_not_recognise_stop_the_demo() -> None:
    good = [Verdict(Path(f"{i}.mp4"), RED_CIRCLE, RED_CIRCLE) for i in range(19)]
    check(good)
    with pytest.raises(ValueError, match="0.950 .*bad.mp4: drawn red/circle/right, found blue/circle/right"):
        check([*good, Verdict(Path("bad.mp4"), RED_CIRCLE, RED_CIRCLE._replace(colour="blue"))])


# --- report --------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_results_are_written_from_the_clips_up(demo: Demo, capsys: pytest.CaptureFixture) -> None:
    draw_and_check(demo)
    assert len(demo.true_clips("train", "validation", "held_out", "lora")) == 8
    for path in demo.true_clips("validation", "held_out"):
        draw(demo.samples("reconstructed") / path.name, drawn(path))
    (demo.samples("reconstructed") / MEASUREMENT).write_text(json.dumps({"scale_factor": 0.5, "psnr": 30.0}))
    pretend_to_sample(
        demo, "trained", demo.seen + demo.held_out * 2 + [c._replace(colour="blue") for c in demo.new * 2]
    )
    pretend_to_sample(demo, "lora", demo.new * 2)
    pretend_to_sample(demo, "untrained", [RED_CIRCLE] * 2)
    for name in ("vae", "t2v", "lora"):
        demo.run(name).mkdir(parents=True)
        lines = [
            {"step": s, "train/loss": 1 / s, **({"val/loss": 2 / s} if s % 10 == 0 else {})}
            for s in range(1, 41)
        ]
        (demo.run(name) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "torch.distributed.run", "train_video.py", "data.path=a <b>"]
    record = {"seconds": 61.0, "peak_memory_gib": 1.5, "command": command}

    report = write_results(
        demo, {"vae": record, "clips": record | {"command": None, "peak_memory_gib": None}}
    )

    results = json.loads((demo.output / "scores.json").read_text())
    expected = {
        "real": 6,
        "reconstructed": 4,
        "seen": 2,
        "held_out": 4,
        "lora": 4,
        "without_lora": 4,
        "untrained": 2,
    }
    assert {name: row["n"] for name, row in results["scores"].items()} == expected
    assert results["scores"]["held_out"]["all"] == results["scores"]["lora"]["all"] == 1.0
    assert results["scores"]["without_lora"] == {
        "n": 4,
        "colour": 0.0,
        "shape": 1.0,
        "direction": 1.0,
        "all": 0.0,
    }
    assert results["seconds_total"] == 122.0 and results["peak_memory_gib"] == 1.5
    assert "OMP_NUM_THREADS=" in results["stages"]["vae"]["command_line"]

    text = report.read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert all(source.startswith("data:") for source in page.sources), "one file: nothing is fetched"
    first = demo.true_clips("validation")[0].read_bytes()
    assert f"data:video/mp4;base64,{base64.b64encode(first).decode()}" in text
    assert not re.search(r"https?://", text) and "a &lt;b&gt;" in text
    assert {c.caption for c in demo.seen + demo.held_out + demo.new} <= set(
        re.findall(r"<h3>(.*?)</h3>", text)
    )
    for picture in ("contact_sheet.png", "loss.png"):
        assert min(Image.open(demo.output / picture).size) > 200
    assert "with LoRA" in capsys.readouterr().out
