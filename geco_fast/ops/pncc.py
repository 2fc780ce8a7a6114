"""Patch-wise normalised cross-correlation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geco_fast import reference
from geco_fast._autograd import (
    below_autograd,
    differentiable,
    direct_apply,
    operators,
    reference_gradients,
    wants_graph,
)
from geco_fast._backend import select
from geco_fast._checks import check_choice, check_positive, check_rank, describe
from geco_fast.ops._operands import per_dimension, same_shape_operands

_REDUCTIONS = ("none", "sum", "mean")


def _reference_pncc(
    x: Tensor,
    y: Tensor,
    size: Sequence[int],
    step: Sequence[int],
    channels: str,
    eps: float,
    reduction: str,
) -> Tensor:
    return reference.pncc(x, y, size, stride=step, channels=channels, eps=eps, reduction=reduction)


def _reference_lncc(
    x: Tensor, y: Tensor, size: int, smooth_nr: float, smooth_dr: float, reduction: str
) -> Tensor:
    return reference.lncc(x, y, size, smooth_nr=smooth_nr, smooth_dr=smooth_dr, reduction=reduction)


def _over(definition: Any, run: Any, differentiate: Any) -> type[torch.autograd.Function]:
    """Return the Function over a backend's operators."""

    class _Correlation(torch.autograd.Function):
        """Saves only the images: backward recomputes the patches' statistics."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            _Correlation.remember(ctx, inputs)
            with below_autograd():
                return run(*inputs)  # type: ignore[no-any-return]

        @staticmethod
        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
            x, y, *options = inputs
            ctx.options = tuple(options)
            ctx.save_for_backward(x, y)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            x, y = ctx.saved_tensors
            rest = (None,) * len(ctx.options)
            if wants_graph():
                return *reference_gradients(
                    lambda x, y: (definition(x, y, *ctx.options),), (x, y), (grad,)
                ), *rest
            wants_x, wants_y = ctx.needs_input_grad[:2]
            grad_x, grad_y = differentiate(x, y, *ctx.options, grad, wants_x, wants_y)
            return grad_x if wants_x else None, grad_y if wants_y else None, *rest

    return _Correlation


def _patches_cover(spatial: Sequence[int], size: Sequence[int], step: Sequence[int]) -> bool:
    """Whether every pixel is in a patch."""
    return all(
        by <= patch and (extent - patch) % by == 0
        for extent, patch, by in zip(spatial, size, step, strict=True)
    )


class _Summed(torch.autograd.Function):
    """A sum or mean, whose gradients are made with it: backward only scales them.

    Not where a pixel is in no patch: it has no gradient, and zero times infinity would be NaN.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, operator: Any, definition: Any, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.define = lambda x, y: (definition(x, y, *options),)
        with below_autograd():
            sums, *grads = operator(x, y, *options, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(x, y, *grads)
        return sums  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *found = ctx.saved_tensors
        if wants_graph():
            return *reference_gradients(ctx.define, (x, y), grads), None, None, None
        scale = grads[0].view(-1, *(1,) * (x.dim() - 1))
        scaled = [
            (gradient * scale).to(x.dtype) if wanted else None
            for gradient, wanted in zip(found, ctx.needs_input_grad[:2], strict=True)
        ]
        return *scaled, None, None, None


_pncc = differentiable("pncc", functools.partial(_over, _reference_pncc), "pncc_backward")
_lncc = differentiable("lncc", functools.partial(_over, _reference_lncc), "lncc_backward")
_pncc_with_gradients = operators("pncc_with_gradients")
_lncc_with_gradients = operators("lncc_with_gradients")
_summed = direct_apply(_Summed)


def _sums_with_gradients(x: Tensor, y: Tensor, reduction: str) -> bool:
    """Whether the sums' gradients may be asked for, outside `torch.compile`'s own formula."""
    return (
        reduction != "none"
        and (x.requires_grad or y.requires_grad)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


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


def check_kernel_size(kernel_size: int) -> None:
    """Raise unless a window's side is a positive odd integer."""
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, (int, torch.SymInt)):
        raise TypeError(f"kernel_size must be an int, got {describe(kernel_size)}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and >= 1, got {kernel_size!r}")


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
    check_choice("reduction", reduction, _REDUCTIONS)
    check_positive("eps", eps)
    x, y = same_shape_operands(x=x, y=y)
    check_rank("x", x, (3, 4, 5), "[B, C, *S] with 1 to 3 spatial dimensions")
    size, step = check_patches(x, patch_size, stride)
    chosen = select("pncc", x, backend)
    if chosen == "reference":
        return _reference_pncc(x, y, size, step, channels, eps, reduction)
    options = (size, step, channels, eps, reduction)
    if _sums_with_gradients(x, y, reduction) and _patches_cover(x.shape[2:], size, step):
        return _summed(x, y, _pncc_with_gradients[chosen], _reference_pncc, options)
    return _pncc[chosen](x, y, *options)  # type: ignore[return-value]


def lncc(
    x: Tensor,
    y: Tensor,
    kernel_size: int = 3,
    *,
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    reduction: str = "none",
    backend: str = "auto",
) -> Tensor:
    r"""Correlate two images window by window, squared, as losses of image registration do.

    .. math:: s_i = \frac{((x_i - \bar x_i)^\top (y_i - \bar y_i))^2 + a}
        {\max(\| x_i - \bar x_i \|^2, b) \, \max(\| y_i - \bar y_i \|^2, b)}

    with :math:`x_i` the window around pixel i of one channel, of the image with zeros around it.
    These zeros are data: they count in means and norms. a is `smooth_nr` and b is `smooth_dr`.

    Parameters
    ----------
    x, y : Tensor
        Images ``[B, C, *S]`` with 1 to 3 spatial dimensions, of the same shape, dtype and device;
        float32, float64, bfloat16 or float16, any strides.
    kernel_size : int
        Odd, for all spatial dimensions.
    smooth_nr, smooth_dr : float
        Added to the numerator, and the least sum of squares in the denominator, not negative.
    reduction : {"none", "sum", "mean"}
        The scores themselves, or their sum or mean over all windows and channels of a batch
        element.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    Tensor
        "none": scores ``[B, C, *S]``, in [0, 1] but for `smooth_nr`, in the dtype of the operands
        (float32 under autocast). "sum", "mean": ``[B]``, float32 for 16-bit operands.

    Raises
    ------
    ValueError
        If a rank, shape, device or option is wrong, or `kernel_size` is even.
    TypeError
        If a dtype is not supported, the dtypes differ, or an option is not a number.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    The score is that of MONAI's ``LocalNormalizedCrossCorrelationLoss`` with its rectangular
    kernel, and of VoxelMorph (Balakrishnan et al., 2019, equation 10) before it.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> x = torch.randn(1, 3, 16, 16)
    >>> gf.ops.lncc(x, x, 5, reduction="mean").round(decimals=3)
    tensor([1.])
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    check_positive("smooth_nr", smooth_nr, zero=True)
    check_positive("smooth_dr", smooth_dr, zero=True)
    check_kernel_size(kernel_size)
    x, y = same_shape_operands(x=x, y=y)
    check_rank("x", x, (3, 4, 5), "[B, C, *S] with 1 to 3 spatial dimensions")
    options = (kernel_size, smooth_nr, smooth_dr, reduction)
    chosen = select("lncc", x, backend)
    if chosen == "reference":
        return _reference_lncc(x, y, *options)
    if _sums_with_gradients(x, y, reduction):
        return _summed(x, y, _lncc_with_gradients[chosen], _reference_lncc, options)
    return _lncc[chosen](x, y, *options)  # type: ignore[return-value]
