"""Where an experiment's work goes: parts that are kept when done, and trainings that resume."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geco_fast.data import DataNotFoundError, load
from geco_fast.experiments.checkpoint import write_atomically
from geco_fast.experiments.config import TrainConfig
from geco_fast.experiments.metrics import read_metrics
from geco_fast.experiments.paper.side_by_side import Task, run, run_together
from geco_fast.experiments.trainer import Interrupted

Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """A finished run: its folder, and what it measured."""

    folder: Path
    config: TrainConfig
    summary: dict[str, Any]

    @property
    def held_out(self) -> dict[str, Any]:
        """Measures on held-out images (see `geco_fast.experiments.evaluate.held_out`)."""
        found: dict[str, Any] = self.summary["held_out"]
        return found

    @property
    def curves(self) -> dict[str, np.ndarray]:
        """Columns of ``metrics.csv``."""
        return read_metrics(self.folder / "metrics.csv")


class Study:
    """One experiment's work in a folder that the experiments share.

    Parameters
    ----------
    root : Path
        Folder of all experiments; trainings that several want are run once.
    name : str
        The experiment's name, and of its folder below ``root``.
    key : str
        Stands for the configuration: parts of another one are not taken.
    data_root : str, optional
        Folder of the user's data. Without it what needs them is left out, and digits made of
        scikit-learn's stand in for MNIST's.
    threads : int, optional
        CPU threads; torch's choice by default. As many trainings run side by side.
    say : callable
        Receives lines of text.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        key: str = "",
        *,
        data_root: str | None = None,
        threads: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.root, self.folder = root, root / name
        self.data_root, self.threads, self.say = data_root, threads, say
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        self._parts = self.folder / f"parts-{digest}"

    @property
    def digits(self) -> str:
        """The labelled digits that data sets are made of here."""
        return "digits" if self.data_root is None else "mnist"

    def available(self, data: str) -> str | None:
        """The data set, or what stands in for it here; None where its files are missing."""
        name = self.digits if data == "mnist" else data
        try:
            load(name, self.data_root, base=self.digits)
        except DataNotFoundError:
            return None
        return name

    def part(self, name: str, compute: Callable[[], Arrays]) -> dict[str, np.ndarray]:
        """What ``compute`` returns: of the run that was interrupted, if that had come so far."""
        path = self._parts / f"{name}.npz"
        if not path.exists():
            self.say(f"  {name}")
            content = io.BytesIO()
            arrays: dict[str, Any] = {k: np.asarray(value) for k, value in compute().items()}
            np.savez(content, **arrays)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.getvalue())
        with np.load(path) as arrays:
            return dict(arrays)

    def train(self, configs: Sequence[TrainConfig]) -> list[Training]:
        """Train, go on with trainings that were interrupted, and take those that are finished.

        On a CPU several run side by side, each in a process of its own.

        Raises
        ------
        TrainError
            As of `geco_fast.experiments.train`.
        Interrupted
            A signal asked to stop; the next call goes on from there.
        """
        wanted = []
        for config in configs:
            config = replace(config, data_root=self.data_root, data_base=self.digits)
            wanted.append(Task(config, self.root / "trainings" / _name(config)))
        tasks = {task.folder: task for task in wanted if not _summary(task.folder).exists()}
        threads = self.threads or torch.get_num_threads()
        try:
            if min(len(tasks), threads) > 1 and not torch.cuda.is_available():
                run_together(list(tasks.values()), threads, self.say)
            else:
                for task in tasks.values():
                    self.say(f"  {task}")
                    run(task._replace(config=replace(task.config, threads=threads)))
        except Interrupted as interruption:
            message = f"{interruption}".partition("; to go on")[0]
            raise Interrupted(
                interruption.signum, f"{message}; to go on: the same command again"
            ) from None
        return [
            Training(folder, config, json.loads(_summary(folder).read_text()))
            for config, folder in wanted
        ]


def _summary(folder: Path) -> Path:
    """What a training writes last."""
    return folder / "summary.json"


def _name(config: TrainConfig) -> str:
    """A folder's name: readable, and another one for every other run."""
    decides = {k: v for k, v in asdict(config).items() if k not in ("data_root", "threads")}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    constrained = config.objective == "geco"
    kappas = [f"{name}{kappa:g}" for name, kappa in config.constraints.items() if constrained]
    parts = [config.data, config.model, config.objective, *kappas, f"seed{config.seed}", digest]
    return "-".join(parts)
