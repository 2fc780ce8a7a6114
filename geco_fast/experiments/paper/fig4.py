"""Figure 4: the information plane of the models, with ELBO, annealed beta and GECO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from geco_fast.experiments.config import TrainConfig
from geco_fast.experiments.paper.models import DRAW, NVP, Options
from geco_fast.experiments.paper.result import Claim, Result, Row
from geco_fast.experiments.paper.study import Study
from geco_fast.experiments.plots import COLOURS

UNCONDITIONAL = ("mnist", "color-mnist", "cifar10", "mnist-triplets")
CONDITIONAL = ("mnist-sum", "mnist-sum-hard", "mnist-rotate")
MARKERS = {"elbo": "s", "annealed": "^", "geco": "o"}


@dataclass(frozen=True)
class Config:
    """Every data set with every model that it suits; VAE+NVP, the slowest to learn, with fewer."""

    unconditional: tuple[str, ...] = UNCONDITIONAL
    conditional: tuple[str, ...] = CONDITIONAL
    flows: tuple[str, ...] = ("mnist", "cifar10")
    kappas: tuple[float, ...] = (0.06, 0.1, 0.175)
    seeds: tuple[int, ...] = (0,)
    draw: Options = field(default_factory=lambda: DRAW["small"])
    nvp: Options = field(default_factory=lambda: NVP["small"])
    anneal_steps: int = 800


SCALES = {
    "small": Config(),
    "paper": Config(
        unconditional=(*UNCONDITIONAL, "celeba"),
        flows=(*UNCONDITIONAL, "celeba"),
        kappas=(0.06, 0.08, 0.1, 0.125, 0.175),
        draw=DRAW["paper"],
        nvp=NVP["paper"],
        anneal_steps=200_000,
    ),
}


def run(config: Config, study: Study) -> Result:
    """Train every model and draw."""
    models = [(name, config.draw) for name in (*config.unconditional, *config.conditional)]
    models += [(name, config.nvp) for name in config.flows]
    objectives: list[Options] = [
        {"objective": "elbo"},
        {"objective": "annealed", "anneal_steps": config.anneal_steps},
        *({"objective": "geco", "kappa": (kappa,)} for kappa in config.kappas),
    ]
    configs = []
    for name, options in models:
        data = study.available(name)
        if data is None:
            study.say(f"  {name} is left out: its files are not in --data-root")
            continue
        for objective in objectives:
            for seed in config.seeds:
                configs.append(TrainConfig(data=data, seed=seed, **{**options, **objective}))
    rows = [row_of(done.held_out, done.config) for done in study.train(configs)]
    return Result(rows, _draw(rows))


def row_of(held_out: dict[str, Any], config: TrainConfig) -> Row:
    """What a table shows of a training."""
    kind = "ConvDraw" if config.model == "convdraw" else "VAE+NVP"
    conditional = config.model == "convdraw" and config.data in CONDITIONAL
    return {
        "data": config.data,
        "model": "conditional ConvDraw" if conditional else kind,
        "objective": config.objective,
        "kappa": config.constraints["re"] if config.objective == "geco" else None,
        "seed": config.seed,
        "nll": held_out["nll_sigma_optimal"],
        "nll_learned_sigma": held_out["nll"],
        "kl": held_out["kl"],
        "re": held_out["re"],
    }


def check(rows: Sequence[Row]) -> list[Claim]:
    """The two claims."""
    return [check_elbo(rows), check_kappa(rows)]


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["data"]), []).append(row)
    return groups


def _mean(rows: Sequence[Row], key: str, **wanted: Any) -> float:
    return float(np.mean([r[key] for r in rows if all(r[k] == v for k, v in wanted.items())]))


def _verdict(
    statement: str, rows: Sequence[Row], holds: Callable[[Sequence[Row]], bool], numbers: str = ""
) -> Claim:
    """Whether it holds of every model and data set in the mean over the seeds; of how many, and of
    how many each seed by itself."""
    groups = _groups(rows)
    missed = [f"{model} on {data}" for (model, data), found in groups.items() if not holds(found)]
    text = f"{len(groups) - len(missed)} of {len(groups)} models and data sets"
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    if len(seeds) > 1:
        single = [_groups([row for row in rows if row["seed"] == seed]).values() for seed in seeds]
        counts = ", ".join(str(sum(map(holds, found))) for found in single)
        text += f" in the mean of {len(seeds)} seeds (one by one: {counts})"
    text += f"; not {', '.join(missed)}" if missed else ""
    return Claim(statement, not missed, f"{text}; {numbers}" if numbers else text)


def _against(rows: Sequence[Row], key: str) -> tuple[float, float]:
    """ELBO's, and GECO's at kappa = 0.1."""
    return _mean(rows, key, objective="elbo"), _mean(rows, key, objective="geco", kappa=0.1)


def _elbo_pays(rows: Sequence[Row]) -> bool:
    (nll, other_nll), (kl, other_kl) = _against(rows, "nll"), _against(rows, "kl")
    return nll < other_nll and kl >= 2 * other_kl


def check_elbo(rows: Sequence[Row]) -> Claim:
    """ELBO's NLL is lower and its KL at least twice as high as GECO's at kappa = 0.1."""
    kls = [_against(found, "kl") for found in _groups(rows).values()]
    ratios = [elbo / geco for elbo, geco in kls]
    spread = f"KL {min(ratios):.1f} to {max(ratios):.1f} times GECO's at kappa = 0.1"
    return _verdict("ELBO reaches a lower NLL at a far higher KL", rows, _elbo_pays, spread)


def _kappa_orders(rows: Sequence[Row]) -> bool:
    kappas = sorted({row["kappa"] for row in rows if row["objective"] == "geco"})
    error, kl = (
        np.diff([_mean(rows, key, objective="geco", kappa=kappa) for kappa in kappas])
        for key in ("re", "kl")
    )
    return bool((error > 0).all() and (kl < 0).all())


def check_kappa(rows: Sequence[Row]) -> Claim:
    """With every larger kappa the error rises and the KL falls."""
    return _verdict("GECO's points move monotonically with kappa", rows, _kappa_orders)


def _draw(rows: Sequence[Row]) -> Figure:
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5 * len(models), 4.8), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        names = list(dict.fromkeys(row["data"] for row in rows if row["model"] == model))
        for name, colour in zip(names, COLOURS, strict=False):
            found = [r for r in rows if r["model"] == model and r["data"] == name]
            for objective, marker in MARKERS.items():
                part = [r for r in found if r["objective"] == objective]
                shown = {"color": colour, "marker": marker, "markersize": 6}
                axis.plot([r["kl"] for r in part], [r["nll"] for r in part], ls="none", **shown)
            kappas = sorted({r["kappa"] for r in found if r["objective"] == "geco"})
            line = [
                [_mean(found, key, objective="geco", kappa=kappa) for kappa in kappas]
                for key in ("kl", "nll")
            ]
            axis.plot(*line, color=colour)
        axis.set(xlabel="KL to the prior (nats per image)", title=model)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        colours = [Line2D([], [], color=c, label=n) for n, c in zip(names, COLOURS, strict=False)]
        shapes = [
            Line2D([], [], color="black", marker=m, linestyle="none", label=o)
            for o, m in MARKERS.items()
        ]
        axis.legend(handles=[*colours, *shapes], fontsize=8, loc="lower left")
    figure.suptitle("A marker for each training, lines through GECO's means over the seeds")
    figure.axes[0].set_ylabel("NLL at the best sigma (nats per image)")
    return figure
