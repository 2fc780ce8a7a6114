"""Reparametrised Gaussian sample and its KL divergence, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from geco_fast.reference._precision import sum_all_but_batch, widen


def gaussian_latent(
    q_mean: Tensor, q_log_std: Tensor, p_mean: Tensor, p_log_std: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Define `geco_fast.ops.gaussian_latent`."""
    dtype = q_mean.dtype
    q_mean, q_log_std, p_mean, p_log_std, noise = widen(q_mean, q_log_std, p_mean, p_log_std, noise)
    z = q_mean + torch.exp(q_log_std) * noise
    log_ratio = q_log_std - p_log_std
    distance = (q_mean - p_mean) * torch.exp(-p_log_std)
    # expm1: near the prior exp(2r) - 1 - 2r would lose all but eps, this loses all but eps |r|.
    kl = 0.5 * (torch.expm1(2 * log_ratio) + distance * distance) - log_ratio
    return z.to(dtype), sum_all_but_batch(kl)
