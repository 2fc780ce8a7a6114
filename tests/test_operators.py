"""Every rule that holds for every operator, over the one table of cases."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import geco_fast as gf
from geco_fast._backend import LIBRARY
from geco_fast._checks import FLOATING
from geco_fast._registry import KERNELS
from geco_fast.testing.budget import Budget, draws
from geco_fast.testing.cases import Case, Tensors, cases

LEVELS = tuple(LIBRARY.instruction_sets()) if LIBRARY is not None else ()


def backends(operator: str, dtype: torch.dtype) -> list[str]:
    """Backends that serve an operator here, the CPU's once for each instruction set."""
    kernels = KERNELS.get(operator, {})
    levels = [f"cpu-{level}" for level in LEVELS if dtype in kernels.get("cpu", ())]
    return ["reference", *levels]


def over(
    chosen: list[Case], dtypes: Sequence[torch.dtype] = (torch.float32,), kernels_only: bool = False
) -> pytest.MarkDecorator:
    """Run a test over cases, dtypes and the backends that serve them."""
    rows = [
        pytest.param(case, dtype, backend, id=f"{case}-{str(dtype)[6:]}-{backend}")
        for case in chosen
        for dtype in dtypes
        for backend in backends(case.operator, dtype)
        if backend != "reference" or not kernels_only
    ]
    return pytest.mark.parametrize(("case", "dtype", "backend"), rows, indirect=["backend"])


ALL = over(cases(), FLOATING)
SMALL = over(cases(tag="small"), [torch.float64])
KERNEL_CASES = [case for case in cases() if case.operator in KERNELS]


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in tensors.items()
    }


def require_grad(case: Case, tensors: Tensors) -> Tensors:
    return {
        name: tensor.detach().requires_grad_() if name in case.gradient_names() else tensor
        for name, tensor in tensors.items()
    }


def gradients(case: Case, results: tuple[Tensor, ...], tensors: Tensors, upstream: list) -> list:
    outputs = [(r, u.to(r.dtype)) for r, u in zip(results, upstream, strict=True) if u is not None]
    leaves = [tensors[name] for name in case.gradient_names()]
    return torch.autograd.grad(
        [r for r, _ in outputs], leaves, [u for _, u in outputs], allow_unused=True
    )


def same_precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def seeds(case: Case, backend: str) -> range:
    """Draws of a case; the reference against itself needs one."""
    if backend == "reference":
        return range(1)
    return range(draws(case.define(case.tensors(torch.float32))[0].numel()))


@ALL
def test_forward(case: Case, dtype: torch.dtype, backend: str) -> None:
    budgets: list[Budget] = []
    for seed in seeds(case, backend):
        tensors = case.tensors(dtype, seed)
        before = cast(tensors, dtype)
        exact = case.define(cast(tensors, torch.float64))
        same = case.define(cast(tensors, same_precision(dtype)))
        results = case.run(tensors, backend)
        budgets = budgets or [Budget(f"result {k}") for k in range(len(results))]
        for budget, result, s, e in zip(budgets, results, same, exact, strict=True):
            budget.add(result, s, e)
        for name, tensor in tensors.items():
            if name not in case.written:
                assert torch.equal(tensor, before[name]), f"{name} was written to"
    for budget in budgets:
        budget.check()


def differentiate(
    case: Case, made: Tensors, dtype: torch.dtype, upstream: list, backend: str | None = None
) -> list:
    """Gradients through a backend, or through the reference in a dtype if none is given."""
    tensors = require_grad(case, made if backend else cast(made, dtype))
    results = case.run(tensors, backend) if backend else case.define(tensors)
    return gradients(case, results, tensors, upstream)


@ALL
def test_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    count = len(case.define(case.tensors(torch.float32)))
    # Every result at once, then each alone: autograd leaves the others' gradients out.
    used_sets = [range(count), *([k] for k in range(count) if count > 1)]
    for used in used_sets:
        budgets = {name: Budget(f"gradient to {name}", True) for name in case.gradient_names()}
        for seed in seeds(case, backend):
            made = case.tensors(dtype, seed)
            generator = torch.Generator().manual_seed(seed + 1000)
            upstream = [
                torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype)
                if k in used
                else None
                for k, r in enumerate(case.define(cast(made, torch.float32)))
            ]
            exact = differentiate(case, made, torch.float64, upstream)
            same = differentiate(case, made, same_precision(dtype), upstream)
            actual = differentiate(case, made, dtype, upstream, backend)
            for budget, a, s, e in zip(budgets.values(), actual, same, exact, strict=True):
                if e is None:
                    assert a is None or not a.any(), f"{budget.name} where there is none"
                    continue
                assert a.dtype == dtype
                budget.add(a, s, e)
        for budget in budgets.values():
            budget.check()


@over(KERNEL_CASES, kernels_only=True)
def test_layout_is_pytorchs(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = case.tensors(dtype)
    for result, expected in zip(case.run(tensors, backend), case.define(tensors), strict=True):
        assert result.shape == expected.shape
        if result.numel():
            significant = [
                (a, b)
                for a, b, size in zip(result.stride(), expected.stride(), result.shape, strict=True)
                if size > 1
            ]
            assert all(a == b for a, b in significant), (result.stride(), expected.stride())


@SMALL
def test_gradcheck(case: Case, dtype: torch.dtype, backend: str) -> None:
    names = case.gradient_names()
    tensors = require_grad(case, case.tensors(dtype))

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        state = {name: tensors[name].clone() for name in case.written}
        return case.run({**tensors, **state, **dict(zip(names, values, strict=True))}, backend)

    leaves = tuple(tensors[name] for name in names)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_opcheck(case: Case) -> None:
    tensors = case.tensors(torch.float32)
    public = inspect.signature(getattr(gf.ops, case.operator)).parameters
    arguments = {name: parameter.default for name, parameter in public.items()}
    arguments |= {**(case.adapt(tensors) if case.adapt else tensors), **case.options}
    operator = getattr(torch.ops.geco_fast, case.operator).default
    values = tuple(arguments[argument.name] for argument in operator._schema.arguments)
    torch.library.opcheck(operator, values)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", cases(tag="small"), ids=str)
def test_compiles_whole(case: Case, dynamic: bool) -> None:
    torch._dynamo.reset()
    made = case.tensors(torch.float64)

    def gradients_through(run: Callable[[Tensors], tuple[Tensor, ...]]) -> list[Tensor]:
        tensors = require_grad(case, cast(made, torch.float64))
        results = run(tensors)
        return [*results, *gradients(case, results, tensors, list(results))]

    compiled = torch.compile(case.run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, wanted in zip(gradients_through(compiled), gradients_through(case.run), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("case", [c for c in cases(tag="small") if not c.written], ids=str)
def test_transforms(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    batches = {
        name: torch.stack([tensor, 0.5 * tensor, -tensor]) for name, tensor in tensors.items()
    }
    names = case.gradient_names()
    mapped = torch.func.vmap(case.run)(batches)
    for k in range(3):
        alone = case.run({name: batch[k] for name, batch in batches.items()})
        for got, wanted in zip(mapped, alone, strict=True):
            torch.testing.assert_close(got[k], wanted)

    primals = tuple(tensors[name] for name in names)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return case.run({**tensors, **dict(zip(names, values, strict=True))})

    tangents = tuple(torch.ones_like(value) for value in primals)
    _, forward_mode = torch.func.jvp(function, primals, tangents)
    step = 1e-6
    shifted = [
        function(*(p + s * step * t for p, t in zip(primals, tangents, strict=True)))
        for s in (1, -1)
    ]
    for got, up, down in zip(forward_mode, *shifted, strict=True):
        torch.testing.assert_close(got, (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


@over(KERNEL_CASES, kernels_only=True)
def test_deterministic(case: Case, dtype: torch.dtype, backend: str, two_threads: None) -> None:
    runs = [case.run(case.tensors(dtype), backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_every_operator_has_cases() -> None:
    assert {case.operator for case in cases()} == set(gf.ops.__all__) - {
        "PreparedWeight",
        "prepare_weight",
    }
