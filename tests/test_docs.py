"""The documents say what the code does."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import geco_fast as gf
from geco_fast._backend import BACKENDS
from geco_fast._checks import FLOATING
from geco_fast._registry import KERNELS
from geco_fast.bench import report, results
from geco_fast.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "ops").glob("*.md"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code(text: str) -> list[str]:
    """The fenced blocks of a document, then its inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))


def table(path: Path, header: str) -> list[list[str]]:
    """Rows of the Markdown table whose first column is called ``header``."""
    lines = iter(path.read_text().splitlines())
    for line in lines:
        if line.startswith(f"| {header} |"):
            break
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def sources() -> list[Path]:
    """The package's Python files, wherever their folders lie."""
    folders = ("geco_fast", "bench", "kernels")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


@each_document
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace, in their order, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {"__name__": document.stem}
    with torch.random.fork_rng(devices=[]):
        for k, block in enumerate(blocks):
            exec(compile(block, f"{document.name}[{k}]", "exec"), namespace)


def test_readme_examples_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("```python\n") == 2
    assert "gf.GECO(" in text
    assert "gf.nn.ConvDraw(" in text


def support_matrix() -> list[str]:
    """The README's rows: what each backend takes of each operator."""
    shorts = dict(zip(FLOATING, ("f32", "f64", "bf16", "f16"), strict=True))
    lines = [f"| operator | {' | '.join(BACKENDS[1:])} |", "|---" * len(BACKENDS) + "|"]
    for name in sorted(set(gf.ops.__all__) - {"PreparedWeight"}):
        takes = {"reference": FLOATING, **KERNELS.get(name, {})}
        cells = (takes.get(backend, ()) for backend in BACKENDS[1:])
        shown = (" ".join(shorts[dtype] for dtype in cell) or "no" for cell in cells)
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return lines


def test_support_matrix_is_the_registry() -> None:
    rows = "\n".join(support_matrix())
    assert rows in (ROOT / "README.md").read_text(), f"the README's matrix should be\n{rows}"


def test_every_operator_has_its_page() -> None:
    stems = {getattr(gf.ops, name).__module__.rpartition(".")[2] for name in gf.ops.__all__}
    assert {page.stem for page in PAGES} == stems


def test_pages_have_the_same_headings() -> None:
    headings = {tuple(re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)) for page in PAGES}
    assert len(headings) == 1, headings


@each_document
def test_local_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [link for link in links if not re.match(r"\w+:", link)]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert not missing


@each_document
def test_commands_exist(document: Path) -> None:
    made = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = set(made[0].split())
    for piece in code(document.read_text()):
        for name in re.findall(r"(?:geco-fast|-m geco_fast) ([a-z][a-z-]*)", piece):
            assert name in cli.commands, piece
        for name in re.findall(r"^make ([a-z-]+)", piece, re.MULTILINE):
            assert name in targets, piece


def test_environment_variables_are_those_that_are_read() -> None:
    read = set()
    for path in [*sources(), ROOT / "setup.py"]:
        text = path.read_text()
        read |= set(re.findall(r'environ(?:\.get)?[(\[]"(\w+)"', text))
        read |= set(re.findall(r'"(\w+)" in os\.environ', text))
    rows = table(ROOT / "docs" / "env.md", "variable")
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[0])} == read


def imports(path: Path) -> list[str]:
    """Modules, and names in modules, that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_imports_follow_the_layers() -> None:
    rows = table(ROOT / "docs" / "architecture.md", "layer")
    layer = {name: int(row[0]) for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    upward = []
    for path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = parts[1] if parts[0] == "geco_fast" else parts[0]
        if name in ("__init__", "__main__", "kernels"):
            continue
        for module in imports(path):
            package, other = f"{module}.".split(".")[:2]
            if package == "geco_fast" and layer.get(other, layer[name]) < layer[name]:
                upward.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not upward


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, example],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@each_document
def test_tables_of_results_are_those_measured(document: Path) -> None:
    text = document.read_text()
    marks = re.findall(r"^<!-- results:", text, re.MULTILINE)
    assert len(report.MARKED.findall(text)) == len(marks)
    assert report.rendered(text) == text, "run `geco-fast bench --render`"


def test_chart_is_that_of_the_results() -> None:
    rows = report.headline(results.read(report.RESULTS / report.HEADLINE).rows)
    drawn = ElementTree.parse(report.CHART).getroot()
    (description,) = drawn.iter("{http://purl.org/dc/elements/1.1/}description")
    assert description.text == report.description(rows), "run `geco-fast bench --render`"


def test_every_result_is_shown_in_a_document() -> None:
    shown = {
        (name, word)
        for document in DOCUMENTS
        for _, name, words, _ in report.MARKED.findall(document.read_text())
        for word in words.split()
    }
    for path in sorted(report.RESULTS.glob("*.json")):
        kept = results.read(path)
        assert {(path.name, row.operator) for row in kept.rows} <= shown
        assert (path.name, "machine") in shown
        for run in kept.runs:
            assert run["command"]
            assert run["commit"]
            assert "dirty" not in run["commit"]
