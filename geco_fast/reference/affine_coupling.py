"""Affine map of a coupling layer with its log-determinant, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from geco_fast.reference._precision import sum_all_but_batch, widen

SCALE_MAPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "exp": lambda a, clamp: a,
    "tanh": lambda a, clamp: clamp * torch.tanh(a),
    "atan": lambda a, clamp: (clamp * 2 / math.pi) * torch.atan(a),
    "sigmoid": lambda a, clamp: F.logsigmoid(a + 2),
}


def affine_coupling(
    x: Tensor,
    log_scale: Tensor,
    shift: Tensor,
    *,
    inverse: bool = False,
    scale_map: str = "tanh",
    clamp: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Define `geco_fast.ops.affine_coupling`."""
    dtype = x.dtype
    x, log_scale, shift = widen(x, log_scale, shift)
    s = SCALE_MAPS[scale_map](log_scale, clamp)
    log_det = sum_all_but_batch(s)
    if inverse:
        return ((x - shift) * torch.exp(-s)).to(dtype), -log_det
    return (x * torch.exp(s) + shift).to(dtype), log_det
