"""Fixed-point map of the equilibrium encoder."""

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
from geco_fast._checks import check_alike, check_floating, check_positive, check_rank, check_shape
from geco_fast.ops._operands import autocast_to_float32


def _function(run: Any, differentiate: Any) -> type[torch.autograd.Function]:
    """Return the Function over a backend's operators."""

    class _EquilibriumMap(torch.autograd.Function):
        """Saves inputs and a value for each point or vector; backward streams once more."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
            with below_autograd():
                output = run(*inputs)
            _EquilibriumMap.remember(ctx, inputs, output)
            return output

        @staticmethod
        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs, *output)
            ctx.mark_non_differentiable(output[2])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            *inputs, mapped, log_normaliser, log_mass = ctx.saved_tensors
            grads = grads[:2]
            if all(grad is None for grad in grads):
                return (None,) * len(inputs)
            if wants_graph():
                given = [tensor for tensor in inputs if tensor is not None]

                def define(*given: Tensor) -> tuple[Tensor, ...]:
                    x, psi, beta, *log_prior = given
                    prior = log_prior[0] if log_prior else None
                    return reference.equilibrium_map(x, psi, beta, log_prior=prior)

                found = reference_gradients(define, given, grads)
                return *found, *(None,) * (len(inputs) - len(given))
            needed = ctx.needs_input_grad
            wanted = sum(needed[k] << k for k in range(len(inputs)))
            found = differentiate(*inputs, mapped, log_normaliser, log_mass, *grads, wanted)
            return tuple(grad if need else None for grad, need in zip(found, needed, strict=True))

    return _EquilibriumMap


_equilibrium_map = differentiable("equilibrium_map", _function, "equilibrium_map_backward")


def equilibrium_map(
    x: Tensor,
    psi: Tensor,
    beta: float | Tensor,
    *,
    log_prior: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Map reconstruction vectors to the means of the data that they are responsible for.

    .. math::
        m_{ia} = \frac{e^{-H_{ia}/\beta}}{\sum_b \pi_b e^{-H_{ib}/\beta}}, \qquad
        H_{ia} = \| x_i - \psi_a \|^2, \qquad
        F(\psi)_a = \frac{\sum_i m_{ia} x_i}{\sum_j m_{ja}}

    The data stream through in chunks: the n by m matrix never exists as a whole, with a gradient
    neither. (The reference keeps it in the autograd graph and inside `torch.compile`.)

    Parameters
    ----------
    x : Tensor
        Data ``[n, d]``; float32, float64, bfloat16 or float16, any strides.
    psi : Tensor
        Reconstruction vectors ``[m, d]``, of the same dtype and device.
    beta : float or Tensor
        Temperature above 0, in units of the data squared; a tensor ``[]`` is not checked for its
        sign, which would have to wait for the device.
    log_prior : Tensor, optional
        Logarithm of the prior weights ``[m]``; uniform by default. Not normalised here.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    mapped : Tensor
        F(psi), ``[m, d]``.
    log_normaliser : Tensor
        :math:`\log \sum_b \pi_b e^{-H_{ib}/\beta}`, ``[n]``. Both are float32 for 16-bit operands.

    Raises
    ------
    ValueError
        If a rank, shape or device is wrong, or a number `beta` is not positive.
    TypeError
        If a dtype is not supported or the dtypes differ.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    Rezende and Viola, "Taming VAEs" (2018), proposition 4 and appendix A.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> x = torch.tensor([[0.0], [1.0], [10.0]])
    >>> mapped, _ = gf.ops.equilibrium_map(x, torch.tensor([[0.0], [9.0]]), 0.1)
    >>> mapped
    tensor([[ 0.5000],
            [10.0000]])
    """
    operands = {"x": x, "psi": psi}
    if log_prior is not None:
        operands["log_prior"] = log_prior
    for name, tensor in operands.items():
        check_floating(name, tensor)
    check_rank("x", x, (2,), "[n, d]")
    check_rank("psi", psi, (2,), "[m, d]")
    check_shape("psi", psi, (psi.shape[0], x.shape[1]), "the dimension of x")
    if log_prior is not None:
        check_shape("log_prior", log_prior, psi.shape[:1], "one per vector of psi")
    if isinstance(beta, Tensor):
        check_floating("beta", beta)
        check_shape("beta", beta, (), "a scalar")
        if beta.device != x.device:
            raise ValueError(f"beta must be on the device of x, {x.device}, got {beta.device}")
    else:
        check_positive("beta", beta)
    cast = dict(zip(operands, autocast_to_float32(*operands.values()), strict=True))
    for name, tensor in cast.items():
        check_alike(name, tensor, "x", cast["x"])
    x, psi, log_prior = cast["x"], cast["psi"], cast.get("log_prior")
    chosen = select("equilibrium_map", x, backend)
    if chosen == "reference":
        return reference.equilibrium_map(x, psi, beta, log_prior=log_prior)
    if not isinstance(beta, Tensor):
        beta = torch.scalar_tensor(beta, dtype=torch.float64, device=x.device)
    mapped, log_normaliser, _ = _equilibrium_map[chosen](x, psi, beta, log_prior)
    return mapped, log_normaliser
