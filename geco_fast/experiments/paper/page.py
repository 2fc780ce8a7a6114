"""``python -m geco_fast.experiments.paper.page FOLDER``: the results' part of docs/paper.md.

Takes the experiments that are in the folder; what is written by hand around them stays.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from geco_fast.experiments.paper import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "paper.md"
MARKED = re.compile(r"(<!-- experiment: (\S+) -->\n).*?(<!-- end of experiment -->)", re.DOTALL)


def block(name: str, content: dict[str, Any]) -> str:
    """Claims with their verdicts and numbers, the figure, and how it was made."""
    lines = ["| claim | verdict | numbers |", "| --- | --- | --- |"]
    for claim in content["claims"]:
        numbers = claim["numbers"].replace("|", "\\|")
        lines.append(f"| {claim['statement']} | {claim['verdict']} | {numbers} |")
    versions = content["versions"]
    made = f"geco_fast {versions['geco_fast']}, torch {versions['torch']}"
    minutes = EXPERIMENTS[name].minutes_with(len(content["config"]["seeds"]))
    return "\n".join(
        [
            *lines,
            "",
            f"![{content['title']}](paper/{name}.png)",
            "",
            f"`{content['command']}`: {made}, about {minutes} min on two cores.",
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """Write the page and its figures."""
    (folder,) = map(Path, arguments)

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        found = folder / name / "results.json"
        if name not in EXPERIMENTS or not found.exists():
            return match[0]
        picture = PAGE.parent / "paper" / f"{name}.png"
        picture.parent.mkdir(exist_ok=True)
        # A palette is a third of the size, and looks the same.
        with Image.open(folder / name / "figure.png") as figure:
            figure.convert("RGB").quantize(128).save(picture, optimize=True)
        return f"{match[1]}\n{block(name, json.loads(found.read_text()))}\n\n{match[3]}"

    PAGE.write_text(MARKED.sub(fill, PAGE.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
