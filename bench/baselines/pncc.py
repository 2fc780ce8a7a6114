"""pNCC by box filters: the sums of x, y, x^2, y^2 and x y over each patch, as users write it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geco_fast.bench.rivals import Rival, like_operator
from geco_fast.testing.cases import Case

POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def pncc(
    x: Tensor,
    y: Tensor,
    patch_size: Any = 8,
    *,
    stride: Any = 1,
    channels: str = "joint",
    eps: float = 1e-6,
    reduction: str = "none",
) -> Tensor:
    """Variances as E[x^2] - E[x]^2, which cancels where a patch is far from zero."""
    pool = POOL[x.dim() - 2]
    count = patch_size ** (x.dim() - 2) if isinstance(patch_size, int) else math.prod(patch_size)
    moments = torch.cat([x, y, x * x, y * y, x * y], dim=1)
    means = pool(moments, patch_size, stride).unflatten(1, (5, x.shape[1]))
    if channels == "joint":
        means, count = means.mean(2), count * x.shape[1]
    mean_x, mean_y, square_x, square_y, product = means.unbind(1)
    norm_x = count * (square_x - mean_x * mean_x).clamp(min=0) + eps
    norm_y = count * (square_y - mean_y * mean_y).clamp(min=0) + eps
    scores = count * (product - mean_x * mean_y) * torch.rsqrt(norm_x * norm_y)
    if reduction == "none":
        return scores
    return scores.flatten(1).sum(1) if reduction == "sum" else scores.flatten(1).mean(1)


def _compiled(case: Case) -> Callable[..., Any]:
    return functools.partial(torch.compile(pncc, fullgraph=True), **case.options)


NOTE = "E[x^2] - E[x]^2, held to 1e-3 instead of the accuracy rule"
RIVALS = {
    "box filters": Rival(like_operator(pncc), tolerance=1e-3, note=NOTE),
    "box filters, compiled": Rival(_compiled, tolerance=1e-3, note=NOTE),
}
