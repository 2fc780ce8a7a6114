"""What is special to `equilibrium_map`: the dense formula, and that it streams."""

import math

import pytest
import torch

from geco_fast.ops import equilibrium_map
from geco_fast.reference import equilibrium_map as definition


def dense(x, psi, beta, log_prior):
    h = torch.cdist(x, psi) ** 2
    prior = torch.full((len(psi),), 1 / len(psi)) if log_prior is None else log_prior.exp()
    normaliser = (prior * torch.exp(-h / beta)).sum(1)
    m = torch.exp(-h / beta) / normaliser[:, None]
    return (m.T @ x) / m.sum(0)[:, None], normaliser.log()


def draw(n, m, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(k, d, dtype=torch.float64, generator=generator) for k in (n, m))


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 3, 2), (40, 9, 5)])
@pytest.mark.parametrize("beta", [0.3, 2.0, torch.tensor(0.7, dtype=torch.float64)])
@pytest.mark.parametrize("uniform", [True, False])
def test_matches_the_dense_formula(n, m, d, beta, uniform):
    x, psi = draw(n, m, d)
    log_prior = None if uniform else torch.linspace(-1, 1, m, dtype=torch.float64).log_softmax(0)
    mapped, log_normaliser = equilibrium_map(x, psi, beta, log_prior=log_prior)
    wanted, wanted_normaliser = dense(x, psi, beta, log_prior)
    torch.testing.assert_close(mapped, wanted)
    torch.testing.assert_close(log_normaliser, wanted_normaliser)


@pytest.mark.parametrize("elements", [1, 20, 64])
def test_chunks_change_nothing(monkeypatch, elements):
    x, psi = draw(11, 3, 2)
    whole = equilibrium_map(x, psi, 0.5)
    monkeypatch.setitem(definition.__globals__, "_CHUNK_ELEMENTS", elements)
    torch.testing.assert_close(equilibrium_map(x, psi, 0.5), whole)


def test_never_makes_the_whole_matrix(monkeypatch):
    n, m = 400, 10
    x, psi = draw(n, m, 2)
    monkeypatch.setitem(definition.__globals__, "_CHUNK_ELEMENTS", 8 * m * 2)
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Recorder():
        equilibrium_map(x, psi, 0.5)
    assert max(sizes) < n * m


def test_cold_and_far_stays_exact():
    # Every likelihood underflows on its own; only their ratios count.
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1000.0, 0.0]])
    psi = torch.tensor([[0.0, 5.0], [900.0, 5.0]])
    mapped, log_normaliser = equilibrium_map(x, psi, 1e-3)
    torch.testing.assert_close(mapped, torch.tensor([[0.5, 0.0], [1000.0, 0.0]]))
    assert log_normaliser.isfinite().all()


def test_a_fixed_point_of_one_vector_is_the_mean():
    x, psi = draw(30, 1, 3)
    mapped, _ = equilibrium_map(x, psi, 0.1)
    torch.testing.assert_close(mapped[0], x.mean(0))


def test_a_component_without_prior_weight_is_mapped_but_not_counted():
    x, psi = draw(6, 3, 2)
    log_prior = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    mapped, log_normaliser = equilibrium_map(x, psi, 0.5, log_prior=log_prior)
    _, wanted = equilibrium_map(x, psi[:2], 0.5)
    torch.testing.assert_close(log_normaliser, wanted)
    assert mapped.isfinite().all()


@pytest.mark.parametrize(("n", "m", "d"), [(0, 3, 2), (4, 0, 2), (4, 3, 0)])
def test_empty_sizes(n, m, d):
    mapped, log_normaliser = equilibrium_map(*draw(n, m, d), 0.5)
    assert mapped.shape == (m, d)
    assert log_normaliser.shape == (n,)
    if m == 0:
        assert log_normaliser.tolist() == [-math.inf] * n


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4)}, ValueError, r"x must be \[n, d\]"),
        ({"psi": torch.ones(3, 1)}, ValueError, r"psi must have shape \[3, 2\]"),
        ({"psi": torch.ones(3, 2).double()}, TypeError, "psi must have the dtype of x"),
        ({"beta": 0.0}, ValueError, "beta must be > 0"),
        ({"beta": torch.ones(2)}, ValueError, r"beta must have shape \[\]"),
        ({"log_prior": torch.ones(4)}, ValueError, r"log_prior must have shape \[3\]"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"x": torch.ones(4, 2), "psi": torch.ones(3, 2), "beta": 0.5}
    with pytest.raises(error, match=message):
        equilibrium_map(**arguments | change)
