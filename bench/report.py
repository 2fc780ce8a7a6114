"""What a benchmark prints and writes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from geco_fast._backend import LIBRARY
from geco_fast._version import __version__
from geco_fast.bench.paired import Row


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The source's revision, with a mark if it was changed since; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, object]:
    """Machine, versions, revision and command of a result; of files the command keeps the name."""
    words = (Path(word).name if "/" in word else word for word in sys.argv[1:])
    return {
        "command": " ".join(("geco-fast", *words)),
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "instruction_sets": LIBRARY.instruction_sets() if LIBRARY else [],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "geco_fast": __version__,
    }


def markdown(rows: list[Row]) -> str:
    """Render rows as a Markdown table; ratios above 1 mean that we are faster."""
    lines = [
        "| case | direction | threads | against | ours, ms | theirs, ms | ratio (quartiles) |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.case} | {r.direction} | {r.threads} | {r.rival} | {r.ours_ms:.3f} | "
        f"{r.rival_ms:.3f} | {r.ratio:.2f} ({r.ratio_low:.2f} to {r.ratio_high:.2f}) |"
        for r in rows
    ]
    return "\n".join(lines)


def write_json(path: Path, rows: list[Row]) -> None:
    """Write rows with the environment they were measured in."""
    content = {"environment": environment(), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
