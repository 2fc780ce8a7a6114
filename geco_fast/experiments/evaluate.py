"""Measures a trained model on held-out images, and writes the pictures and the summary."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geco_fast.data import DataError
from geco_fast.experiments import checkpoint, distributed, plots
from geco_fast.experiments.config import TrainConfig, TrainError
from geco_fast.experiments.metrics import read_metrics
from geco_fast.experiments.run import EVALUATION, SAMPLES, Run


def evaluate(
    out: str | Path, *, images: int = 0, device: str = "auto", data_root: str | None = None
) -> dict[str, Any]:
    """Measure the last checkpoint of a run on held-out data.

    Parameters
    ----------
    out : path
        Folder of the run.
    images : int
        How many held-out images to use; 0 for all.
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    data_root : str, optional
        Where the data are, if not where they were in training.

    Returns
    -------
    dict
        As `held_out` returns, and the ``step`` of the checkpoint.

    Raises
    ------
    TrainError
        The folder holds no run, or one that cannot be read.
    """
    with restored(out, images=images, device=device, data_root=data_root) as (run, step):
        try:
            return {"step": step} | held_out(run)
        except DataError as error:
            raise TrainError(str(error)) from error


@contextlib.contextmanager
def restored(
    out: str | Path, *, images: int = 0, device: str = "auto", data_root: str | None = None
) -> Iterator[tuple[Run, int]]:
    """The parts of a run as its last checkpoint has them, and the checkpoint's step.

    Takes `evaluate`'s arguments, and raises its errors.
    """
    out = Path(out)
    config = TrainConfig.from_file(out / "config.json")
    config = replace(config, eval_images=images, data_root=data_root or config.data_root)
    folder = checkpoint.latest(out / "checkpoints")
    if folder is None:
        raise TrainError(f"{out} holds no checkpoint")
    classifier = out / "classifier.safetensors"
    if {"fre", "cla"} & set(config.constraint) and not classifier.exists():
        raise TrainError(f"{classifier} is missing; the run's constraint looks through it")
    with distributed.connect(device) as world:
        tensors, about = checkpoint.load(folder, world.device)
        run = Run(config, out, world)
        run.load_state(tensors)
        yield run, about["step"]


@contextlib.contextmanager
def _still(run: Run) -> Iterator[None]:
    run.model.eval()
    with torch.no_grad():
        yield
    run.model.train()


def held_out(run: Run) -> dict[str, Any]:
    """Measure the model on the first ``eval_images`` held-out images, in nats per image.

    Returns
    -------
    dict
        ``re``: mean squared error per pixel. ``kl``: average KL. ``nll``: negative
        log-likelihood of the images given their latents under the learned ``sigma``;
        ``nll_sigma_optimal`` under the best one, sqrt(re). ``constraints``: for each its
        ``kappa``, its mean ``value``, whether that is ``satisfied`` (<= 0) and by which
        ``fraction`` of the images; for ``re`` also the error over kappa^2.
    """
    config, dataset = run.config, run.test_data
    count = min(config.eval_images or len(dataset), len(dataset))
    sums: dict[str, float] = {}
    satisfied = dict.fromkeys(config.constraints, 0.0)
    with _still(run):
        for first in range(0, count, config.batch_size):
            indices = np.arange(first, min(first + config.batch_size, count))
            batch = run.batch(dataset, indices)
            noise = run.noise(len(indices), EVALUATION, first)
            terms = run.terms(batch, run.model(batch.image, batch.context, noise=noise))
            for name, values in terms.items():
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
            for name in satisfied:
                satisfied[name] += (terms[f"constraint_{name}"] <= 0).sum().item()
    means = {name: value / count for name, value in sums.items()}
    constraints: dict[str, dict[str, Any]] = {}
    for name, kappa in config.constraints.items():
        value = means[f"constraint_{name}"]
        constraints[name] = {
            "kappa": kappa,
            "value": value,
            "satisfied": value <= 0,
            "fraction": satisfied[name] / count,
        }
        if name == "re":
            constraints[name]["re_over_kappa2"] = means["re"] / kappa**2
    pixels = math.prod(dataset.image_shape)
    return {
        "images": count,
        "re": means["re"],
        "kl": means["kl"],
        "nll": -means["log_likelihood"],
        "nll_sigma_optimal": 0.5 * pixels * (math.log(2 * math.pi * means["re"]) + 1),
        "sigma": run.model.log_sigma.exp().item(),
        "constraints": constraints,
    }


def report(run: Run, out: Path, step: int) -> dict[str, Any]:
    """Write ``summary.json`` and the pictures of a finished run; returns the summary."""
    curves = read_metrics(out / "metrics.csv")
    summary = {
        "step": step,
        "seconds": float(curves["seconds"][-1]),
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "training": training(curves, run.config),
        "held_out": held_out(run),
    }
    checkpoint.write_atomically(
        out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode()
    )
    plots.curves(out / "curves.png", curves, run.config)
    plots.information_plane(out / "information_plane.png", curves, run.config)
    _pictures(run, out)
    return summary


def training(curves: dict[str, np.ndarray], config: TrainConfig) -> dict[str, Any]:
    """What the metrics tell of the course of a run.

    The step at which every constraint was first satisfied by a batch, and the KL there, are None
    if none was.
    """
    met = np.all([curves[f"constraint_{name}"] <= 0 for name in config.constraints], axis=0)
    first = int(np.argmax(met)) if met.any() else None
    course: dict[str, Any] = {
        "step_first_satisfied": None if first is None else int(curves["step"][first]),
        "kl_first_satisfied": None if first is None else float(curves["kl"][first]),
        "kl_last": float(curves["kl"][-1]),
    }
    for name in config.constraints:
        if f"lambda_{name}" in curves:
            values = curves[f"lambda_{name}"]
            course[f"lambda_{name}"] = {"max": float(values.max()), "last": float(values[-1])}
    return course


def pictured(run: Run, count: int, samples: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Held-out images and their reconstructions, and rows of samples, ``[count, C, H, W]`` each."""
    shown = np.arange(min(count, len(run.test_data)))
    with _still(run):
        batch = run.batch(run.test_data, shown)
        given = {} if batch.context is None else {"context": batch.context}
        noise = run.noise(len(shown), EVALUATION, 0)
        rebuilt = run.model(batch.image, batch.context, noise=noise).reconstruction
        drawn = {
            f"sample {row}": run.model.sample(
                len(shown), batch.context, noise=run.noise(len(shown), SAMPLES, row)
            )
            for row in range(1, samples + 1)
        }
    return given | {"data": batch.image, "reconstruction": rebuilt}, given | drawn


def _pictures(run: Run, out: Path) -> None:
    rebuilt, drawn = pictured(run, 12, 6)
    plots.image_rows(out / "reconstructions.png", rebuilt, "Held-out images")
    title = "Samples from the prior" + (" given the context" if "context" in drawn else "")
    plots.image_rows(out / "samples.png", drawn, title)
