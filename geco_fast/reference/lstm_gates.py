"""Pointwise half of an LSTM cell, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def lstm_gates(gates: Tensor, c: Tensor, *, forget_bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """Define `geco_fast.ops.lstm_gates`."""
    i, f, g, o = gates.chunk(4, dim=1)
    c_next = torch.sigmoid(f + forget_bias) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c_next), c_next
