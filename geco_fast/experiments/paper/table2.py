"""Table 2: the KL of the marginal posterior to the prior, ELBO against GECO, VAE+NVP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from geco_fast.experiments.config import TrainConfig
from geco_fast.experiments.evaluate import restored
from geco_fast.experiments.paper.models import NVP, Options
from geco_fast.experiments.paper.result import Claim, Result, Row
from geco_fast.experiments.paper.study import Study
from geco_fast.experiments.plots import COLOURS
from geco_fast.experiments.run import MARGINAL, Run, generator
from geco_fast.nn import NVPVAE, ConditionalRealNVP
from geco_fast.nn.real_nvp import standard_normal_log_prob

ACCEPTABLE = 1.1  # error over kappa^2


@dataclass(frozen=True)
class Config:
    """Trainings, and how many images and samples the estimator sees."""

    data: tuple[str, ...] = ("cifar10", "color-mnist")
    kappa: dict[str, float] = field(
        default_factory=lambda: {"cifar10": 0.175, "color-mnist": 0.175}
    )
    seeds: tuple[int, ...] = (0, 1)
    images: int = 1000
    samples: int = 500
    nvp: Options = field(default_factory=lambda: NVP["small"])


SCALES = {
    "small": Config(),
    "paper": Config(
        kappa={"cifar10": 0.1, "color-mnist": 0.1}, images=50_000, samples=2000, nvp=NVP["paper"]
    ),
}


@torch.no_grad()
def marginal_kl(
    flow: ConditionalRealNVP, features: Tensor, noise: Tensor, *, pairs: int = 8192
) -> tuple[float, float]:
    """Average and marginal KL of a posterior to the standard normal prior, in nats.

    The marginal KL is ``1/S sum_s [logsumexp_i log q(z_s | x_i) - ln n - log pi(z_s)]`` over all
    pairs, in parts, with z_s from the posterior of image s; the average is of the same samples, so
    that the difference is at most ln n.

    Parameters
    ----------
    flow : ConditionalRealNVP
        The posterior.
    features : Tensor
        What it is conditioned on, ``[n, F]``, of all images.
    noise : Tensor
        Standard normal ``[S, D]``, S <= n: the samples are of the first S images.
    pairs : int
        Most pairs at a time.
    """
    count, samples = len(features), len(noise)
    z, log_q = flow.sample_and_log_prob(features[:samples], noise=noise)
    log_prior = standard_normal_log_prob(z)
    width = max(1, pairs // count)
    marginal = []
    for part in z.split(width):
        every = part.repeat_interleave(count, 0)
        found = flow.log_prob(every, features.repeat(len(part), 1)).reshape(len(part), count)
        marginal.append(torch.logsumexp(found.double(), 1) - math.log(count))
    average = (log_q - log_prior).double().mean()
    return average.item(), (torch.cat(marginal) - log_prior.double()).mean().item()


def run(config: Config, study: Study) -> Result:
    """Train, estimate and draw."""
    rows: list[Row] = []
    configs = []
    for name in config.data:
        data = study.available(name)
        if data is None:
            study.say(f"  {name} is left out: its files are not in --data-root")
            continue
        objectives: list[Options] = [
            {"objective": "elbo"},
            {"objective": "geco", "kappa": (config.kappa[name],)},
        ]
        for seed in config.seeds:
            for objective in objectives:
                configs.append(TrainConfig(data=data, seed=seed, **{**config.nvp, **objective}))
    for done in study.train(configs):

        def estimate(folder: Path = done.folder) -> dict[str, Any]:
            with restored(folder, data_root=study.data_root) as (trained, _):
                images = min(config.images, len(trained.train_data))
                average, marginal = _estimate(trained, images, config.samples)
            return {"average": average, "marginal": marginal, "log_images": math.log(images)}

        found = study.part(done.folder.name, estimate)
        rows.append(
            {
                "data": done.config.data,
                "objective": done.config.objective,
                "seed": done.config.seed,
                "kappa": config.kappa[done.config.data],
                "re": done.held_out["re"],
                "average_kl": float(found["average"]),
                "marginal_kl": float(found["marginal"]),
                "log_images": float(found["log_images"]),
            }
        )
    return Result(rows, _draw(rows))


def _estimate(trained: Run, images: int, samples: int) -> tuple[float, float]:
    model = trained.model
    assert isinstance(model, NVPVAE)
    model.eval()
    features = []
    with torch.no_grad():
        for part in np.array_split(np.arange(images), max(1, images // 500)):
            features.append(model.encoder(trained.batch(trained.train_data, part).image))
    noise = torch.randn(
        min(samples, images),
        model.latent_features,
        generator=generator(trained.config.seed, MARGINAL),
    )
    every = torch.cat(features)
    return marginal_kl(model.flow, every, noise.to(every))


def check(rows: Sequence[Row]) -> list[Claim]:
    """The two claims."""
    return [check_marginal(rows), check_information(rows)]


def _mean(rows: Sequence[Row], key: str, data: str, objective: str) -> tuple[float, float]:
    found = [r[key] for r in rows if r["data"] == data and r["objective"] == objective]
    return float(np.mean(found)), float(np.ptp(found))


def check_marginal(rows: Sequence[Row]) -> Claim:
    """GECO's marginal KL is at most half of ELBO's in the mean over the seeds, and its squared
    error at most a tenth above kappa^2."""
    texts, holds = [], True
    for data in dict.fromkeys(row["data"] for row in rows):
        elbo, geco = (_mean(rows, "marginal_kl", data, o) for o in ("elbo", "geco"))
        error = max(
            row["re"] / row["kappa"] ** 2
            for row in rows
            if row["data"] == data and row["objective"] == "geco"
        )
        holds &= geco[0] <= 0.5 * elbo[0] and error <= ACCEPTABLE
        texts.append(
            f"{data}: {elbo[0]:.1f} (spread {elbo[1]:.1f}) against {geco[0]:.1f} "
            f"(spread {geco[1]:.1f}) nats, error at most {error:.2f} kappa²"
        )
    return Claim("GECO's marginal KL is much lower at an acceptable error", holds, "; ".join(texts))


def check_information(rows: Sequence[Row]) -> Claim:
    """The average less the marginal KL lies in [0, ln n], but for rounding."""
    found = [row["average_kl"] - row["marginal_kl"] for row in rows]
    most = max(row["log_images"] for row in rows)
    holds = all(
        -1e-3 <= value <= row["log_images"] + 1e-3 for value, row in zip(found, rows, strict=True)
    )
    numbers = f"{min(found):.3f} to {max(found):.3f} nats, ln n = {most:.3f}"
    return Claim("Average less marginal KL lies in [0, ln n]", holds, numbers)


def _draw(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(row["data"] for row in rows))
    for k, (objective, colour) in enumerate(zip(("elbo", "geco"), COLOURS, strict=False)):
        places = np.arange(len(names)) + 0.4 * k - 0.2
        for key, alpha, label in (
            ("average_kl", 0.35, "average"),
            ("marginal_kl", 1.0, "marginal"),
        ):
            heights = [_mean(rows, key, name, objective)[0] for name in names]
            text = f"{objective.upper()}, {label} KL"
            axis.bar(places, heights, 0.36, color=colour, alpha=alpha, label=text)
        for place, name in zip(places, names, strict=True):
            found = [r for r in rows if r["data"] == name and r["objective"] == objective]
            axis.plot(
                np.full(len(found), place), [r["marginal_kl"] for r in found], "k.", markersize=5
            )
    axis.set_xticks(np.arange(len(names)), names)
    axis.set(ylabel="KL to the prior (nats per image)", title="VAE+NVP; dots: marginal KL by seed")
    axis.margins(y=0.2)
    axis.legend(frameon=False, ncols=2)
    axis.grid(alpha=0.25, axis="y")
    return figure
