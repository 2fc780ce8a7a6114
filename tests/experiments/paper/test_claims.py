"""Each claim's check passes on results that bear it out, and fails on ones that break it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from geco_fast.experiments.paper import fig2, fig3, fig4, fig5, fig6, fig7, table2
from geco_fast.experiments.paper.result import Row


def sweep(**changed: Any) -> list[Row]:
    """Fixed points that merge at three temperatures, where the curvature has its spikes."""
    betas = np.linspace(0.01, 0.3, 100)
    merges = (0.05, 0.1, 0.2)
    curvature = 1 + sum(-60 * np.exp(-(((betas - at) / 0.004) ** 2)) for at in merges)
    count = 4 - sum((betas > at).astype(int) for at in merges)
    values = {"distinct": count, "curvature": curvature, "error": betas, **changed}
    rows: list[Row] = [
        {"part": "sweep", "seed": 0, "beta": b, **{k: v[i] for k, v in values.items()}}
        for i, b in enumerate(betas)
    ]
    return rows + [{"part": "stable", "seed": 0, "beta": at} for at in merges]


def test_number_of_fixed_points_falls() -> None:
    assert fig2.check_number_falls(sweep()).holds
    assert not fig2.check_number_falls(sweep(distinct=np.full(100, 4))).holds
    assert not fig2.check_number_falls(sweep(distinct=np.arange(1, 101))).holds
    assert not fig2.check_number_falls(sweep(distinct=np.r_[np.full(99, 4), 2])).holds


def test_critical_temperatures() -> None:
    assert fig2.check_critical_temperatures(sweep()).holds
    # no merging; no spikes; spikes elsewhere than stability has them
    assert not fig2.check_critical_temperatures(sweep(distinct=np.full(100, 4))).holds
    flat = np.sin(np.arange(100.0))
    assert not fig2.check_critical_temperatures(sweep(curvature=flat)).holds
    rows = sweep()
    rows[-1] = {**rows[-1], "beta": 0.3}
    assert not fig2.check_critical_temperatures(rows).holds


def test_spikes_are_the_highest_maxima() -> None:
    curvature = np.array([0, 1, 0, -5, 0, 3, 0, -2, 0, np.nan])
    assert fig2.critical_temperatures(curvature).tolist() == [3, 5, 7]


def partition(kl: list[float], moved: float = 0.0) -> list[Row]:
    betas = np.geomspace(0.1, 1e-6, len(kl))
    return [
        {"part": "partition", "beta": b, "kl": k, "moved": moved, "log_points": 4.0}
        for b, k in zip(betas, kl, strict=True)
    ]


def test_kl_tends_to_the_logarithm() -> None:
    assert fig2.check_partition(partition([0.5, 2.0, 4.0])).holds
    assert not fig2.check_partition(partition([0.5, 2.0, 3.9])).holds
    assert not fig2.check_partition(partition([4.5, 2.0, 4.0])).holds
    assert not fig2.check_partition(partition([0.5, 2.0, 4.0], moved=0.1)).holds


def test_gamma_solves_its_equation() -> None:
    row = {"part": "occupation", "residual": 1e-3, "excess": 1e-4, "total": 1.0, "distinct": 3.0}
    assert fig2.check_occupation([row]).holds
    for broken in ({"residual": 0.1}, {"excess": 0.1}, {"total": 1.1}):
        assert not fig2.check_occupation([row, {**row, **broken}]).holds


def way(beta: list[float], met: int) -> list[Row]:
    return [
        {"seed": 0, "step": 10.0 * k, "beta": b, "average_re": 0.1 if k < met else -0.1}
        for k, b in enumerate(beta)
    ]


def test_beta_falls_and_rises() -> None:
    assert fig3.check_beta(way([0.9, 0.1, 0.01, 0.02, 0.03, 0.05], met=2)).holds
    # above 1 before; never met; never rising
    assert not fig3.check_beta(way([2.0, 0.1, 0.01, 0.02, 0.03, 0.05], met=2)).holds
    assert not fig3.check_beta(way([0.9, 0.1, 0.01, 0.02, 0.03, 0.05], met=9)).holds
    assert not fig3.check_beta(way([0.9, 0.5, 0.2, 0.1, 0.05, 0.01], met=2)).holds
    assert not fig3.check_beta(way([0.9, 0.1, 0.01, 0.05, 0.03, 0.011], met=2)).holds


def plane(**changed: tuple[float, float, float]) -> list[Row]:
    """NLL, KL and error by name of the training."""
    found = {
        "elbo": (-500.0, 130.0, 0.001),
        "0.06": (-300.0, 60.0, 0.0036),
        "0.1": (-200.0, 25.0, 0.01),
        "0.175": (-90.0, 4.0, 0.03),
        **changed,
    }
    return [
        {
            **{"model": "ConvDraw", "data": "mnist", "seed": 0},
            "objective": name if name == "elbo" else "geco",
            "kappa": None if name == "elbo" else float(name),
            **{"nll": nll, "kl": kl, "re": error},
        }
        for name, (nll, kl, error) in found.items()
    ]


def test_elbo_pays_with_kl() -> None:
    assert fig4.check_elbo(plane()).holds
    assert not fig4.check_elbo(plane(elbo=(-500.0, 30.0, 0.001))).holds
    assert not fig4.check_elbo(plane(elbo=(-150.0, 130.0, 0.02))).holds
    other = [{**row, "data": "cifar10"} for row in plane(elbo=(-150.0, 130.0, 0.02))]
    claim = fig4.check_elbo(plane() + other)
    assert not claim.holds
    assert "1 of 2" in claim.numbers
    assert "ConvDraw on cifar10" in claim.numbers


def test_of_several_seeds_the_mean_decides() -> None:
    other = [{**row, "seed": 1} for row in plane(elbo=(-500.0, 40.0, 0.001))]
    claim = fig4.check_elbo(plane() + other)
    assert claim.holds
    assert "1 of 1 models and data sets in the mean of 2 seeds (one by one: 1, 0);" in claim.numbers
    other = [{**row, "seed": 1} for row in plane(**{"0.1": (-200.0, 200.0, 0.05)})]
    claim = fig4.check_kappa(plane() + other)
    assert not claim.holds
    assert "0 of 1 models and data sets in the mean of 2 seeds (one by one: 1, 0);" in claim.numbers


def test_kappa_orders_the_points() -> None:
    assert fig4.check_kappa(plane()).holds
    assert not fig4.check_kappa(plane(**{"0.1": (-200.0, 70.0, 0.01)})).holds
    assert not fig4.check_kappa(plane(**{"0.175": (-90.0, 4.0, 0.009)})).holds


def curves(kl: float, error: float) -> list[Row]:
    ours = {"geco": (kl, error), "elbo": (100.0, 0.01)}
    return [
        {"objective": name, "seed": 0, "step": step, "kl": k, "re": e}
        for name, (k, e) in ours.items()
        for step in range(20)
    ]


def test_geco_has_the_lower_kl() -> None:
    assert fig5.check_kl(curves(80.0, 0.01)).holds
    assert not fig5.check_kl(curves(120.0, 0.01)).holds
    assert not fig5.check_kl(curves(80.0, 0.012)).holds


@pytest.mark.parametrize(
    ("constraint", "kappa", "value", "met"),
    [
        ("re", 0.1, -0.001, True),
        ("re", 0.1, 0.001, True),
        ("re", 0.1, 0.002, False),
        ("fre", 0.4, 0.01, True),
        ("cla", 0.9, 0.01, True),
        ("pncc", 0.8, 0.05, False),
    ],
)
def test_held_out_constraints(constraint: str, kappa: float, value: float, met: bool) -> None:
    rows: list[Row] = [
        {"data": "mnist", "constraint": "none (ELBO)", "re": 0.1, "kl": 1.0},
        {"data": "mnist", "constraint": constraint, "kappa": kappa, "value": value},
    ]
    assert fig6.check_held_out(rows).holds == met


def manifolds(**changed: dict[str, float]) -> list[Row]:
    good = {"distance": 0.01, "thinness": 0.1, "coverage": 0.95, "distinct": 20}
    rows: list[Row] = [
        {**good, "constraint": "free", "beta": b, "coverage": 0.7, "distinct": d}
        for b, d in ((0.001, 30), (0.005, 20), (0.05, 5))
    ]
    for kind in ("local", "global"):
        rows += [{**good, "constraint": kind, "beta": 0.005, "bound": b} for b in (2.0, 1.0)]
    return [
        {"data": "lines", "seed": 0, **row, **changed.get(row["constraint"], {})} for row in rows
    ]


def test_fixed_points_under_lipschitz_constraints() -> None:
    assert all(claim.holds for claim in fig7.check(manifolds()))
    assert not fig7.check_collapse(manifolds(free={"distinct": 7})).holds
    assert not fig7.check_thin(manifolds(local={"distance": 0.05})).holds
    assert not fig7.check_thin(manifolds(local={"thinness": 0.6})).holds
    assert not fig7.check_cover(manifolds(**{"global": {"coverage": 0.6}})).holds
    assert not fig7.check_cover(manifolds(**{"global": {"coverage": 0.8}})).holds


def marginals(elbo: float, geco: float, **changed: float) -> list[Row]:
    return [
        {
            **{"data": "cifar10", "objective": name, "seed": 0, "kappa": 0.1, "re": 0.01},
            **{"marginal_kl": kl, "average_kl": kl + 3, "log_images": 6.9, **changed},
        }
        for name, kl in (("elbo", elbo), ("geco", geco))
    ]


def test_marginal_kl_is_lower() -> None:
    assert table2.check_marginal(marginals(100.0, 20.0)).holds
    assert not table2.check_marginal(marginals(100.0, 60.0)).holds
    assert not table2.check_marginal(marginals(100.0, 20.0, re=0.02)).holds


def test_information_is_bounded() -> None:
    assert table2.check_information(marginals(100.0, 20.0)).holds
    assert not table2.check_information(marginals(100.0, 20.0, average_kl=10.0)).holds
    assert not table2.check_information(marginals(100.0, 20.0, average_kl=120.0)).holds


def test_verdicts_are_words() -> None:
    claim = fig7.check_thin(manifolds())
    assert "thin manifolds: holds (lines: distance 0.01 (0.01 to 0.01)" in str(claim)
