"""Paired timing: both sides in one process, in turn, and the median of the pairs' ratios."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from geco_fast._backend import LIBRARY
from geco_fast.bench.entrants import FORWARD, Entrant, Problem, Results
from geco_fast.bench.limits import measure_limits
from geco_fast.bench.memory import keep_freed_memory, peak_bytes
from geco_fast.bench.results import Row
from geco_fast.bench.rivals import Rival
from geco_fast.testing.budget import Budget

FEWEST_PAIRS = 3


class WrongResult(AssertionError):
    """Our side breaks the accuracy rule: there is no speed of a wrong result."""


class TooSlow(BaseException):
    """A side took longer than the patience with it; no library's `except Exception` takes it."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Parameters
    ----------
    pairs : int
        Most slices of each side in a comparison.
    slice_s : float
        Length of a slice in seconds; short calls are repeated to fill it.
    seconds : float
        Length of a comparison, which has fewer pairs where calls are long; a side of which one
        call takes longer is left out.
    patience : float
        Longest first call of a side in seconds, compilation included.
    """

    pairs: int = 21
    slice_s: float = 0.01
    seconds: float = 30.0
    patience: float = 180.0


def settle() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(side: Callable[[], object], repeats: int) -> float:
    """Time of one call, averaged over `repeats`, until the last one's results are there."""
    settle()
    start = time.perf_counter()
    for _ in range(repeats):
        side()
    settle()
    return (time.perf_counter() - start) / repeats


def pair(
    ours: Callable[[], object], rival: Callable[[], object], effort: Effort
) -> list[tuple[float, float]]:
    """Times (ours, rival) of interleaved slices, after a warm-up."""
    repeats, length = [], 0.0
    for side in (ours, rival):
        call = seconds(side, 1)
        if call > effort.seconds:
            raise TooSlow(f"one call takes {call:.0f} s")
        if call < 0.1:
            call = min(call, *(seconds(side, 1) for _ in range(3)))
        repeats.append(max(1, round(effort.slice_s / call)))
        length += repeats[-1] * call
    pairs = max(FEWEST_PAIRS, min(effort.pairs, int(effort.seconds / length)))
    times = []
    for k in range(pairs):
        # The order alternates, so that neither side always follows the other's cache.
        a, b = ((ours, repeats[0]), (rival, repeats[1]))[:: 1 if k % 2 else -1]
        first, second = seconds(*a), seconds(*b)
        times.append((first, second) if k % 2 else (second, first))
    return times


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Capture a step as a CUDA graph, and return what replays it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def patience(limit: float) -> Iterator[None]:
    """Raise TooSlow in a block that takes longer; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TooSlow(f"the first call takes more than {limit:.0f} s, compilation included")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(failure: BaseException) -> str:
    """Why a rival takes no part, in one line."""
    if isinstance(failure, ImportError):
        return f"not installed ({failure})"
    if isinstance(failure, AssertionError | TooSlow):
        return str(failure)
    return (
        f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"
    )


class _Check:
    """Holds one side's results, over all draws, to the accuracy rule or to the side's tolerance."""

    def __init__(self, rival: Rival | None, bound: float | None) -> None:
        self.rival = rival
        self.bound = bound
        self.budgets: dict[str, Budget] = {}

    def add(
        self,
        entrant: Entrant,
        seed: int,
        directions: Sequence[str],
        expected: tuple[Results, Results],
    ) -> None:
        """Take in one draw."""
        for direction in directions:
            got = entrant.results(seed, direction)
            if self.rival is None or self.rival.tolerance != math.inf:
                self._add(direction, got, *expected)

    def _add(self, direction: str, got: Results, same: Results, exact: Results) -> None:
        for kind in Results._fields:
            if direction == FORWARD and kind == "gradients":
                continue
            found, own, true = (list(getattr(side, kind)) for side in (got, same, exact))
            if kind == "gradients" and self.rival is not None and self.rival.permuted:
                own[-1], true[-1] = own[-1].sort().values, true[-1].sort().values
            for k, (g, s, e) in enumerate(zip(found, own, true, strict=True)):
                name = f"{direction}, {kind} {k}"
                budget = self.budgets.setdefault(
                    name, Budget(name, kind == "gradients", self.bound)
                )
                budget.add(g, s, e)
                if self.rival is not None and self.rival.tolerance and e.numel():
                    tolerated = self.rival.tolerance * e.abs().max().item()
                    budget.allowed_unit = max(budget.allowed_unit, tolerated)

    @property
    def failure(self) -> str:
        """What breaks the rule so far; empty if nothing does."""
        try:
            self.finish()
        except AssertionError as error:
            return str(error)
        return ""

    def finish(self) -> None:
        """Raise AssertionError if the rule is broken."""
        for budget in self.budgets.values():
            budget.check()


def sides(
    problem: Problem, names: Sequence[str], effort: Effort
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """Ours and these rivals, checked against each other; and why those left out are.

    Raises
    ------
    WrongResult
        If our results break the accuracy rule.
    """
    torch._dynamo.reset()
    ready: dict[str, Entrant] = {}
    out: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            with patience(effort.patience):
                return action()
        except (Exception, TooSlow) as failure:
            ready.pop(name, None)
            if name == "ours":
                if isinstance(failure, AssertionError):
                    raise WrongResult(f"{problem}: {failure}") from failure
                raise
            out[name] = reason(failure)

    for name in dict.fromkeys(("ours", *names)):
        if name != "self":
            built = attempt(name, partial(problem.build, name))
            if name not in out:
                ready[name] = built
    checks = {
        name: _Check(problem.rivals.get(name), problem.bound if name == "ours" else None)
        for name in ready
    }
    start = time.perf_counter()
    for seed in problem.seeds():
        expected = problem.expected(seed)
        for name, check in checks.items():
            attempt(name, partial(check.add, ready[name], seed, problem.directions, expected))
        # Whoever keeps the rule is done; another draw is for those whom this one may have wronged.
        checks = {name: check for name, check in checks.items() if name in ready and check.failure}
        if not checks or time.perf_counter() - start > effort.patience:
            break
    for name, check in checks.items():
        attempt(name, check.finish)
    return ready, out


def compare(
    problem: Problem,
    *,
    rivals: Sequence[str] | None = None,
    threads: int = 1,
    effort: Effort = Effort(),
    graph: bool = False,
) -> list[Row]:
    """Compare ours with its rivals on one problem.

    Parameters
    ----------
    problem : Problem
        What is compared.
    rivals : sequence of str, optional
        Names of rivals, of those that the problem has; all by default. "self" is ours once more.
    threads : int
        Threads of both sides.
    effort : Effort
        How long to measure.
    graph : bool
        Whether both sides are captured as CUDA graphs, whose replays are timed.

    Raises
    ------
    WrongResult
        If our results break the accuracy rule.
    """
    known = [*problem.rivals, "self"]
    chosen = known if rivals is None else [name for name in known if name in rivals]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        ready, out = sides(problem, chosen, effort)
        limits = measure_limits(threads, problem.device)
        rows = []
        for direction in problem.directions:
            work = problem.work(direction)
            step = ready["ours"].step(direction)
            ours = captured(step) if graph else step
            base = Row(
                operator=problem.operator,
                case=str(problem),
                direction=direction,
                rival="",
                threads=threads,
                instruction_set=_level(problem.device),
                captured=graph,
                ours_peak_bytes=peak_bytes(step, problem.device),
                least_bytes=work.bytes if work else None,
                least_operations=work.operations if work else None,
                copy_bytes_per_s=limits.bytes_per_s,
                fma_operations_per_s=limits.operations_per_s,
            )
            for name in chosen:
                note = problem.rivals[name].note if name in problem.rivals else ""
                row = replace(base, rival=name, note=note)
                rows.append(_measured(row, ready, out, problem.device, ours, effort))
        return rows
    finally:
        torch.set_num_threads(before)


def _level(device: str) -> str:
    """Instruction set of our kernels, or the architecture of the GPU."""
    if device != "cpu":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return LIBRARY.instruction_set() if LIBRARY else "none"


def _measured(
    row: Row,
    ready: dict[str, Entrant],
    out: dict[str, str],
    device: str,
    ours: Callable[[], object],
    effort: Effort,
) -> Row:
    if row.rival in out:
        return replace(row, unavailable=out[row.rival])
    entrant = ready["ours" if row.rival == "self" else row.rival]
    try:
        with patience(effort.patience):
            step = entrant.step(row.direction)
            theirs = captured(step) if row.captured else step
            theirs()
        times = pair(ours, theirs, effort)
        held = peak_bytes(step, device)
    except (Exception, TooSlow) as failure:
        return replace(row, unavailable=reason(failure))
    low, ratio, high = statistics.quantiles([theirs / ours for ours, theirs in times], n=4)
    return replace(
        row,
        pairs=len(times),
        ours_ms=1e3 * statistics.median(t for t, _ in times),
        rival_ms=1e3 * statistics.median(t for _, t in times),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        # What torch's allocator doesn't see would read as nothing.
        rival_peak_bytes=held if getattr(entrant, "on_torch", True) else None,
    )
