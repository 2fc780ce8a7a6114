"""Squared error per batch element."""

from __future__ import annotations

from torch import Tensor

from geco_fast import reference
from geco_fast._backend import select
from geco_fast._checks import check_choice
from geco_fast.ops._operands import same_shape_operands


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
    select("squared_error", x, backend)
    return reference.squared_error(x, y, reduction=reduction)
