"""GECO: train under constraints, with multipliers that follow them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geco_fast._checks import FLOATING, check_floating, check_positive, check_rank, describe
from geco_fast.ops.geco_update import check_geco_options, geco_options, move_multipliers
from geco_fast.reference._precision import widen
from geco_fast.reference.geco_update import GECOOptions

_WIDE = (torch.float32, torch.float64)


class _ProcessGroupHandle:
    """Lets a module that holds a process group be copied (sharing it) and pickled (without it)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _ProcessGroupHandle:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _ProcessGroupHandle, (None,)


class GECO(nn.Module):
    r"""Generalised ELBO with constrained optimisation.

    Minimises an objective, as a rule the divergence of posterior from prior, subject to
    constraints :math:`C_l \le 0`, with one positive multiplier :math:`\lambda_l` each:

    .. math:: \mathcal{L} = \mathrm{mean}(\text{objective}) + \sum_l \lambda_l C_l^t

    where :math:`C_l^t` has the value of a moving average of the batch means and the gradient of
    the batch. A call in training mode then updates average and multipliers,
    :math:`\lambda_l \leftarrow \lambda_l e^{\nu C_l^t}`: a violated constraint gains weight, a
    satisfied one loses it. In evaluation mode nothing is updated, no rank talks to another, and
    the value is ``mean(objective) + sum(lambda * mean(C))`` of the given batch alone.

    Parameters
    ----------
    constraints : sequence of str or mapping of str to torch.nn.Module
        The constraints' names; a mapping also brings the modules, for `evaluate_constraints`.
    alpha : float
        Decay of the moving average, in [0, 1).
    step_size : float
        Rate of the multipliers, per unit of the constraint.
    lambda_init, lambda_min, lambda_max : float
        First value and bounds of the multipliers.
    max_log_step : float or (float, float), optional
        Bound of one step of log lambda, both ways; or its bounds (down, up).
    warmup_steps : int
        Calls during which only the average moves.
    update_every : int
        The multipliers move at every such call.
    speedup : float, optional
        Factor of the rate while a constraint's average is satisfied.
    parametrization : {"exp", "softplus2"}
        The paper's, or ``lambda = softplus(w) ** 2`` with w ascending along its gradient.
    process_group : torch.distributed.ProcessGroup, optional
        Batch means are taken over its ranks, so that all hold the same multipliers. The gradient
        stays that of the local batch, lambda / B, for `DistributedDataParallel` to average over
        ranks with batches of equal size. A deep copy shares the group, a pickle leaves it out.

    Attributes
    ----------
    ema, log_lambda : Tensor
        Buffers ``[L]``, float32 or, after ``.double()``, float64; never 16-bit.
    step : Tensor
        Buffer, number of calls in training mode, int64 ``[]``.

    Raises
    ------
    ValueError
        If an option or a name is wrong.
    TypeError
        If an option is not a number, or a constraint is not a module.

    Notes
    -----
    Rezende and Viola, "Taming VAEs" (2018), algorithm 1; see `geco_fast.ops.geco_update`.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> geco = gf.GECO(["re"], step_size=0.1)
    >>> kl, error = torch.tensor([2.0, 4.0]), torch.tensor([0.5, 1.5])
    >>> geco(kl, {"re": error})
    tensor(4.)
    >>> geco.lambdas["re"]
    tensor(1.1052)
    """

    ema: Tensor
    log_lambda: Tensor
    step: Tensor

    def __init__(
        self,
        constraints: Sequence[str] | Mapping[str, nn.Module],
        *,
        alpha: float = 0.99,
        step_size: float = 0.01,
        lambda_init: float = 1.0,
        lambda_min: float = 1e-6,
        lambda_max: float = 1e6,
        max_log_step: float | tuple[float, float] | None = None,
        warmup_steps: int = 0,
        update_every: int = 1,
        speedup: float | None = None,
        parametrization: str = "exp",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.options = GECOOptions(
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
        check_geco_options(self.options)
        check_positive("lambda_init", lambda_init)
        if not lambda_min <= lambda_init <= lambda_max:
            raise ValueError(
                f"lambda_init must be in [{lambda_min!r}, {lambda_max!r}], got {lambda_init!r}"
            )
        self.names = _constraint_names(constraints)
        self.constraints = nn.ModuleDict()
        if isinstance(constraints, Mapping):
            for name, module in constraints.items():
                self._add_constraint(name, module)
        self._process_group = _ProcessGroupHandle(process_group)
        count = len(self.names)
        self.register_buffer("ema", torch.zeros(count, dtype=torch.float32))
        self.register_buffer(
            "log_lambda", torch.full((count,), math.log(lambda_init), dtype=torch.float32)
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def _add_constraint(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"constraints[{name!r}] must be a torch.nn.Module, got {describe(module)}"
            )
        try:
            self.constraints[name] = module
        except KeyError as error:
            raise ValueError(f"constraints can't have the name {name!r}: {error.args[0]}") from None

    def forward(self, objective: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Return the scalar to minimise; in training mode, update average and multipliers.

        Parameters
        ----------
        objective : Tensor
            What to minimise under the constraints, ``[]`` or ``[B]``.
        values : mapping of str to Tensor
            Each constraint's value, ``[]`` or ``[B]``, at most 0 where satisfied.

        Returns
        -------
        Tensor
            ``mean(objective) + sum lambda * C``, ``[]``, with the multipliers before the update.

        Raises
        ------
        ValueError
            If a name is missing or unknown, or a rank or device is wrong.
        TypeError
            If a value is not a floating-point tensor.
        """
        _check_value("objective", "", objective)
        if set(values) != set(self.names):
            raise ValueError(
                f"values must hold the constraints {list(self.names)}, got {list(values)}"
            )
        constraints = [values[name] for name in self.names]
        for name, value in zip(self.names, constraints, strict=True):
            _check_value("values", name, value)
        group = self._process_group.group if self.training else None
        c_hat = _stack(constraints) if group is None else _joined_means(constraints, group)
        options = geco_options(*self.options)
        penalty = move_multipliers(
            c_hat, self.ema, self.log_lambda, self.step, options, self.training
        )
        if objective.dtype not in _WIDE:
            (objective,) = widen(objective)
        return (objective.mean() if objective.dim() else objective) + penalty

    def evaluate_constraints(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Call every constraint module with the same arguments; return name to value ``[B]``.

        Raises
        ------
        ValueError
            If the constraints were given by name only.
        """
        if not self.constraints:
            raise ValueError("constraints must be given as a mapping of modules to be evaluated")
        return {name: module(*args, **kwargs) for name, module in self.constraints.items()}

    @property
    def lambdas(self) -> dict[str, Tensor]:
        """Name to multiplier ``[]``, on the state's device; never past its bounds by rounding."""
        lambdas = self.log_lambda.exp().clamp(self.options.lambda_min, self.options.lambda_max)
        return dict(zip(self.names, lambdas.unbind(), strict=True))

    @property
    def beta(self) -> Tensor:
        """The equivalent weight of the objective, ``1 / lambda``, ``[]``; for one constraint.

        Raises
        ------
        ValueError
            If there are several.
        """
        if len(self.names) != 1:
            raise ValueError(f"beta is defined for one constraint, got {list(self.names)}")
        return 1 / self.lambdas[self.names[0]]

    @property
    def satisfied(self) -> Tensor:
        """Whether every constraint's average is at most 0, bool ``[]``; False before step 1."""
        return (self.step > 0) & (self.ema <= 0).all()

    def log_dict(self) -> dict[str, float]:
        """Multipliers and averages as numbers, ``lambda/NAME`` and ``constraint/NAME``.

        One constraint also gives ``beta``. Waits for the device, once.
        """
        lambdas, averages = torch.stack([self.log_lambda.exp(), self.ema]).tolist()
        low, high = self.options.lambda_min, self.options.lambda_max
        lambdas = [min(max(value, low), high) for value in lambdas]
        log = {f"lambda/{name}": value for name, value in zip(self.names, lambdas, strict=True)}
        log |= {f"constraint/{name}": v for name, v in zip(self.names, averages, strict=True)}
        if len(self.names) == 1:
            log["beta"] = 1 / lambdas[0]
        return log

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GECO:
        state = {"ema": self.ema, "log_lambda": self.log_lambda}
        super()._apply(fn, recurse)
        for name, before in state.items():
            after = getattr(self, name)
            if after.dtype not in (torch.float32, torch.float64):
                # A 16-bit log lambda would lose the small steps that it sums.
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
        return f"{list(self.names)}, {options}"


def _constraint_names(constraints: object) -> tuple[str, ...]:
    if isinstance(constraints, str) or not isinstance(constraints, (Sequence, Mapping)):
        raise TypeError(
            "constraints must be a sequence of names or a mapping of names to modules, "
            f"got {describe(constraints)}"
        )
    names = tuple(constraints)
    if not names or any(not isinstance(name, str) or not name for name in names):
        raise ValueError(f"constraints must have names, one or more, got {list(names)}")
    if len(set(names)) != len(names):
        raise ValueError(f"constraints must have different names, got {list(names)}")
    return names


def _check_value(argument: str, name: str, value: object) -> None:
    """Raise unless a value is a floating tensor ``[]`` or ``[B]``."""
    # The good case words no error.
    if (
        isinstance(value, Tensor)
        and value.dtype in FLOATING
        and value.layout is torch.strided
        and value.dim() < 2
    ):
        return
    shown = f"{argument}[{name!r}]" if name else argument
    check_floating(shown, value)
    check_rank(shown, value, (0, 1), "[] or [B]")  # type: ignore[arg-type]


def _stack(values: list[Tensor]) -> Tensor:
    """``[L, B]`` or ``[L]`` where all values are alike, else their means ``[L]``."""
    if len(values) == 1:
        return values[0].unsqueeze(0)
    if all(value.shape == values[0].shape for value in values):
        return torch.stack(values)
    return torch.stack([value.mean() for value in widen(*values)])


def _joined_means(values: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Means ``[L]`` over the batches of all ranks, with the gradient of the local means."""
    values = list(widen(*values))
    sums = [value.detach().sum() for value in values]
    counts = [value.new_full((), value.numel()) for value in values]
    packed = torch.stack(sums + counts)
    dist.all_reduce(packed, group=group)
    joined, count = packed.chunk(2)
    local = torch.stack([value.mean() for value in values])
    # The first term is exactly 0, so that every rank holds the same bits.
    return (local - local.detach()) + joined / count
