"""PyTorch's convolution in its other layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from geco_fast.bench.rivals import Rival
from geco_fast.testing.cases import Case


def _channels_last(case: Case) -> Callable[..., Tensor]:
    """The weight is converted at each call, as that of a layer would not be: it is small."""

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)

    return call


RIVALS = {"channels-last": Rival(_channels_last, tolerance=1e-5)}
