"""What is special to `squared_error`: its reductions."""

import math

import pytest
import torch
from marks import every_level, needs_library

from geco_fast import reference
from geco_fast._checks import FLOATING
from geco_fast.ops import squared_error
from geco_fast.testing.budget import assert_within_budget


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4, 5)])
def test_matches_mse_loss_row_by_row(shape, reduction):
    generator = torch.Generator().manual_seed(len(shape))
    x, y = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    rows = [
        torch.nn.functional.mse_loss(a, b, reduction=reduction) for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(squared_error(x, y, reduction=reduction), torch.stack(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands_are_accumulated_in_float32(dtype):
    x, y = torch.randn(2, 2, 3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(squared_error(x, y), squared_error(x.float(), y.float()))


def test_no_element_to_average_is_nan_and_to_sum_zero():
    x = torch.empty(3, 0)
    assert squared_error(x, x).isnan().tolist() == [True] * 3
    assert squared_error(x, x, reduction="sum").tolist() == [0.0] * 3


def test_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'none'"):
        squared_error(torch.ones(2), torch.ones(2), reduction="none")


@every_level
@pytest.mark.parametrize("dtype", FLOATING)
def test_non_finite_values_stay_where_they_are(dtype, backend):
    x, y = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    for k, value in enumerate((math.nan, math.inf, -math.inf)):
        x[k, 39] = y[k + 3, 0] = value
    x[6, 1] = y[6, 1] = math.inf
    same = torch.float32 if dtype == torch.float64 else dtype
    exact = reference.squared_error(x.double(), y.double())
    assert exact.isfinite().tolist() == [False] * 7 + [True]
    s = reference.squared_error(x.to(same), y.to(same))
    assert_within_budget(squared_error(x, y, backend=backend), s, exact)


@every_level
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_gradient_of_a_sum_goes_where_it_is_wanted(reduction, wanted, backend):
    values = torch.randn(
        2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    x, y = (v.clone().requires_grad_(needs) for v, needs in zip(values, wanted, strict=True))
    squared_error(x, y, reduction=reduction, backend=backend).sum().backward()
    gradient = 2 * (x - y).detach() / (20 if reduction == "mean" else 1)
    for leaf, needs, expected in zip((x, y), wanted, (gradient, -gradient), strict=True):
        assert (leaf.grad is not None) == needs
        if needs:
            torch.testing.assert_close(leaf.grad, expected)


def test_threads_do_not_change_a_bit():
    x, y = torch.randn(2, 3, 20001, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(squared_error(x, y))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@every_level
def test_any_number_of_dimensions(backend):
    x, y = operands = torch.randn(2, 2, 3, 1, 2, 1, 2, 1, 2, 1, 2)
    flat = squared_error(*operands.flatten(2), backend=backend)
    assert torch.equal(squared_error(x, y, backend=backend), flat)


@needs_library
def test_operator_itself_checks_what_memory_needs():
    x = torch.zeros(2, 3)
    forward = torch.ops.geco_fast.squared_error
    with pytest.raises(RuntimeError, match="squared_error: x and y must be"):
        forward(x, x[:1], "mean")
    with pytest.raises(RuntimeError, match="squared_error: dtypes differ"):
        forward(x, x.double(), "mean")
    with pytest.raises(RuntimeError, match="unknown reduction"):
        forward(x, x, "none")
    with pytest.raises(RuntimeError, match="the gradient of a sum must be"):
        torch.ops.geco_fast.squared_error_backward(x, x, "mean", x[0], True, True)
