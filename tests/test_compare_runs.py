"""Runs side by side: settings that differ first, and no difference claimed that is within its error."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from pages import Page
from run_folders import make_run

from cogvideox.command_line import run_door
from cogvideox.report import comparison, comparison_page
from cogvideox.report.comparison import (
    contest,
    differences,
    final_numbers,
    other_differences,
    sentence,
    short_names,
)
from cogvideox.report.run_folder import RunFolder, read_run
from cogvideox.report.settings import ABSENT, differing
from scripts import compare_runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "good", log_every=20)
    make_run(folder / "bad", log_every=20, lr=1e-2, better=False, config={"lora": "{rank: 4}"})
    return folder


@pytest.fixture
def runs(root: Path) -> list[RunFolder]:
    return [read_run(root / name) for name in ("good", "bad")]


def compare(*argv: object) -> int:
    return run_door(compare_runs.main, list(map(str, argv)))


# --------------------------------------------------------------------------------------------------- what differs


def test_only_keys_that_differ_are_listed(runs: list[RunFolder]) -> None:
    assert differences(runs) == {
        "lora": ["null", ABSENT],
        "lora.rank": [ABSENT, "4"],
        "lora.alpha": [ABSENT, "1"],
        "lora.layers.0": [ABSENT, "query_key_value"],
        "lora.layers.1": [ABSENT, "dense"],
        "lora.transformer_layers": [ABSENT, "null"],
        "lora.rank_pattern": [ABSENT, "{}"],
        "lora.alpha_pattern": [ABSENT, "{}"],
        "lora.rslora": [ABSENT, "false"],
        "lora.dropout": [ABSENT, "0"],
        "lora.dora": [ABSENT, "false"],
        "lora.quantize_base": [ABSENT, "null"],
        "train.optimizer.params.lr": ["0.001", "0.01"],
    }


def test_a_key_that_one_of_three_lacks_is_a_difference() -> None:
    found = differing([{"a": {"b": 1}, "c": 2}, {"a": {"b": 1}}, {"a": {"b": 1}, "c": 2}])
    assert found == {"c": [2, ABSENT, 2]}
    assert differing([{"run": {"dir": "x"}}, {"run": {"dir": "y"}}]) == {}


def test_versions_and_dataset_are_compared_too(root: Path, tmp_path: Path) -> None:
    other = shutil.copytree(root / "good", tmp_path / "other")
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"dataset": {"clips": 45, "sha256": "beef"}}))
    (other / "command.txt").write_text("train_video.py\n  8 ranks, torch 3\n")
    found = other_differences([read_run(root / "good"), read_run(other)])
    assert found == {
        "ranks and versions": ["1 ranks, python 3.11, torch 2", "8 ranks, torch 3"],
        "dataset": ["clips 44, sha256 f00d", "clips 45, sha256 beef"],
    }


def test_runs_of_the_same_name_are_told_apart_by_their_parents(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "good", tmp_path / "good")
    pair = [read_run(root / "good"), read_run(tmp_path / "good")]
    assert short_names(pair) == [f"{root.name}/good", f"{tmp_path.name}/good"]


# ------------------------------------------------------------------------------------------------- is it beyond chance


def with_validation(run: Path, to: Path, **changes: object) -> RunFolder:
    folder = shutil.copytree(run, to)
    path = folder / "checkpoints" / "400" / "state.json"
    state = json.loads(path.read_text())
    state["validation"] = {k: v for k, v in (state["validation"] | changes).items() if v is not None}
    path.write_text(json.dumps(state))
    return read_run(folder)


def test_the_same_clips_are_paired(runs: list[RunFolder]) -> None:
    good, bad = (run.state["validation"]["now"] for run in runs)
    changes = [b - a for a, b in zip(good, bad, strict=True)]
    found = contest(*runs)
    assert found.difference == pytest.approx(statistics.mean(changes), rel=1e-9)
    assert found.error == pytest.approx(statistics.stdev(changes) / len(changes) ** 0.5, rel=1e-9)
    assert found.kind == "worse" and contest(*reversed(runs)).kind == "better"
    assert "worse, beyond its error (paired over 4 clips)" in sentence("bad", "good", found)


def test_a_small_difference_is_within_its_error(root: Path, tmp_path: Path, runs: list[RunFolder]) -> None:
    now = runs[0].state["validation"]["now"]
    # Changes +3, -1, +3, -1 (in thousandths): mean 1, standard error 2.309 / 2.
    near = [a + d / 1000 for a, d in zip(now, (3, -1, 3, -1), strict=True)]
    found = contest(runs[0], with_validation(root / "good", tmp_path / "near", now=near))
    assert found.difference == pytest.approx(0.001) and found.error == pytest.approx(0.0023094 / 2, rel=1e-4)
    assert found.kind == "even" and "within its error" in sentence("near", "good", found)


def test_without_newest_losses_the_errors_of_the_same_start_are_added(root: Path, tmp_path: Path) -> None:
    pair = [with_validation(root / name, tmp_path / name, now=None) for name in ("good", "bad")]
    found, deltas = contest(*pair), []
    for run in pair:
        record = [r for r in run.records if "val/delta" in r][-1]
        deltas.append((record["val/delta"], record["val/delta_se"]))
    assert found.difference == pytest.approx(deltas[1][0] - deltas[0][0])
    assert found.error == pytest.approx((deltas[0][1] ** 2 + deltas[1][1] ** 2) ** 0.5)
    assert "an upper bound" in found.words


def test_other_starts_or_no_losses_by_clip_give_no_error(root: Path, tmp_path: Path, runs) -> None:
    other = with_validation(root / "bad", tmp_path / "bad", now=None, start=[0.1, 0.2, 0.3, 0.4])
    found = contest(runs[0], other)
    assert (
        (found.error, found.kind) == (None, "unknown") and found.difference > 0 and "unpaired" in found.words
    )
    (tmp_path / "bad" / "checkpoints" / "400" / "state.json").unlink()
    found = contest(runs[0], read_run(tmp_path / "bad"))
    assert (found.error, found.kind) == (None, "unknown") and "kept no losses by clip" in found.words


def test_other_clips_or_noise_are_not_comparable(root: Path, tmp_path: Path, runs: list[RunFolder]) -> None:
    other = with_validation(root / "bad", tmp_path / "bad", clips=["a", "b", "c", "d"], seed=5)
    found = contest(runs[0], other)
    assert found.difference is None and found.words == "measured with other clips and seed: not comparable"
    assert "cannot be compared" in sentence("bad", "good", found)


# -------------------------------------------------------------------------------------------------- the final numbers


def test_the_best_of_each_row_is_marked_and_none_where_all_are_alike(runs: list[RunFolder]) -> None:
    numbers = {number.name: number for number in final_numbers(runs)}
    assert numbers["val/loss at step 400"].best == {0} and numbers["val/loss, lowest"].best == {0}
    assert numbers["val/delta"].texts[0].startswith("-0.09") and " ± " in numbers["val/delta"].texts[0]
    assert numbers["peak memory, GiB"].texts == ["24.00", "24.00"] and not numbers["peak memory, GiB"].best
    assert numbers["steps"].best == numbers["val/gap"].best == set()
    assert "MFU" not in numbers


def test_runs_of_other_lengths_are_compared_at_a_common_step(root: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "short", steps=200, log_every=50, previews=())
    numbers = {n.name: n for n in final_numbers([read_run(root / "good"), read_run(tmp_path / "short")])}
    assert "val/loss at step 200" in numbers  # of 0, 100, 200, 300, 400 and of 0, 50, 100, 150, 200
    assert None not in numbers["val/loss at step 200"].values
    assert numbers["saturation drift"].texts == ["+100%", ABSENT]


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_page_shows_settings_first_and_needs_nothing_else(root: Path, tmp_path: Path, capsys) -> None:
    assert compare(root / "good", root / "bad", "-o", tmp_path / "out.html", "--traceback") == 0
    printed = capsys.readouterr().out
    page = Page(tmp_path / "out.html")
    assert page.needs_nothing_else()
    assert page.headings == ["What differs", "Curves", "Final numbers", "Previews of the same prompts"]
    assert len([s for s in page.sources if s.startswith("data:video/mp4")]) == 2 * 2
    # One for each metric but mem/rss_gib, which was not measured.
    assert len([s for s in page.sources if s.startswith("data:image/png")]) == 11
    for words in ("train.optimizer.params.lr", "worse, beyond its error", "good, step 400", "bad, step 400"):
        assert words in page.words, words
    assert re.search(r"^train\.optimizer\.params\.lr +0\.001 +0\.01$", printed, re.MULTILINE)
    assert (
        "bad against good: held-out loss higher by 0.19" in printed and str(tmp_path / "out.html") in printed
    )


def test_a_run_without_previews_or_validation_is_compared_in_what_it_has(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "metrics.jsonl").write_text('{"step": 5, "train/loss": 1.0}\n')
    monkeypatch.setattr(comparison_page, "CURVES", comparison_page.CURVES[:2])
    assert compare(tmp_path / "plain", root / "good", "-o", tmp_path / "out.html", "--traceback") == 0
    page = Page(tmp_path / "out.html")
    assert "cannot be compared" in page.words and "good, step 400" in page.words


def test_prompts_beyond_the_size_of_a_page_are_left_out_and_counted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in root.glob("*/previews/400/*.mp4"))
    monkeypatch.setattr(comparison_page, "MAX_MIB", 0.6 * size / 2**20)
    monkeypatch.setattr(comparison_page, "CURVES", ())
    runs = comparison.read_runs([root / "good", root / "bad"])
    comparison_page.write_comparison(runs, tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    assert "1 of 2 prompts are left out" in page.words
    assert len([s for s in page.sources if s.startswith("data:video/mp4")]) == 2


MISTAKES = {
    "a single run": (["{root}/good"], r"1 run to compare: name two or more"),
    "the same run twice": (["{root}/good", "{root}/../{name}/good"], r"is named twice"),
    "a folder that is no run": (["{root}/good", "{tmp}"], r"holds neither config.yaml nor metrics.jsonl"),
    "a folder that is not there": (["{root}/good", "{tmp}/no"], r"is not there"),
    "no metric in common": (["{root}/good", "{tmp}/odd"], r"no metric in common"),
    "an output that is no page": (["{root}/good", "{root}/bad", "-o", "{tmp}/x.pdf"], r"ends in .html"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_no_page(mistake: str, root: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "metrics.jsonl").write_text('{"step": 1, "something": 1.0}\n')
    arguments, message = MISTAKES[mistake]
    argv = [a.format(root=root, tmp=tmp_path, name=root.name) for a in arguments]
    argv += [] if "-o" in argv else ["-o", str(tmp_path / "out.html")]
    assert compare(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.glob("*.html"))
