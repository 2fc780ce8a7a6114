"""One step of GECO's constraint average and multipliers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from geco_fast import reference
from geco_fast._autograd import below_autograd, direct, direct_apply, operators
from geco_fast._backend import select
from geco_fast._checks import (
    FLOATING,
    check_choice,
    check_floating,
    check_positive,
    check_rank,
    check_shape,
    check_tensor,
    describe,
)
from geco_fast.reference.geco_update import GECOOptions

_STATE = (torch.float32, torch.float64)
_steps = operators("geco_update")
_directly = {backend: direct(step) for backend, step in _steps.items()}


class _GECOUpdate(torch.autograd.Function):
    """The penalty is linear in `c_hat`: its slope is all that backward needs, at any order."""

    @staticmethod
    def forward(ctx: Any, c_hat: Tensor, others: tuple[Any, ...], step: Any) -> Tensor:
        with below_autograd():
            penalty, ctx.slope = step(c_hat, *others)
        return penalty

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.slope * grads[0], None, None


_geco_update = direct_apply(_GECOUpdate)


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


def _normal(options: GECOOptions) -> GECOOptions:
    """Check options and bring them to the form that the operator takes: bounds as a pair."""
    check_geco_options(options)
    bound = options.max_log_step
    if bound is None or isinstance(bound, tuple):
        return options
    return options._replace(max_log_step=(-bound, bound))


@functools.lru_cache(maxsize=64, typed=True)
def _normal_once(*values: Any) -> GECOOptions:
    # Python's own numbers, of which NumPy's are no kind.
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(float, value))
        return value if value is None or isinstance(value, (int, str)) else float(value)

    return GECOOptions(*map(plain, _normal(GECOOptions(*values))))


def geco_options(*values: Any) -> GECOOptions:
    """Options in the order of `GECOOptions`, checked; what was checked before comes from a cache.

    Raises what `geco_update` documents.
    """
    if not torch.compiler.is_compiling():
        try:
            return _normal_once(*values)
        except TypeError:
            # A wrong type, which is now named, or one that can't be kept in a cache.
            pass
    return _normal(GECOOptions(*values))


def _may_fit(c_hat: Tensor, ema: Tensor, log_lambda: Tensor, step: Tensor) -> bool:
    """Whether a kernel may get the tensors; it refuses itself what else `_check_tensors` does.

    A tensor of another class may never reach it, as a fake one.
    """
    return (
        type(c_hat) is type(ema) is type(log_lambda) is type(step) is Tensor
        and c_hat.dtype in FLOATING
        and c_hat.is_cpu
        and ema.is_cpu
        and log_lambda.is_cpu
        and step.is_cpu
    )


def _check_tensors(c_hat: Tensor, ema: Tensor, log_lambda: Tensor, step: Tensor) -> None:
    check_floating("c_hat", c_hat)
    check_rank("c_hat", c_hat, (1, 2), "[L] or [L, B]")
    check_floating("ema", ema, _STATE)
    check_floating("log_lambda", log_lambda, _STATE)
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


def move_multipliers(
    c_hat: Tensor,
    ema: Tensor,
    log_lambda: Tensor,
    step: Tensor,
    options: GECOOptions,
    update: bool,
    backend: str = "auto",
) -> Tensor:
    """`geco_update` with options that were checked."""
    checked = torch.compiler.is_compiling() or not _may_fit(c_hat, ema, log_lambda, step)
    if checked:
        _check_tensors(c_hat, ema, log_lambda, step)
    if update and (ema.requires_grad or log_lambda.requires_grad) and torch.is_grad_enabled():
        name = "ema" if ema.requires_grad else "log_lambda"
        raise RuntimeError(
            f"{name} must not require grad, as it is updated in place; detach it, or call under "
            "torch.no_grad()"
        )
    chosen = select("geco_update", c_hat, backend)
    if chosen == "reference":
        if not checked:
            _check_tensors(c_hat, ema, log_lambda, step)
        return reference.geco_update(
            c_hat, ema, log_lambda, step, update=update, **options._asdict()
        )
    if torch.compiler.is_compiling():
        # No autograd formula may be registered with an operator that writes to its arguments.
        values, state = c_hat.detach(), (ema.detach(), log_lambda.detach())
        penalty, slope = _steps[chosen](values, *state, step, *options, update)
        return penalty + (slope * (c_hat - values)).sum() if c_hat.requires_grad else penalty
    others = (ema, log_lambda, step, *options, update)
    try:
        if c_hat.requires_grad and torch.is_grad_enabled():
            penalty = _geco_update(c_hat, others, _directly[chosen])
        else:
            with below_autograd():
                penalty, _ = _directly[chosen](c_hat, *others)
    except RuntimeError:
        try:
            _check_tensors(c_hat, ema, log_lambda, step)
        except (TypeError, ValueError) as named:
            raise named from None
        raise
    if update:
        torch.autograd.graph.increment_version((ema, log_lambda, step))
    return penalty


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
    RuntimeError
        If state that is to be updated requires grad, or shares memory with itself or another
        operand.
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
    options = geco_options(
        alpha,
        step_size,
        lambda_min,
        lambda_max,
        max_log_step,
        warmup_steps,
        update_every,
        speedup,
        parametrization,
    )
    return move_multipliers(c_hat, ema, log_lambda, step, options, update, backend)
