"""Dtypes and reductions that the definitions share."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring 16-bit tensors to float32; wider ones stay as they are."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def sum_all_but_batch(value: Tensor) -> Tensor:
    """Sum ``[B, ...]`` to ``[B]``."""
    # The added axis makes [B] no special case: an empty list of axes would sum over all of them.
    return value.unsqueeze(-1).sum(tuple(range(1, value.dim() + 1)))
