"""One step of a convolutional LSTM, and the convolution in it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from geco_fast import reference
from geco_fast._backend import select
from geco_fast._checks import check_alike, check_floating, check_rank, check_shape
from geco_fast.ops._operands import autocast_to_lower, per_dimension
from geco_fast.ops.lstm_gates import lstm_gates
from geco_fast.reference.conv_lstm import conv_lstm_gates


class PreparedWeight(NamedTuple):
    """A convolution weight made ready for many steps at one image size; see `prepare_weight`.

    Attributes
    ----------
    weight : Tensor
        ``[4C, Cx + C, kh, kw]``.
    spatial : tuple of int
        ``(H, W)`` of the images it is meant for.
    """

    weight: Tensor
    spatial: tuple[int, int]


def _check_weight(weight: Tensor) -> None:
    check_floating("weight", weight)
    check_rank("weight", weight, (4,), "[out_channels, in_channels, kh, kw]")
    kernel = tuple(weight.shape[2:])
    if not (kernel[0] % 2 and kernel[1] % 2):
        raise ValueError(f"weight must have an odd kernel, got {kernel[0]}x{kernel[1]}")


def _alike(operands: dict[str, Tensor | None], first: str) -> dict[str, Any]:
    """Apply autocast to the operands that are there; check that dtype and device agree."""
    present = {name: tensor for name, tensor in operands.items() if tensor is not None}
    cast = dict(zip(present, autocast_to_lower(*present.values()), strict=True))
    for name, tensor in cast.items():
        check_alike(name, tensor, first, cast[first])
    return {name: cast.get(name) for name in operands}


def prepare_weight(
    weight: Tensor, spatial: tuple[int, int], *, backend: str = "auto"
) -> PreparedWeight:
    """Transform a weight once for all steps of a forward pass.

    What `conv_lstm_step` would do to its weight at every step is done here once; the gradient is
    accumulated over the steps and brought back to `weight` once.

    Parameters
    ----------
    weight : Tensor
        ``[4C, Cx + C, kh, kw]``, odd kernels.
    spatial : tuple of int
        ``(H, W)`` of the images that the steps will see.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    PreparedWeight
        Given to `conv_lstm_step` in place of the weight.

    Raises
    ------
    ValueError
        If the weight's rank, an even kernel or `spatial` is wrong.
    TypeError
        If the dtype is not supported.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.
    """
    _check_weight(weight)
    height, width = per_dimension("spatial", spatial, 2)
    (weight,) = autocast_to_lower(weight)
    select("prepare_weight", weight, backend)
    return PreparedWeight(weight, (height, width))


def conv_lstm_step(
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor | PreparedWeight,
    bias: Tensor | None = None,
    *,
    forget_bias: float = 0.0,
    x_projection: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Advance a convolutional LSTM by one step.

    .. math:: i, f, g, o = W * [x, h] + b + p, \qquad
        c' = \sigma(f + b_f) \, c + \sigma(i) \tanh(g), \qquad h' = \sigma(o) \tanh(c')

    with a convolution of stride 1 and "same" zero padding, and p = `x_projection`.

    Parameters
    ----------
    x : Tensor or None
        Input ``[B, Cx, H, W]``; None stands for no input channels. float32, float64, bfloat16 or
        float16, any strides.
    h, c : Tensor
        Hidden and cell state ``[B, C, H, W]``.
    weight : Tensor or PreparedWeight
        ``[4C, Cx + C, kh, kw]``: gates in PyTorch's order i, f, g, o; input channels x, then h;
        odd kernels.
    bias : Tensor, optional
        ``[4C]``.
    forget_bias : float
        Added to the forget gate's pre-activation.
    x_projection : Tensor, optional
        ``[B, 4C, H, W]``, added to the pre-activations: the part of time-invariant inputs,
        computed once for all steps.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call. With "auto" the gates may have a kernel where the
        step has none.

    Returns
    -------
    h, c_next : Tensor
        ``[B, C, H, W]`` in the dtype of the operands (under autocast, autocast's).

    Raises
    ------
    ValueError
        If a rank, shape or device is wrong, a kernel is even, or a `PreparedWeight` is for another
        image size.
    TypeError
        If a dtype is not supported or the dtypes differ.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    Shi et al., "Convolutional LSTM network" (2015), eq. 3 without peepholes.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> h = c = torch.zeros(2, 8, 6, 6)
    >>> h, c = gf.ops.conv_lstm_step(torch.randn(2, 3, 6, 6), h, c, torch.randn(32, 11, 5, 5))
    >>> h.shape
    torch.Size([2, 8, 6, 6])
    """
    check_floating("h", h)
    check_rank("h", h, (4,), "[B, C, H, W]")
    batch, hidden, *spatial = h.shape
    check_floating("c", c)
    check_shape("c", c, h.shape, "that of h")
    if isinstance(weight, PreparedWeight):
        if weight.spatial != tuple(spatial):
            raise ValueError(
                f"weight must be prepared for the spatial shape {spatial} of h, "
                f"got one for {list(weight.spatial)}"
            )
        weight = weight.weight
    _check_weight(weight)
    inputs = 0
    if x is not None:
        check_floating("x", x)
        check_rank("x", x, (4,), "[B, Cx, H, W]")
        inputs = x.shape[1]
        check_shape("x", x, (batch, inputs, *spatial), "batch and spatial shape of h")
    shape = (4 * hidden, inputs + hidden, *weight.shape[2:])
    check_shape("weight", weight, shape, "[4C, Cx + C, kh, kw] of x and h")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (4 * hidden,), "four times the channels of h")
    if x_projection is not None:
        check_floating("x_projection", x_projection)
        shape = (batch, 4 * hidden, *spatial)
        check_shape("x_projection", x_projection, shape, "four times the channels of h")
    operands = _alike(
        {"x": x, "h": h, "weight": weight, "bias": bias, "x_projection": x_projection, "c": c}, "h"
    )
    select("conv_lstm_step", operands["h"], backend)
    c = operands.pop("c")
    gates = conv_lstm_gates(**operands)
    return lstm_gates(gates, c, forget_bias=forget_bias, backend=backend)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Convolve images with stride 1 and "same" zero padding.

    Parameters
    ----------
    x : Tensor
        Images ``[B, Cin, H, W]``; float32, float64, bfloat16 or float16, any strides.
    weight : Tensor
        ``[Cout, Cin, kh, kw]``, odd kernels.
    bias : Tensor, optional
        ``[Cout]``.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    Tensor
        ``[B, Cout, H, W]`` in the dtype of the operands (under autocast, autocast's), laid out as
        `torch.nn.functional.conv2d` would.

    Raises
    ------
    ValueError
        If a rank, shape or device is wrong, or a kernel is even.
    TypeError
        If a dtype is not supported or the dtypes differ.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> gf.ops.conv2d(torch.randn(2, 3, 7, 9), torch.randn(4, 3, 5, 3)).shape
    torch.Size([2, 4, 7, 9])
    """
    check_floating("x", x)
    check_rank("x", x, (4,), "[B, Cin, H, W]")
    _check_weight(weight)
    shape = (weight.shape[0], x.shape[1], *weight.shape[2:])
    check_shape("weight", weight, shape, "[Cout, Cin, kh, kw] of x")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, weight.shape[:1], "the output channels of weight")
    operands = _alike({"x": x, "weight": weight, "bias": bias}, "x")
    select("conv2d", operands["x"], backend)
    return reference.conv2d(**operands)
