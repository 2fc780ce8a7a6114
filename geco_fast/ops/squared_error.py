"""Squared error per batch element."""

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
from geco_fast._checks import check_choice
from geco_fast._registry import MAX_RANK
from geco_fast.ops._operands import same_shape_operands


def _function(run: Any, differentiate: Any) -> type[torch.autograd.Function]:
    """Return the Function over a backend's operators."""

    class _SquaredError(torch.autograd.Function):
        """Saves only its inputs."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            _SquaredError.remember(ctx, inputs)
            with below_autograd():
                return run(*inputs)

        @staticmethod
        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
            x, y, ctx.reduction = inputs
            ctx.save_for_backward(x, y)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            x, y = ctx.saved_tensors
            reduction = ctx.reduction
            if wants_graph():
                return *reference_gradients(
                    lambda x, y: (reference.squared_error(x, y, reduction=reduction),),
                    (x, y),
                    (grad,),
                ), None
            needs_x, needs_y, _ = ctx.needs_input_grad
            grad_x, grad_y = differentiate(x, y, reduction, grad, needs_x, needs_y)
            return grad_x if needs_x else None, grad_y if needs_y else None, None

    return _SquaredError


_squared_error = differentiable("squared_error", _function, "squared_error_backward")


def squared_error(
    x: Tensor, y: Tensor, *, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    r"""Reduce :math:`(x - y)^2` over all but the batch.

    Parameters
    ----------
    x, y : Tensor
        ``[B, ...]``, of the same shape, dtype and device; float32, float64, bfloat16 or float16,
        any strides.
    reduction : {"mean", "sum"}
        Mean or sum over all but the batch. The mean over no element is NaN, as in PyTorch.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    Tensor
        ``[B]``, accumulated in float32 or wider and returned so.

    Raises
    ------
    ValueError
        If shapes or devices differ, or `reduction` is unknown.
    TypeError
        If a dtype is not supported or the dtypes differ.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    The reconstruction error of Rezende and Viola, "Taming VAEs" (2018), table 1, less its
    tolerance.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> gf.ops.squared_error(torch.full((2, 4), 3.0), torch.ones(2, 4), reduction="sum")
    tensor([16., 16.])
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    x, y = same_shape_operands(x=x, y=y)
    chosen = select("squared_error", x, backend)
    if chosen == "reference":
        return reference.squared_error(x, y, reduction=reduction)
    if x.dim() > MAX_RANK:
        x, y = x.flatten(MAX_RANK - 1), y.flatten(MAX_RANK - 1)
    error: Tensor = _squared_error[chosen](x, y, reduction)  # type: ignore[assignment]
    return error
