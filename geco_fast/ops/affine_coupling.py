"""Affine map of a coupling layer with its log-determinant."""

from __future__ import annotations

from torch import Tensor

from geco_fast import reference
from geco_fast._backend import select
from geco_fast._checks import check_choice, check_positive
from geco_fast.ops._operands import same_shape_operands
from geco_fast.reference.affine_coupling import SCALE_MAPS


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
    check_positive("clamp", clamp)
    x, log_scale, shift = same_shape_operands(x=x, log_scale=log_scale, shift=shift)
    select("affine_coupling", x, backend)
    return reference.affine_coupling(
        x, log_scale, shift, inverse=inverse, scale_map=scale_map, clamp=clamp
    )
