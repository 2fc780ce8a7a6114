"""Whether training with the kernels is the same training: loss curves beside the reference's.

``python -m geco_fast.bench.curves --data-root FOLDER --out curves.svg`` trains ConvDraw and VAE+NVP
on MNIST by GECO with Adam, each from several seeds, once with the kernels and once with the
reference in their place. A seed decides the initial weights, the order of the images and the noise,
so both see the same; what is left is rounding, and its growth in training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import geco_fast as gf

BATCH = 16
KAPPA = 0.1  # root mean square error of a pixel
WINDOW = 25  # steps that a point of a curve is the mean of
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ConvDraw": lambda: gf.nn.ConvDraw((1, 28, 28), hidden_channels=32, steps=4, downsample=2),
    "VAE+NVP": lambda: gf.nn.NVPVAE((1, 28, 28)),
}
SIDES = {"kernels": "auto", "reference": "reference"}


def losses(make: Callable[[], nn.Module], images: Any, seed: int, steps: int) -> list[float]:
    """Loss at each step of a training from this seed."""
    torch.manual_seed(seed)
    model = make()
    constraints = {"re": gf.constraints.ReconstructionError(KAPPA)}
    geco = gf.GECO(constraints, alpha=0.9, step_size=0.05 / KAPPA**2, max_log_step=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    found: list[float] = []
    for _ in range(steps):
        x: Tensor = images.batch(torch.randint(len(images), (BATCH,))).image
        output = model(x)
        loss = geco(output.kl, geco.evaluate_constraints(x, output.reconstruction))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def smooth(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unfold(0, WINDOW, 1).mean(1)


def summary(runs: dict[str, list[list[float]]]) -> dict[str, float]:
    """How far the sides are apart at one seed, and seeds at one side, where it is most.

    Both are mean distances of smoothed curves over all pairs, at the step where that is largest.
    """
    curves = {side: torch.stack([smooth(run) for run in each]) for side, each in runs.items()}
    ours, theirs = curves["kernels"], curves["reference"]
    pairs = torch.combinations(torch.arange(len(theirs)))
    between_seeds = (theirs[pairs[:, 0]] - theirs[pairs[:, 1]]).abs().mean(0)
    between_sides = (ours - theirs).abs().mean(0)
    return {
        "last, kernels": ours[:, -1].mean().item(),
        "last, reference": theirs[:, -1].mean().item(),
        "between sides": between_sides.max().item(),
        "between seeds": between_seeds.max().item(),
        "last, between sides": between_sides[-1].item(),
        "last, between seeds": between_seeds[-1].item(),
    }


def draw(results: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Curves of all runs, a panel for each model, to an SVG file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "geco_fast"}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        for k, (name, runs) in enumerate(results.items()):
            axes = figure.add_subplot(1, len(results), k + 1)
            sides = (("reference", "#b5482f", "-"), ("kernels", "#2a7f62", "--"))
            for side, colour, style in sides:
                for seed, run in enumerate(runs[side]):
                    label = side if seed == 0 else None
                    steps = range(WINDOW, len(run) + 1)
                    axes.plot(steps, smooth(run), style, color=colour, linewidth=1, label=label)
            axes.set_title(name)
            axes.set_xlabel("step")
            axes.set_ylabel(f"loss, mean of {WINDOW} steps")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


@click.command(help=__doc__)
@click.option("--data-root", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", "names", type=click.Choice(list(MODELS)), multiple=True)
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(2 * WINDOW), default=500, show_default=True)
@click.option("--json", "kept", type=click.Path(path_type=Path), help="Runs; those there stay.")
@click.option("--out", type=click.Path(path_type=Path), help="SVG file for the curves.")
def main(
    data_root: Path,
    names: tuple[str, ...],
    seeds: int,
    steps: int,
    kept: Path | None,
    out: Path | None,
) -> None:
    images = gf.data.load("mnist", root=data_root)
    results = json.loads(kept.read_text()) if kept and kept.exists() else {}
    for name in names or MODELS:
        results[name] = {}
        for side, backend in SIDES.items():
            with gf.use_backend(backend):
                results[name][side] = [
                    losses(MODELS[name], images, seed, steps) for seed in range(seeds)
                ]
    for name, runs in results.items():
        for what, value in summary(runs).items():
            click.echo(f"{name}: {what} {value:.4g}")
    if kept is not None:
        kept.write_text(json.dumps(results))
    if out is not None:
        draw(results, out)


if __name__ == "__main__":
    main()
