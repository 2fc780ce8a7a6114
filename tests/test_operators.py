"""Every rule that holds for every operator, over the one table of cases."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import geco_fast as gf
from geco_fast._backend import interprets, unavailable_reason
from geco_fast._checks import FLOATING
from geco_fast._registry import KERNELS
from geco_fast.testing.budget import REDRAWS, Budget, draws
from geco_fast.testing.calls import (
    EMULATED,
    LEVELS,
    Expected,
    backends,
    cast,
    device,
    expect_gradients,
    expect_results,
    gradients,
    named_gradients,
    named_results,
    require_grad,
)
from geco_fast.testing.cases import Case, Tensors, cases
from geco_fast.testing.guards import Guards


def is_large(case: Case) -> bool:
    return sum(map(math.prod, case.shapes.values())) > 4096


def over(
    chosen: list[Case], dtypes: Sequence[torch.dtype] = (torch.float32,), kernels_only: bool = False
) -> pytest.MarkDecorator:
    """Run a test over cases, dtypes and the backends that serve them.

    Triton's interpreter takes a thousand times longer than a kernel. It gets small cases in
    float32; tests of all dtypes give it large ones and small ones in bfloat16 as well, in the slow
    suite. The rest is for those who have a GPU.
    """
    everything = len(dtypes) > 1

    def row(case: Case, dtype: torch.dtype, backend: str) -> Any:
        name = f"{case}-{str(dtype)[6:]}-{backend}"
        interpreted = backend == "triton" and interprets()
        is_slow = interpreted and (is_large(case) or dtype != torch.float32)
        short = dtype == torch.float32 or (dtype == torch.bfloat16 and not is_large(case))
        if is_slow and not (everything and short):
            return None
        return pytest.param(
            case, dtype, backend, id=name, marks=[pytest.mark.slow] if is_slow else []
        )

    rows = [
        row(case, dtype, backend)
        for case in chosen
        for dtype in dtypes
        if dtype in case.dtypes
        for backend in served_by(case, dtype)
        if backend != "reference" or not kernels_only
    ]
    rows = [found for found in rows if found is not None]
    return pytest.mark.parametrize(("case", "dtype", "backend"), rows, indirect=["backend"])


# Operators with cases that the CPU's kernels alone serve; the others of theirs are PyTorch's
# convolution there.
APART = {case.operator for case in cases() if case.kernel_options}
FEW = range(4)


def served_by(case: Case, dtype: torch.dtype) -> list[str]:
    """Backends of a case; where the CPU has cases of its own, one level stands for all others."""
    found = backends(case.operator, dtype)
    if case.operator not in APART:
        return found
    if case.kernel_options:
        return [backend for backend in found if backend not in ("cuda", "triton")]
    levels = [backend for backend in found if backend.startswith("cpu")]
    return [backend for backend in found if backend not in levels[:-1]]


ALL = over(cases(), FLOATING)
SMALL = over(cases(tag="small"), [torch.float64])
KERNEL_CASES = [case for case in cases() if case.operator in KERNELS]


def for_compilation() -> list:
    """Small cases; the quick suite compiles each operator's first and last one."""
    rows = []
    for operator in sorted({case.operator for case in cases()}):
        small = cases(operator, "small")
        for case in small:
            slow = [] if case in (small[0], small[-1]) else [pytest.mark.slow]
            rows.append(pytest.param(case, "auto", id=str(case), marks=slow))
            if case == small[0] and "triton" in backends(operator, torch.float64):
                rows.append(pytest.param(case, "triton", id=f"{case}-triton"))
    return rows


def seeds(case: Case, backend: str, judged: Sequence[Tensor], operands: Tensors) -> range:
    """Draws of a case, enough for the smallest result; the reference against itself needs one.

    Where few results are made of many values, a draw is long and luck small.
    """
    if EMULATED is not None or (backend == "triton" and interprets()):
        return range(1)
    if case.operator in APART:
        return FEW
    if backend == "reference":
        return range(1)
    volume = sum(tensor.numel() for tensor in operands.values())
    enough = draws(min((tensor.numel() for tensor in judged if tensor.numel()), default=0))
    return range(min(enough, max(8, 2**16 // max(volume, 1))))


@functools.lru_cache(1024)
def expected_results(name: str, dtype: torch.dtype, seed: int) -> Expected:
    """Same for every backend; so are the gradients."""
    case = BY_NAME[name]
    return expect_results(case, case.arguments(case.tensors(dtype, seed)))


@functools.lru_cache(1024)
def expected_gradients(
    name: str, dtype: torch.dtype, seed: int, used: tuple[int, ...]
) -> tuple[list, Expected]:
    """The gradients to the results in `used`, and those to all differentiable operands."""
    case = BY_NAME[name]
    tensors = case.tensors(dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    upstream = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype)
        if k in used
        else None
        for k, r in enumerate(case.define(cast(tensors, torch.float32)))
    ]
    return upstream, expect_gradients(case, tensors, upstream)


Drawn = dict[str, list[tuple[Tensor, Tensor, Tensor]]]


def check_draws(
    draw: Callable[[int, Drawn], None], seeds: range, *, gradient: bool, bound: float | None
) -> None:
    """Hold each quantity to the accuracy rule; what fails is drawn more often before it is judged.

    ``draw(seed, drawn)`` appends the result under test, the reference's and the exact one by name.
    """
    drawn: Drawn = {}
    stops = [len(seeds)]
    while stops[-1] < REDRAWS:
        stops.append(min(4 * stops[-1], REDRAWS))
    for done, stop in pairwise((0, *stops)):
        for seed in range(done, stop):
            draw(seed, drawn)
        budgets = []
        for name, draws_of_it in drawn.items():
            name = f"gradient to {name}" if gradient else name
            budgets.append(Budget(name, gradient, bound))
            budgets[-1].add_draws(draws_of_it)
        if all(budget.kept() for budget in budgets):
            return
    for budget in budgets:
        budget.check()


def bound(case: Case, backend: str) -> float | None:
    """What a case allows a backend instead of the accuracy rule; nothing but that to PyTorch."""
    return None if backend == "reference" else case.bound


BY_NAME = {str(case): case for case in cases()}


@ALL
def test_forward(case: Case, dtype: torch.dtype, backend: str) -> None:
    def draw(seed: int, drawn: Drawn) -> None:
        exact, same = expected_results(str(case), dtype, seed)
        # What requires grad may go another way.
        for names in ((), case.gradient_names()):
            guards = Guards(device(backend))
            placed = guards.place_all(case.arguments(case.tensors(dtype, seed)))
            results = named_results(case, require_grad(names, placed), backend)
            guards.check(written=[placed[name] for name in case.written])
            for name, result in results.items():
                if not result.is_floating_point():
                    assert torch.equal(result, exact[name]), name
                    continue
                assert result.shape == exact[name].shape
                key = f"{name} with a graph" if names else name
                drawn.setdefault(key, []).append((result, same[name], exact[name]))

    made = case.tensors(torch.float32)
    enough = seeds(case, backend, case.define(made), made)
    check_draws(draw, enough, gradient=False, bound=bound(case, backend))


@ALL
def test_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    def draw(seed: int, drawn: Drawn, used: tuple[int, ...]) -> None:
        upstream, (exact, same) = expected_gradients(str(case), dtype, seed, used)
        guards = Guards(device(backend))
        tensors = guards.place_all(case.tensors(dtype, seed))
        actual = named_gradients(case, tensors, guards.place_all(upstream), backend)
        guards.check(written=[tensors[name] for name in case.written])
        for name, e in exact.items():
            a = actual[name]
            if e is None:
                assert a is None or not a.any(), f"gradient to {name} where there is none"
                continue
            assert a is not None, f"no gradient to {name}"
            assert a.dtype == dtype
            assert a.shape == e.shape
            drawn.setdefault(name, []).append((a, same[name], e))

    made = case.tensors(torch.float32)
    count = len(case.define(made))
    judged = [made[name] for name in case.gradient_names()]
    enough = seeds(case, backend, judged, made)
    # Every result at once, then each alone: autograd leaves the others' gradients out.
    for used in (tuple(range(count)), *((k,) for k in range(count) if count > 1)):
        check_draws(
            functools.partial(draw, used=used), enough, gradient=True, bound=bound(case, backend)
        )


@over(KERNEL_CASES, kernels_only=True)
def test_layout_is_pytorchs(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = Guards(device(backend)).place_all(case.tensors(dtype))
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
    tensors = require_grad(names, Guards(device(backend)).place_all(case.tensors(dtype)))

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        state = {name: tensors[name].clone() for name in case.written}
        return case.run({**tensors, **state, **dict(zip(names, values, strict=True))}, backend)

    leaves = tuple(tensors[name] for name in names)
    assert torch.autograd.gradcheck(function, leaves)
    # Gradients of gradients go through the reference, whatever the instruction set.
    if not LEVELS or backend in ("reference", f"cpu-{LEVELS[-1]}"):
        assert torch.autograd.gradgradcheck(function, leaves)


def overloads() -> list:
    """Cases of operators that torch knows, each with the overloads that can run here."""
    rows = []
    for case in KERNEL_CASES:
        packet = getattr(torch.ops.geco_fast, case.operator, None)
        for name in () if packet is None else packet.overloads():
            triton = name == "triton"
            too_long = triton and interprets() and is_large(case)
            if not (triton and (case.kernel_options or unavailable_reason("triton") or too_long)):
                rows.append(pytest.param(case, name, id=f"{case}-{name}"))
    return rows


@pytest.mark.parametrize(("case", "overload"), overloads())
def test_opcheck(case: Case, overload: str) -> None:
    tensors = Guards(device(overload)).place_all(case.tensors(torch.float32))
    public = inspect.signature(getattr(gf.ops, case.operator)).parameters
    arguments = {name: parameter.default for name, parameter in public.items()}
    arguments |= {**(case.adapt(tensors) if case.adapt else tensors), **case.options}
    operator = getattr(getattr(torch.ops.geco_fast, case.operator), overload)
    values = []
    for argument in operator._schema.arguments:
        value = arguments[argument.name]
        if isinstance(value, list):
            # A list of tensors can't hold None: an empty one stands for it.
            first = next(iter(tensors.values()))
            value = [first.new_empty(0) if each is None else each for each in value]
        as_tensor = isinstance(value, float) and str(argument.type) == "Tensor"
        values.append(torch.tensor(value, device=device(overload)) if as_tensor else value)
    # Tracing takes a second a case and sees shapes alone.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    traced = ("test_aot_dispatch_dynamic",) if "small" in case.tags else ()
    torch.library.opcheck(operator, tuple(values), test_utils=(*checks, *traced))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("case", "backend"), for_compilation())
def test_compiles_whole(case: Case, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    made = Guards(device(backend)).place_all(case.tensors(torch.float64))

    def gradients_through(run: Callable[[Tensors, str], tuple[Tensor, ...]]) -> list[Tensor]:
        tensors = require_grad(case.gradient_names(), cast(made, torch.float64))
        results = run(tensors, backend)
        leaves = [tensors[name] for name in case.gradient_names()]
        return [*results, *gradients(results, leaves, results)]

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
    placed = [Guards(device(backend)).place_all(case.tensors(dtype)) for _ in range(2)]
    runs = [case.run(tensors, backend) for tensors in placed]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_every_operator_has_cases() -> None:
    assert {case.operator for case in cases()} == set(gf.ops.__all__) - {
        "PreparedWeight",
        "prepare_weight",
    }
