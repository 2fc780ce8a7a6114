"""One step of GECO's constraint average and multipliers."""

from __future__ import annotations

import torch
from torch import Tensor

from geco_fast import reference
from geco_fast._backend import select
from geco_fast._checks import (
    check_choice,
    check_floating,
    check_positive,
    check_rank,
    check_shape,
    check_tensor,
    describe,
)
from geco_fast.reference.geco_update import GECOOptions


def _check_count(name: str, value: object, least: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def check_geco_options(options: GECOOptions) -> None:
    """Raise what `geco_update` documents if an option is wrong."""
    check_positive("alpha", options.alpha, zero=True)
    if options.alpha >= 1:
        raise ValueError(f"alpha must be < 1, got {options.alpha!r}")
    for name in ("step_size", "lambda_min", "lambda_max"):
        check_positive(name, getattr(options, name))
    if options.lambda_min > options.lambda_max:
        raise ValueError(
            f"lambda_min must be <= lambda_max = {options.lambda_max!r}, got {options.lambda_min!r}"
        )
    bound = options.max_log_step
    if isinstance(bound, tuple):
        if len(bound) != 2 or not bound[0] <= 0 <= bound[1]:
            raise ValueError(f"max_log_step must be (down <= 0, up >= 0), got {bound!r}")
    elif bound is not None:
        check_positive("max_log_step", bound)
    _check_count("warmup_steps", options.warmup_steps, 0)
    _check_count("update_every", options.update_every, 1)
    if options.speedup is not None:
        check_positive("speedup", options.speedup)
    check_choice("parametrization", options.parametrization, ("exp", "softplus2"))


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
    max_log_step: float | tuple[float, float] | None = None,
    warmup_steps: int = 0,
    update_every: int = 1,
    speedup: float | None = None,
    parametrization: str = "exp",
    update: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""Return the Lagrangian's penalty and move the multipliers, in place, on their device.

    With :math:`\hat c` the batch means, one step of algorithm 1 is

    .. math::
        m &\leftarrow \alpha m + (1 - \alpha) \hat c
            \qquad (m \leftarrow \hat c \text{ at step } 0) \\
        C &= \hat c + \mathrm{stop\_gradient}(m - \hat c) \\
        \text{penalty} &= \sum_l \lambda_l C_l \qquad \text{with the old } \lambda \\
        \lambda_l &\leftarrow \lambda_l e^{\nu C_l}

    so the penalty has the value of the average and the gradient of the batch: that to `c_hat` is
    :math:`\lambda_l / B`.

    Parameters
    ----------
    c_hat : Tensor
        Constraint values ``[L]`` or ``[L, B]``, at most 0 where satisfied; float32, float64,
        bfloat16 or float16.
    ema, log_lambda : Tensor
        Moving average m and logarithm of the multipliers, ``[L]``, float32 or float64; updated in
        place.
    step : Tensor
        Number of steps done, int64 ``[]``; updated in place.
    alpha : float
        Decay of the average, in [0, 1).
    step_size : float
        Rate :math:`\nu` of the multipliers, per unit of the constraint.
    lambda_min, lambda_max : float
        Bounds of the multipliers.
    max_log_step : float or (float, float), optional
        Bound of one step of log lambda, both ways; or its bounds (down, up), for instance
        ``(math.log(0.9), math.log(1.05))``.
    warmup_steps : int
        Steps during which only the average moves.
    update_every : int
        The multipliers move at steps that it divides.
    speedup : float, optional
        Factor of the rate while a constraint's average is satisfied.
    parametrization : {"exp", "softplus2"}
        Ascend on log lambda, as the paper; or on w of ``lambda = softplus(w) ** 2``, along the
        gradient of the penalty.
    update : bool
        False leaves the state as it is and returns ``sum(lambda * c_hat)`` of this batch alone.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    Tensor
        The penalty ``[]``, in the widest of the dtypes of `c_hat` and state. It reads no value
        back to the host.

    Raises
    ------
    ValueError
        If a rank, shape, device or option is wrong.
    TypeError
        If a dtype is not supported, or an option is not a number.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    Rezende and Viola, "Taming VAEs" (2018), algorithm 1. The squared softplus is the form of
    DeepMind's Sonnet. `torch.func` transforms refuse to change tensors that a function captures:
    there, pass the state as arguments or use ``update=False``.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> ema, log_lambda, step = torch.zeros(1), torch.zeros(1), torch.tensor(0)
    >>> penalty = gf.ops.geco_update(
    ...     torch.tensor([[1.0, 3.0]]), ema, log_lambda, step, alpha=0.99, step_size=0.1
    ... )
    >>> penalty, ema, log_lambda, step
    (tensor(2.), tensor([2.]), tensor([0.2000]), tensor(1))
    """
    options = GECOOptions(
        alpha=alpha,
        step_size=step_size,
        lambda_min=lambda_min,
        lambda_max=lambda_max,
        max_log_step=max_log_step,
        warmup_steps=warmup_steps,
        update_every=update_every,
        speedup=speedup,
        parametrization=parametrization,
    )
    check_geco_options(options)
    check_floating("c_hat", c_hat)
    check_rank("c_hat", c_hat, (1, 2), "[L] or [L, B]")
    state = (torch.float32, torch.float64)
    check_floating("ema", ema, state)
    check_floating("log_lambda", log_lambda, state)
    check_tensor("step", step)
    if step.dtype != torch.int64:
        raise TypeError(f"step must have the dtype int64, got {step.dtype}")
    check_shape("ema", ema, c_hat.shape[:1], "one per constraint of c_hat")
    check_shape("log_lambda", log_lambda, c_hat.shape[:1], "one per constraint of c_hat")
    check_shape("step", step, (), "a scalar")
    for name, tensor in (("ema", ema), ("log_lambda", log_lambda), ("step", step)):
        if tensor.device != c_hat.device:
            raise ValueError(
                f"{name} must be on the device of c_hat, {c_hat.device}, got {tensor.device}"
            )
    select("geco_update", c_hat, backend)
    return reference.geco_update(c_hat, ema, log_lambda, step, update=update, **options._asdict())
