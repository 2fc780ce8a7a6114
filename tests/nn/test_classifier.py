"""`Classifier`."""

from __future__ import annotations

import pytest
import torch

from geco_fast.nn import Classifier


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 9, 14)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shapes(batch: int, shape: tuple[int, int, int]) -> None:
    model, x = Classifier(shape, 7, hidden_channels=4), torch.rand(batch, *shape)
    assert model.features(x).shape == (batch, 8, shape[1] // 4, shape[2] // 4)
    assert model(x).shape == (batch, 7)
    assert torch.equal(model(x), model.head(model.features(x).flatten(1)))


def test_learns() -> None:
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(8)
    x = 0.1 * torch.rand(24, 1, 8, 8)
    for label in range(3):
        x[labels == label, :, 2 * label : 2 * label + 2] += 0.5
    model = Classifier((1, 8, 8), 3, hidden_channels=4)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimiser.step()
    assert torch.equal(model(x).argmax(1), labels)


@pytest.mark.parametrize(
    ("shape", "classes", "error", "match"),
    [
        ((1, 3, 8), 2, ValueError, r"image_shape\[1\] must be >= 4"),
        ((8, 8), 2, ValueError, "image_shape must be"),
        ((1, 8, 8), 0, ValueError, "num_classes must be >= 1"),
    ],
)
def test_constructor_refuses(
    shape: tuple[int, ...], classes: int, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Classifier(shape, classes)


def test_call_refuses() -> None:
    with pytest.raises(ValueError, match="x must have shape"):
        Classifier((1, 8, 8), 2)(torch.rand(1, 2, 8, 8))
