"""Training of a constrained VAE: one loop, made to be read and copied."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from geco_fast.data import DataError
from geco_fast.experiments import checkpoint, distributed
from geco_fast.experiments.config import TrainConfig, TrainError
from geco_fast.experiments.distributed import World
from geco_fast.experiments.evaluate import report
from geco_fast.experiments.metrics import Display, MetricsLog
from geco_fast.experiments.run import Run


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved. ``signum`` is the signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def train(config: TrainConfig, out: str | Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a model and write all there is to know about it into a folder.

    The folder receives ``config.json``, ``metrics.csv``, ``tensorboard/``, ``checkpoints/``,
    pictures and ``summary.json``. Under torchrun the processes share every batch.

    Data order and noise depend on the seed and the step alone, so a run that was killed and
    resumed ends with the same bits as one that was not, and N processes compute what one does.

    Parameters
    ----------
    config : TrainConfig
    out : path
        Folder of the run; must not hold one unless ``resume``.
    resume : bool
        Go on from the last checkpoint in ``out``.

    Returns
    -------
    dict
        The content of ``summary.json``; on other ranks than the first, an empty one.

    Raises
    ------
    TrainError
        The run cannot start, its loss is no longer finite, or a file cannot be written.
    Interrupted
        Ctrl-C or a request to terminate; a checkpoint was written.
    """
    out = Path(out)
    try:
        with distributed.connect(config.device) as world, _settings(config):
            return _train(config, out, resume, world)
    except OSError as error:
        raise TrainError(f"{error.filename or out}: {error.strerror or error}") from error
    except DataError as error:
        raise TrainError(str(error)) from error
    except KeyboardInterrupt:
        # Before the first step or after the last one; between them the loop sees to it.
        kept = checkpoint.latest(out / "checkpoints")
        saved = f"to go on: geco-fast train --resume --out {out}" if kept else "nothing to save yet"
        raise Interrupted(signal.SIGINT, f"stopped; {saved}") from None


def _train(config: TrainConfig, out: Path, resume: bool, world: World) -> dict[str, Any]:
    _check_folder(config, out, resume, world)
    run = Run(config, out, world, say=print if world.leads else lambda _: None)
    start = _load_checkpoint(run, out) if resume else 0
    if world.leads:
        # Only now: a refused resumption must leave the run as it was.
        checkpoint.write_atomically(out / "config.json", config.to_json().encode())
    model = world.wrap(run.model)
    model.train()
    with _Record(run, out, start) as record, caught_signals() as signals:
        for step in range(start + 1, config.steps + 1):
            batch, noise = run.training_batch(step - 1)
            output = model(batch.image, batch.context, noise=noise)
            terms = run.terms(batch, output)
            loss = run.loss(batch, output, terms, step - 1)
            run.optimizer.zero_grad()
            (loss + run.sigma_loss(batch, terms)).backward()

            stop = torch.tensor(float(bool(signals)), device=world.device)
            means = world.mean({"loss": loss, **terms, "stop": stop})
            _check_finite(step, means, out)
            run.optimizer.step()

            stopped = means.pop("stop") > 0
            record.add(step, means)
            if stopped or step == config.steps or step % config.checkpoint_every == 0:
                record.save(step)
            if stopped:
                # Another process may have been the one that received it.
                signum = signals[0] if signals else signal.SIGTERM
                resume_by = f"geco-fast train --resume --out {out}"
                raise Interrupted(signum, f"stopped at step {step}; to go on: {resume_by}")
    summary = report(run, out, max(start, config.steps)) if world.leads else {}
    world.wait()
    return summary


class _Record:
    """Metrics and checkpoints, kept by the first process while the run goes."""

    def __init__(self, run: Run, out: Path, start: int) -> None:
        self._run, self._out = run, out
        self._logged, self._logged_at = start, time.monotonic()

    def __enter__(self) -> _Record:
        if self._run.world.leads:
            self._log = MetricsLog(self._out, self._logged)
            self._display = Display(self._run.config, self._logged)
            self._display.__enter__()
            # As if all time before had been spent in this process.
            self._started = self._logged_at - self._log.seconds
        return self

    def __exit__(self, *_: object) -> None:
        if self._run.world.leads:
            self._display.__exit__()
            self._log.close()

    def add(self, step: int, means: Mapping[str, float]) -> None:
        """Log this step, if it is one of those that are logged."""
        config = self._run.config
        if not self._run.world.leads or (step != 1 and step % config.log_every):
            return
        now = time.monotonic()
        images = (step - self._logged) * config.batch_size
        row = {
            "step": step,
            "seconds": round(now - self._started, 3),
            "images_per_second": round(images / (now - self._logged_at), 3),
            **means,
            **self._run.multipliers(),
        }
        self._logged, self._logged_at = step, now
        self._log.write(row)
        self._display.show(row)

    def save(self, step: int) -> None:
        """Write a checkpoint; the metrics before it, so that they are never behind it."""
        if self._run.world.leads:
            self._log.sync()
            about = {"config": asdict(self._run.config), "torch": torch.__version__}
            checkpoint.save(self._out / "checkpoints", step, self._run.state(), about)
        self._run.world.wait()


def _check_folder(config: TrainConfig, out: Path, resume: bool, world: World) -> None:
    if config.batch_size % world.size:
        raise TrainError(f"batch_size {config.batch_size} must divide among {world.size} processes")
    if resume:
        config.check_resumes(TrainConfig.from_file(out / "config.json"))
    elif checkpoint.latest(out / "checkpoints"):
        raise TrainError(f"{out} holds a run already; choose another --out, or go on by --resume")
    world.wait()
    if world.leads and not resume:
        out.mkdir(parents=True, exist_ok=True)
        (out / "classifier.safetensors").unlink(missing_ok=True)
    world.wait()


def _load_checkpoint(run: Run, out: Path) -> int:
    folder = checkpoint.latest(out / "checkpoints")
    if folder is None:
        return 0
    tensors, about = checkpoint.load(folder, run.world.device)
    run.load_state(tensors)
    if about["step"] > run.config.steps:
        raise TrainError(f"steps must be >= {about['step']}, where {folder} stands")
    return about["step"]


def _check_finite(step: int, means: Mapping[str, float], out: Path) -> None:
    if math.isfinite(means["loss"]):
        return
    bad = [name for name, value in means.items() if not math.isfinite(value) and name != "loss"]
    named = ", ".join(name.replace("_", " ", 1) for name in bad) or "lambda"
    folder = checkpoint.latest(out / "checkpoints")
    kept = f"the last good checkpoint is {folder}" if folder else "there is no checkpoint yet"
    raise TrainError(f"step {step}: the loss is {means['loss']}, not finite in {named}; {kept}")


@contextlib.contextmanager
def _settings(config: TrainConfig) -> Iterator[None]:
    """The run's thread count, and deterministic convolutions on CUDA; restored at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM for the loop to see; a second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before: dict[int, Any] = {
        signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)
    }

    def receive(signum: int, _: object) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])

    try:
        for signum in before:
            signal.signal(signum, receive)
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
