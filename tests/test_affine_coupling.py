"""What is special to `affine_coupling`: its Jacobian, its inverse and its scale maps."""

import math

import pytest
import torch
from marks import every_level, needs_library

from geco_fast import reference
from geco_fast._checks import FLOATING
from geco_fast.ops import affine_coupling
from geco_fast.testing.budget import Budget, assert_within_budget

MAPS = {
    "exp": lambda a, clamp: a,
    "tanh": lambda a, clamp: clamp * a.tanh(),
    "atan": lambda a, clamp: clamp * 2 / math.pi * a.atan(),
    "sigmoid": lambda a, clamp: torch.log(torch.sigmoid(a + 2)),
}


def operands(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, *shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("inverse", [False, True])
def test_log_det_is_that_of_the_jacobian(scale_map, inverse):
    x, log_scale, shift = operands(3, 4)
    options = {"inverse": inverse, "scale_map": scale_map, "clamp": 1.3}
    _, log_det = affine_coupling(x, log_scale, shift, **options)
    for row in range(3):
        part = slice(row, row + 1)

        def transform(value, part=part):
            return affine_coupling(value[None], log_scale[part], shift[part], **options)[0][0]

        jacobian = torch.autograd.functional.jacobian(transform, x[row])
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("clamp", [0.5, 2.0])
def test_scale_is_the_documented_map(scale_map, clamp):
    x, log_scale, shift = operands(2, 3, 5, seed=1)
    y, log_det = affine_coupling(x, log_scale, shift, scale_map=scale_map, clamp=clamp)
    s = MAPS[scale_map](log_scale, clamp)
    torch.testing.assert_close(y, x * s.exp() + shift)
    torch.testing.assert_close(log_det, s.sum((1, 2)))


@pytest.mark.parametrize("scale_map", MAPS)
def test_inverse_undoes_forward(scale_map):
    x, log_scale, shift = operands(4, 6, seed=2)
    y, log_det = affine_coupling(x, log_scale, shift, scale_map=scale_map)
    back, log_det_back = affine_coupling(y, log_scale, shift, scale_map=scale_map, inverse=True)
    torch.testing.assert_close(back, x)
    assert torch.equal(log_det_back, -log_det)


@pytest.mark.parametrize(
    ("scale_map", "bound"), [("tanh", 2.0), ("atan", 2.0), ("sigmoid", math.inf)]
)
def test_extreme_log_scale_stays_finite(scale_map, bound):
    x = torch.ones(1, 2)
    log_scale = torch.tensor([[-60.0, 1e30]])
    y, log_det = affine_coupling(x, log_scale, x, scale_map=scale_map)
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    assert abs(log_det.item()) <= 2 * bound


def test_wrong_options_are_named():
    x, log_scale, shift = operands(2, 3)
    with pytest.raises(ValueError, match=r"scale_map must be one of .*'softplus'"):
        affine_coupling(x, log_scale, shift, scale_map="softplus")
    with pytest.raises(ValueError, match="clamp must be > 0, got -1"):
        affine_coupling(x, log_scale, shift, clamp=-1.0)


def test_64_layers_and_back_lose_no_more_than_the_reference():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 24, generator=generator)
    layers = 0.5 * torch.randn(64, 2, 16, 24, generator=generator)

    def there_and_back(function):
        z, total = x, 0
        for log_scale, shift in layers:
            z, log_det = function(z, log_scale, shift)
            total = total + log_det
        for log_scale, shift in layers.flip(0):
            z, log_det = function(z, log_scale, shift, inverse=True)
            total = total + log_det
        return z, total

    budget = Budget("round trip")
    wanted = x.double(), torch.zeros(16, dtype=torch.float64)
    for got, same, exact in zip(
        there_and_back(affine_coupling),
        there_and_back(reference.affine_coupling),
        wanted,
        strict=True,
    ):
        budget.add(got, same, exact)
    budget.check()


def exp_extremes(dtype):
    info = torch.finfo(dtype)
    ends = (math.log(info.tiny * info.eps) - 2, math.log(info.max) + 2)
    return torch.linspace(*ends, 40001, dtype=torch.float64).to(dtype)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", [False, True])
def test_exp_over_its_whole_range(dtype, inverse, backend):
    a = exp_extremes(dtype)
    y, _ = affine_coupling(
        *(torch.ones_like(a), -a if inverse else a, torch.zeros_like(a)),
        scale_map="exp",
        inverse=inverse,
        backend=backend,
    )
    info = torch.finfo(dtype)
    exact = torch.tensor(
        [math.exp(v) if v < 709.7827 else math.inf for v in a.tolist()], dtype=torch.float64
    )
    in_range = exact <= info.max
    assert y[~in_range].isinf().all()
    error = (y.double() - exact)[in_range].abs()
    # Below the least normal number the spacing no longer shrinks.
    assert (error <= 2 * info.eps * exact[in_range].clamp(min=info.tiny)).all()


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale_map", ["tanh", "atan", "sigmoid"])
def test_scale_maps_over_their_whole_range(scale_map, dtype, backend):
    a = torch.cat(
        [
            torch.linspace(-60, 60, 20001, dtype=torch.float64),
            torch.logspace(-30, 0, 500, dtype=torch.float64),
            torch.logspace(2, 37, 100, dtype=torch.float64),
        ]
    ).to(dtype)
    # One element a row: log_det is s.
    _, s = affine_coupling(a, a, a, scale_map=scale_map, clamp=1.0, backend=backend)
    value = {
        "tanh": math.tanh,
        "atan": lambda v: math.atan(v) * 2 / math.pi,
        "sigmoid": lambda v: min(v + 2, 0) - math.log1p(math.exp(-abs(v + 2))),
    }[scale_map]
    # a + 2 is rounded in the dtype, by the definition, too.
    rounded = (a + 2).double() - 2 if scale_map == "sigmoid" else a.double()
    exact = torch.tensor([value(v) for v in rounded.tolist()], dtype=torch.float64)
    info = torch.finfo(dtype)
    assert ((s.double() - exact).abs() <= 4 * info.eps * exact.abs().clamp(min=info.tiny)).all()


@every_level
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("scale_map", MAPS)
@pytest.mark.parametrize("inverse", [False, True])
def test_non_finite_values_stay_where_they_are(scale_map, inverse, dtype, backend):
    x, log_scale, shift = operands(64, 40, seed=4).to(dtype)
    for k, value in enumerate((math.nan, math.inf, -math.inf)):
        x[2 * k, 5] = log_scale[2 * k, 17] = shift[2 * k, 39] = value
    options = {"scale_map": scale_map, "inverse": inverse}
    same = torch.float32 if dtype == torch.float64 else dtype
    for got, s, exact in zip(
        affine_coupling(x, log_scale, shift, backend=backend, **options),
        reference.affine_coupling(x.to(same), log_scale.to(same), shift.to(same), **options),
        reference.affine_coupling(x.double(), log_scale.double(), shift.double(), **options),
        strict=True,
    ):
        assert not exact.isfinite().all()
        assert_within_budget(got, s, exact)


@every_level
def test_gradients_of_sums_and_of_one_result(backend):
    """Autograd's gradient of a sum is one number at stride 0; that of an unused result is none."""
    for inverse in (False, True):
        leaves = [t.clone().requires_grad_() for t in operands(5, 3, 7, seed=5)]
        for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
            grads = []
            for function in (
                lambda *t, i=inverse: affine_coupling(*t, inverse=i, backend=backend),
                lambda *t, i=inverse: reference.affine_coupling(*t, inverse=i),
            ):
                used = [r.sum() for r, w in zip(function(*leaves), weights, strict=True) if w]
                grads.append(torch.autograd.grad(sum(used), leaves, allow_unused=True))
            for got, wanted in zip(*grads, strict=True):
                assert (got is None) == (wanted is None)
                if got is not None:
                    torch.testing.assert_close(got, wanted)


def test_only_what_needs_a_gradient_gets_one():
    for wanted in range(1, 8):
        for inverse in (False, True):
            leaves = operands(4, 9, seed=6).unbind()
            chosen = [t.requires_grad_() for k, t in enumerate(leaves) if wanted >> k & 1]
            y, log_det = affine_coupling(*leaves, inverse=inverse)
            got = torch.autograd.grad(y.sum() + log_det.sum(), chosen, retain_graph=True)
            y, log_det = reference.affine_coupling(*leaves, inverse=inverse)
            exact = torch.autograd.grad(y.sum() + log_det.sum(), chosen)
            for a, b in zip(got, exact, strict=True):
                torch.testing.assert_close(a, b)
            for leaf in leaves:
                leaf.requires_grad_(False)


def test_threads_do_not_change_a_bit():
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(affine_coupling(*operands(9, 20001, seed=7).float()))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_level
def test_any_number_of_dimensions(backend):
    tensors = operands(2, 3, 1, 2, 1, 2, 1, 2, 1, 2)
    y, log_det = affine_coupling(*tensors, backend=backend)
    flat_y, flat_log_det = affine_coupling(*tensors.flatten(2), backend=backend)
    assert torch.equal(y, flat_y.view(y.shape))
    assert torch.equal(log_det, flat_log_det)


@needs_library
def test_operator_itself_checks_what_memory_needs():
    x = torch.zeros(2, 3)
    forward = torch.ops.geco_fast.affine_coupling
    backward = torch.ops.geco_fast.affine_coupling_backward
    with pytest.raises(RuntimeError, match="affine_coupling: shapes differ"):
        forward(x, x[:1], x, False, "tanh", 2.0)
    with pytest.raises(RuntimeError, match="affine_coupling: dtypes differ"):
        forward(x, x, x.double(), False, "tanh", 2.0)
    with pytest.raises(RuntimeError, match="unknown scale_map"):
        forward(x, x, x, False, "tan", 2.0)
    with pytest.raises(RuntimeError, match="takes shift for the inverse alone"):
        backward(x, x, x, False, "tanh", 2.0, x, None, True, True, False)
    with pytest.raises(RuntimeError, match="the gradient of a sum must be"):
        backward(x, x, None, False, "tanh", 2.0, x, x[0], True, True, False)
