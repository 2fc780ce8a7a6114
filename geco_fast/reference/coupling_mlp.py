"""Conditioner of a coupling layer, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "silu": F.silu,
}


def coupling_mlp(
    x: Tensor,
    context_projection: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    activation: str = "relu",
) -> Tensor:
    """Define `geco_fast.ops.coupling_mlp`."""
    y = F.linear(x, weights[0], biases[0])
    if context_projection is not None:
        y = y + context_projection
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        y = F.linear(ACTIVATIONS[activation](y), weight, bias)
    return y
