"""Trainings that run side by side: their results, their errors and their interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geco_fast.experiments import Interrupted, TrainConfig, TrainError, train
from geco_fast.experiments.checkpoint import latest
from geco_fast.experiments.paper import side_by_side
from geco_fast.experiments.paper.side_by_side import Task, run_together
from geco_fast.experiments.paper.study import Study

TINY = TrainConfig(
    image_size=8,
    hidden_channels=4,
    latent_channels=2,
    draw_steps=2,
    batch_size=8,
    steps=4,
    log_every=1,
    eval_images=16,
    threads=1,
)


def measured(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())["held_out"]
    return found


def test_results_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    configs = [dataclasses.replace(TINY, seed=seed) for seed in range(2)]
    said: list[str] = []
    study = Study(tmp_path, "x", threads=2, say=said.append)
    done = study.train([*configs, configs[0]])
    assert [training.config.seed for training in done] == [0, 1, 0]
    assert sum(line.startswith("  training ") for line in said) == 2
    assert said[-1].startswith("  2 of 2 done, about 0 min left")
    for training in done:
        assert "step 4/4" in (training.folder / "output.txt").read_text()
    alone = tmp_path / "alone"
    train(dataclasses.replace(configs[1], data_base="digits"), alone)
    assert measured(alone) == done[1].held_out


def test_an_error_is_that_of_the_training(tmp_path: Path) -> None:
    lost = dataclasses.replace(TINY, data="cifar10", data_root=str(tmp_path), steps=3)
    tasks = [Task(TINY, tmp_path / "found"), Task(lost, tmp_path / "lost")]
    with pytest.raises(TrainError, match="cifar10"):
        run_together(tasks, 2, lambda _: None)


@pytest.fixture
def interrupter(tmp_path: Path) -> Iterator[threading.Thread]:
    """Sends this process the signal as soon as both trainings have a checkpoint."""

    def interrupt() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if all(latest(tmp_path / name / "checkpoints") for name in "ab"):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=interrupt)
    thread.start()
    yield thread
    thread.join()


@pytest.mark.usefixtures("interrupter")
def test_a_signal_stops_all_and_they_go_on(tmp_path: Path) -> None:
    long = dataclasses.replace(TINY, steps=10**6, checkpoint_every=1)
    said: list[str] = []
    with pytest.raises(Interrupted, match="stopped") as interruption:
        run_together([Task(long, tmp_path / name) for name in "abc"], 2, said.append)
    assert interruption.value.signum == signal.SIGTERM
    assert said == ["  training a", "  training b"]
    for name in "ab":
        folder = latest(tmp_path / name / "checkpoints")
        assert folder is not None
        step = int(folder.name.partition("-")[2])
        short = Task(dataclasses.replace(long, steps=step + 1), tmp_path / name)
        assert str(short) == f"going on with {name}"
        side_by_side.run(short)
        assert "re" in measured(short.folder)


def test_a_worker_that_is_killed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "_work", _die)
    with pytest.raises(TrainError, match="was killed"):
        run_together([Task(TINY, tmp_path / name) for name in "ab"], 2, lambda _: None)


def _die(*_: object) -> bool:
    os._exit(9)
