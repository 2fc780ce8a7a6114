"""Every operator with kernels on random calls, at every instruction-set level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from strategies import CALLS, Example, examples
from torch import Tensor
from torch.utils import _pytree

from geco_fast import ops
from geco_fast._registry import KERNELS
from geco_fast.testing.budget import FEWEST_ELEMENTS, Budget
from geco_fast.testing.calls import (
    backends,
    cast,
    expect_gradients,
    expect_results,
    instruction_set,
    named_gradients,
    named_results,
)
from geco_fast.testing.cases import lay_out
from geco_fast.testing.guards import Guards

Named = dict[str, Any]

QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
REDRAWS = 64
LONG = settings(QUICK, max_examples=400, derandomize=False, print_blob=True)


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


class Judge:
    """Collects the errors of one example's draws, quantity by quantity."""

    def __init__(self) -> None:
        self.budgets: dict[str, Budget] = {}
        self.fewest = FEWEST_ELEMENTS

    def add(
        self,
        name: str,
        got: Tensor,
        same: Tensor,
        exact: Tensor,
        calm: Tensor | None,
        roundings: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        judged = within(got, same, exact, name)
        masks = {name: judged}
        if calm is not None:
            # What no extreme value has touched is held to the rule among its like. Of a zero that
            # can't be told: the reference's 1 - sigmoid is one, too, and hides any factor.
            masks[f"{name} beside extremes"] = judged & (calm == exact) & (exact != 0)
        for key, mask in masks.items():
            count = int(mask.sum())
            if count:
                self.fewest = min(self.fewest, count)
                budget = self.budgets.setdefault(key, Budget(key, "gradient" in name))
                budget.add(got[mask], same[mask], exact[mask])
                for rounded, exactly in roundings:
                    both = mask & rounded.isfinite() & exactly.isfinite()
                    budget.add(exactly[both], rounded[both], exactly[both])

    def allow_cancelled(self, dense: Judge) -> None:
        """Where every exact value is zero, allow a rounding of what the same call is if dense."""
        for key, budget in self.budgets.items():
            if budget.allowed_own + budget.allowed_unit == 0 and key in dense.budgets:
                budget.allowed_unit = dense.budgets[key].allowed_unit

    def kept(self) -> bool:
        return all(b.got <= b.allowed_own + b.allowed_unit for b in self.budgets.values())


def roundings(
    example: Example, arguments: Any, exact: Named, call: Callable[[Any], Named]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """More pairs of what the reference rounds and of the exact, for float64; by name.

    There the reference in float32 only stands for what rounding in float64 might do, and a draw
    that decides may have been a lucky one. So the arguments' neighbours are asked as well, whose
    errors are as large; and the reference in float64 with the last dimension slowest in memory, for
    PyTorch adds in the order of memory.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in exact}
    if example.dtype != torch.float64:
        return found

    def changed(change: Callable[[Tensor], Tensor]) -> Any:
        def of_floating(tensor: Tensor) -> Tensor:
            return change(tensor) if tensor.is_floating_point() else tensor

        return _pytree.tree_map_only(Tensor, of_floating, cast(arguments, torch.float64))

    pairs = [(call(changed(lambda tensor: lay_out(tensor, "reversed"))), exact)]
    for factor in (1 - 1 / 128, 1 + 1 / 128, 1 + 3 / 128):
        # In float32 first: both arithmetics get the same numbers.
        near = changed(lambda tensor, factor=factor: (tensor * factor).float().double())
        pairs.append((call(cast(near, torch.float32)), call(near)))
    for rounded, exactly in pairs:
        for name, wanted in exactly.items():
            if wanted is not None and wanted.is_floating_point():
                found[name].append((rounded[name], wanted))
    return found


def draw_results(example: Example, seed: int, served_by: list[str], judge: Judge) -> None:
    case = example.case
    arguments = case.arguments(case.tensors(example.dtype, seed))
    exact, same = expect_results(case, arguments)
    more = roundings(example, arguments, exact, partial(named_results, case))
    calm: dict[str, Any] = {}
    if example.calm is not None:
        calm_arguments = case.arguments(example.calm.tensors(example.dtype, seed))
        calm = named_results(case, cast(calm_arguments, torch.float64))
    guards = Guards()
    like = named_results(case, guards.place_all(arguments))
    for backend in served_by:
        guards = Guards()
        placed = guards.place_all(arguments)
        with instruction_set(backend) as name:
            results = named_results(case, placed, name)
        guards.check(written=[placed[name] for name in case.written])
        for name, got in results.items():
            key = f"{backend} {name}"
            assert got.dtype == like[name].dtype, f"{key}: {got.dtype}"
            assert same_layout(got, like[name]), f"{key}: strides {got.stride()}"
            if got.is_floating_point():
                judge.add(key, got, same[name], exact[name], calm.get(name), more[name])
            else:
                assert torch.equal(got, exact[name]), key


def draw_gradients(example: Example, seed: int, served_by: list[str], judge: Judge) -> None:
    case = example.case
    tensors = case.tensors(example.dtype, seed)
    incoming = example.incoming(case.call(case.arguments(cast(tensors, example.dtype))), seed)
    exact, same = expect_gradients(case, tensors, incoming, example.wanted)
    more = roundings(
        example,
        tensors,
        exact,
        lambda tensors: named_gradients(case, tensors, incoming, names=example.wanted),
    )
    calm: dict[str, Any] = {}
    if example.calm is not None:
        calm_tensors = cast(example.calm.tensors(example.dtype, seed), torch.float64)
        calm = named_gradients(case, calm_tensors, incoming, names=example.wanted)
    for backend in served_by:
        guards = Guards()
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
            judge.add(key, got, same[name], wanted, calm.get(name), more[name])


def without_layouts(example: Example) -> Example:
    calm = example.calm and replace(example.calm, layout="contiguous")
    return replace(example, case=replace(example.case, layout="contiguous"), calm=calm)


def check(example: Example) -> None:
    served_by = backends(example.case.operator, example.dtype)
    served_by = served_by[1:] or served_by
    for draw in (draw_results, draw_gradients):
        judge = Judge()
        draw(example, example.seed, served_by, judge)
        if judge.kept():
            continue
        # The reference may be lucky where a few elements decide: only more draws can tell.
        for k in range(1, max(REDRAWS, -(-FEWEST_ELEMENTS // judge.fewest))):
            draw(example, example.seed + k, served_by, judge)
        # Equal values cancel: centred ones to exact zeros, sums of them only to their rounding.
        dense = Judge()
        draw(without_layouts(example), example.seed, served_by, dense)
        judge.allow_cancelled(dense)
        for budget in judge.budgets.values():
            budget.check()


@pytest.mark.parametrize("operator", sorted(set(CALLS) & set(ops.__all__)))
def test_random_calls(operator: str, pytestconfig: pytest.Config) -> None:
    # Without kernels there is nothing to find but calls that aren't valid.
    count = pytestconfig.getoption("random_examples") if operator in KERNELS else 25
    settings(QUICK, max_examples=count)(given(examples(operator))(check))()


@pytest.mark.slow
@pytest.mark.parametrize("operator", sorted(set(CALLS) & set(KERNELS)))
def test_many_random_calls(operator: str, pytestconfig: pytest.Config) -> None:
    seeded = hypothesis.seed(pytestconfig.getoption("random_seed"))
    LONG(seeded(given(examples(operator))(check)))()


def test_every_kernel_has_random_calls() -> None:
    assert set(KERNELS) <= set(CALLS)
