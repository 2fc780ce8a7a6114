"""Affine map of a coupling layer with its log-determinant."""

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
from geco_fast._checks import check_choice, check_positive
from geco_fast._registry import MAX_RANK
from geco_fast.ops._operands import same_shape_operands
from geco_fast.reference.affine_coupling import SCALE_MAPS


def _function(run: Any, differentiate: Any) -> type[torch.autograd.Function]:
    """Return the Function over a backend's operators."""

    class _AffineCoupling(torch.autograd.Function):
        """Saves x and log_scale, and shift for the inverse: forward, no gradient depends on it."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            _AffineCoupling.remember(ctx, inputs)
            with below_autograd():
                return run(*inputs)

        @staticmethod
        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
            x, log_scale, shift, *ctx.options = inputs
            inverse = ctx.options[0]
            ctx.save_for_backward(x, log_scale, *((shift,) if inverse else ()))
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            inverse, scale_map, clamp = ctx.options
            x, log_scale, *rest = ctx.saved_tensors
            grad_y = grads[0]
            needs_x, needs_log_scale, needs_shift, *_ = ctx.needs_input_grad
            grad_shift = grad_y if needs_shift and not inverse else None
            if wants_graph():

                def define(
                    x: Tensor, log_scale: Tensor, shift: Tensor | None = None
                ) -> tuple[Tensor, Tensor]:
                    shift = torch.zeros_like(x) if shift is None else shift
                    return reference.affine_coupling(
                        x, log_scale, shift, inverse=inverse, scale_map=scale_map, clamp=clamp
                    )

                found = reference_gradients(define, (x, log_scale, *rest), grads)
                return *found, *(() if inverse else (grad_shift,)), None, None, None
            if grad_y is None:
                needs_x = needs_shift = False
            if needs_x or needs_log_scale or (needs_shift and inverse):
                shift = rest[0] if inverse else None
                grad_x, grad_log_scale, grad_of_shift = differentiate(
                    *(x, log_scale, shift, inverse, scale_map, clamp, *grads),
                    *(needs_x, needs_log_scale, needs_shift),
                )
                if needs_shift and inverse:
                    grad_shift = grad_of_shift
            return (
                grad_x if needs_x else None,
                grad_log_scale if needs_log_scale else None,
                grad_shift,
                *(None, None, None),
            )

    return _AffineCoupling


_affine_coupling = differentiable("affine_coupling", _function, "affine_coupling_backward")


def affine_coupling(
    x: Tensor,
    log_scale: Tensor,
    shift: Tensor,
    *,
    inverse: bool = False,
    scale_map: str = "tanh",
    clamp: float = 2.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Scale and shift elementwise, invertibly, with the logarithm of the Jacobian determinant.

    Forward :math:`y = x e^s + t` with log-determinant :math:`\sum s`; inverse
    :math:`y = (x - t) e^{-s}` with :math:`-\sum s`, where :math:`s` is a map of
    :math:`a` = `log_scale`:

    ========= ==================================================
    map       s
    ========= ==================================================
    exp       a
    tanh      clamp * tanh(a)
    atan      clamp * (2 / pi) * atan(a)
    sigmoid   log sigmoid(a + 2), that is, the scale is a sigmoid
    ========= ==================================================

    Parameters
    ----------
    x : Tensor
        The part that is transformed, ``[B, ...]``; float32, float64, bfloat16 or float16, any
        strides.
    log_scale, shift : Tensor
        The conditioner's outputs a and t, of the same shape, dtype and device.
    inverse : bool
        Undo the forward map.
    scale_map : {"tanh", "exp", "atan", "sigmoid"}
        The map from `log_scale` to s.
    clamp : float
        Bound of \|s\| in the maps "tanh" and "atan"; the others have no use for it.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    y : Tensor
        ``[B, ...]`` in the dtype of the operands (float32 under autocast).
    log_det : Tensor
        ``[B]``, of the direction asked for; float32 for 16-bit operands.

    Raises
    ------
    ValueError
        If a shape or a device differs from that of `x`, `scale_map` is unknown, or `clamp` is not
        positive.
    TypeError
        If a dtype is not supported or the dtypes differ.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    Dinh et al., "Density estimation using Real NVP" (2017), eq. 7 to 9.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> x, a, t = torch.randn(3, 2, 4, dtype=torch.float64)
    >>> y, log_det = gf.ops.affine_coupling(x, a, t)
    >>> back, _ = gf.ops.affine_coupling(y, a, t, inverse=True)
    >>> torch.allclose(back, x)
    True
    """
    check_choice("scale_map", scale_map, SCALE_MAPS)
    if type(clamp) is not float or not clamp > 0:
        check_positive("clamp", clamp)
    x, log_scale, shift = same_shape_operands(x=x, log_scale=log_scale, shift=shift)
    chosen = select("affine_coupling", x, backend)
    if chosen == "reference":
        return reference.affine_coupling(
            x, log_scale, shift, inverse=inverse, scale_map=scale_map, clamp=clamp
        )
    operands, shape = (x, log_scale, shift), x.shape
    if len(shape) > MAX_RANK:
        y, log_det = _affine_coupling[chosen](
            *(operand.flatten(MAX_RANK - 1) for operand in operands),
            *(bool(inverse), scale_map, clamp),
        )
        return y.view(shape), log_det
    y, log_det = _affine_coupling[chosen](*operands, bool(inverse), scale_map, clamp)
    return y, log_det
