"""The run folder's account of what happened."""

from __future__ import annotations

from pathlib import Path

from cogvideox.engine.events import Events, read_events


def test_events_are_appended_and_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    Events(tmp_path / "run").write("started", ranks=2)
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "kind": "skip')
    Events(tmp_path / "run").write("skipped_step", step=7, clips=["a.mp4"])
    events = read_events(tmp_path / "run")
    assert [event["kind"] for event in events] == ["started", "skipped_step"]
    assert events[1]["clips"] == ["a.mp4"] and events[0]["time"] <= events[1]["time"]
