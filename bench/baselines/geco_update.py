"""GECO's step as one writes it by hand: the fewest operations of PyTorch, and no options."""

from __future__ import annotations

import math

from torch import Tensor

from geco_fast.bench.rivals import Rival, like_operator


def geco_update(
    c_hat: Tensor,
    ema: Tensor,
    log_lambda: Tensor,
    step: Tensor,
    *,
    alpha: float,
    step_size: float,
    lambda_min: float = 1e-6,
    lambda_max: float = 1e6,
) -> Tensor:
    """Return the penalty and change the state in place, as `geco_fast.ops.geco_update` does.

    It does less: the average starts at zero instead of the first value, and there is no bound of a
    step, no warm-up and no other parametrization.
    """
    lambdas = log_lambda.exp()
    c = c_hat.mean(1) if c_hat.dim() == 2 else c_hat
    ema.mul_(alpha).add_(c.detach(), alpha=1 - alpha)
    penalty = (lambdas * (c + (ema - c).detach())).sum()
    log_lambda.add_(step_size * ema).clamp_(math.log(lambda_min), math.log(lambda_max))
    step.add_(1)
    return penalty


OPTIONS = {"alpha", "step_size", "lambda_min", "lambda_max"}
RIVALS = {
    "by hand": Rival(
        like_operator(geco_update),
        lambda case: case.options.keys() <= OPTIONS,
        math.inf,
        "its average starts at zero; without bounds of a step, warm-up and other parametrizations",
    )
}
