"""pytest-benchmark suite: `pytest bench --benchmark-enable`, one row per case and side."""

from __future__ import annotations

import pytest
import torch

from geco_fast.bench.paired import DIRECTIONS, bench_cases, make_sides


@pytest.mark.parametrize("side", ["ours", "eager", "compile"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", bench_cases(), ids=str)
def test_operator(benchmark, case, direction, side) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"{case} {direction}"
    benchmark(make_sides(case, direction, torch.float32)[side])
