"""Paired timing: both sides in one process, in turn, and the median of the pairs' ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geco_fast._backend import LIBRARY
from geco_fast._checks import check_choice
from geco_fast.testing.budget import Budget
from geco_fast.testing.cases import Case, Tensors, cases

RIVALS = ("eager", "compile", "self")
DIRECTIONS = ("forward", "forward+backward")

Side = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One comparison: `ratio` is the rival's time over ours, with the quartiles of the pairs."""

    case: str
    direction: str
    rival: str
    threads: int
    instruction_set: str
    ours_ms: float
    rival_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def seconds(side: Side, repeats: int) -> float:
    """Time of one call, averaged over `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        side()
    return (time.perf_counter() - start) / repeats


def pair(ours: Side, rival: Side, pairs: int = 41, slice_s: float = 0.01) -> list[tuple]:
    """Times (ours, rival) of interleaved slices, after a warm-up.

    Parameters
    ----------
    ours, rival : callable
        The two sides.
    pairs : int
        How many slices of each.
    slice_s : float
        Length of one slice in seconds; short calls are repeated to fill it.
    """
    repeats = [max(1, round(slice_s / min(seconds(s, 1) for _ in range(3)))) for s in (ours, rival)]
    for side, count in zip((ours, rival), repeats, strict=True):
        seconds(side, count)
    times = []
    for k in range(pairs):
        # The order alternates, so that neither side always follows the other's cache.
        a, b = ((ours, repeats[0]), (rival, repeats[1]))[:: 1 if k % 2 else -1]
        first, second = seconds(*a), seconds(*b)
        times.append((first, second) if k % 2 else (second, first))
    return times


def make_sides(case: Case, direction: str, dtype: torch.dtype) -> dict[str, Side]:
    """Our call and its rivals on one set of tensors; raises AssertionError if results disagree."""
    check_choice("direction", direction, DIRECTIONS)
    made = case.tensors(dtype)
    names = case.gradient_names()
    torch.manual_seed(0)
    upstream = [torch.randn_like(result) for result in case.define(made)]

    def side(function: Callable[[Tensors], tuple[Tensor, ...]]) -> Callable[[], list[Tensor]]:
        if direction == "forward":
            return lambda: list(function(made))

        def step() -> list[Tensor]:
            tensors = {
                name: tensor.detach().requires_grad_() if name in names else tensor
                for name, tensor in made.items()
            }
            results = function(tensors)
            leaves = [tensors[name] for name in names]
            return [*results, *torch.autograd.grad(results, leaves, upstream)]

        return step

    torch._dynamo.reset()
    sides = {
        "ours": side(case.run),
        "eager": side(case.define),
        "compile": side(torch.compile(case.define, fullgraph=True)),
        "self": side(case.run),
    }
    wide = {n: t.double() if t.is_floating_point() else t for n, t in made.items()}
    exact = exact_results(case, wide, upstream, direction)
    same = sides["eager"]()
    for name, run in sides.items():
        for k, (got, s, e) in enumerate(zip(run(), same, exact, strict=True)):
            budget = Budget(f"{case} {direction} {name} {k}", gradient=True)
            budget.add(got, s, e)
            budget.check()
    return sides


def exact_results(
    case: Case, tensors: Tensors, upstream: list[Tensor], direction: str
) -> list[Tensor]:
    """Results, and gradients if they are timed, of the reference in float64."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in case.gradient_names()}
    results = case.define({**tensors, **leaves})
    if direction == "forward":
        return list(results)
    grads = torch.autograd.grad(results, list(leaves.values()), [u.double() for u in upstream])
    return [*results, *grads]


def compare(
    case: Case,
    *,
    rivals: tuple[str, ...] = RIVALS,
    directions: tuple[str, ...] = DIRECTIONS,
    threads: int = 1,
    dtype: torch.dtype = torch.float32,
    pairs: int = 41,
) -> list[Row]:
    """Compare the public function with its rivals on one case."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = []
        for direction in directions:
            sides = make_sides(case, direction, dtype)
            for rival in rivals:
                times = pair(sides["ours"], sides[rival], pairs)
                ratios = [theirs / ours for ours, theirs in times]
                low, ratio, high = statistics.quantiles(ratios, n=4)
                rows.append(
                    Row(
                        case=str(case),
                        direction=direction,
                        rival=rival,
                        threads=threads,
                        instruction_set=LIBRARY.instruction_set() if LIBRARY else "none",
                        ours_ms=1e3 * statistics.median(t for t, _ in times),
                        rival_ms=1e3 * statistics.median(t for _, t in times),
                        ratio=ratio,
                        ratio_low=low,
                        ratio_high=high,
                    )
                )
        return rows
    finally:
        torch.set_num_threads(before)


def bench_cases(operator: str | None = None) -> list[Case]:
    """Cases of the benchmark, of one operator or of all."""
    return cases(operator, tag="bench")
