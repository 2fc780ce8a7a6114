"""`LNCCLoss`."""

from __future__ import annotations

import pickle

import pytest
import torch

from geco_fast.nn import LNCCLoss
from geco_fast.testing.budget import Budget


def images(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))
    return made[0], 0.5 * made[0] + made[1]


def test_is_minus_one_where_images_agree_and_minus_their_correlation_else():
    x, y = images(2, 3, 12, 11)
    assert LNCCLoss(kernel_size=5)(x, -2 * x).item() == pytest.approx(-1, abs=1e-4)
    scores = LNCCLoss(kernel_size=5, reduction="none")(x, y)
    assert scores.shape == x.shape
    assert scores.min() >= -1
    assert scores.max() <= 0
    torch.testing.assert_close(LNCCLoss(kernel_size=5)(x, y), scores.mean())
    torch.testing.assert_close(LNCCLoss(kernel_size=5, reduction="sum")(x, y), scores.sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("shape", "kernel_size"), [((2, 1, 30), 7), ((2, 3, 14, 12), 9), ((1, 2, 7, 6, 8), 3)]
)
def test_is_monais_loss(shape, kernel_size, reduction):
    losses = pytest.importorskip("monai.losses")
    options = {"kernel_size": kernel_size, "reduction": reduction, "smooth_nr": 1e-3}
    ours = LNCCLoss(len(shape) - 2, **options)
    theirs = losses.LocalNormalizedCrossCorrelationLoss(len(shape) - 2, **options)

    def run(loss, dtype):
        x, y = (image.to(dtype).requires_grad_() for image in images(*shape))
        value = loss(x, y)
        return value.detach(), *torch.autograd.grad(value.sum(), (x, y))

    wanted = run(theirs, torch.float64)
    for got, same, exact in zip(
        run(ours, torch.float32), run(theirs, torch.float32), wanted, strict=True
    ):
        budget = Budget("loss or gradient", gradient=True)
        budget.add(got, same, exact)
        budget.check()
    for got, exact in zip(run(ours, torch.float64), wanted, strict=True):
        torch.testing.assert_close(got, exact)


def test_options_survive_pickling_and_show():
    loss = pickle.loads(pickle.dumps(LNCCLoss(3, 7, reduction="sum", smooth_dr=1e-3)))
    shown = "spatial_dims=3, kernel_size=7, reduction='sum', smooth_nr=0.0, smooth_dr=0.001"
    assert repr(loss) == f"LNCCLoss({shown})"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spatial_dims": 4}, ValueError, "spatial_dims must be 1, 2 or 3, got 4"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"smooth_dr": -1.0}, ValueError, "smooth_dr must be >= 0"),
        ({"smooth_nr": None}, TypeError, "smooth_nr must be a number"),
    ],
)
def test_wrong_options_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        LNCCLoss(**arguments)


def test_wrong_images_are_named():
    loss = LNCCLoss()
    with pytest.raises(ValueError, match=r"prediction must be \[B, C, H, W\]"):
        loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="y must have shape"):
        loss(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5))
