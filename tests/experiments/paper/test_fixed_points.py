"""The theory's experiments against plain float64 formulas that hold the n by m matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geco_fast.experiments.paper import fig2, fig7
from geco_fast.experiments.paper.fixed_points import (
    Lipschitz,
    distinct,
    error_and_kl,
    initial_vectors,
    iterate,
    map_and_mass,
    occupation,
    tile_centres,
)


def dense(x: np.ndarray, psi: np.ndarray, beta: float) -> dict[str, np.ndarray]:
    """Posterior and map from their definitions, float64."""
    energy = ((x[:, None] - psi) ** 2).sum(-1)
    weight = np.exp(-energy / beta)
    m = weight / weight.mean(1, keepdims=True)
    return {"energy": energy, "m": m, "mapped": (m.T @ x) / m.sum(0)[:, None]}


@pytest.fixture(params=[0.004, 0.05, 0.5])
def beta(request: pytest.FixtureRequest) -> float:
    return request.param  # type: ignore[no-any-return]


def data(points: int = 40, side: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return fig2.blobs(points, 3), initial_vectors(side, 4)


def test_iteration_is_appendix_a(beta: float) -> None:
    x, psi = data()
    path = iterate(x, psi, beta, most_steps=25, tolerance=0)
    wanted = psi.numpy()
    for found in path.vectors[1:].numpy():
        wanted = 0.9 * wanted + 0.1 * dense(x.numpy(), wanted, beta)["mapped"]
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert path.steps == 25
    assert not path.converged


def test_iteration_stops_where_nothing_moves() -> None:
    x, psi = data()
    path = iterate(x, psi, 0.5)
    assert path.converged
    assert (path.vectors[-1] - path.vectors[-2]).norm() < 1e-3
    assert (path.vectors[-2] - path.vectors[-3]).norm() >= 1e-3
    torch.testing.assert_close(path.last, x.mean(0).expand_as(psi), atol=2e-2, rtol=0)


def test_error_and_kl_are_expectations(beta: float) -> None:
    x, psi = data()
    found = dense(x.numpy(), psi.numpy(), beta)
    m, energy = found["m"], found["energy"]
    kl = (m * np.log(m)).mean(1).mean()
    assert error_and_kl(x, psi, beta) == pytest.approx(((m * energy).mean(), kl), rel=1e-9)


def test_mass_is_what_a_tile_answers_for(beta: float) -> None:
    x, psi = data()
    mapped, mass = map_and_mass(x, psi, beta)
    found = dense(x.numpy(), psi.numpy(), beta)
    np.testing.assert_allclose(mapped, found["mapped"], rtol=1e-9)
    np.testing.assert_allclose(mass, found["m"].sum(0) / len(psi), rtol=1e-9)


def test_occupation_solves_proposition_5() -> None:
    x, psi = fig2.blobs(60, 0), distinct(iterate(fig2.blobs(60, 0), data()[1], 0.01).last, 0.02)
    solved = occupation(x, psi, 0.01)
    energy = ((x[:, None] - psi) ** 2).sum(-1).numpy()
    weight = np.exp(-energy / 0.01)
    sums = (weight / (weight @ solved.gamma.numpy())[:, None]).sum(0)
    assert len(psi) > 1
    np.testing.assert_allclose(sums, len(x), rtol=2e-3)
    assert float(solved.gamma.sum()) == pytest.approx(1, abs=1e-9)


def test_occupation_says_when_it_has_not_arrived() -> None:
    x, psi = data()
    solved = occupation(x, psi, 0.01, most_steps=2)
    assert solved.steps == 2
    assert solved.residual > 1e-3


def test_temperatures_of_stable_means() -> None:
    """Below it the mean of a group loses to its two halves, above it does not."""
    x = torch.tensor([[-0.1, 0.0], [0.1, 0.0]], dtype=torch.float64)
    critical = fig2.stable_from(x)
    assert critical == pytest.approx(0.02)
    start = torch.tensor([[-0.001, 0.0], [0.001, 0.0]], dtype=torch.float64)
    for factor, apart in ((0.9, True), (1.1, False)):
        last = iterate(x, start, factor * critical, most_steps=4000, tolerance=1e-12).last
        assert (last.abs().amax() > 0.01) == apart


def test_distinct_points() -> None:
    psi = torch.tensor([[0.0, 0.0], [0.0, 0.001], [0.5, 0.5]], dtype=torch.float64)
    found = distinct(psi, 0.01)
    assert sorted(found[:, 1].tolist()) == [0.0005, 0.5]


def test_projection_is_proposition_6() -> None:
    """``(D + Lap)^-1 D F``, from sums over pairs; its weights are of an average."""
    side, bound, radius, beta, count = 5, 0.8, 0.5, 0.01, 30
    constraint = Lipschitz(side, bound, radius, first=0.3)
    generator = torch.Generator().manual_seed(0)
    mapped = torch.randn(side**2, 2, generator=generator, dtype=torch.float64)
    mass = torch.rand(side**2, generator=generator, dtype=torch.float64)
    centres = tile_centres(side).numpy()
    system, data_part = np.zeros((side**2, side**2)), mass.numpy() / (beta * count)
    for a in range(side**2):
        system[a, a] += data_part[a]
        for b in range(side**2):
            squared = ((centres[a] - centres[b]) ** 2).sum()
            if a != b and squared <= radius**2:
                weight = 0.3 / (bound**2 * (squared + 1 / side**2 / 3))
                system[a, a] += weight
                system[a, b] -= weight
    wanted = np.linalg.solve(system, data_part[:, None] * mapped.numpy())
    np.testing.assert_allclose(constraint.project(mapped, mass, count, beta), wanted, rtol=1e-9)
    same = constraint.project(torch.ones_like(mapped), mass, count, beta)
    np.testing.assert_allclose(same, 1, rtol=1e-12)


def test_latent_distances_are_those_of_points_in_tiles() -> None:
    """K_ab, by Monte Carlo: appendix B's integral over two tiles."""
    side, draws = 4, 200_000
    centres, rng = tile_centres(side).numpy(), np.random.default_rng(0)
    first, second = centres[0], centres[6]
    inside = rng.uniform(-0.5 / side, 0.5 / side, (2, draws, 2))
    squared = ((first + inside[0] - second - inside[1]) ** 2).sum(-1).mean()
    found = 1 / Lipschitz(side, 1.0, 1.0).inverse[0, 6].item()
    assert found == pytest.approx(squared, rel=5e-3)


def test_multipliers_follow_violations() -> None:
    constraint = Lipschitz(3, 1.0, 10.0, most=0.1)
    before = constraint.log_omega.clone()
    psi = tile_centres(3) * 5
    violated = constraint.violations(psi) > 0
    constraint.ascend(psi)
    moved = constraint.log_omega - before
    assert (moved[violated] > 0).all()
    assert (moved[~violated] <= 0).all()
    assert moved.abs().max() <= 0.1 + 1e-12
    constraint.ascend(psi * 0)
    assert (constraint.log_omega < before + moved).all()


def test_constraint_tames_the_vectors() -> None:
    x, first = fig7.lines(60, 0), initial_vectors(6, 0)
    free = iterate(x, first, 0.005, most_steps=300).last
    constraint = Lipschitz(6, 1.0, 0.5)
    tamed = iterate(x, first, 0.005, most_steps=300, lipschitz=constraint).last
    assert constraint.fraction_violated(tamed) < 0.7 * constraint.fraction_violated(free)


@pytest.mark.parametrize("name", fig7.DATA)
def test_data_lie_on_their_manifold(name: str) -> None:
    draw, distance = fig7.DATA[name]
    assert distance(draw(500, 0)).mean() == pytest.approx(fig7.NOISE * (2 / np.pi) ** 0.5, rel=0.15)
    assert distance(draw(500, 0) + 5).min() > 3


def test_measures_of_a_line() -> None:
    x = fig7.lines(300, 0)
    along = torch.linspace(0, 1, 60, dtype=torch.float64)[:, None, None]
    line = torch.lerp(fig7.SEGMENTS[:, 0], fig7.SEGMENTS[:, 1], along).flatten(0, 1)
    measured = fig7.measure(x, line, fig7.to_lines)
    assert measured["coverage"] > 0.98
    assert measured["distance"] < 1e-9
    assert measured["thinness"] < 0.05
    spread = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)).double() - 0.5
    plane = fig7.measure(x, spread, fig7.to_lines)
    assert plane["thinness"] > 0.4
    assert plane["distance"] > 5 * fig7.NOISE
    alone = fig7.measure(x, torch.zeros(20, 2, dtype=torch.float64), fig7.to_lines)
    assert alone["coverage"] < 0.1
    assert alone["distinct"] == 1
