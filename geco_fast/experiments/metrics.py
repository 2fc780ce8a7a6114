"""The record of a run: ``metrics.csv``, TensorBoard, and a line or a live table to watch."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from geco_fast.experiments.checkpoint import write_atomically
from geco_fast.experiments.config import TrainConfig

TIME_COLUMNS = ("seconds", "images_per_second")


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of ``metrics.csv``, each a float64 array over its rows."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    values = np.array(rows, dtype=float).reshape(len(rows), len(header))
    return dict(zip(header, values.T, strict=True))


class MetricsLog:
    """Rows of scalars, in ``metrics.csv`` and in TensorBoard.

    Parameters
    ----------
    out
        Folder of the run.
    step
        The step from which the run goes on; later rows, of a run that was killed, are dropped.
    """

    def __init__(self, out: Path, step: int = 0) -> None:
        path = out / "metrics.csv"
        kept = [line for line in self._lines(path) if self._step(line) <= step] if step else []
        write_atomically(path, "".join(kept).encode())
        self._columns = kept[0].strip().split(",") if kept else None
        self.seconds = float(kept[-1].split(",")[1]) if len(kept) > 1 else 0.0
        self._file = path.open("a", newline="")
        self._board = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    @staticmethod
    def _lines(path: Path) -> list[str]:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [line for line in lines if line.endswith("\n")]

    @staticmethod
    def _step(line: str) -> int:
        step = line.partition(",")[0]
        return 0 if step == "step" else int(step)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; its keys, ``step`` and ``seconds`` first, are the columns of all rows."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if self._columns is None:
            self._columns = list(row)
            writer.writerow(self._columns)
        writer.writerow([row[column] for column in self._columns])
        self._file.write(text.getvalue())
        for column, value in row.items():
            if column != "step":
                self._board.add_scalar(column, value, int(row["step"]))

    def sync(self) -> None:
        """Bring every row to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Write what is left and close the files."""
        self._file.close()
        self._board.close()


class Display:
    """Shows how a run goes: a live table on a terminal, plain lines elsewhere."""

    def __init__(self, config: TrainConfig, step: int, *, console: Console | None = None) -> None:
        self._config, self._first = config, step
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False)
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, row: Mapping[str, float]) -> None:
        """Show a row of the log; plain lines come at most every two seconds."""
        now = time.monotonic()
        done = int(row["step"])
        last = done + self._config.log_every > self._config.steps
        fields = self._fields(row, (now - self._started) / (done - self._first))
        if self._console.is_terminal:
            table = Table("step", *fields)
            table.add_row(f"{done}/{self._config.steps}", *fields.values())
            self._live.update(table, refresh=True)
        elif done == 1 or last or now > self._said + 2:
            self._said = now
            parts = "  ".join(f"{name} {value}" for name, value in fields.items())
            self._console.print(f"step {done}/{self._config.steps}  {parts}")

    def _fields(self, row: Mapping[str, float], seconds_per_step: float) -> dict[str, str]:
        left = round((self._config.steps - row["step"]) * seconds_per_step)
        fields = {"RE": f"{row['re']:.5f}"}
        for name, kappa in self._config.constraints.items():
            if name == "re":
                fields["RE"] += f" (kappa^2 {kappa**2:.5f})"
            else:
                fields[f"C {name}"] = f"{row[f'constraint_{name}']:+.4f}"
        fields["KL"] = f"{row['kl']:.1f}"
        for name in self._config.constraints:
            if f"lambda_{name}" in row:
                suffix = f" {name}" if len(self._config.constraints) > 1 else ""
                fields[f"lambda{suffix}"] = f"{row[f'lambda_{name}']:.4g}"
        if "beta" in row:
            fields["beta"] = f"{row['beta']:.3g}"
        fields["images/s"] = f"{row['images_per_second']:.0f}"
        fields["left"] = f"{left // 60}:{left % 60:02d}"
        return fields
