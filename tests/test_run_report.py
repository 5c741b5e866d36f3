"""report.html and the plots of a run: complete in one file, only what the run has, whatever state the folder is in."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from pages import Page
from PIL import Image
from run_folders import make_run

from cogvideox.command_line import run_door
from cogvideox.report import plots, previews, run_report
from cogvideox.report.run_folder import read_run
from cogvideox.report.run_report import report_page, write_report, write_report_if_possible
from cogvideox.report.series import at_same_steps, names, series, smooth, thinned
from cogvideox.report.settings import changed_from_files, yaml_files
from cogvideox.report.verdict import verdict
from cogvideox.sampling.preview_sheet import write_preview_sheet
from scripts import report

ALL = {plot.name for plot in plots.PLOTS}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything, and its report."""
    folder = make_run(tmp_path_factory.mktemp("reports") / "run")
    write_preview_sheet(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


def bare(folder: Path, *records: dict) -> Path:
    """A run folder with nothing but these lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def text_page(folder: Path) -> Page:
    """The page without its plots, which take the time."""
    path = folder / "report.html"
    path.write_text(report_page(read_run(folder), {}), encoding="utf-8")
    return Page(path)


def drawn(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "plots").glob("*.png")}


# -------------------------------------------------------------------------------------------------------- the page


def test_the_page_opens_without_anything_beside_it(page: Page) -> None:
    assert page.needs_nothing_else()
    assert len([s for s in page.sources if s.startswith("data:image/png")]) == len(ALL) + 1  # and the sheet
    assert len([s for s in page.sources if s.startswith("data:video/mp4")]) == 2 * 3


def test_a_run_with_everything_has_every_section_and_every_plot(run: Path, page: Page) -> None:
    assert page.headings == [
        "Curves",
        "Previews",
        "Configuration",
        "Commands, versions, dataset",
        "Clips put aside",
        "Events",
        "Time and memory",
        "All numbers",
    ]
    assert drawn(run) == ALL
    for words in ("skipped_step", "rank 0: loss nan", "1 h 00 min", "30.50", "f00d", "0.2305 at step 400"):
        assert words in page.words, words


def test_what_people_wrote_is_shown_and_not_run(page: Page) -> None:
    assert "a blue square & <b>moving</b> up (seed 1)" in page.words
    assert "<damaged>" in page.words and "damaged" not in page.tags


def test_a_run_that_has_just_begun_has_a_page_without_empty_sections(tmp_path: Path) -> None:
    folder = bare(tmp_path / "new")
    write_report(folder)
    page = Page(folder / "report.html")
    assert page.headings == ["Curves"] and "Nothing is logged yet" in page.words
    assert page.needs_nothing_else() and drawn(folder) == set()


def test_the_settings_that_the_command_changed_are_listed_with_their_old_values(run: Path) -> None:
    files, changed = changed_from_files(read_run(run))
    assert [Path(file).name for file in files] == ["tiny_t2v.yaml"]
    changed.pop("run.dir")
    assert changed == {
        "load.transformer": (None, "runs/base"),
        "train.steps": (2800, 400),
        "train.optimizer.params.lr": (3e-3, 1e-3),
    }
    assert yaml_files("python x.py --base a.yaml b.yaml run.dir=x --seed 3") == ["a.yaml", "b.yaml"]
    assert yaml_files("python x.py 'unfinished") == []


def test_a_configuration_of_another_version_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = bare(tmp_path / "old", {"step": 1, "train/loss": 1.0})
    (folder / "config.yaml").write_text("a_key_of_old: 3\n")
    (folder / "command.txt").write_text("train_video.py --base nowhere.yaml\n")
    words = text_page(folder).words
    assert "a_key_of_old: 3" in words and "without what is a default" not in words


def test_videos_beyond_the_size_of_a_page_are_left_out_and_counted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    size = sum(path.stat().st_size for path in (folder / "previews").glob("*/*.mp4"))
    monkeypatch.setattr(previews, "MAX_MIB", 0.8 * size / 2**20)
    page = text_page(folder)
    assert "Videos of 2 of 3 steps (0, 400): the others are left out" in page.words
    assert len([s for s in page.sources if s.startswith("data:video/mp4")]) == 4
    monkeypatch.setattr(previews, "MAX_MIB", 0)
    page = text_page(folder)
    assert "Videos of 0 of 3 steps: the others are left out" in page.words
    assert not any(source.startswith("data:video") for source in page.sources)


def test_a_file_that_cannot_be_read_is_named_on_the_page(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "summary.json").write_text('{"steps": 4')
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 401, "train/lo')  # being written
    words = text_page(folder).words
    assert "cannot be read: summary.json" in words and "metrics.jsonl:" not in words
    assert "Time and memory" not in words and "401" not in words


def test_many_events_are_cut_in_the_middle_and_counted(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    lines = [json.dumps({"time": i, "kind": "skipped_step", "step": i, "id": f"e{i}."}) for i in range(500)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    words = text_page(folder).words
    assert "300 of 500 in the middle are left out" in words
    assert "id: e0." in words and "id: e499." in words and "id: e200." not in words


# ------------------------------------------------------------------------------------------------------ the verdict


def line(step: int, delta: float, error: float | None = 0.01, **others: float) -> dict:
    return {"step": step, "val/loss": 0.5 + delta, "val/delta": delta, "val/delta_se": error, **others}


@pytest.mark.parametrize(
    ("delta", "kind", "words"),
    [
        (
            -0.0300,
            "better",
            "Better than before training: at step 9 the held-out loss is lower by 0.0300 ± 0.0100",
        ),
        (
            0.0300,
            "worse",
            "Worse than before training: at step 9 the held-out loss is higher by 0.0300 ± 0.0100",
        ),
        (
            -0.0150,
            "even",
            "No difference from before training beyond its error: at step 9 the held-out loss is lower",
        ),
    ],
)
def test_the_verdict_is_better_or_worse_only_beyond_the_error(
    tmp_path: Path, delta: float, kind: str, words: str
) -> None:
    folder = bare(
        tmp_path, line(0, 0.0, 0.0), line(9, delta, **{"val/gap": 0.02, "train/skipped_steps": 3.0})
    )
    found = verdict(read_run(folder))
    assert found.kind == kind and found.sentence.startswith(words)
    assert "the gap to training clips is +0.0200" in found.sentence
    assert found.sentence.endswith("It did 9 steps, skipped 3 of them, and put 0 clips aside.")


def test_without_an_error_or_held_out_clips_nothing_is_claimed(tmp_path: Path) -> None:
    one_clip = bare(tmp_path / "one", line(0, 0.0, None), line(9, -0.3, None))
    found = verdict(read_run(one_clip))
    assert (
        found.kind == "unknown"
        and "0.2000 at step 9 (0.5000 at step 0), with no error known" in found.sentence
    )
    none = verdict(read_run(bare(tmp_path / "none", {"step": 4, "train/loss": 1.0})))
    assert none.kind == "unknown" and "no held-out clips (data.validation_path" in none.sentence
    only_start = verdict(read_run(bare(tmp_path / "start", line(0, 0.0, 0.0))))
    assert only_start.kind == "unknown"


@pytest.mark.parametrize("kind", ["failed", "stopped", "stalled"])
def test_the_verdict_says_how_an_unfinished_run_ended(run: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": 1, "kind": kind}) + "\n")
    assert kind not in verdict(read_run(folder)).sentence  # all 400 steps are done
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("steps: 400", "steps: 999"))
    assert (
        f"400 of 999 steps and {'then' if kind != 'stopped' else 'was'} {kind}"
        in verdict(read_run(folder)).sentence
    )


# -------------------------------------------------------------------------------------------------------- the plots


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"train/loss": 0.5}, {"loss"}),
        ({"val/loss": 0.5}, {"loss"}),
        ({"train/grad_norm": 1.0, "train/lr": 1e-4}, {"grad_norm", "learning_rate"}),
        ({"train/update_ratio/mlp": 1e-3, "train/grad_norm/mlp": 1.0}, {"update_ratio", "grad_norm"}),
        ({"val/delta": -0.1, "val/delta_se": None, "val/gap": 0.1}, {"delta", "gap"}),
        ({"perf/step_s": 1.0}, {"step_time"}),
        ({"mem/rss_gib": 1.0, "mem/train_rss_gib": 0.9}, {"memory"}),
        ({"preview/saturation": 0.1}, {"looks"}),
        (
            {"train/loss_by_t/0000-0249": 1.0, "val/loss_by_t/0999": 1.0},
            {"loss_by_timestep", "val_loss_by_timestep"},
        ),
        ({"train/loss": None, "perf/step_s": None}, set()),
    ],
    ids=lambda value: " ".join(sorted(value)) or "nothing",
)
def test_one_point_is_drawn_and_nothing_without_one(tmp_path: Path, record: dict, expected: set[str]) -> None:
    folder = bare(tmp_path, {"step": 3, **record})
    plots.draw_plots(read_run(folder))
    assert drawn(folder) == expected
    for name in expected:
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert picture.size == (930, 495) and len(picture.getcolors()) > 3


def test_a_plot_without_data_any_more_is_removed(tmp_path: Path) -> None:
    folder = bare(tmp_path, {"step": 1, "train/loss": 1.0, "train/lr": 1.0})
    plots.draw_plots(read_run(folder))
    bare(tmp_path, {"step": 1, "train/loss": 1.0})
    plots.draw_plots(read_run(folder))
    assert drawn(folder) == {"loss"}


def test_a_restart_is_a_line_through_the_curves(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "PLOTS", [plot for plot in plots.PLOTS if plot.name == "learning_rate"])
    folder = shutil.copytree(run, tmp_path / "run")
    with_line = np.array(Image.open(folder / "plots" / "learning_rate.png").convert("L"))
    assert read_run(folder).restarts == [200]
    (folder / "events.jsonl").unlink()
    plots.draw_plots(read_run(folder))
    without = np.array(Image.open(folder / "plots" / "learning_rate.png").convert("L"))
    columns = np.flatnonzero((np.abs(with_line.astype(int) - without) > 20).sum(axis=0) > 60)
    # Step 200 of a curve from 5 to 400, in the middle of the axes (10.5 % to 98 % of 930 pixels), one or two wide.
    assert (
        0 < len(columns) <= 3
        and abs(columns.mean() - 930 * (0.105 + 0.875 * (0.0455 + 0.909 * 195 / 395))) < 4
    )


def test_thousands_of_points_with_gaps_are_drawn(tmp_path: Path) -> None:
    records = [{"step": i, "train/loss": None if i % 7 == 0 else 1 / (i + 1), "perf/step_s": 1.0, "perf/data_s": 0.1}
               for i in range(1, 5000)]  # fmt: skip
    folder = bare(tmp_path, *records)
    plots.draw_plots(read_run(folder))
    assert drawn(folder) == {"loss", "step_time"}


def test_series_leave_out_what_is_null_and_join_what_has_the_same_steps() -> None:
    records = [{"step": 1, "a": 1.0, "b": None}, {"step": 2, "b": 3.0, "a": 2.0}, {"step": 3, "a/x": None}]
    assert series(records, "a").tolist() == [[1, 1], [2, 2]] and series(records, "c").shape == (0, 2)
    assert at_same_steps(records, ["a", "b"])["step"].tolist() == [2]
    assert names(records, "a") == ["a"]
    values = np.arange(2000.0).reshape(1000, 2)
    assert thinned(values, 10).shape == (10, 2) and thinned(values, 10).mean() == pytest.approx(values.mean())


def test_smoothing_is_unbiased_from_the_first_point() -> None:
    assert smooth(np.full(50, 3.0), 10.0) == pytest.approx([3.0] * 50)


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_the_report_of_a_run_that_still_trains(tmp_path: Path, capsys) -> None:
    folder = bare(tmp_path / "run", {"step": 3, "train/loss": 1.0})
    assert run_door(report.main, [str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert Page(folder / "report.html").needs_nothing_else()


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere", "is not there"), ("empty", "holds neither config.yaml")]
)
def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path: Path, capsys, name: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    assert run_door(report.main, [str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert reason in error and "expected a run folder that train_video.py wrote" in error
    assert error.count("\n") == 1 and not list(tmp_path.glob("*/*"))


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: object) -> None:
        raise MemoryError("no room for a picture")

    folder = bare(tmp_path, {"step": 1, "train/loss": 1.0})
    monkeypatch.setattr(run_report, "draw_plots", fail)
    with caplog.at_level(logging.INFO, logger="cogvideox"):
        write_report_if_possible(folder)
    assert "the report could not be written (MemoryError: no room for a picture)" in caplog.text
    assert f"python -m scripts.report {folder}" in caplog.text and not (folder / "report.html").exists()
