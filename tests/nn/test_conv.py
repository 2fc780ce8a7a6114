"""`Conv2d`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from geco_fast import ops
from geco_fast.nn import Conv2d
from geco_fast.testing.budget import assert_within_budget

SERVED = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 5, "padding": "same"},
    {"kernel_size": (1, 3), "padding": (0, 1), "bias": False},
]
LEFT = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
]


@pytest.mark.parametrize("options", [*SERVED, *LEFT])
def test_is_the_library_s_layer(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = Conv2d(4, 6, **options)
    torch.manual_seed(0)
    twin = nn.Conv2d(4, 6, **options)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in twin.state_dict().items())
    x = torch.randn(2, 4, 7, 8)
    assert_within_budget(layer(x), twin(x), copy.deepcopy(twin).double()(x.double()))


@pytest.mark.parametrize(
    ("options", "served"), [*((o, True) for o in SERVED), *((o, False) for o in LEFT)]
)
def test_what_the_operator_serves(
    options: dict[str, object], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(ops, "conv2d", lambda *args: calls.append(args) or args[0])
    Conv2d(4, 6, **options)(torch.randn(2, 4, 7, 8))
    assert bool(calls) is served


def test_leaves_a_single_image_to_the_library() -> None:
    torch.manual_seed(1)
    layer, x = Conv2d(4, 6, 3, padding=1), torch.randn(4, 7, 8)
    assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))
    assert layer(x).shape == (6, 7, 8)
