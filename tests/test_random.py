"""Every operator with kernels on random calls: a GPU's, and every instruction set's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.internal.conjecture import providers
from strategies import CALLS, Example, examples
from torch import Tensor
from torch.utils import _pytree

from geco_fast import ops
from geco_fast._backend import interprets, unavailable_reason
from geco_fast._registry import KERNELS
from geco_fast.testing.budget import FEWEST_ELEMENTS, REDRAWS, Budget
from geco_fast.testing.calls import (
    COMPOSED,
    Expected,
    backends,
    cast,
    device,
    expect_gradients,
    expect_results,
    instruction_set,
    named_gradients,
    named_results,
)
from geco_fast.testing.cases import lay_out
from geco_fast.testing.guards import Guards

Named = dict[str, Any]
Roundings = dict[str, list[tuple[Tensor, Tensor]]]

QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
NEIGHBOURS = [1 + k / 128 for k in range(-6, 7) if k]
CANCELLED = 2.0**-26  # the root of float64's epsilon
LONG = settings(QUICK, max_examples=400, derandomize=False, print_blob=True)


@pytest.fixture(autouse=True)
def no_constants_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep hypothesis from drawing numbers found in the modules that happen to be imported."""
    monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)


def within(got: Tensor, same: Tensor, exact: Tensor, name: str) -> Tensor:
    """Where a quantity is finite and can be judged; its shape, dtype and the others are checked.

    With extreme values the reference may leave the range on its way to a finite result: there,
    anything goes.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}"
    finite = exact.to(got.dtype).isfinite()
    settled = same.isfinite() == finite if got.dtype == same.dtype else torch.ones_like(finite)
    wrong = settled & (got.isfinite() != finite)
    assert not wrong.any(), (
        f"{name}: finite where the reference is not, or the reverse: got {got[wrong][:4].tolist()} "
        f"instead of {exact[wrong][:4].tolist()}"
    )
    return finite & got.isfinite() & same.isfinite() & exact.to(same.dtype).isfinite()


def same_layout(got: Tensor, wanted: Tensor) -> bool:
    pairs = zip(got.stride(), wanted.stride(), got.shape, strict=True)
    return not got.numel() or all(a == b for a, b, size in pairs if size > 1)


@dataclass(frozen=True)
class Beside:
    """A quantity without extreme values, in float64 and as the reference gives it, and with NaN.

    What is the same without the extreme values and with NaN for each, no extreme value has touched.
    """

    exact: Tensor
    same: Tensor
    poisoned: Tensor


class Judge:
    """Collects the errors of one example's draws, quantity by quantity."""

    def __init__(self, bound: float | None = None) -> None:
        self.bound = bound
        self.budgets: dict[str, Budget] = {}
        self.fewest = FEWEST_ELEMENTS

    def add(
        self,
        name: str,
        got: Tensor,
        same: Tensor,
        exact: Tensor,
        beside: Beside | None,
        roundings: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        judged = within(got, same, exact, name)
        masks = {name: judged}
        if beside is not None and self.bound is None:
            # What is untouched may have the errors that the call without extreme values may have.
            untouched = (beside.exact == exact) & (beside.poisoned == exact)
            masks[f"{name} beside extremes"] = judged & untouched
        for key, mask in masks.items():
            count = int(mask.sum())
            if count:
                self.fewest = min(self.fewest, count)
                budget = self.budgets.setdefault(key, Budget(key, "gradient" in name, self.bound))
                budget.add(got[mask], same[mask], exact[mask])
                # What is rounded to 16 bits is judged by that rounding.
                wide = got.element_size() > 2
                pairs = [(a[mask], b[mask]) for a, b in roundings if wide]
                if beside is not None and key != name:
                    pairs.append((beside.same, beside.exact))
                for rounded, exactly in pairs:
                    both = rounded.isfinite() & exactly.to(rounded.dtype).isfinite()
                    budget.allow(rounded[both], exactly[both], got.dtype)

    def allow_cancelled(self, dense: Judge) -> None:
        """Where all exact values cancel, allow a rounding of what the same call is if dense.

        Equal values cancel: centred ones to zeros, sums of them to their rounding, in float64, too.
        """
        for key, budget in self.budgets.items():
            if key in dense.budgets:
                unit = dense.budgets[key].allowed_unit
                if budget.allowed_own + budget.allowed_unit <= CANCELLED * unit:
                    budget.allowed_unit = unit

    def kept(self) -> bool:
        return all(budget.kept() for budget in self.budgets.values())


def roundings(
    example: Example, arguments: Any, exact: Named, call: Callable[[Any], Named]
) -> Roundings:
    """More pairs of what the reference rounds and of the exact, by name.

    A reference may be lucky where it isn't asked in the arithmetic it stands for: its float32 for
    what rounding in float64 might do, and numbers of 16 bits are so coarse that arithmetic in
    float32 may be exact. In float32 all of a draw's elements may share one rounding, and the few
    draws that a steep function magnifies decide. So the arguments' neighbours are asked as well,
    whose errors are as large, in float32; and for float64 the reference with the last dimension
    slowest in memory, for PyTorch adds in the order of memory.
    """
    found: Roundings = {name: [] for name in exact}

    def changed(change: Callable[[Tensor], Tensor]) -> Any:
        def of_floating(tensor: Tensor) -> Tensor:
            return change(tensor) if tensor.is_floating_point() else tensor

        return _pytree.tree_map_only(Tensor, of_floating, cast(arguments, torch.float64))

    pairs = []
    if example.dtype == torch.float64:
        pairs.append((call(changed(lambda tensor: lay_out(tensor, "reversed"))), exact))
    for factor in NEIGHBOURS:
        # In float32 first: both arithmetics get the same numbers.
        near = changed(lambda tensor, factor=factor: (tensor * factor).float().double())
        pairs.append((call(cast(near, torch.float32)), call(near)))
    for rounded, exactly in pairs:
        for name, wanted in exactly.items():
            if wanted is not None and wanted.is_floating_point():
                found[name].append((rounded[name], wanted))
    return found


def beside_extremes(
    example: Example, seed: int, expect: Callable[[Any], Expected]
) -> dict[str, Beside]:
    """What tells which quantities no extreme value has touched, by name."""
    if not example.values.extremes:
        return {}
    exact, same = expect(example.calm().tensors(example.dtype, seed))
    poisoned, _ = expect(example.poisoned().tensors(example.dtype, seed))
    return {
        name: Beside(wanted, same[name], poisoned[name])
        for name, wanted in exact.items()
        if wanted is not None and wanted.is_floating_point()
    }


def draw_results(
    example: Example, seed: int, served_by: list[str], judge: Judge, careful: bool
) -> None:
    case = example.case
    arguments = case.arguments(case.tensors(example.dtype, seed))
    exact, same = expect_results(case, arguments)
    more: Roundings = {}
    if careful:
        more = roundings(example, arguments, exact, partial(named_results, case))
    beside = beside_extremes(
        example, seed, lambda tensors: expect_results(case, case.arguments(tensors))
    )
    guards = Guards()
    like = named_results(case, guards.place_all(arguments))
    for backend in served_by:
        guards = Guards(device(backend))
        placed = guards.place_all(arguments)
        with instruction_set(backend) as name:
            results = named_results(case, placed, name)
        guards.check(written=[placed[name] for name in case.written])
        for name, got in results.items():
            key = f"{backend} {name}"
            assert got.dtype == like[name].dtype, f"{key}: {got.dtype}"
            # A copy of state that has gaps would have none.
            in_place = name.startswith("state") and device(backend) != "cpu"
            assert in_place or same_layout(got, like[name]), f"{key}: strides {got.stride()}"
            if got.is_floating_point():
                judge.add(key, got, same[name], exact[name], beside.get(name), more.get(name, []))
            else:
                assert torch.equal(got, exact[name]), key


def draw_gradients(
    example: Example, seed: int, served_by: list[str], judge: Judge, careful: bool
) -> None:
    case = example.case
    tensors = case.tensors(example.dtype, seed)
    incoming = example.incoming(case.call(case.arguments(cast(tensors, example.dtype))), seed)
    exact, same = expect_gradients(case, tensors, incoming, example.wanted)
    more: Roundings = {}
    if careful:
        call = partial(named_gradients, case, upstream=incoming, names=example.wanted)
        more = roundings(example, tensors, exact, call)
    beside = beside_extremes(
        example, seed, lambda tensors: expect_gradients(case, tensors, incoming, example.wanted)
    )
    for backend in served_by:
        guards = Guards(device(backend))
        placed, upstream = guards.place_all((tensors, incoming))
        with instruction_set(backend) as name:
            found = named_gradients(case, placed, upstream, name, example.wanted)
        guards.check()
        for name, wanted in exact.items():
            key, got = f"{backend} gradient to {name}", found[name]
            if wanted is None:
                assert got is None or not got.any(), f"{key} where there is none"
                continue
            assert got is not None, f"no {key}"
            assert got.dtype == example.dtype, f"{key}: {got.dtype}"
            judge.add(key, got, same[name], wanted, beside.get(name), more.get(name, []))


def without_layouts(example: Example) -> Example:
    return replace(example, case=replace(example.case, layout="contiguous"))


def as_plain_call(example: Example) -> Example:
    """The example without the ways that the CPU's kernels alone have."""
    return replace(example, case=replace(example.case, kernel_options={}, bound=None))


def check(example: Example, kernels: str) -> None:
    if kernels != "cpu":
        example = as_plain_call(example)
    if kernels == "cuda" and example.case.operator in COMPOSED:
        # What PyTorch makes of NaN and infinity on a GPU is not always what it makes on a CPU.
        example = replace(example, case=example.calm(), values=replace(example.values, extremes=()))
    found = backends(example.case.operator, example.dtype)
    served_by = [backend for backend in found if backend.startswith(kernels)]
    if not served_by:
        # PyTorch's products of bfloat16 read the gaps between rows on processors with AMX.
        example, served_by = without_layouts(example), ["reference"]
    for draw in (draw_results, draw_gradients):
        judge = Judge(example.case.bound)
        draw(example, example.seed, served_by, judge, careful=False)
        if judge.kept():
            continue
        # The reference may be lucky where a few elements decide: only more draws can tell.
        redraws = max(REDRAWS, -(-FEWEST_ELEMENTS // judge.fewest))
        for careful in (False, True):
            for k in range(redraws):
                draw(example, example.seed + k, served_by, judge, careful)
            if judge.kept():
                break
        dense = Judge()
        draw(without_layouts(example), example.seed, served_by, dense, careful=False)
        judge.allow_cancelled(dense)
        for budget in judge.budgets.values():
            budget.check()


OPERATORS = sorted(set(CALLS) & set(ops.__all__))
OF_A_GPU = pytest.mark.parametrize(
    ("operator", "kernels"),
    [
        pytest.param(operator, kernels, id=f"{operator}-{kernels}")
        for operator in OPERATORS
        for kernels in ("cuda", "triton")
        if kernels in KERNELS.get(operator, {})
    ],
)
# A call in Triton's interpreter takes a thousand times longer.
FEW = 10


@pytest.mark.parametrize("operator", OPERATORS)
def test_random_calls(operator: str, pytestconfig: pytest.Config) -> None:
    # Without kernels there is nothing to find but calls that aren't valid.
    count = pytestconfig.getoption("random_examples") if operator in KERNELS else 25
    run(operator, "cpu", settings(QUICK, max_examples=count))


@OF_A_GPU
def test_random_calls_on_gpu(operator: str, kernels: str, pytestconfig: pytest.Config) -> None:
    count = FEW if interprets() else pytestconfig.getoption("random_examples")
    run(operator, kernels, settings(QUICK, max_examples=count))


@pytest.mark.slow
@pytest.mark.parametrize("operator", sorted(set(CALLS) & set(KERNELS)))
def test_many_random_calls(operator: str, pytestconfig: pytest.Config) -> None:
    run(operator, "cpu", LONG, pytestconfig.getoption("random_seed"))


@pytest.mark.slow
@pytest.mark.skipif(interprets(), reason="takes too long in Triton's interpreter")
@OF_A_GPU
def test_many_random_calls_on_gpu(operator: str, kernels: str, pytestconfig: pytest.Config) -> None:
    run(operator, kernels, LONG, pytestconfig.getoption("random_seed"))


def run(operator: str, kernels: str, effort: settings, seed: int | None = None) -> None:
    if kernels != "cpu" and unavailable_reason(kernels):
        pytest.skip(unavailable_reason(kernels))
    test = given(examples(operator))(lambda example: check(example, kernels))
    effort(test if seed is None else hypothesis.seed(seed)(test))()


def test_every_kernel_has_random_calls() -> None:
    assert set(KERNELS) - {"prepare_weight"} <= set(CALLS)
