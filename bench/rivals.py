"""Rivals: other implementations of what an operator or a module computes, and where they are found.

`bench/baselines/<operator>.py` holds those of an operator, in a mapping called ``RIVALS``; an
operator without the file has none beyond plain PyTorch and `torch.compile` of it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from geco_fast import ops
from geco_fast._registry import KERNELS
from geco_fast.testing.cases import Case, cases

# What there is for every operator and module; "self" is ours once more, and shows the noise.
ALWAYS = ("eager", "compile", "self")


@dataclass(frozen=True)
class Rival:
    """Another implementation.

    Parameters
    ----------
    build : callable
        For an operator, ``build(case)`` returns a function that takes the call's arguments by name,
        without its options, and returns its result or the tuple of its results. For a module,
        ``build(module)`` returns one with the same weights that is called like it. It imports what
        it needs itself: an `ImportError` says that the rival is not installed.
    serves : callable
        Whether it can compute a case of an operator; all by default.
    tolerance : float, optional
        Largest error, as a part of the largest exact value, of a rival that rounds worse than the
        accuracy rule allows. Infinite: it computes another function, of which `note` tells.
    note : str
        What a reader of its rows must know.
    permuted : bool
        Whether it holds a module's parameters in another order.
    """

    build: Callable[[Any], Any]
    serves: Callable[[Case], bool] = lambda case: True
    tolerance: float | None = None
    note: str = ""
    permuted: bool = False


def like_operator(function: Callable[..., Any]) -> Callable[[Case], Callable[..., Any]]:
    """A rival's `build` from a function with the operator's own signature, options included."""
    return lambda case: partial(function, **case.options)


def declared(operator: str) -> Mapping[str, Rival]:
    """Rivals in ``bench/baselines/<operator>.py``."""
    name = f"geco_fast.bench.baselines.{operator}"
    if importlib.util.find_spec(name) is None:
        return {}
    rivals: Mapping[str, Rival] = importlib.import_module(name).RIVALS
    return rivals


# On a GPU, where CUDA's kernels are ours if this installation has them.
TRITON = Rival(
    build=lambda case: partial(getattr(ops, case.operator), **case.options, backend="triton"),
    note="our own kernels in Triton",
)


def operator_rivals(case: Case, device: str = "cpu") -> dict[str, Rival]:
    """Rivals that serve a case, besides those there always are."""
    found = {name: rival for name, rival in declared(case.operator).items() if rival.serves(case)}
    if device == "cuda" and "triton" in KERNELS.get(case.operator, ()):
        found["triton"] = TRITON
    return found


def bench_cases(operator: str | None = None, device: str = "cpu") -> list[Case]:
    """Cases of the benchmark, of one operator or of all; a GPU also gets some that fill it."""
    found = cases(operator, tag="bench")
    return found if device == "cpu" else [*found, *cases(operator, tag="bench-gpu")]
