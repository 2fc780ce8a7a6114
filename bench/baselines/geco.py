"""Training of one parameter vector under one constraint: ours, plain PyTorch, cooper."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from geco_fast import GECO
from geco_fast.bench.entrants import Results, Step
from geco_fast.bench.rivals import Rival

KAPPA2 = 0.01
RATE = 1e-4


class Problem(nn.Module):
    """Keep ``w`` small, and near to ``x`` within kappa."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64))
        self.geco = GECO(["near"], step_size=RATE)

    def forward(self, x: Tensor) -> Tensor:
        return self.geco(self.w.square(), {"near": (x - self.w).square() - KAPPA2})


class PlainProblem(nn.Module):
    """The same, algorithm 1 of the paper in a user's few lines."""

    average: Tensor
    multiplier: Tensor

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.w = nn.Parameter(problem.w.detach().clone())
        self.alpha = problem.geco.options.alpha
        self.first = True
        self.register_buffer("average", torch.zeros((), device=self.w.device))
        self.register_buffer("multiplier", torch.ones((), device=self.w.device))

    def forward(self, x: Tensor) -> Tensor:
        violation = ((x - self.w).square() - KAPPA2).mean()
        with torch.no_grad():
            if self.first:
                self.average.copy_(violation)
                self.first = False
            else:
                self.average.lerp_(violation, 1 - self.alpha)
        violation = violation + (self.average - violation).detach()
        loss = self.w.square().mean() + self.multiplier.clone() * violation
        with torch.no_grad():
            self.multiplier.mul_(torch.exp(RATE * violation))
        return loss


class _Cooper:
    """cooper's Lagrangian, simultaneous updates."""

    def __init__(self, problem: Problem) -> None:
        import cooper

        self.cooper = cooper
        self.w = nn.Parameter(problem.w.detach().clone())

    def entrant(self, inputs: tuple[Tensor, ...]) -> _CooperEntrant:
        return _CooperEntrant(self.cooper, self.w, *inputs)


class _CooperEntrant:
    """One `roll`: both Lagrangians, their gradients, both optimisers' steps."""

    def __init__(self, cooper: Any, w: nn.Parameter, x: Tensor) -> None:
        class Minimization(cooper.ConstrainedMinimizationProblem):
            def __init__(self) -> None:
                super().__init__()
                self.near = cooper.Constraint(
                    constraint_type=cooper.ConstraintType.INEQUALITY,
                    formulation_type=cooper.formulations.Lagrangian,
                    multiplier=cooper.multipliers.DenseMultiplier(init=torch.ones(1)),
                )

            def compute_cmp_state(self) -> Any:
                violation = ((x - w).square() - KAPPA2).mean()
                state = cooper.ConstraintState(violation=violation[None])
                return cooper.CMPState(
                    loss=w.square().mean(), observed_constraints={self.near: state}
                )

        problem = Minimization()
        self.optimizer = cooper.optim.SimultaneousOptimizer(
            cmp=problem,
            primal_optimizers=torch.optim.Adam([w], lr=1e-5),
            dual_optimizers=torch.optim.SGD(problem.dual_parameters(), lr=RATE, maximize=True),
        )

    def step(self, direction: str) -> Step:
        return self.optimizer.roll

    def results(self, seed: int, direction: str) -> Results:
        self.optimizer.roll()
        return Results([], [torch.zeros(64)])


RIVALS = {
    "cooper": Rival(
        _Cooper, tolerance=math.inf, note="multipliers rise linearly, without the moving average"
    )
}
