"""Patch-wise normalised cross-correlation, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from geco_fast.reference._precision import widen


def extract_patches(
    x: Tensor, patch_size: int | Sequence[int], stride: int | Sequence[int]
) -> Tensor:
    """View the valid patches of ``[B, C, *S]`` as ``[B, C, *S', *patch_size]``."""
    for axis in range(2, x.dim()):
        size = patch_size if isinstance(patch_size, int) else patch_size[axis - 2]
        x = x.unfold(axis, size, stride if isinstance(stride, int) else stride[axis - 2])
    return x


def pncc(
    x: Tensor,
    y: Tensor,
    patch_size: int | Sequence[int] = 8,
    *,
    stride: int | Sequence[int] = 1,
    channels: str = "joint",
    eps: float = 1e-6,
    reduction: str = "none",
) -> Tensor:
    """Define `geco_fast.ops.pncc`."""
    dtype = x.dtype
    axes = tuple(range(2 - x.dim(), 0))
    if channels == "joint":
        axes = (1, *axes)

    def whiten(image: Tensor) -> Tensor:
        patches = extract_patches(image, patch_size, stride)  # [B, C, *S', *K]
        centred = patches - patches.mean(axes, keepdim=True)
        return centred / torch.sqrt((centred * centred).sum(axes, keepdim=True) + eps)

    x, y = widen(x, y)
    scores = (whiten(x) * whiten(y)).sum(axes)
    # Rounding can leave [-1, 1] by an ulp; the value is brought back, the derivatives stay.
    scores = scores + (scores.clamp(-1, 1) - scores).detach()
    if reduction == "none":
        return scores.to(dtype)
    total = scores.flatten(1).sum(1)
    return total if reduction == "sum" else total / math.prod(scores.shape[1:])
