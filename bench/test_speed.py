"""pytest-benchmark suite: `pytest bench --benchmark-enable`, one row per problem and side."""

from __future__ import annotations

import pytest

from geco_fast.bench.entrants import OperatorProblem, Problem
from geco_fast.bench.modules import module_problems
from geco_fast.bench.paired import Effort, sides
from geco_fast.bench.rivals import bench_cases

PROBLEMS: list[Problem] = [*map(OperatorProblem, bench_cases()), *module_problems()]


@pytest.mark.parametrize(
    ("problem", "direction", "side"),
    [
        pytest.param(problem, direction, side, id=f"{problem}-{direction}-{side}")
        for problem in PROBLEMS
        for direction in problem.directions
        for side in ("ours", *problem.rivals)
    ],
)
def test_speed(benchmark, problem, direction, side) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"{problem} {direction}"
    ready, out = sides(problem, [side], Effort())
    if side in out:
        pytest.skip(out[side])
    benchmark(ready[side].step(direction))
