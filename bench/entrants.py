"""What takes part in a comparison: a problem, and its sides ready to be checked and timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from geco_fast import ops, reference
from geco_fast.bench.limits import Work, operator_work
from geco_fast.bench.rivals import Rival, operator_rivals
from geco_fast.testing.budget import draws
from geco_fast.testing.cases import Case, Tensors
from geco_fast.testing.guards import moved

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)

# torch.compile orders sums in its own way: plain PyTorch's own error is no measure for it.
COMPILED = Rival(build=lambda _: None, tolerance=1e-5)
PLAIN = Rival(build=lambda _: None)

Step = Callable[[], object]


class Results(NamedTuple):
    """Results of one call and, where they were asked for, its gradients."""

    values: list[Tensor]
    gradients: list[Tensor]


class Entrant(Protocol):
    """One side of a comparison."""

    def step(self, direction: str) -> Step:
        """What is timed: the call, with nothing around it that a user wouldn't run."""

    def results(self, seed: int, direction: str) -> Results:
        """What such a call computes on one draw of the problem, for the check."""


class Problem(Protocol):
    """What is compared, on what inputs."""

    operator: str
    directions: tuple[str, ...]
    rivals: Mapping[str, Rival]
    bound: float | None  # what ours is held to instead of the accuracy rule (see `Budget`)
    device: str  # "cpu" or "cuda"

    def __str__(self) -> str: ...

    def build(self, side: str) -> Entrant:
        """Make one side; raises whatever keeps a rival from taking part."""

    def expected(self, seed: int) -> tuple[Results, Results]:
        """Results of plain PyTorch, in the dtype that is timed and in float64."""

    def seeds(self) -> range:
        """Draws that the check may judge together, so that luck evens out."""

    def work(self, direction: str) -> Work | None:
        """The least a kernel has to do, where it is known."""


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def differentiated(
    values: Sequence[Tensor], leaves: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients to `leaves`, of those values that have any."""
    pairs = [(v, u) for v, u in zip(values, upstream, strict=True) if v.requires_grad]
    return torch.autograd.grad([v for v, _ in pairs], leaves, [u for _, u in pairs])


class OperatorProblem:
    """One case of an operator, in float32."""

    directions = DIRECTIONS

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.device = device
        self.case = case
        self.operator = case.operator
        self.bound = case.bound
        self.rivals = {"eager": PLAIN, "compile": COMPILED, **operator_rivals(case, device)}
        # Drawing large tensors takes longer than most sides take on them.
        self.tensors = functools.lru_cache(maxsize=1)(self._draw)

    def _draw(self, seed: int) -> Tensors:
        drawn = self.case.tensors(torch.float32, seed)
        return {name: moved(tensor, self.device) for name, tensor in drawn.items()}

    def __str__(self) -> str:
        return str(self.case)

    def build(self, side: str) -> Entrant:
        define = getattr(reference, self.operator)
        if side in ("ours", "self"):
            options = {**self.case.options, **self.case.kernel_options}
            function = partial(getattr(ops, self.operator), **options)
        elif side == "eager":
            function = partial(define, **self.case.options)
        elif side == "compile":
            function = partial(torch.compile(define, fullgraph=True), **self.case.options)
        else:
            function = self.rivals[side].build(self.case)
        return self._entrant(function)

    def _entrant(self, function: Callable[..., Any]) -> FunctionEntrant:
        return FunctionEntrant(self.case, function, self.tensors)

    def expected(self, seed: int) -> tuple[Results, Results]:
        entrant = self._entrant(partial(getattr(reference, self.operator), **self.case.options))
        return entrant.results(seed, BOTH), entrant.results(seed, BOTH, torch.float64)

    def seeds(self) -> range:
        made = self.tensors(0)
        return range(draws(min(result.numel() for result in self.case.define(made))))

    def work(self, direction: str) -> Work | None:
        return operator_work(self.case, direction == BOTH)


class FunctionEntrant:
    """An implementation of an operator, as a function of a case's arguments."""

    def __init__(
        self, case: Case, function: Callable[..., Any], tensors: Callable[[int], Tensors]
    ) -> None:
        self.case = case
        self.function = function
        self.tensors = tensors

    def _arguments(self, tensors: Tensors) -> dict[str, Any]:
        return self.case.adapt(tensors) if self.case.adapt is not None else tensors

    def _upstream(self, values: Sequence[Tensor], seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed + 1000)
        return [
            torch.randn(v.shape, generator=generator, dtype=torch.float32).to(v) for v in values
        ]

    def _leaves(self, tensors: Tensors) -> Tensors:
        names = self.case.gradient_names()
        return {name: tensors[name].detach().requires_grad_() for name in names}

    def step(self, direction: str) -> Step:
        # Arguments are made once. State that is updated in place goes on from call to call, as in a
        # training loop, and no side pays for copies of it.
        made = self.tensors(0)
        if direction == FORWARD:
            return partial(self.function, **self._arguments(made))
        leaves = self._leaves(made)
        call = partial(self.function, **self._arguments({**made, **leaves}))
        values = as_tuple(call())
        upstream = self._upstream(values, 0)
        if all(value.requires_grad for value in values):
            targets = tuple(leaves.values())

            def step() -> object:
                values = as_tuple(call())
                return values, torch.autograd.grad(values, targets, upstream)

            return step
        return lambda: differentiated(as_tuple(call()), list(leaves.values()), upstream)

    def results(self, seed: int, direction: str, dtype: torch.dtype = torch.float32) -> Results:
        made = self.tensors(seed)
        made = {n: t.to(dtype) if t.is_floating_point() else t for n, t in made.items()}
        if direction == FORWARD:
            return Results(list(as_tuple(self.function(**self._arguments(made)))), [])
        leaves = self._leaves(made)
        values = as_tuple(self.function(**self._arguments({**made, **leaves})))
        gradients = differentiated(values, list(leaves.values()), self._upstream(values, seed))
        return Results([v.detach() for v in values], list(gradients))
