"""Figure 7: fixed points under local and global Lipschitz constraints of the decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from geco_fast.experiments.paper.fig2 import draw_vectors
from geco_fast.experiments.paper.fixed_points import (
    Lipschitz,
    distinct,
    initial_vectors,
    iterate,
)
from geco_fast.experiments.paper.result import Claim, Result, Row
from geco_fast.experiments.paper.study import Study

NEAR = 0.03  # the data span about 0.8
NEIGHBOURS = 8
NOISE = 0.01


@dataclass(frozen=True)
class Config:
    """Sizes; the radii are the paper's."""

    points: int = 300
    side: int = 16
    beta: float = 0.005
    free_betas: tuple[float, ...] = (0.001, 0.005, 0.05)
    radii: tuple[float, ...] = (0.2, 1.0)
    bounds: tuple[float, ...] = (2.0, 1.5, 1.0)
    steps: int = 800
    seeds: tuple[int, ...] = (0, 1, 2)


SCALES = {"small": Config(), "paper": Config(points=1000, side=32, steps=2000)}

SEGMENTS = torch.tensor(
    [[[-0.4, -0.4], [0.1, 0.4]], [[-0.1, -0.4], [0.4, 0.0]], [[-0.45, 0.2], [0.4, 0.35]]]
).double()
CENTRES = torch.tensor([[-0.2, -0.15], [0.2, 0.2]]).double()
RADII = torch.tensor([0.22, 0.18]).double()


def _uniform(points: int, generator: torch.Generator) -> Tensor:
    return torch.rand(points, 1, generator=generator, dtype=torch.float64)


def lines(points: int, seed: int) -> Tensor:
    """A mixture of three line segments, ``[points, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    segment = SEGMENTS[torch.arange(points) % len(SEGMENTS)]
    along = torch.lerp(segment[:, 0], segment[:, 1], _uniform(points, generator))
    return along + NOISE * torch.randn(points, 2, generator=generator, dtype=torch.float64)


def circles(points: int, seed: int) -> Tensor:
    """A mixture of two circles, ``[points, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.arange(points) % len(CENTRES)
    angle = 2 * math.pi * _uniform(points, generator)
    around = CENTRES[which] + RADII[which, None] * torch.cat([angle.cos(), angle.sin()], 1)
    return around + NOISE * torch.randn(points, 2, generator=generator, dtype=torch.float64)


def to_lines(points: Tensor) -> Tensor:
    """Distance of each point to the nearest segment."""
    start, way = SEGMENTS[:, 0], SEGMENTS[:, 1] - SEGMENTS[:, 0]
    along = ((points[:, None] - start) * way).sum(-1) / way.square().sum(-1)
    nearest = start + along.clamp(0, 1)[..., None] * way
    return (points[:, None] - nearest).norm(dim=-1).amin(1)


def to_circles(points: Tensor) -> Tensor:
    """Distance of each point to the nearest circle."""
    return ((points[:, None] - CENTRES).norm(dim=-1) - RADII).abs().amin(1)


DATA: dict[str, tuple[Callable[[int, int], Tensor], Callable[[Tensor], Tensor]]] = {
    "lines": (lines, to_lines),
    "circles": (circles, to_circles),
}


def measure(x: Tensor, psi: Tensor, distance: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """What the fixed points look like.

    Returns
    -------
    dict
        ``distance``: median distance of the vectors to the data's manifold. ``coverage``: part of
        the data with a vector nearer than `NEAR`. ``thinness``: median over the vectors of the
        second over the first singular value of their `NEIGHBOURS` nearest, 0 on a line.
        ``distinct``: fixed points, `NEAR` apart.
    """
    nearest = torch.cdist(psi, psi).topk(NEIGHBOURS + 1, largest=False).indices
    around = psi[nearest] - psi[nearest].mean(1, keepdim=True)
    values = torch.linalg.svdvals(around)
    flat = values[:, 1] / values[:, 0].clamp_min(1e-12)
    return {
        "distance": float(distance(psi).median()),
        "coverage": float((torch.cdist(x, psi).amin(1) < NEAR).double().mean()),
        "thinness": float(flat.median()),
        "distinct": len(distinct(psi, NEAR)),
    }


def run(config: Config, study: Study) -> Result:
    """Compute the figure."""
    rows: list[Row] = []
    shown: dict[tuple[Any, ...], tuple[Tensor, np.ndarray]] = {}
    cases = [("free", math.inf, math.inf, beta) for beta in config.free_betas]
    cases += [
        ("local" if radius == min(config.radii) else "global", radius, bound, config.beta)
        for radius in config.radii
        for bound in config.bounds
    ]
    for name, (draw, distance) in DATA.items():
        for seed in config.seeds:
            x = draw(config.points, seed)
            for kind, radius, bound, beta in cases:
                part = f"{name}-seed{seed}-{kind}-bound{bound:g}-beta{beta:g}"
                found = study.part(part, partial(_compute, x, config, seed, radius, bound, beta))
                last = torch.from_numpy(found["last"])
                row: Row = {"data": name, "seed": seed, "constraint": kind}
                # JSON has no infinity.
                row |= {"radius": radius, "bound": bound} if kind != "free" else {}
                row |= {"beta": beta, "steps": int(found["steps"])}
                row |= {"violated": float(found["violated"]), **measure(x, last, distance)}
                rows.append(row)
                if seed == config.seeds[0]:
                    shown[name, kind, bound, beta] = (x, found["path"])
    return Result(rows, _draw(config, shown))


def _compute(
    x: Tensor, config: Config, seed: int, radius: float, bound: float, beta: float
) -> dict[str, Any]:
    first, violated = initial_vectors(config.side, seed), 0.0
    if math.isinf(radius):
        path = iterate(x, first, beta)
    else:
        constraint = Lipschitz(config.side, bound, radius)
        path = iterate(x, first, beta, most_steps=config.steps, lipschitz=constraint)
        violated = constraint.fraction_violated(path.last)
    return {
        # As many as a line needs.
        "path": path.vectors[:: max(1, path.steps // 200)].numpy(),
        "last": path.last.numpy(),
        "violated": violated,
        "steps": path.steps,
    }


def check(rows: Sequence[Row]) -> list[Claim]:
    """The three claims."""
    return [check_collapse(rows), check_thin(rows), check_cover(rows)]


def _values(rows: Sequence[Row], key: str, **wanted: Any) -> list[float]:
    return [r[key] for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def _mean(rows: Sequence[Row], key: str, **wanted: Any) -> float:
    return float(np.mean(_values(rows, key, **wanted)))


def _spread(rows: Sequence[Row], key: str, **wanted: Any) -> str:
    """Mean, least and largest over the seeds."""
    found = _values(rows, key, **wanted)
    return f"{np.mean(found):.2g} ({min(found):.2g} to {max(found):.2g})"


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["data"] for row in rows))


def check_collapse(rows: Sequence[Row]) -> Claim:
    """Without a constraint fewer fixed points are left at each higher temperature."""
    betas = sorted({row["beta"] for row in rows if row["constraint"] == "free"})
    counts = {
        name: [_mean(rows, "distinct", data=name, constraint="free", beta=b) for b in betas]
        for name in _names(rows)
    }
    holds = all(later < earlier for found in counts.values() for earlier, later in pairwise(found))
    text = "; ".join(
        f"{name} {' to '.join(f'{count:.0f}' for count in found)}" for name, found in counts.items()
    )
    statement = "Without constraints fixed points collapse as beta rises"
    return Claim(statement, holds, f"{text} at beta {' to '.join(f'{b:g}' for b in betas)}")


def check_thin(rows: Sequence[Row]) -> Claim:
    """At the weaker bounds half of the vectors lie within twice the data's noise of the manifold,
    and their neighbourhoods are three times as long as wide."""
    strongest = min(r["bound"] for r in rows if r["constraint"] == "local")
    weaker = [r for r in rows if r["constraint"] == "local" and r["bound"] > strongest]
    found = {
        name: (_mean(weaker, "distance", data=name), _mean(weaker, "thinness", data=name))
        for name in _names(rows)
    }
    holds = all(d <= 2 * NOISE and thin <= 1 / 3 for d, thin in found.values())
    text = "; ".join(
        f"{name}: distance {_spread(weaker, 'distance', data=name)}, width "
        f"{_spread(weaker, 'thinness', data=name)} of the length"
        for name in found
    )
    statement = "With r = 0.2 fixed points organise along thin manifolds"
    return Claim(statement, holds, f"{text}; noise {NOISE:g}")


def check_cover(rows: Sequence[Row]) -> Claim:
    """At every bound more of the data is covered than without a constraint, and nine tenths or more
    at the strongest."""
    wide = [row for row in rows if row["constraint"] == "global"]
    beta = wide[0]["beta"]
    bounds = sorted({row["bound"] for row in wide}, reverse=True)
    found = {
        name: [
            _mean(rows, "coverage", data=name, constraint="free", beta=beta),
            *(_mean(wide, "coverage", data=name, bound=bound) for bound in bounds),
        ]
        for name in _names(rows)
    }
    holds = all(min(covered) > free and covered[-1] >= 0.9 for free, *covered in found.values())
    text = "; ".join(
        f"{name} {_spread(rows, 'coverage', data=name, constraint='free', beta=beta)} without, "
        + ", ".join(_spread(wide, "coverage", data=name, bound=bound) for bound in bounds)
        for name in found
    )
    statement = "With r = 1.0 fixed points cover the regions of high density"
    return Claim(statement, holds, f"covered: {text} at L = {', '.join(f'{b:g}' for b in bounds)}")


def _draw(config: Config, shown: dict[tuple[Any, ...], tuple[Tensor, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(15, 8.2), layout="constrained")
    halves: Any = figure.subfigures(1, len(DATA))
    for part, name in zip(halves, DATA, strict=True):
        part.suptitle(f"Mixture of {name}")
        columns = max(len(config.free_betas), len(config.bounds))
        grid = part.subplots(3, columns, sharex=True, sharey=True)
        for line, kind in zip(grid, ("free", "local", "global"), strict=True):
            found = [(key, value) for key, value in shown.items() if key[:2] == (name, kind)]
            for axis, ((*_, bound, beta), (x, path)) in zip(line, found, strict=True):
                draw_vectors(axis, x, path, path[-1])
                text = f"no constraint, β = {beta:g}"
                if kind != "free":
                    radius = (min if kind == "local" else max)(config.radii)
                    text = f"r = {radius:g}, L = {bound:g}, β = {beta:g}"
                axis.set_title(text, fontsize=9)
            line[0].set_ylabel("x₂ (data units)")
        for axis in grid[-1]:
            axis.set_xlabel("x₁ (data units)")
    return figure
