"""Reparametrised Gaussian sample and its KL divergence."""

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
from geco_fast._registry import MAX_RANK
from geco_fast.ops._operands import same_shape_operands

# Which of the five inputs each result depends on, as bits.
_OF_Z, _OF_KL = 0b10011, 0b01111


def _function(run: Any, differentiate: Any) -> type[torch.autograd.Function]:
    """Return the Function over a backend's operators."""

    class _GaussianLatent(torch.autograd.Function):
        """Saves only its inputs."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            _GaussianLatent.remember(ctx, inputs)
            with below_autograd():
                return run(*inputs)

        @staticmethod
        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
            ctx.save_for_backward(*inputs)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            if wants_graph():
                return reference_gradients(reference.gaussian_latent, inputs, grads)
            grad_z, grad_kl = grads
            reached = (0 if grad_z is None else _OF_Z) | (0 if grad_kl is None else _OF_KL)
            a, b, c, d, e = ctx.needs_input_grad
            needs = reached & (a | b << 1 | c << 2 | d << 3 | e << 4)
            if not needs:
                return (None,) * 5
            found = differentiate(*inputs, grad_z, grad_kl, needs)
            return tuple([grad if needs >> k & 1 else None for k, grad in enumerate(found)])

    return _GaussianLatent


_gaussian_latent = differentiable("gaussian_latent", _function, "gaussian_latent_backward")


def gaussian_latent(
    q_mean: Tensor,
    q_log_std: Tensor,
    p_mean: Tensor,
    p_log_std: Tensor,
    noise: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Sample a diagonal Gaussian posterior and measure it against its prior.

    .. math::
        z &= \mu_q + \sigma_q \epsilon \\
        \mathrm{KL}(q \| p) &= \sum \log \frac{\sigma_p}{\sigma_q}
            + \frac{\sigma_q^2 + (\mu_q - \mu_p)^2}{2 \sigma_p^2} - \frac{1}{2}

    Parameters
    ----------
    q_mean, q_log_std : Tensor
        Mean and logarithm of the standard deviation of the posterior q, ``[B, ...]``; float32,
        float64, bfloat16 or float16, any strides.
    p_mean, p_log_std : Tensor
        The same of the prior p.
    noise : Tensor
        Standard normal noise of the same shape.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    z : Tensor
        The sample, ``[B, ...]``, in the dtype of the operands (float32 under autocast).
    kl : Tensor
        The analytic divergence in nats, ``[B]``, summed over all but the batch; float32 for
        16-bit operands.

    Raises
    ------
    ValueError
        If a shape or a device differs from that of `q_mean`.
    TypeError
        If a dtype is not supported or the dtypes differ.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    Kingma and Welling, "Auto-encoding variational Bayes" (2014), section 2.4 and appendix B, for a
    prior that is any diagonal Gaussian.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> zero = torch.zeros(2, 3)
    >>> z, kl = gf.ops.gaussian_latent(zero + 1, zero, zero, zero, torch.randn(2, 3))
    >>> kl
    tensor([1.5000, 1.5000])
    """
    operands = same_shape_operands(
        q_mean=q_mean, q_log_std=q_log_std, p_mean=p_mean, p_log_std=p_log_std, noise=noise
    )
    chosen = select("gaussian_latent", operands[0], backend)
    if chosen == "reference":
        return reference.gaussian_latent(*operands)
    if operands[0].dim() > MAX_RANK:
        z, kl = _gaussian_latent[chosen](*(operand.flatten(MAX_RANK - 1) for operand in operands))
        return z.view(q_mean.shape), kl
    z, kl = _gaussian_latent[chosen](*operands)
    return z, kl
