"""What is special to `affine_coupling`: its Jacobian, its inverse and its scale maps."""

import math

import pytest
import torch

from geco_fast.ops import affine_coupling

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
