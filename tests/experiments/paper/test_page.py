from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from geco_fast.experiments.paper import EXPERIMENTS, page


def test_the_page_shows_every_experiment() -> None:
    text = page.PAGE.read_text()
    found = {match[2]: match[0] for match in page.MARKED.finditer(text)}
    assert list(found) == list(EXPERIMENTS)
    for name, shown in found.items():
        assert re.search(rf"`geco-fast experiment {name}\b", shown), f"{name} has no results"
        assert (page.PAGE.parent / "paper" / f"{name}.png").exists()


def test_results_go_between_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "paper.md")
    marks = "<!-- experiment: {} -->\nold\n<!-- end of experiment -->\n"
    page.PAGE.write_text(f"above\n{marks.format('fig2')}between\n{marks.format('fig3')}")
    folder = tmp_path / "runs" / "fig2"
    folder.mkdir(parents=True)
    Image.new("RGB", (3, 2), "red").save(folder / "figure.png")
    content = {
        "title": "a title",
        "command": "geco-fast experiment fig2",
        "config": {"seeds": [0, 1, 2, 3, 4, 5]},
        "versions": {"geco_fast": "0", "torch": "2"},
        "claims": [{"statement": "so", "verdict": "holds", "numbers": "1 | 2"}],
    }
    (folder / "results.json").write_text(json.dumps(content))
    page.main([str(tmp_path / "runs")])
    text = page.PAGE.read_text()
    for part in ("above\n", "between\n", "| so | holds | 1 \\| 2 |", "fig2.png)", "about 2 min"):
        assert part in text
    # What has no results stays.
    assert text.endswith(marks.format("fig3"))
    with Image.open(tmp_path / "paper" / "fig2.png") as picture:
        assert picture.size == (3, 2)
        assert picture.convert("RGB").getpixel((1, 1)) == (255, 0, 0)
