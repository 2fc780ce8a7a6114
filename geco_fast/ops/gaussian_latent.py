"""Reparametrised Gaussian sample and its KL divergence."""

from __future__ import annotations

from torch import Tensor

from geco_fast import reference
from geco_fast._backend import select
from geco_fast.ops._operands import same_shape_operands


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
    select("gaussian_latent", operands[0], backend)
    return reference.gaussian_latent(*operands)
