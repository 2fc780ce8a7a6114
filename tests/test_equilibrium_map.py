"""What is special to `equilibrium_map`: the dense formula, and that it streams."""

import math
import subprocess
import sys

import pytest
import torch
from marks import every_level, needs_library

from geco_fast._checks import FLOATING
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
    whole = equilibrium_map(x, psi, 0.5, backend="reference")
    monkeypatch.setitem(definition.__globals__, "_CHUNK_ELEMENTS", elements)
    torch.testing.assert_close(equilibrium_map(x, psi, 0.5, backend="reference"), whole)


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
        equilibrium_map(x, psi, 0.5, backend="reference")
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


def gradients(function, tensors, upstream, used=(0, 1)):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    x, psi, beta, log_prior = leaves
    results = function(x, psi, beta, log_prior=log_prior)
    return torch.autograd.grad(
        [results[k] for k in used], leaves, [upstream[k] for k in used], allow_unused=True
    )


def everything(n, m, d, dtype=torch.float64):
    x, psi = draw(n, m, d)
    beta = torch.tensor(0.7, dtype=torch.float64)
    log_prior = torch.linspace(-1, 1, m, dtype=torch.float64)
    upstream = torch.randn(m, d, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    return [t.to(dtype) for t in (x, psi, beta, log_prior)], [t.to(dtype) for t in upstream]


@every_level
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(1, 1, 1), (2, 17, 5), (63, 16, 3), (65, 33, 7), (129, 15, 35), (1700, 31, 2), (70, 50, 129)],
)
def test_sizes_around_the_kernels_blocks(backend, n, m, d, used):
    tensors, upstream = everything(n, m, d)
    x, psi, beta, log_prior = tensors
    for got, wanted in zip(
        equilibrium_map(x, psi, beta, log_prior=log_prior, backend=backend),
        definition(x, psi, beta, log_prior=log_prior),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    for got, wanted in zip(
        gradients(equilibrium_map, tensors, upstream, used),
        gradients(definition, tensors, upstream, used),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@needs_library
@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_the_gradients_asked_for(wanted):
    tensors, upstream = everything(40, 18, 3)
    leaves = [t.detach().requires_grad_(bool(wanted >> k & 1)) for k, t in enumerate(tensors)]
    x, psi, beta, log_prior = leaves
    torch.autograd.backward(equilibrium_map(x, psi, beta, log_prior=log_prior), upstream)
    for leaf, grad in zip(leaves, gradients(definition, tensors, upstream), strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, grad)


@needs_library
@pytest.mark.parametrize("n", [5, 1700])
@pytest.mark.parametrize("d", [2, 33])
def test_threads_change_no_bit(n, d):
    tensors, upstream = everything(n, 40, d, torch.float32)
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x, psi, beta, log_prior = tensors
        results = equilibrium_map(x, psi, beta, log_prior=log_prior, backend="cpu")
        runs.append([*results, *gradients(equilibrium_map, tensors, upstream)])
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@every_level
@pytest.mark.parametrize("step", [10, -10])
def test_bound_rises_with_the_data(backend, step):
    """Each datum is e^1000 or more times as likely as the one before, or as little."""
    x = torch.arange(1000, 1000 + 200 * step, step, dtype=torch.float64)[:, None]
    psi = torch.tensor([[1000.0], [2003.0], [9000.0]], dtype=torch.float64)
    mapped, _ = equilibrium_map(x, psi, 1e-2, backend=backend)
    torch.testing.assert_close(mapped, definition(x, psi, 1e-2)[0])


NON_FINITE = [
    ("x", (3, 1), math.nan),
    ("x", (3, 1), math.inf),
    ("psi", (2, 0), math.nan),
    ("psi", (2, 0), -math.inf),
    ("log_prior", (4,), math.nan),
    ("log_prior", (4,), math.inf),
    ("log_prior", (4,), -math.inf),
    ("log_prior", slice(None), -math.inf),
    ("beta", (), math.nan),
    ("beta", (), math.inf),
]


@every_level
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("name", "where", "value"), NON_FINITE)
def test_non_finite_values_stay_where_they_are(backend, dtype, name, where, value):
    tensors, _ = everything(70, 19, 3, dtype)
    named = dict(zip(("x", "psi", "beta", "log_prior"), tensors, strict=True))
    named[name][where] = value
    for got, wanted in zip(
        equilibrium_map(**named, backend=backend), definition(**named), strict=True
    ):
        assert torch.equal(got.isfinite(), wanted.isfinite())


@every_level
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_points_normaliser_has_no_gradient_from_other_points(backend, value):
    tensors, _ = everything(70, 19, 3, torch.float64)
    tensors[0][3, 1] = value
    points = tensors[0].requires_grad_()
    for function, options in ((equilibrium_map, {"backend": backend}), (definition, {})):
        _, log_normaliser = function(*tensors[:3], log_prior=tensors[3], **options)
        (gradient,) = torch.autograd.grad(log_normaliser.sum(), points)
        assert gradient[3].isnan().any()
        others = torch.arange(70) != 3
        assert gradient[others].isfinite().all()


MEMORY = """
import resource, sys, torch
from geco_fast.ops import equilibrium_map
torch.set_num_threads(1)
n, m, d = map(int, sys.argv[1:])
x, psi = torch.randn(n, d), torch.randn(m, d)
warm = [equilibrium_map(x[:9], psi.clone().requires_grad_(), 1.0 * d)[0].sum().backward()]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
x.requires_grad_(), psi.requires_grad_()
mapped, log_normaliser = equilibrium_map(x, psi, 1.0 * d)
torch.autograd.backward((mapped, log_normaliser), (mapped.detach(), log_normaliser.detach()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize(("n", "m", "d"), [(1_000_000, 1024, 2), (40_000, 2048, 784)])
def test_memory_does_not_grow_with_the_pairs(n, m, d):
    """Beyond data and results: gradients of the data and normalisers, and the slots' sums."""
    sizes = map(str, (n, m, d))
    run = [sys.executable, "-c", MEMORY, *sizes]
    kilobytes = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    beyond = kilobytes * 1024 - 4 * n * (d + 1)
    assert beyond < 200 * 2**20
    assert beyond < 4 * n * m / 2


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


@needs_library
def test_operator_itself_checks_what_memory_needs():
    forward, backward = (
        torch.ops.geco_fast.equilibrium_map,
        torch.ops.geco_fast.equilibrium_map_backward,
    )
    x, psi, beta = torch.ones(4, 2), torch.ones(3, 2), torch.tensor(0.5)
    with pytest.raises(RuntimeError, match="x must be"):
        forward(x, psi[:, :1], beta, None)
    with pytest.raises(RuntimeError, match="dtypes differ"):
        forward(x, psi.double(), beta, None)
    with pytest.raises(RuntimeError, match="beta must be a scalar"):
        forward(x, psi, torch.ones(2), None)
    with pytest.raises(RuntimeError, match="log_prior must be"):
        forward(x, psi, beta, torch.ones(4))
    results = forward(x, psi, beta, None)
    with pytest.raises(RuntimeError, match="results must have the shapes"):
        backward(x, psi, beta, None, x, *results[1:], None, None, 1)
    with pytest.raises(RuntimeError, match="a gradient must have the shape"):
        backward(x, psi, beta, None, *results, x, None, 1)
