"""Figure 2: reconstruction fixed points of a high-capacity beta-VAE, over beta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from geco_fast.experiments.paper.fixed_points import (
    distinct,
    error_and_kl,
    initial_vectors,
    iterate,
    map_and_mass,
    occupation,
)
from geco_fast.experiments.paper.result import Claim, Result, Row
from geco_fast.experiments.paper.study import Study
from geco_fast.experiments.plots import COLOURS

# Two vectors closer than this, where the data span about 1, are one fixed point.
APART = 0.01
CRITICAL = 3
NEAR = 6


@dataclass(frozen=True)
class Config:
    """Sizes; the rest is appendix A's."""

    points: int = 128
    side: int = 32
    cold: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    betas: int = 120
    lowest: float = 0.006
    highest: float = 0.3
    shown: tuple[float, ...] = (1e-4, 5e-3, 0.03, 0.3)
    seeds: tuple[int, ...] = (0, 1, 2)
    partition_betas: tuple[float, ...] = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    occupied_betas: tuple[float, ...] = (1e-3, 0.01, 0.1)


SCALES = {"small": Config(), "paper": Config(points=100_000, side=32, seeds=(0,))}


def blobs(points: int, seed: int) -> Tensor:
    """Four Gaussian blobs, two nearer to each other than the other two, ``[points, 2]``."""
    centres = torch.tensor([[-0.3, -0.12], [-0.3, 0.12], [0.3, -0.17], [0.3, 0.17]]).double()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(points, 2, generator=generator, dtype=torch.float64)
    return centres[torch.arange(points) % 4] + 0.03 * noise


def _groups(points: int) -> list[Tensor]:
    """The blobs whose fixed points merge, as masks: the two pairs, and all."""
    pair = torch.arange(points) % 4 // 2
    return [pair == 0, pair == 1, pair >= 0]


def stable_from(group: Tensor) -> float:
    """Temperature from which the mean of data alone in their surroundings is a stable fixed point.

    There the derivative of F is 2 / beta times their covariance, whose largest eigenvalue must be
    below beta / 2.
    """
    return 2 * float(torch.linalg.eigvalsh(torch.cov(group.T, correction=0))[-1])


def sweep_betas(config: Config) -> np.ndarray:
    """Temperatures, equally far apart, of which the second derivative is taken."""
    return np.linspace(config.lowest, config.highest, config.betas)


def run(config: Config, study: Study) -> Result:
    """Compute the figure."""
    rows: list[Row] = []
    cold, betas = len(config.cold), np.concatenate([config.cold, sweep_betas(config)])
    for seed in config.seeds:
        x, first = blobs(config.points, seed), initial_vectors(config.side, seed)

        def at(beta: float, x: Tensor = x, first: Tensor = first) -> dict[str, Any]:
            path = iterate(x, first, beta)
            error, kl = error_and_kl(x, path.last, beta)
            count = len(distinct(path.last, APART))
            return {"error": error, "kl": kl, "distinct": count, "steps": path.steps}

        if config.points > 10_000:
            found = [study.part(f"seed{seed}-beta{b:.5f}", partial(at, b)) for b in betas]
        else:
            whole = study.part(f"seed{seed}", lambda: _columns([at(float(b)) for b in betas]))
            found = [{k: v[i] for k, v in whole.items()} for i in range(len(betas))]
        error = np.array([float(each["error"]) for each in found])
        # Where they are equally far apart.
        curvature = np.full_like(error, math.nan)
        curvature[cold:] = np.gradient(np.gradient(error[cold:], betas[cold:]), betas[cold:])
        rows += [
            _row(part="sweep", seed=seed, beta=beta, curvature=second, **each)
            for beta, second, each in zip(betas, curvature, found, strict=True)
        ]
        rows += [
            {"part": "stable", "seed": seed, "beta": stable_from(x[blob])}
            for blob in _groups(config.points)
        ]
    rows += _partition(config, study) + _occupation(config, study)
    return Result(rows, _draw(config, study, rows))


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _row(**values: Any) -> Row:
    return {k: v.item() if isinstance(v, np.ndarray | np.generic) else v for k, v in values.items()}


def _partition(config: Config, study: Study) -> list[Row]:
    """Proposition 2: from an equiprobable partition of the latent space, as beta falls."""
    tiles = config.side**2
    points = 2 ** int(math.log2(min(config.points, tiles)))
    if tiles % points:
        points = config.side

    def compute() -> dict[str, Any]:
        x = blobs(points, config.seeds[0])
        first = x.repeat_interleave(tiles // points, 0)
        found = []
        for beta in config.partition_betas:
            mapped, _ = map_and_mass(x, first, beta)
            last = iterate(x, first, beta).last
            error, kl = error_and_kl(x, last, beta)
            moved = float((mapped - first).norm(dim=1).max())
            found.append({"error": error, "kl": kl, "moved": moved})
        return _columns(found)

    found = study.part("partition", compute)
    return [
        _row(part="partition", beta=beta, log_points=math.log(points), **_at(found, i))
        for i, beta in enumerate(config.partition_betas)
    ]


def _occupation(config: Config, study: Study) -> list[Row]:
    """Proposition 5, at the distinct fixed points of a few temperatures."""

    def compute() -> dict[str, Any]:
        x, first = blobs(config.points, config.seeds[0]), initial_vectors(config.side, 0)
        found = []
        for beta in config.occupied_betas:
            psi = distinct(iterate(x, first, beta).last, APART)
            solved = occupation(x, psi, beta)
            found.append(
                {
                    "distinct": len(psi),
                    "residual": solved.residual,
                    "excess": solved.excess,
                    "total": float(solved.gamma.sum()),
                    "steps": solved.steps,
                }
            )
        return _columns(found)

    found = study.part("occupation", compute)
    return [
        _row(part="occupation", beta=beta, **_at(found, i))
        for i, beta in enumerate(config.occupied_betas)
    ]


def _at(columns: dict[str, np.ndarray], index: int) -> dict[str, Any]:
    return {name: column[index] for name, column in columns.items()}


def critical_temperatures(curvature: np.ndarray) -> np.ndarray:
    """Places of the highest local maxima of \\|d^2 u / d beta^2\\|, the highest first."""
    from scipy.signal import find_peaks

    height = np.nan_to_num(np.abs(curvature))
    peaks, _ = find_peaks(height)
    return np.asarray(peaks[np.argsort(-height[peaks])][:CRITICAL])


def check(rows: Sequence[Row]) -> list[Claim]:
    """The four claims."""
    return [
        check_number_falls(rows),
        check_critical_temperatures(rows),
        check_partition(rows),
        check_occupation(rows),
    ]


def _sweeps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    sweeps: dict[int, list[Row]] = {}
    for row in rows:
        if row["part"] == "sweep":
            sweeps.setdefault(row["seed"], []).append(row)
    names = ("beta", "distinct", "curvature", "error")
    return [
        {"seed": seed, **{k: np.array([r[k] for r in found]) for k in names}}
        for seed, found in sweeps.items()
    ]


def check_number_falls(rows: Sequence[Row]) -> Claim:
    """Falls from many to one, in step with beta: Spearman's rank correlation below -0.7."""
    from scipy.stats import spearmanr

    found = _sweeps(rows)
    ranks = [
        float(spearmanr(s["beta"], s["distinct"]).statistic) if np.ptp(s["distinct"]) else 0.0
        for s in found
    ]
    ends = [(int(s["distinct"][0]), int(s["distinct"][-1])) for s in found]
    holds = all(r < -0.7 for r in ranks) and all(a > b == 1 for a, b in ends)
    fall = ", ".join(f"{a} to {b}" for a, b in ends)
    numbers = f"{fall} fixed points; rank correlation {', '.join(f'{r:.2f}' for r in ranks)}"
    return Claim("The number of distinct fixed points falls with beta", holds, numbers)


def check_critical_temperatures(rows: Sequence[Row]) -> Claim:
    """Each of the highest peaks stands five times above the median and is within a fifth of a
    temperature at which a group's mean becomes stable, and fewer fixed points are left `NEAR`
    temperatures further than there were somewhere on the way."""
    texts, holds = [], True
    for sweep in _sweeps(rows):
        height = np.abs(sweep["curvature"])
        peaks = critical_temperatures(sweep["curvature"])
        ratio = height[peaks] / np.nanmedian(height)
        count = sweep["distinct"]
        merged = [
            count[min(k + NEAR, len(count) - 1)] < count[max(k - NEAR, 0) : k + 1].max()
            for k in peaks
        ]
        wanted = sorted(
            row["beta"] for row in rows if row["part"] == "stable" and row["seed"] == sweep["seed"]
        )
        found = np.sort(sweep["beta"][peaks])
        fits = len(found) == len(wanted) and np.allclose(found, wanted, rtol=0.2, atol=0)
        holds &= len(peaks) == CRITICAL and bool(np.all(ratio > 5)) and all(merged) and fits
        pairs = ", ".join(f"{a:.3f} for {b:.3f}" for a, b in zip(found, wanted, strict=False))
        least = f"{ratio.min():.0f}" if len(peaks) else "none"
        texts.append(f"{pairs}; {least} times the median, {sum(merged)} of {len(peaks)} merge")
    statement = "At critical temperatures, spikes of the second derivative, fixed points merge"
    return Claim(statement, holds, "; ".join(texts))


def check_partition(rows: Sequence[Row]) -> Claim:
    """At the lowest beta within a thousandth of ln n and a fixed point, and rising towards it."""
    found = sorted((r for r in rows if r["part"] == "partition"), key=lambda r: -r["beta"])
    kl = [row["kl"] for row in found]
    wanted = found[-1]["log_points"]
    rises = all(b >= a - 1e-9 for a, b in pairwise(kl))
    near = abs(kl[-1] - wanted) <= 1e-3 * wanted and found[-1]["moved"] <= 1e-6
    numbers = f"KL {kl[0]:.3f} to {kl[-1]:.4f} nats, ln n = {wanted:.4f}"
    return Claim("KL tends to ln n as beta falls (proposition 2)", rises and near, numbers)


def check_occupation(rows: Sequence[Row]) -> Claim:
    """The equation holds to a hundredth where gamma is not zero, gamma sums to 1."""
    found = [row for row in rows if row["part"] == "occupation"]
    worst = max(max(row["residual"], row["excess"]) for row in found)
    total = max(abs(row["total"] - 1) for row in found)
    places = ", ".join(f"{row['distinct']:.0f}" for row in found)
    numbers = f"largest relative residual {worst:.1e} with {places} fixed points"
    holds = worst < 1e-2 and total < 1e-6
    return Claim("gamma solves its equation (proposition 5)", holds, numbers)


def _draw(config: Config, study: Study, rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(12, 8), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    top, bottom = halves
    seed = config.seeds[0]
    x, first = blobs(config.points, seed), initial_vectors(config.side, seed)
    panels: Any = top.subplots(1, len(config.shown))
    for axis, beta in zip(panels, config.shown, strict=True):

        def trajectory(beta: float = beta) -> dict[str, Any]:
            path = iterate(x, first, beta).vectors
            # Every fourth vector of the grid: all would cover each other.
            return {"path": path[:, ::4].numpy(), "last": path[-1].numpy()}

        shown = study.part(f"trajectory-beta{beta:g}", trajectory)
        draw_vectors(axis, x[:: max(1, len(x) // 2000)], shown["path"], shown["last"])
        count = len(distinct(torch.from_numpy(shown["last"]), APART))
        axis.set(title=f"beta = {beta:g}: {count} fixed points", xlabel="x₁", ylabel="x₂")
    curves: Any = bottom.subplots(1, 2)
    left, right = curves
    for sweep, colour in zip(_sweeps(rows), COLOURS, strict=False):
        places = critical_temperatures(sweep["curvature"])
        left.plot(
            sweep["beta"], sweep["error"], color=colour, label=f"data of seed {sweep['seed']}"
        )
        right.plot(sweep["beta"], sweep["curvature"], color=colour)
        right.plot(
            *(sweep[k][places] for k in ("beta", "curvature")), "o", color=colour, markersize=5
        )
        for place in sweep["beta"][places]:
            left.axvline(place, color=colour, linewidth=0.8, linestyle=":")
    left.legend(frameon=False)
    left.set(ylabel="u = E‖x - g‖² (data units squared)", title="Expected reconstruction error")
    right.set(ylabel="d²u / dβ²", title="Second derivative; dots: the critical temperatures")
    for axis in (left, right):
        axis.set_xlabel("beta (data units squared)")
        axis.grid(alpha=0.25)
    return figure


def draw_vectors(axis: Axes, x: Tensor, path: np.ndarray, last: np.ndarray) -> None:
    """Data, the vectors' ways ``[t, m, 2]``, and where they ended."""
    axis.plot(path[..., 0], path[..., 1], color="0.75", linewidth=0.4, zorder=1)
    axis.plot(*x.T.numpy(), ".", color=COLOURS[0], markersize=2.5, zorder=2, label="data")
    axis.plot(*last.T, ".", color=COLOURS[1], markersize=4, zorder=3, label="fixed points")
    axis.set_aspect("equal")
