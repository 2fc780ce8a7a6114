"""Pointwise half of an LSTM cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geco_fast import reference
from geco_fast._autograd import (
    below_autograd,
    differentiable,
    reference_gradients,
    wants_graph,
)
from geco_fast._backend import select
from geco_fast._checks import (
    alike,
    check_alike,
    check_floating,
    check_number,
    check_rank,
    check_shape,
)
from geco_fast.ops._operands import autocast_enabled

_RANKS = range(2, 6)


def _function(run: Any, differentiate: Any) -> type[torch.autograd.Function]:
    """Return the Function over a backend's operators."""

    class _LSTMGates(torch.autograd.Function):
        """Saves only its inputs: to recompute the activations costs less than to load them."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            _LSTMGates.remember(ctx, inputs)
            with below_autograd():
                return run(*inputs)

        @staticmethod
        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
            gates, c, ctx.forget_bias = inputs
            ctx.save_for_backward(gates, c)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            gates, c = ctx.saved_tensors
            if wants_graph():
                return *reference_gradients(
                    lambda gates, c: reference.lstm_gates(gates, c, forget_bias=ctx.forget_bias),
                    (gates, c),
                    grads,
                ), None
            return *differentiate(gates, c, ctx.forget_bias, *grads), None

    return _LSTMGates


_lstm_gates = differentiable("lstm_gates", _function, "lstm_gates_backward")


def _fit(gates: torch.Size, c: torch.Size) -> bool:
    """Whether the shapes of gates and state belong together."""
    rank = len(gates)
    return (
        1 < rank < 6
        and len(c) == rank
        and gates[0] == c[0]
        and gates[1] == 4 * c[1]
        # Slices would take longer than all the rest.
        and (rank < 3 or gates[2] == c[2])
        and (rank < 4 or gates[3] == c[3])
        and (rank < 5 or gates[4] == c[4])
    )


def _checked_state(gates: Tensor, c: Tensor) -> Tensor:
    """Return the state in the dtype of gates, where autocast allows; else name what is wrong."""
    check_floating("gates", gates)
    check_floating("c", c)
    check_rank("gates", gates, _RANKS, "[B, 4C, *S] with 0 to 3 spatial dimensions")
    batch, width, *spatial = gates.shape
    if width % 4:
        raise ValueError(
            f"gates must have a channel count divisible by 4 (i, f, g, o), got {width}"
        )
    check_shape("c", c, (batch, width // 4, *spatial), "a quarter of the channels of gates")
    if c.dtype != gates.dtype and autocast_enabled(gates.device.type):
        c = c.to(gates.dtype)
    check_alike("c", c, "gates", gates)
    return c


def lstm_gates(
    gates: Tensor, c: Tensor, *, forget_bias: float = 0.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Apply the gates of an LSTM cell to its pre-activations.

    .. math::
        c' &= \sigma(f + b) \, c + \sigma(i) \tanh(g) \\
        h' &= \sigma(o) \tanh(c')

    with ``i, f, g, o = gates.chunk(4, dim=1)``, PyTorch's order, and forget bias ``b``.

    Parameters
    ----------
    gates : Tensor
        Pre-activations ``[B, 4C, *S]``, zero to three spatial dimensions; float32, float64,
        bfloat16 or float16, any strides.
    c : Tensor
        Cell state ``[B, C, *S]``, of the same dtype and device. Under autocast it is brought to
        the dtype of `gates`.
    forget_bias : float
        Added to the forget gate's pre-activation.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    h, c_next : Tensor
        Hidden and cell state ``[B, C, *S]`` in the dtype of `gates`, laid out as PyTorch would for
        the same maths. Arithmetic is in float32 for the 16-bit dtypes.

    Raises
    ------
    ValueError
        If a rank, a shape or a device is wrong.
    TypeError
        If a dtype is not supported, the dtypes differ, or `forget_bias` is not a number.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    Hochreiter and Schmidhuber, "Long short-term memory" (1997), with the forget gate of Gers et
    al. (2000); its convolutional form is Shi et al., "Convolutional LSTM network" (2015), eq. 3
    without peepholes.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> h, c = gf.ops.lstm_gates(torch.randn(2, 4 * 8, 5, 5), torch.zeros(2, 8, 5, 5))
    >>> h.shape
    torch.Size([2, 8, 5, 5])
    """
    if not (alike(gates, c) and _fit(gates.shape, c.shape)):
        c = _checked_state(gates, c)
    if type(forget_bias) is not float:
        check_number("forget_bias", forget_bias)
    chosen = select("lstm_gates", gates, backend)
    if chosen == "reference":
        return reference.lstm_gates(gates, c, forget_bias=forget_bias)
    h, c_next = _lstm_gates[chosen](gates, c, forget_bias)
    return h, c_next
