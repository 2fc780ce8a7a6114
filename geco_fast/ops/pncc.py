"""Patch-wise normalised cross-correlation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from geco_fast import reference
from geco_fast._backend import select
from geco_fast._checks import check_choice, check_positive, check_rank
from geco_fast.ops._operands import per_dimension, same_shape_operands


def check_patches(
    image: Tensor, patch_size: int | Sequence[int], stride: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Patch size and stride per dimension of an image ``[B, C, *S]`` that holds a patch."""
    size = per_dimension("patch_size", patch_size, image.dim() - 2)
    step = per_dimension("stride", stride, image.dim() - 2)
    for patch, extent in zip(size, image.shape[2:], strict=True):
        if patch > extent:
            raise ValueError(
                f"patch_size must fit into the spatial shape {list(image.shape[2:])}, "
                f"got {patch_size!r}"
            )
    return size, step


def pncc(
    x: Tensor,
    y: Tensor,
    patch_size: int | Sequence[int] = 8,
    *,
    stride: int | Sequence[int] = 1,
    channels: str = "joint",
    eps: float = 1e-6,
    reduction: str = "none",
    backend: str = "auto",
) -> Tensor:
    r"""Correlate two images patch by patch.

    .. math:: \rho_i = \psi(x, i)^\top \psi(y, i), \qquad
        \psi(x, i) = \frac{x_i - \bar x_i}{\sqrt{\| x_i - \bar x_i \|^2 + \varepsilon}}

    with :math:`x_i` the patch at location i. Only patches that lie inside the image count.

    Parameters
    ----------
    x, y : Tensor
        Images ``[B, C, *S]`` with 1 to 3 spatial dimensions, of the same shape, dtype and device;
        float32, float64, bfloat16 or float16, any strides.
    patch_size, stride : int or sequence of int
        One for all or one per spatial dimension; even and odd sizes.
    channels : {"joint", "separate"}
        One patch spans all channels, or each channel has its own.
    eps : float
        Added to each patch's sum of squares, in units of the image squared; a patch flatter than
        that scores near 0.
    reduction : {"none", "sum", "mean"}
        The scores themselves, or their sum or mean over all patches of a batch element.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    Tensor
        "none": scores in [-1, 1], ``[B, *S']`` (``[B, C, *S']`` for "separate") with
        ``S' = (S - patch_size) // stride + 1``, in the dtype of the operands (float32 under
        autocast). "sum", "mean": ``[B]``, float32 for 16-bit operands.

    Raises
    ------
    ValueError
        If a rank, shape, device or option is wrong, or a patch does not fit into the image.
    TypeError
        If a dtype is not supported, the dtypes differ, or a size is not an integer.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    Rezende and Viola, "Taming VAEs" (2018), table 1. The statistics are computed in float32 or
    wider, from centred patches.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> x = torch.randn(1, 3, 16, 16)
    >>> gf.ops.pncc(x, 2 * x + 1, reduction="mean").round(decimals=3)
    tensor([1.])
    """
    check_choice("channels", channels, ("joint", "separate"))
    check_choice("reduction", reduction, ("none", "sum", "mean"))
    check_positive("eps", eps)
    x, y = same_shape_operands(x=x, y=y)
    check_rank("x", x, (3, 4, 5), "[B, C, *S] with 1 to 3 spatial dimensions")
    size, step = check_patches(x, patch_size, stride)
    select("pncc", x, backend)
    return reference.pncc(x, y, size, stride=step, channels=channels, eps=eps, reduction=reduction)
