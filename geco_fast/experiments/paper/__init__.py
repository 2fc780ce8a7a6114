"""The paper's figures and tables, each as one experiment whose claims are checked."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geco_fast._checks import check_choice, check_count
from geco_fast.data import DataError
from geco_fast.experiments.config import TrainError
from geco_fast.experiments.paper import fig2, fig3, fig4, fig5, fig6, fig7, table2
from geco_fast.experiments.paper.result import Claim, Result, Row, write
from geco_fast.experiments.paper.study import Study
from geco_fast.experiments.trainer import Interrupted

__all__ = ["EXPERIMENTS", "SCALES", "Claim", "Experiment", "run_experiment"]


@dataclass(frozen=True)
class Experiment:
    """A figure or table of "Taming VAEs" (2018).

    ``minutes`` is how long its small scale takes on two cores, alone, with its usual seeds.
    """

    title: str
    minutes: int
    scales: dict[str, Any]
    run: Callable[[Any, Study], Result]
    check: Callable[[Sequence[Row]], list[Claim]]

    @classmethod
    def of(cls, module: Any, minutes: int) -> Experiment:
        """The experiment that a module of this package holds."""
        title = (module.__doc__ or "").partition(": ")[2].strip().rstrip(".")
        return cls(title, minutes, module.SCALES, module.run, module.check)

    def minutes_with(self, seeds: int | None) -> int:
        """About how long the small scale takes with that many seeds; None for the usual ones."""
        usual = len(self.scales["small"].seeds)
        return math.ceil(self.minutes * (seeds or usual) / usual)


EXPERIMENTS = {
    "fig2": Experiment.of(fig2, 1),
    "fig3": Experiment.of(fig3, 2),
    "fig4": Experiment.of(fig4, 20),
    "fig5": Experiment.of(fig5, 4),
    "fig6": Experiment.of(fig6, 2),
    "fig7": Experiment.of(fig7, 1),
    "table2": Experiment.of(table2, 7),
}
SCALES = ("small", "paper")


def run_experiment(
    name: str,
    out: str | Path,
    *,
    scale: str = "small",
    data_root: str | None = None,
    seeds: int | None = None,
    threads: int | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> list[Claim]:
    """Regenerate one result of the paper, and check what the paper says of it.

    The folder ``out/name`` receives ``figure.png``, ``figure.svg``, ``results.csv`` and
    ``results.json`` (claims, configuration, seeds, versions, command). What was done before, by an
    interrupted run or another experiment, is taken from ``out``.

    Parameters
    ----------
    name : str
        One of `EXPERIMENTS`.
    out : path
        Folder that the experiments share.
    scale : {"small", "paper"}
        What two cores manage, or full size.
    data_root : str, optional
        Folder of MNIST's and CIFAR-10's files; without it scikit-learn's digits stand in for
        MNIST's, and what needs photographs is left out.
    seeds : int, optional
        How many, from 0 on; each experiment's own number by default. Claims are checked of all of
        them: of each, or of their mean.
    threads : int, optional
        CPU threads; torch's choice by default. As many trainings run side by side, in processes
        that multiprocessing spawns: with more than one, a script keeps the call under
        ``if __name__ == "__main__"``.
    command : str
        What ``results.json`` says was called.
    say : callable
        Receives lines of text.

    Returns
    -------
    list of Claim

    Raises
    ------
    ValueError
        A name or scale is unknown, or ``seeds`` is less than 1.
    TypeError
        ``seeds`` is not an integer.
    TrainError, Interrupted
        As of `geco_fast.experiments.train`.
    """
    check_choice("name", name, tuple(EXPERIMENTS))
    check_choice("scale", scale, SCALES)
    experiment = EXPERIMENTS[name]
    config = experiment.scales[scale]
    if seeds is not None:
        config = dataclasses.replace(config, seeds=tuple(range(check_count("seeds", seeds))))
    content = dataclasses.asdict(config)
    key = json.dumps(content, sort_keys=True)
    study = Study(Path(out), name, key, data_root=data_root, threads=threads, say=say)
    start = time.monotonic()
    try:
        result = experiment.run(config, study)
        claims = experiment.check(result.rows)
        about = {
            "experiment": name,
            "title": experiment.title,
            "scale": scale,
            "command": command,
            "digits": study.digits,
            "seconds": round(time.monotonic() - start, 1),
        }
        write(study.folder, result, claims, content, about)
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, "stopped; to go on: the same command again") from None
    except OSError as error:
        raise TrainError(f"{error.filename or out}: {error.strerror or error}") from error
    except DataError as error:
        raise TrainError(str(error)) from error
    return claims
