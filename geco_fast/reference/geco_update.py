"""One step of GECO's constraint average and multipliers, in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geco_fast._checks import exporting


class GECOOptions(NamedTuple):
    """The constants of `geco_fast.ops.geco_update`."""

    alpha: float
    step_size: float
    lambda_min: float = 1e-6
    lambda_max: float = 1e6
    max_log_step: float | tuple[float, float] | None = None
    warmup_steps: int = 0
    update_every: int = 1
    speedup: float | None = None
    parametrization: str = "exp"


@torch.library.custom_op("geco_fast::multipliers", mutates_args=())
def _multipliers(log_lambda: Tensor) -> Tensor:
    return log_lambda.exp()


@_multipliers.register_fake
def _(log_lambda: Tensor) -> Tensor:
    return torch.empty_like(log_lambda)


@_multipliers.register_vmap
def _(_info: Any, in_dims: tuple[int], log_lambda: Tensor) -> tuple[Tensor, int]:
    return _multipliers(log_lambda), in_dims[0]


def multipliers(log_lambda: Tensor) -> Tensor:
    """Return lambda, which has no gradient.

    What it knows how to recompute, torch.compile saves the inputs of; the gradients would be those
    of the state written meanwhile. An operator of our own it can only save.
    """
    if torch.compiler.is_compiling() and not exporting():
        return _multipliers(log_lambda)  # type: ignore[no-any-return]
    return log_lambda.exp()


def batch_means(c_hat: Tensor, ema: Tensor, log_lambda: Tensor) -> Tensor:
    """Constraints ``[L]``, or batch means of ``[L, B]``, in the widest dtype, at least float32."""
    dtype = torch.promote_types(ema.dtype, log_lambda.dtype)
    c = c_hat.to(torch.promote_types(torch.promote_types(c_hat.dtype, dtype), torch.float32))
    return c.mean(1) if c.dim() == 2 else c


def next_state(
    c_hat: Tensor, ema: Tensor, log_lambda: Tensor, step: Tensor, options: GECOOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the penalty and the average, log multipliers and step after it; change nothing."""
    c = batch_means(c_hat, ema, log_lambda)
    ema, log_lambda, value = ema.detach().to(c.dtype), log_lambda.detach().to(c.dtype), c.detach()
    ema = torch.where(step == 0, value, options.alpha * ema + (1 - options.alpha) * value)
    # Value of the average, exactly; gradient of the batch.
    penalty = (multipliers(log_lambda) * ((c - value) + ema)).sum()

    ascent = options.step_size * ema
    if options.speedup is not None:
        ascent = torch.where(ema <= 0, options.speedup * ascent, ascent)
    if options.parametrization == "softplus2":
        root = torch.exp(0.5 * log_lambda)  # softplus(w)
        slope = -torch.expm1(-root)  # sigmoid(w)
        w = root + torch.log(slope) + ascent * 2 * root * slope
        ascent = 2 * torch.log(torch.logaddexp(w, torch.zeros_like(w))) - log_lambda
    if options.max_log_step is not None:
        bound = options.max_log_step
        down, up = bound if isinstance(bound, tuple) else (-bound, bound)
        ascent = ascent.clamp(down, up)
    moved = (log_lambda + ascent).clamp(math.log(options.lambda_min), math.log(options.lambda_max))
    due = (step >= options.warmup_steps) & (step % options.update_every == 0)
    return penalty, ema, torch.where(due, moved, log_lambda), step + 1


def geco_update(
    c_hat: Tensor,
    ema: Tensor,
    log_lambda: Tensor,
    step: Tensor,
    *,
    update: bool = True,
    **options: Any,
) -> Tensor:
    """Define `geco_fast.ops.geco_update`; `options` are those of `GECOOptions`."""
    if not update:
        c = batch_means(c_hat, ema, log_lambda)
        return (multipliers(log_lambda.detach().to(c.dtype)) * c).sum()
    penalty, *state = next_state(c_hat, ema, log_lambda, step, GECOOptions(**options))
    with torch.no_grad():
        for tensor, value in zip((ema, log_lambda, step), state, strict=True):
            tensor.copy_(value)
    return penalty
