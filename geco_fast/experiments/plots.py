"""The pictures of a run, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from geco_fast.experiments.checkpoint import write_atomically
from geco_fast.experiments.config import TrainConfig

# Okabe and Ito's palette: distinct under the common colour-vision deficiencies.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
LIMIT: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}


def image_rows(path: Path, rows: Mapping[str, Tensor], title: str) -> None:
    """Rows of images under each other, each with its name.

    Parameters
    ----------
    path
        PNG file to write.
    rows
        Images ``[N, C, H, W]`` in [0, 1] by name, N the same in each row. Three channels are shown
        as colours, any other number as grey images one below the other.
    title
    """
    tiles = {name: strip(images) for name, images in rows.items()}
    width = max(tile.shape[1] for tile in tiles.values())
    heights = [tile.shape[0] for tile in tiles.values()]
    scale = 9 / width
    size = (9 + 1.2, scale * sum(heights) + 0.05 * len(tiles) + 0.5)
    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained", h_pad=0.02, hspace=0.0)
    axes = figure.subplots(len(tiles), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, tile) in zip(axes, tiles.items(), strict=True):
        axis.imshow(tile, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.suptitle(title)
    _save(figure, path)


def strip(images: Tensor) -> np.ndarray:
    """Images ``[N, C, H, W]`` side by side, as `image_rows` shows them."""
    pixels = images.detach().cpu().float().clamp(0, 1).numpy()
    if pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    else:
        pixels = np.concatenate(list(pixels.swapaxes(0, 1)), axis=-2)
    gap = ((0, 0), (1, 1), (1, 1)) + ((0, 0),) * (pixels.ndim - 3)
    return np.concatenate(list(np.pad(pixels, gap, constant_values=1)), axis=1)


def curves(path: Path, curves: Mapping[str, np.ndarray], config: TrainConfig) -> None:
    """The course of a run over its steps: error, constraints, KL, likelihood, lambda and beta."""
    steps = curves["step"]
    names = list(config.constraints)
    multipliers = [name for name in names if f"lambda_{name}" in curves]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)

    axis = panels[0, 0]
    axis.plot(steps, curves["re"], color=COLOURS[0])
    axis.set(ylabel="squared error per pixel", yscale="log", title="Reconstruction error")
    _mark_kappa(axis, config, horizontal=True)

    axis = panels[0, 1]
    for name, colour in zip(names, COLOURS, strict=False):
        batch = curves[f"constraint_{name}"]
        average = curves.get(f"average_{name}")
        if average is not None:
            axis.plot(steps, batch, color=colour, alpha=0.35, label=f"{name}, batch")
            axis.plot(steps, average, color=colour, label=f"{name}, moving average")
        else:
            axis.plot(steps, batch, color=colour, label=f"{name}, batch")
    axis.axhline(0, **LIMIT)
    axis.set(ylabel="C (satisfied at or below 0)", title="Constraints")
    typical = np.median(np.abs([curves[f"constraint_{name}"] for name in names]))
    axis.set_yscale("symlog", linthresh=max(float(typical), 1e-6))
    axis.legend(frameon=False)

    axis = panels[0, 2]
    axis.plot(steps, curves["kl"], color=COLOURS[0])
    axis.set(ylabel="KL (nats per image)", title="KL to the prior")

    axis = panels[1, 0]
    axis.plot(steps, -curves["log_likelihood"], color=COLOURS[0])
    axis.set(ylabel="NLL (nats per image)", title="Negative log-likelihood, learned sigma")

    for axis, inverse in ((panels[1, 1], False), (panels[1, 2], True)):
        axis.set_title("beta = 1 / lambda" if inverse else "lambda")
        axis.set_ylabel("beta" if inverse else "lambda")
        for name, colour in zip(multipliers, COLOURS, strict=False):
            values = curves[f"lambda_{name}"]
            axis.plot(steps, 1 / values if inverse else values, color=colour, label=name)
        if multipliers:
            axis.set_yscale("log")
            axis.legend(frameon=False)
        else:
            text = f"none: objective {config.objective}"
            axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes)
    for axis in panels[1]:
        axis.set_xlabel("training step")
    for axis in panels.flat:
        axis.grid(alpha=0.25)
    _save(figure, path)


def information_plane(path: Path, curves: Mapping[str, np.ndarray], config: TrainConfig) -> None:
    """KL against reconstruction error, coloured by training step."""
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot(curves["re"], curves["kl"], color="0.8", linewidth=0.8, zorder=1)
    points = axis.scatter(
        curves["re"], curves["kl"], c=curves["step"], cmap="viridis", s=14, zorder=2
    )
    axis.set(
        xlabel="reconstruction error (squared error per pixel)",
        ylabel="KL to the prior (nats per image)",
        title=f"Information plane: {config.model} on {config.data}, {config.objective}",
        xscale="log",
    )
    _mark_kappa(axis, config, horizontal=False)
    axis.grid(alpha=0.25)
    figure.colorbar(points, label="training step")
    _save(figure, path)


def _mark_kappa(axis: Axes, config: TrainConfig, *, horizontal: bool) -> None:
    if kappa := config.constraints.get("re"):
        line = axis.axhline if horizontal else axis.axvline
        line(kappa**2, label=f"kappa² = {kappa**2:.3g}", **LIMIT)
        axis.legend(frameon=False)


def _save(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, bbox_inches="tight")
    write_atomically(path, png.getvalue())
