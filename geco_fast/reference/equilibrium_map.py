"""Fixed-point map of the equilibrium encoder, in plain PyTorch."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from geco_fast.reference._precision import widen

_CHUNK_ELEMENTS = 1 << 20


def equilibrium_map(
    x: Tensor, psi: Tensor, beta: float | Tensor, *, log_prior: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Define `geco_fast.ops.equilibrium_map`."""
    x, psi = widen(x, psi)
    if log_prior is None:
        log_prior = torch.log_softmax(psi.new_zeros(psi.shape[0]), 0)
    else:
        (log_prior,) = widen(log_prior)
    if torch.compiler.is_compiling():
        # A loop over chunks would tie the graph to n.
        chunks: tuple[Tensor, ...] = (x,)
    else:
        chunks = x.split(max(1, _CHUNK_ELEMENTS // max(1, psi.numel())))

    def log_likelihood(rows: Tensor) -> Tensor:
        return -(rows.unsqueeze(1) - psi).square().sum(-1) / beta  # [rows, m]

    log_normaliser = torch.cat(
        [torch.logsumexp(log_prior + log_likelihood(rows), 1) for rows in chunks]
    )
    normalisers = log_normaliser.unsqueeze(1).split([rows.shape[0] for rows in chunks])
    log_mass = reduce(
        torch.logaddexp,
        (
            torch.logsumexp(log_likelihood(rows) - normaliser, 0)
            for rows, normaliser in zip(chunks, normalisers, strict=True)
        ),
    )  # [m]
    mapped = torch.zeros_like(psi)
    for rows, normaliser in zip(chunks, normalisers, strict=True):
        weights = torch.exp(log_likelihood(rows) - normaliser - log_mass)
        # Not a matrix product: that would be open to TF32 and autocast.
        mapped = mapped + (weights.unsqueeze(-1) * rows.unsqueeze(1)).sum(0)
    return mapped, log_normaliser
