"""Squared error per batch element, in plain PyTorch."""

from __future__ import annotations

import math

from torch import Tensor

from geco_fast.reference._precision import sum_all_but_batch, widen


def squared_error(x: Tensor, y: Tensor, *, reduction: str = "mean") -> Tensor:
    """Define `geco_fast.ops.squared_error`."""
    x, y = widen(x, y)
    difference = x - y
    total = sum_all_but_batch(difference * difference)
    return total if reduction == "sum" else total / math.prod(x.shape[1:])
