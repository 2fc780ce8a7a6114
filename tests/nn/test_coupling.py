"""`AffineCoupling`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from geco_fast.nn import AffineCoupling
from geco_fast.testing.budget import assert_within_budget

MASKS = ("first", "second")


def build(features: int = 5, seed: int = 0, **options: object) -> AffineCoupling:
    torch.manual_seed(seed)
    layer = AffineCoupling(features, hidden_features=(16, 8), **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def plain(layer: AffineCoupling, x: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
    """Equations 7 and 8 of Real NVP with one MLP over ``[x1, context]``."""
    first = layer.features // 2
    x1, x2 = x[:, :first], x[:, first:]
    if layer.mask == "second":
        x1, x2 = x2, x1
    weight = torch.cat([layer.layers[0].weight, layer.context_projection.weight], dim=1)
    y = nn.functional.linear(torch.cat([x1, context], dim=1), weight, layer.layers[0].bias)
    for linear in list(layer.layers)[1:]:
        y = linear(torch.relu(y))
    log_scale, shift = y.chunk(2, dim=1)
    s = layer.clamp * torch.tanh(log_scale)
    y2 = x2 * s.exp() + shift
    parts = [x1, y2] if layer.mask == "first" else [y2, x1]
    return [torch.cat(parts, dim=1), s.sum(1)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("features", [2, 5, 6])
def test_is_the_paper_s_layer(features: int, mask: str) -> None:
    layer = build(features, context_features=3, mask=mask, clamp=1.5)
    x, context = torch.randn(256, features), torch.randn(256, 3)
    exact = plain(copy.deepcopy(layer).double(), x.double(), context.double())
    for got, same, wide in zip(layer(x, context), plain(layer, x, context), exact, strict=True):
        assert_within_budget(got, same, wide)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale_map", ["tanh", "atan", "exp", "sigmoid"])
@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_log_det_is_the_jacobian_s(
    direction: str, context_features: int, scale_map: str, mask: str
) -> None:
    layer = build(context_features=context_features, scale_map=scale_map, mask=mask).double()
    run = getattr(layer, direction)
    x = torch.randn(3, 5, dtype=torch.float64)
    context = torch.randn(3, 3, dtype=torch.float64) if context_features else None
    y, log_det = run(x, context)
    for i in range(3):
        own = None if context is None else context[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda row, own=own: run(row[None], own)[0][0], x[i]
        )
        torch.testing.assert_close(log_det[i], jacobian.slogdet().logabsdet)
    back, back_log_det = (layer.inverse if direction == "forward" else layer)(y, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_log_det, -log_det)


@pytest.mark.parametrize("scale_map", ["tanh", "atan", "exp"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_fresh_layer_is_the_identity(mask: str, scale_map: str) -> None:
    torch.manual_seed(1)
    layer = AffineCoupling(5, hidden_features=(8,), mask=mask, scale_map=scale_map)
    x = torch.randn(4, 5)
    y, log_det = layer(x)
    assert torch.equal(y, x)
    assert torch.equal(log_det, torch.zeros(4))


def test_the_kept_part_passes_unchanged() -> None:
    x = torch.randn(4, 5)
    for mask, kept in (("first", slice(0, 2)), ("second", slice(2, 5))):
        y, _ = build(mask=mask)(x)
        changed = y != x
        assert not changed[:, kept].any()
        assert int(changed.sum()) == changed.numel() - changed[:, kept].numel()


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    y, log_det = build(context_features=3)(torch.randn(batch, 5), torch.randn(batch, 3))
    assert y.shape == (batch, 5)
    assert log_det.shape == (batch,)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients(direction: str) -> None:
    layer = build(context_features=3, activation="silu").double()
    operands = [torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (5, 3)]
    run = getattr(layer, direction)
    assert torch.autograd.gradcheck(run, operands)
    assert torch.autograd.gradgradcheck(run, operands)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate: object) -> None:
    layer, x = build(), torch.randn(2, 5)
    assert torch.equal(duplicate(layer)(x)[0], layer(x)[0])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"features": 1}, ValueError, "features must be >= 2"),
        ({"features": 4.0}, TypeError, "features must be an integer"),
        ({"context_features": -1}, ValueError, "context_features must be >= 0"),
        ({"hidden_features": ()}, ValueError, "hidden_features must name at least one"),
        ({"hidden_features": (8, 0)}, ValueError, r"hidden_features\[1\] must be >= 1"),
        ({"scale_map": "softplus"}, ValueError, "scale_map must be one of"),
        ({"clamp": 0.0}, ValueError, "clamp must be > 0"),
        ({"mask": "third"}, ValueError, "mask must be one of"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
    ],
)
def test_constructor_refuses(
    options: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        AffineCoupling(**{"features": 4, **options})


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("context_features", "context", "match"),
    [
        (0, torch.randn(2, 3), "context must be None"),
        (3, None, "context must be given"),
        (3, torch.randn(2, 4), "context must have shape"),
        (3, torch.randn(3, 3), "context must have shape"),
    ],
)
def test_call_refuses_contexts(
    context_features: int, context: torch.Tensor | None, match: str, direction: str
) -> None:
    layer = build(context_features=context_features)
    with pytest.raises(ValueError, match=match):
        getattr(layer, direction)(torch.randn(2, 5), context)


def test_call_names_its_argument() -> None:
    layer = build()
    with pytest.raises(ValueError, match="x must have shape"):
        layer(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"y must be \[B, 5\]"):
        layer.inverse(torch.randn(5))
