"""What is special to `squared_error`: its reductions."""

import pytest
import torch

from geco_fast.ops import squared_error


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
