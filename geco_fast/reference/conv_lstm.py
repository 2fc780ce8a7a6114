"""One step of a convolutional LSTM and the convolution in it, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geco_fast.reference.lstm_gates import lstm_gates


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Define `geco_fast.ops.conv2d`."""
    batch, _, *spatial = x.shape
    outputs, _, height, width = weight.shape
    if outputs == 0 or 0 in spatial:
        # PyTorch refuses these; the product keeps the empty result in the autograd graph.
        return x.new_zeros((batch, outputs, *spatial)) * (x.sum() + weight.sum())
    return F.conv2d(x, weight, bias, padding=(height // 2, width // 2))


def conv_lstm_gates(
    x: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    x_projection: Tensor | None = None,
) -> Tensor:
    """Pre-activations ``[B, 4C, H, W]`` of `conv_lstm_step`."""
    gates = conv2d(h if x is None else torch.cat([x, h], dim=1), weight, bias)
    return gates if x_projection is None else gates + x_projection


def conv_lstm_step(
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    forget_bias: float = 0.0,
    x_projection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Define `geco_fast.ops.conv_lstm_step`."""
    gates = conv_lstm_gates(x, h, weight, bias, x_projection)
    return lstm_gates(gates, c, forget_bias=forget_bias)
