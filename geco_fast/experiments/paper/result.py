"""What an experiment gives: rows of numbers, a figure, and each claim with its verdict."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from geco_fast._version import __version__
from geco_fast.experiments.checkpoint import write_atomically

Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper's, and what the numbers say."""

    statement: str
    holds: bool
    numbers: str

    def __post_init__(self) -> None:
        # NumPy's own is no JSON.
        object.__setattr__(self, "holds", bool(self.holds))

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "does not hold"

    def __str__(self) -> str:
        return f"{self.statement}: {self.verdict} ({self.numbers})"


@dataclass(frozen=True)
class Result:
    """Rows with one set of columns, and the figure."""

    rows: Sequence[Row]
    figure: Figure


def write(
    folder: Path,
    result: Result,
    claims: Sequence[Claim],
    config: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    """Write ``figure.png``, ``figure.svg``, ``results.csv`` and ``results.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, options in (("png", {"dpi": 120}), ("svg", {"metadata": {"Date": None}})):
        image = io.BytesIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "geco_fast"}):
            result.figure.savefig(image, format=kind, bbox_inches="tight", **options)
        write_atomically(folder / f"figure.{kind}", image.getvalue())
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in result.rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.rows)
    write_atomically(folder / "results.csv", text.getvalue().encode())
    content = {
        **about,
        "versions": {
            "geco_fast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "config": config,
        "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in claims],
        "rows": result.rows,
    }
    write_atomically(folder / "results.json", (json.dumps(content, indent=1) + "\n").encode())
