"""What a variational autoencoder minimises: each objective over one `VAEOutput`.

Every objective is called ``objective(output, target, step=0, **options)`` and returns ``[B]``, to
be averaged over the batch and minimised, so that comparing objectives is one argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from geco_fast import ops
from geco_fast._checks import check_positive


class VAEOutput(NamedTuple):
    """What a variational autoencoder's forward pass returns.

    Attributes
    ----------
    reconstruction : Tensor
        Mean of the decoder, ``[B, C, H, W]``.
    kl : Tensor
        Divergence of the posterior from the prior, in nats, ``[B]``.
    log_likelihood : Tensor
        Logarithm of the decoder's density at the target, in nats, ``[B]``.
    """

    reconstruction: Tensor
    kl: Tensor
    log_likelihood: Tensor


def elbo(output: VAEOutput, target: Tensor, step: int | Tensor = 0) -> Tensor:
    """Negative evidence lower bound, ``kl - log_likelihood``, in nats.

    Parameters
    ----------
    output : VAEOutput
        The model's output.
    target : Tensor
        The data ``[B, C, H, W]``; not used, `output` holds its likelihood.
    step : int or Tensor
        Not used.

    Returns
    -------
    Tensor
        ``[B]``.

    Notes
    -----
    Kingma and Welling, "Auto-encoding variational Bayes" (2014), eq. 3.
    """
    return output.kl - output.log_likelihood


def beta_vae(
    output: VAEOutput, target: Tensor, step: int | Tensor = 0, *, beta: float = 1.0
) -> Tensor:
    """Negative evidence lower bound with a weighted divergence, ``beta * kl - log_likelihood``.

    Parameters
    ----------
    output, target, step
        As for `elbo`.
    beta : float
        Weight of the divergence, at least 0.

    Returns
    -------
    Tensor
        ``[B]``.

    Raises
    ------
    ValueError
        If `beta` is negative.

    Notes
    -----
    Higgins et al., "beta-VAE" (2017), eq. 4.
    """
    check_positive("beta", beta, zero=True)
    return beta * output.kl - output.log_likelihood


def gqn_sigma(
    step: int | Tensor, start: float = 2.0, end: float = 0.7, steps: float = 2e5
) -> float | Tensor:
    """Decoder's standard deviation, annealed linearly by hand.

    Parameters
    ----------
    step : int or Tensor
        Training step; a tensor gives a tensor, with no host synchronisation.
    start, end : float
        First and last value, in units of the data.
    steps : float
        Steps from the one to the other.

    Returns
    -------
    float or Tensor
        ``end + (start - end) * max(1 - step / steps, 0)``.

    Notes
    -----
    Eslami et al., "Neural scene representation and rendering" (2018), supplement; with its
    constants this is ``max(0.7 + 1.3 * (1 - step / 2e5), 0.7)``.
    """
    left = 1 - step / steps
    left = left.clamp(min=0) if isinstance(left, Tensor) else max(left, 0.0)
    return end + (start - end) * left


def annealed(
    output: VAEOutput,
    target: Tensor,
    step: int | Tensor = 0,
    *,
    start: float = 2.0,
    end: float = 0.7,
    steps: float = 2e5,
) -> Tensor:
    """Negative evidence lower bound under a Gaussian decoder of annealed width.

    Parameters
    ----------
    output : VAEOutput
        The model's output; its own likelihood is not used.
    target : Tensor
        The data ``[B, C, H, W]``.
    step : int or Tensor
        Training step.
    start, end, steps : float
        The schedule, see `gqn_sigma`.

    Returns
    -------
    Tensor
        ``||target - reconstruction||^2 / (2 sigma^2) + D log(sigma sqrt(2 pi)) + kl``, ``[B]``,
        with D values per batch element.

    Raises
    ------
    ValueError
        If `target` has not the shape of the reconstruction.

    Notes
    -----
    The hand-annealed baseline of Rezende and Viola, "Taming VAEs" (2018).
    """
    sigma = gqn_sigma(step, start, end, steps)
    log_sigma = torch.log(sigma) if isinstance(sigma, Tensor) else math.log(sigma)
    error = ops.squared_error(target, output.reconstruction, reduction="sum")
    size = math.prod(target.shape[1:])
    normaliser = size * (log_sigma + 0.5 * math.log(2 * math.pi))
    return error / (2 * sigma**2) + normaliser + output.kl


def geco(output: VAEOutput, target: Tensor, step: int | Tensor = 0) -> Tensor:
    """Divergence alone, ``kl``: what `geco_fast.GECO` minimises under its constraints.

    Parameters
    ----------
    output, target, step
        As for `elbo`.

    Returns
    -------
    Tensor
        ``[B]``.

    Notes
    -----
    Rezende and Viola, "Taming VAEs" (2018), eq. 2.
    """
    return output.kl


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "geco": geco,
    "elbo": elbo,
    "beta": beta_vae,
    "annealed": annealed,
}
