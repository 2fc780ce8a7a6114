"""Trainings side by side, each in a process of its own.

Models of the small scale gain little from a second thread, so cores are better spent on several
trainings than on one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import NamedTuple

from geco_fast.experiments.checkpoint import latest
from geco_fast.experiments.config import TrainConfig, TrainError
from geco_fast.experiments.trainer import Interrupted, caught_signals, train


class Task(NamedTuple):
    """A training and its folder."""

    config: TrainConfig
    folder: Path

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return latest(self.folder / "checkpoints") is not None

    def __str__(self) -> str:
        return f"{'going on with' if self.begun else 'training'} {self.folder.name}"


class _Running(NamedTuple):
    """A training in a worker: its length, and when it was begun."""

    steps: int
    begun: float

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.begun


def run(task: Task) -> None:
    """Train, or go on with a training that was interrupted."""
    train(task.config, task.folder, resume=task.begun)


def run_together(tasks: Sequence[Task], threads: int, say: Callable[[str], None]) -> None:
    """Run all, as many at a time as there are threads; what they print is in ``output.txt``.

    Parameters
    ----------
    tasks : sequence of Task
    threads : int
        CPU threads of all together.
    say : callable
        Receives a line at the start and at the end of each training.

    Raises
    ------
    TrainError
        One failed; the others have stopped, with checkpoints.
    Interrupted
        A signal asked to stop; they have stopped likewise.
    """
    workers = min(threads, len(tasks))
    context = multiprocessing.get_context("spawn")
    started: SimpleQueue[int] = context.SimpleQueue()
    waiting = sorted(tasks, key=lambda task: -task.config.steps)
    running: dict[Future[bool], _Running] = {}
    done = steps = 0
    seconds = 0.0
    with (
        ProcessPoolExecutor(workers, context, _begin, (started,)) as executor,
        caught_signals() as signals,
    ):
        try:
            while running or waiting:
                while waiting and len(running) < workers:
                    task = waiting.pop(0)
                    say(f"  {task}")
                    future = executor.submit(_work, task, threads // workers)
                    running[future] = _Running(task.config.steps, time.monotonic())
                for future in wait(running, 0.2, FIRST_COMPLETED).done:
                    finished = running.pop(future)
                    if not future.result():
                        # The workers were asked, perhaps with this process.
                        raise Interrupted(signals[0] if signals else signal.SIGTERM, "stopped")
                    done, steps = done + 1, steps + finished.steps
                    seconds += finished.seconds
                    pace = seconds / steps
                    left = sum(pace * task.config.steps for task in waiting)
                    left += sum(max(0, pace * r.steps - r.seconds) for r in running.values())
                    minutes = round(left / workers / 60)
                    say(f"  {done} of {len(tasks)} done, about {minutes} min left")
                if signals:
                    raise Interrupted(signals[0], "stopped")
        except BrokenProcessPool:
            if signals:
                raise Interrupted(signals[0], "stopped") from None
            raise TrainError("a training's process was killed (out of memory?)") from None
        finally:
            _stop(started, running)


def _work(task: Task, threads: int) -> bool:
    """A training in a worker; whether it came to its end."""
    task.folder.mkdir(parents=True, exist_ok=True)
    with (task.folder / "output.txt").open("a") as output, contextlib.redirect_stdout(output):
        try:
            run(task._replace(config=replace(task.config, threads=threads)))
        except Interrupted:
            return False
    return True


def _begin(started: SimpleQueue[int]) -> None:
    """Ctrl-C reaches every process of a terminal: only the parent stops the workers, and those
    listen only while they train."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    started.put(os.getpid())


def _stop(started: SimpleQueue[int], running: Iterable[Future[bool]]) -> None:
    """Ask what runs to write its checkpoint, until all have stopped."""
    workers: list[int] = []
    while wait(running, 0.2).not_done:
        while not started.empty():
            workers.append(started.get())
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGINT)
