"""Figure 3: the way of a conditional ConvDraw through the information plane under GECO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

from geco_fast.experiments.config import TrainConfig
from geco_fast.experiments.paper.models import DRAW, Options
from geco_fast.experiments.paper.result import Claim, Result, Row
from geco_fast.experiments.paper.study import Study
from geco_fast.experiments.plots import LIMIT


@dataclass(frozen=True)
class Config:
    """One training for each seed; lambda starts at 1, as in algorithm 1."""

    data: str = "mnist-rotate"
    kappa: float = 0.1
    seeds: tuple[int, ...] = (0, 1)
    draw: Options = field(
        default_factory=lambda: {**DRAW["small"], "steps": 4800, "lambda_init": 1.0}
    )


SCALES = {"small": Config(), "paper": Config(seeds=(0,), draw=DRAW["paper"])}
COLUMNS = ("step", "re", "average_re", "kl", "log_likelihood", "lambda_re", "beta")


def run(config: Config, study: Study) -> Result:
    """Train and draw."""
    rows: list[Row] = []
    trainings = study.train(
        [
            TrainConfig(data=config.data, kappa=(config.kappa,), seed=seed, **config.draw)
            for seed in config.seeds
        ]
    )
    for seed, done in zip(config.seeds, trainings, strict=True):
        curves = done.curves
        for k in range(len(curves["step"])):
            rows.append({"seed": seed, **{name: float(curves[name][k]) for name in COLUMNS}})
    return Result(rows, _draw(config, [r for r in rows if r["seed"] == config.seeds[0]]))


def check(rows: Sequence[Row]) -> list[Claim]:
    """The one claim, of each seed."""
    return [check_beta(rows)]


def check_beta(rows: Sequence[Row]) -> Claim:
    """Below 1 while the average has not met the constraint, and from its lowest value on rising:
    rank correlation with the step above 0.8, and at the end a half more at least."""
    from scipy.stats import spearmanr

    texts, holds = [], True
    for seed in dict.fromkeys(row["seed"] for row in rows):
        found = [row for row in rows if row["seed"] == seed]
        beta = np.array([row["beta"] for row in found])
        met = np.array([row["average_re"] <= 0 for row in found])
        first = int(met.argmax()) if met.any() else len(found)
        lowest = int(beta.argmin())
        rank = float(spearmanr(np.arange(lowest, len(beta)), beta[lowest:]).statistic)
        rise = beta[-1] / beta[lowest]
        below = bool((beta[:first] < 1).all())
        holds &= bool(met.any()) and below and rank > 0.8 and rise >= 1.5
        step = f"{found[first]['step']:.0f}" if met.any() else "never"
        texts.append(
            f"met at step {step}; beta at most {beta[: max(first, 1)].max():.2g} before, lowest "
            f"{beta[lowest]:.2g} at step {found[lowest]['step']:.0f}, then {rise:.1f} times it"
        )
    statement = "beta stays below 1 until the constraint is met, then rises"
    return Claim(statement, holds, "; ".join(texts))


def _draw(config: Config, rows: Sequence[Row]) -> Figure:
    column = {name: np.array([row[name] for row in rows]) for name in COLUMNS}
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    plane, temperature, error = figure.subplots(1, 3)
    shown = {"c": column["step"], "cmap": "viridis", "s": 12}
    points = plane.scatter(-column["log_likelihood"], column["kl"], **shown)
    plane.set(xlabel="NLL (nats per image)", ylabel="KL to the prior (nats per image)")
    plane.set_title("Information plane")
    plane.set_yscale("symlog", linthresh=1)
    temperature.scatter(column["step"], column["beta"], **shown)
    temperature.axhline(1, **LIMIT)
    temperature.set(xlabel="training step", ylabel="beta = 1 / lambda", yscale="log")
    temperature.set_title("Equivalent beta")
    error.scatter(column["step"], column["re"], **shown)
    error.axhline(config.kappa**2, label=f"kappa² = {config.kappa**2:.3g}", **LIMIT)
    error.set(xlabel="training step", ylabel="squared error per pixel", yscale="log")
    error.set_title("Reconstruction error")
    error.legend(frameon=False)
    for axis in (plane, temperature, error):
        axis.grid(alpha=0.25)
    figure.colorbar(points, ax=error, label="training step")
    figure.suptitle(
        f"Conditional ConvDraw on {config.data}, GECO with RE, kappa = {config.kappa:g}"
    )
    return figure
