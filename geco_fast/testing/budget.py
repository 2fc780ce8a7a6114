"""The accuracy rule: a result may be twice as far from the exact one as PyTorch's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


# A single element can be lucky in one arithmetic and not in the other.
FEWEST_ELEMENTS = 256
# Draws of a quantity that failed: many elements may share one rounding, and with it one luck.
REDRAWS = 64


def draws(elements: int) -> int:
    """How often to draw a case with this many elements, so that luck evens out."""
    return -(-FEWEST_ELEMENTS // elements) if elements else 1


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest distance of `actual` from `exact` (float64); NaN is infinitely far.

    Where `exact` is not finite, or beyond the range of `actual`'s dtype, `actual` must not be
    finite, either: otherwise the error is infinite.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {list(actual.shape)} instead of {list(exact.shape)}")
    finite = exact.to(actual.dtype).isfinite()
    actual = actual.detach().to(torch.float64)
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    distance = (actual - exact)[finite].abs()
    return distance.max().item() if distance.numel() else 0.0


@dataclass
class Budget:
    """Holds one quantity, over all draws of a case, to the accuracy rule.

    ``err(actual) <= k * err(reference in the same dtype) + eps(dtype) * max|exact|`` with k = 2 for
    results and 3 for gradients; errors are the largest distances from the reference in float64.

    In float64 the reference can't measure its own rounding: there `same` is float32's result, and
    its error is scaled by the ratio of the two epsilons.

    With a `bound`, the relative error in the Frobenius norm of all draws together is held to it
    instead.
    """

    name: str
    gradient: bool = False
    bound: float | None = None
    got: float = 0.0
    allowed_own: float = 0.0
    allowed_unit: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)  # of the distances and of the exact values

    def add_draws(self, draws: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take in several draws at once, each as `add` does."""
        self.add(*(torch.cat([t.flatten() for t in kind]) for kind in zip(*draws, strict=True)))

    def add(self, actual: Tensor, same: Tensor, exact: Tensor) -> None:
        """Take in one draw: the result under test, the reference's and the exact one."""
        largest = error(actual, exact)
        if self.bound is None:
            self.allow(same, exact, actual.dtype)
            self.got = max(self.got, largest)
            return
        finite = exact.to(actual.dtype).isfinite()
        distance = (actual.detach().to(torch.float64) - exact)[finite]
        squares = (distance.square().sum().item(), exact[finite].square().sum().item())
        self.squares = (self.squares[0] + squares[0], self.squares[1] + squares[1])
        relative = (self.squares[0] / self.squares[1]) ** 0.5 if self.squares[0] else 0.0
        self.got = largest if largest == float("inf") else relative
        self.allowed_own = self.bound

    def allow(self, same: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
        """Allow a result in `dtype` what the reference's errors grant; any shape will do."""
        if self.bound is not None:
            return
        epsilon = torch.finfo(dtype).eps
        own = error(same, exact) * epsilon / torch.finfo(same.dtype).eps
        factor = GRADIENT_FACTOR if self.gradient else FORWARD_FACTOR
        if own == float("inf"):
            raise AssertionError(f"{self.name}: the reference leaves the range of {same.dtype}")
        finite = exact[exact.to(dtype).isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        self.allowed_own = max(self.allowed_own, factor * own)
        self.allowed_unit = max(self.allowed_unit, epsilon * largest)

    def kept(self) -> bool:
        """Whether what was taken in keeps the rule."""
        return self.got <= self.allowed_own + self.allowed_unit

    def check(self) -> None:
        """Raise AssertionError if the rule is broken."""
        if not self.kept():
            allowed = self.allowed_own + self.allowed_unit
            raise AssertionError(f"{self.name}: error {self.got:.3e} exceeds {allowed:.3e}")


def assert_within_budget(
    actual: Tensor, same: Tensor, exact: Tensor, *, gradient: bool = False
) -> None:
    """Raise AssertionError unless one tensor keeps the accuracy rule (see `Budget`)."""
    budget = Budget("result", gradient)
    budget.add(actual, same, exact)
    budget.check()
