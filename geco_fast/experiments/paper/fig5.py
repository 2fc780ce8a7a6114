"""Figure 5: ELBO to convergence, then GECO at the error that it reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

from geco_fast.experiments.config import TrainConfig
from geco_fast.experiments.paper.models import DRAW, Options
from geco_fast.experiments.paper.result import Claim, Result, Row
from geco_fast.experiments.paper.study import Study
from geco_fast.experiments.plots import COLOURS

# GECO's error may be this much above ELBO's and still count as the same.
SAME = 1.05


@dataclass(frozen=True)
class Config:
    """Two trainings for each seed, GECO's ``times`` as long as ELBO's."""

    data: str = "cifar10"
    seeds: tuple[int, ...] = (0, 1)
    times: int = 3
    draw: Options = field(
        default_factory=lambda: {**DRAW["small"], "steps": 3000, "lambda_init": 1e5}
    )


SCALES = {"small": Config(), "paper": Config(seeds=(0,), times=1, draw=DRAW["paper"])}


def run(config: Config, study: Study) -> Result:
    """Train both ways and draw."""
    data = study.available(config.data) or "digits"
    options: Options = {"data": data, **config.draw}
    elbo = study.train([TrainConfig(objective="elbo", seed=s, **options) for s in config.seeds])
    # The last tenth of the training, smoother than its end.
    errors = [done.curves["re"] for done in elbo]
    reached = [float(np.mean(error[-max(1, len(error) // 10) :])) for error in errors]
    kappas = [round(math.sqrt(error), 4) for error in reached]
    longer = {**options, "steps": config.times * elbo[0].config.steps}
    geco = study.train(
        [
            TrainConfig(objective="geco", kappa=(kappa,), seed=seed, **longer)
            for seed, kappa in zip(config.seeds, kappas, strict=True)
        ]
    )
    rows: list[Row] = []
    for kappa, *trained in zip(kappas, elbo, geco, strict=True):
        for done in trained:
            curves = done.curves
            for k in range(len(curves["step"])):
                rows.append(
                    {
                        "data": data,
                        "objective": done.config.objective,
                        "seed": done.config.seed,
                        "kappa": kappa,
                        "step": int(curves["step"][k]),
                        "re": float(curves["re"][k]),
                        "kl": float(curves["kl"][k]),
                    }
                )
    return Result(rows, _draw(rows))


def check(rows: Sequence[Row]) -> list[Claim]:
    """The one claim, of each seed."""
    return [check_kl(rows)]


def _last_tenth(rows: Sequence[Row], key: str, objective: str, seed: int) -> float:
    found = [r[key] for r in rows if r["objective"] == objective and r["seed"] == seed]
    return float(np.mean(found[-max(1, len(found) // 10) :]))


def check_kl(rows: Sequence[Row]) -> Claim:
    """Over the last tenth of the training GECO's KL is lower, its error at most 5 % higher."""
    texts, holds = [], True
    for seed in dict.fromkeys(row["seed"] for row in rows):
        kl, error = (
            {o: _last_tenth(rows, key, o, seed) for o in ("elbo", "geco")} for key in ("kl", "re")
        )
        ratio = error["geco"] / error["elbo"]
        holds &= kl["geco"] < kl["elbo"] and ratio <= SAME
        texts.append(
            f"KL {kl['geco']:.1f} for {kl['elbo']:.1f} nats at {ratio:.2f} times the error"
        )
    return Claim("GECO has a lower average KL at the same error", holds, "; ".join(texts))


def _draw(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for objective, colour in zip(("elbo", "geco"), COLOURS, strict=False):
        for seed in dict.fromkeys(row["seed"] for row in rows):
            found = [r for r in rows if r["objective"] == objective and r["seed"] == seed]
            label = objective.upper() if seed == rows[0]["seed"] else None
            for axis, key in ((left, "re"), (right, "kl")):
                axis.plot(
                    [r["step"] for r in found],
                    [r[key] for r in found],
                    color=colour,
                    label=label,
                    linewidth=1,
                )
    left.set(ylabel="squared error per pixel", yscale="log", title="Reconstruction error")
    right.set(ylabel="KL to the prior (nats per image)", title="Average KL")
    for axis in (left, right):
        axis.set_xlabel("training step")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.suptitle(f"ConvDraw on {rows[0]['data']}, one line for each seed")
    return figure
