"""Pointwise half of an LSTM cell, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from geco_fast.reference._precision import widen


def lstm_gates(gates: Tensor, c: Tensor, *, forget_bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """Define `geco_fast.ops.lstm_gates`."""
    wide_gates, wide_c = widen(gates, c)
    i, f, g, o = wide_gates.chunk(4, dim=1)
    c_next = torch.sigmoid(f + forget_bias) * wide_c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c_next)
    return h.to(gates.dtype), c_next.to(c.dtype)
