"""Patch-wise normalised cross-correlation, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
    return reduce_scores(scores, reduction, dtype)


def reduce_scores(scores: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Scores in a dtype, or their sum or mean over all but the batch in their own."""
    if reduction == "none":
        return scores.to(dtype)
    total = scores.flatten(1).sum(1)
    return total if reduction == "sum" else total / math.prod(scores.shape[1:])


def lncc(
    x: Tensor,
    y: Tensor,
    kernel_size: int = 3,
    *,
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    reduction: str = "none",
) -> Tensor:
    """Define `geco_fast.ops.lncc`."""
    dtype = x.dtype
    axes = tuple(range(2 - x.dim(), 0))
    padding = [kernel_size // 2] * (2 * len(axes))

    def centre(image: Tensor) -> Tensor:
        patches = extract_patches(F.pad(image, padding), kernel_size, 1)  # [B, C, *S, *K]
        return patches - patches.mean(axes, keepdim=True)

    x, y = widen(x, y)
    if 0 in x.shape[2:]:  # no window fits into the padding alone
        return reduce_scores(x * y, reduction, dtype)
    x, y = centre(x), centre(y)
    cross = (x * y).sum(axes)
    var_x, var_y = ((image * image).sum(axes).clamp(min=smooth_dr) for image in (x, y))
    scores = (cross * cross + smooth_nr) / (var_x * var_y)
    return reduce_scores(scores, reduction, dtype)
