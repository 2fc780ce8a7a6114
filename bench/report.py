"""What a benchmark shows: tables, the bar chart, and both within the documents."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from geco_fast.bench.results import ResultFile, Row, read

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CHART = ROOT / "docs" / "speed.svg"
# Of which file the README's table and chart are made.
HEADLINE = "zen5-avx512.json"
MARKED = re.compile(r"(<!-- results: (\S+) (.+?) -->\n).*?(<!-- end of results -->)", re.DOTALL)
NONE_YET = "No results yet.\n"

LEGEND = """\
Ratio: the rival's time over ours, median of the pairs (quartiles); "even" where the quartiles
hold 1. Noise: the quartiles of ours against itself. Limit: the least time of the work on this
machine over ours, and what sets it; above 1, the data came from the cache, not from memory.
Memory: peak in torch's allocator during one call, ours / the rival's."""


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "?"
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return f"not measured: {row.unavailable}"
    return f"{row.ratio:.2f} {row.verdict} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"


def _limit(row: Row) -> str:
    return "" if row.limit is None else f"{row.limit[0]:.2f} {row.limit[1]}"


def _memory(row: Row) -> str:
    if row.ratio is None or row.ours_peak_bytes is None:
        return ""
    return f"{_bytes(row.ours_peak_bytes)} / {_bytes(row.rival_peak_bytes)}"


def _noise(row: Row, rows: Sequence[Row]) -> str:
    for own in rows:
        if own.key == (*row.key[:2], "self", *row.key[3:]) and own.ratio is not None:
            return f"{own.ratio_low:.2f} to {own.ratio_high:.2f}"
    return ""


Column = tuple[str, Callable[[Row, Sequence[Row]], str]]
COLUMNS: list[Column] = [
    ("case", lambda row, _: row.case),
    ("direction", lambda row, _: row.direction + (", CUDA graph" if row.captured else "")),
    ("threads", lambda row, _: str(row.threads)),
    ("against", lambda row, _: row.rival),
    ("ours, ms", lambda row, _: _ms(row.ours_ms)),
    ("theirs, ms", lambda row, _: _ms(row.rival_ms)),
    ("ratio", lambda row, _: _ratio(row)),
    ("noise", _noise),
    ("limit", lambda row, _: _limit(row)),
    ("memory", lambda row, _: _memory(row)),
]


def table(rows: Sequence[Row], *, leave_out: Sequence[str] = ()) -> list[list[str]]:
    """Header and cells. Ours against itself is the column of noise, unless it is all there is."""
    columns = [column for column in COLUMNS if column[0] not in leave_out]
    shown = [row for row in rows if row.rival != "self"] or list(rows)
    return [
        [name for name, _ in columns],
        *([render(row, rows) for _, render in columns] for row in shown),
    ]


def markdown(rows: Sequence[Row], *, leave_out: Sequence[str] = ()) -> str:
    """The table as Markdown, with the notes on rivals below it."""
    header, *cells = table(rows, leave_out=leave_out)
    lines = [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *cells)]
    if found := notes(rows):
        lines += ["", *found]
    return "\n".join(lines) + "\n"


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know of the rivals, a line each."""
    found = {row.rival: row.note for row in rows if row.note}
    return [f"- {rival}: {note}" for rival, note in found.items()]


def headline(rows: Sequence[Row]) -> list[Row]:
    """Of each case, forward and backward on one thread, the row of the fastest rival."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.direction != "forward+backward" or row.threads != 1 or row.rival == "self":
            continue
        if row.ratio is not None and row.ratio < getattr(best.get(row.case), "ratio", math.inf):
            best[row.case] = row
    return [*best.values()]


def machine(results: ResultFile) -> str:
    """The runs of a file: what they ran on and the limits that they saw."""
    parts = []
    for k, run in enumerate(results.runs):
        peers = ", ".join(f"{name} {version}" for name, version in run.get("peers", {}).items())
        parts += [
            f"`{run['command']}`",
            "",
            f"- {_hardware(run)}; Python {run['python']}, torch {run['torch']}, "
            f"geco_fast {run['geco_fast']} at {run['commit']}",
            *([f"- {peers}"] if peers else []),
        ]
        limits = {
            (row.threads, row.instruction_set): (row.copy_bytes_per_s, row.fma_operations_per_s)
            for row in results.rows
            if row.run == k and row.copy_bytes_per_s is not None
        }
        for (threads, level), (copied, operations) in sorted(limits.items()):
            peak = (
                f", {operations / 1e9:.0f} GFLOP/s of {level} multiply-adds" if operations else ""
            )
            plural = "s" if threads > 1 else ""
            parts.append(f"- {threads} thread{plural}: copies {copied / 1e9:.1f} GB/s{peak}")
        parts.append("")
    return "\n".join(parts)


def _hardware(run: dict[str, Any]) -> str:
    processor = f"{run['processor']}, {run['cores']} cores, {', '.join(run['instruction_sets'])}"
    if "device" not in run:
        return processor
    return f"{run['device']}, CUDA {run['cuda']}, Triton {run['triton']}, beside {processor}"


def block(results: ResultFile, what: Sequence[str]) -> str:
    """What stands in a document: "headline", "machine", or the rows of operators or modules."""
    if not results.rows:
        return NONE_YET
    if list(what) == ["machine"]:
        return machine(results)
    if list(what) == ["headline"]:
        chosen = headline(results.rows)
        shown = [*chosen, *(row for row in results.rows if row.rival == "self")]
        return markdown(shown, leave_out=("direction", "threads")) if chosen else NONE_YET
    chosen = [row for row in results.rows if row.operator in what]
    return markdown(chosen) if chosen else NONE_YET


def rendered(text: str) -> str:
    """A document's text with what stands between its marks made anew.

    A mark is ``<!-- results: FILE WHAT... -->``, a file of `bench/results` and what of it (see
    `block`); ``<!-- end of results -->`` ends it.
    """

    def fill(match: re.Match[str]) -> str:
        body = block(read(RESULTS / match[2]), match[3].split())
        return f"{match[1]}\n{body.rstrip()}\n\n{match[4]}"

    return MARKED.sub(fill, text)


def documents() -> list[Path]:
    """Where marks may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def render() -> list[Path]:
    """Make tables and chart from the committed results; returns the files that changed."""
    changed = []
    for path in documents():
        before = path.read_text()
        after = rendered(before)
        if after != before:
            path.write_text(after)
            changed.append(path)
    before_chart = CHART.read_text() if CHART.exists() else ""
    draw(headline(read(RESULTS / HEADLINE).rows), CHART)
    if CHART.read_text() != before_chart:
        changed.append(CHART)
    return changed


def description(rows: Sequence[Row]) -> str:
    """What a chart holds in words; the drawing carries it, so that a test can compare."""
    return "; ".join(
        f"{row.case} against {row.rival}: {_ratio(row)}" for row in rows if row.ratio is not None
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a bar for each row, as long as its ratio, with the quartiles, to an SVG file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.ratio is not None]
    colours = {"faster": "#2a7f62", "even": "#8a8a8a", "slower": "#b5482f"}
    # Text as text and fixed ids: the same rows make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "geco_fast"}):
        figure = Figure(figsize=(8, 0.9 + 0.27 * max(1, len(rows))), layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.add_subplot()
        ratios: list[Any] = [row.ratio for row in rows]
        spread: list[Any] = [
            [r.ratio - r.ratio_low for r in rows],
            [r.ratio_high - r.ratio for r in rows],
        ]
        # Bars start at 1, where both are as fast.
        axes.barh(
            range(len(rows)),
            [ratio - 1 for ratio in ratios],
            left=1,
            height=0.7,
            xerr=spread if rows else None,
            color=[colours[row.verdict] for row in rows],
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )
        axes.axvline(1, color="#333333", linewidth=1)
        axes.set_xscale("log", base=2)
        low, high = min([1.0, *ratios]), max([1.0, *ratios])
        axes.set_xlim(low / 1.5, high * 1.9)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks(range(len(rows)), [row.case for row in rows], fontsize=7)
        axes.invert_yaxis()
        for k, row in enumerate(rows):
            right = max(1.0, row.ratio_high)
            text = f" {row.ratio:.2g} against {row.rival}"
            axes.text(right, k, text, va="center", fontsize=7)
        axes.set_xlabel("the best rival's time over ours: to the right of 1 we are faster")
        axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None, "Description": description(rows)}
        figure.savefig(path, format="svg", metadata=metadata)
