"""What the documentation says can be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_sampling_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (example,) = python_blocks("sampling.md")
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(compile(example, "docs/sampling.md", "exec"), names)
    assert names["edited"].shape == names["video"].shape
    assert torch.isfinite(names["edited"]).all() and not torch.equal(names["edited"], names["video"])
    assert "denoise 1 1" in capsys.readouterr().out  # half of two steps


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
def test_links_and_pictures_of_a_page_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    places = re.findall(r"\]\(([^)#\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [
        place for place in places if "://" not in place and not ((ROOT / page).parent / place).exists()
    ]
    assert not missing


def test_the_table_of_communication_is_the_planner_s() -> None:
    from scripts.plan_cluster import rows

    assert "\n".join(rows()) in (ROOT / "docs" / "cluster.md").read_text()
