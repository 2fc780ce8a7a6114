"""Rows of measurements, and the files they are kept in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from geco_fast._backend import LIBRARY
from geco_fast._version import __version__
from geco_fast.bench.limits import Limits, Work

# Distributions of the rivals, whose versions a result names.
PEERS = (
    "conv-lstm",
    "cooper-optim",
    "fireants",
    "flax",
    "FrEIA",
    "jax",
    "monai",
    "neurite",
    "nflows",
    "normflows",
    "pyro-ppl",
    "zuko",
)


@dataclass(frozen=True)
class Row:
    """One comparison: `ratio` is the rival's time over ours, with the quartiles of the pairs.

    Where the rival could not be measured, `unavailable` says why and there are no times. Peaks are
    in bytes of torch's allocator; `run` is the place of the run in the file. On a GPU
    `instruction_set` is its architecture, and `captured` says that replays of a CUDA graph were
    timed instead of calls.
    """

    operator: str
    case: str
    direction: str
    rival: str
    threads: int
    instruction_set: str
    pairs: int = 0
    ours_ms: float | None = None
    rival_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ours_peak_bytes: int | None = None
    rival_peak_bytes: int | None = None
    least_bytes: float | None = None
    least_operations: float | None = None
    copy_bytes_per_s: float | None = None
    fma_operations_per_s: float | None = None
    note: str = ""
    unavailable: str = ""
    run: int = 0
    captured: bool = False

    @property
    def key(self) -> tuple[str, str, str, int, str, bool]:
        """What a later measurement of the same thing replaces."""
        measured = (self.case, self.direction, self.rival)
        return *measured, self.threads, self.instruction_set, self.captured

    @property
    def limit(self) -> tuple[float, str] | None:
        """The least time over ours, and what bounds it."""
        if None in (self.ours_ms, self.least_bytes, self.copy_bytes_per_s):
            return None
        work = Work(self.least_bytes, self.least_operations or 0.0)
        limits = Limits(self.copy_bytes_per_s, self.fma_operations_per_s)
        return 1e3 * limits.seconds(work) / self.ours_ms, limits.bound(work)

    @property
    def verdict(self) -> str:
        """Who is faster; nobody where the quartiles hold 1."""
        if self.ratio_low is None or self.ratio_high is None:
            return ""
        return "faster" if self.ratio_low > 1 else "slower" if self.ratio_high < 1 else "even"


@dataclass(frozen=True)
class ResultFile:
    """Rows, and the runs that they come from: machine, versions, revision and command."""

    runs: list[dict[str, Any]]
    rows: list[Row]

    def merged(self, run: dict[str, Any], rows: Iterable[Row]) -> ResultFile:
        """With the rows of another run, which replace those of the same key."""
        new = {row.key: replace(row, run=len(self.runs)) for row in rows}
        kept = {row.key: row for row in self.rows}
        merged = [*{**kept, **new}.values()]
        runs = [*self.runs, run]
        used = sorted({row.run for row in merged})
        return ResultFile(
            [runs[k] for k in used], [replace(row, run=used.index(row.run)) for row in merged]
        )


def with_run_limits(rows: Sequence[Row]) -> list[Row]:
    """Rows of one run, each with the best limits that the run saw at its number of threads.

    What else runs on a machine only ever lowers them.
    """
    copied: dict[int, float] = {}
    computed: dict[tuple[int, str], float] = {}
    for row in rows:
        level = (row.threads, row.instruction_set)
        copied[row.threads] = max(copied.get(row.threads, 0.0), row.copy_bytes_per_s or 0.0)
        computed[level] = max(computed.get(level, 0.0), row.fma_operations_per_s or 0.0)
    return [
        replace(
            row,
            copy_bytes_per_s=copied[row.threads] or None,
            fma_operations_per_s=computed[row.threads, row.instruction_set] or None,
        )
        for row in rows
    ]


def read(path: Path) -> ResultFile:
    """Read a file of results; empty if there is none."""
    if not path.exists():
        return ResultFile([], [])
    content = json.loads(path.read_text())
    return ResultFile(content["runs"], [Row(**row) for row in content["rows"]])


def write(path: Path, results: ResultFile) -> None:
    """Write a file of results."""
    content = {"runs": results.runs, "rows": [asdict(row) for row in results.rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The source's revision, marked if code changed since; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    # Results that an earlier run of the same session wrote change nothing that is measured.
    code = ["csrc", "geco_fast", "kernels", "setup.py", "bench", ":(exclude)bench/results"]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], check=False)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("-dirty" if same.returncode else "")


def _gpu() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": metadata.version("triton"),
    }


def environment(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, revision and command of a run; of files the command keeps the name."""
    words = (Path(word).name if "/" in word else word for word in sys.argv[1:])
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "command": " ".join(("geco-fast", *words)),
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        **({} if device == "cpu" else _gpu()),
        "instruction_sets": LIBRARY.instruction_sets() if LIBRARY else [],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "geco_fast": __version__,
        "peers": {name: installed[name] for name in PEERS if name in installed},
    }
