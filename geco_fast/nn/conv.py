"""Convolution layer on top of `geco_fast.ops.conv2d`."""

from __future__ import annotations

from torch import Tensor, nn

from geco_fast import ops


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that goes through `geco_fast.ops.conv2d` where that computes the same.

    That is: stride 1, no dilation, one group, odd kernel, zero padding that keeps the size, batched
    input. Everything else is left to `torch.nn.Conv2d`. Arguments, parameters, `state_dict` keys
    and initialisation are those of `torch.nn.Conv2d`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() == 4 and input.is_floating_point() and keeps_size(self):
            return ops.conv2d(input, weight, bias)
        return super()._conv_forward(input, weight, bias)


def keeps_size(conv: nn.Conv2d) -> bool:
    """Whether a layer is a plain "same" convolution: stride 1, odd kernel, zero padding."""
    return (
        conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and all(k % 2 == 1 for k in conv.kernel_size)
        and conv.padding in ("same", tuple(k // 2 for k in conv.kernel_size))
    )
