"""Calls of an operator and what they must give: results, state and gradients by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from geco_fast._backend import LIBRARY, interprets, unavailable_reason
from geco_fast._registry import KERNELS
from geco_fast.testing.cases import Case, Tensors

LEVELS = tuple(LIBRARY.instruction_sets()) if LIBRARY is not None else ()
# A library of CUDA's kernels for the CPU, which stand in for the CPU's own; the tests load it.
EMULATED = os.environ.get("GECO_EMULATED")

# Operators whose CUDA kernels are PyTorch's convolutions or products, and kernels of the others.
COMPOSED = ("conv2d", "conv_lstm_step", "coupling_mlp", "prepare_weight")

# By the name of a result, state tensor or operand: in float64, and in the dtype under test
# (float32 for float64, where the reference can't measure its own rounding).
Expected = tuple[dict[str, Any], dict[str, Any]]


def backends(operator: str, dtype: torch.dtype) -> list[str]:
    """Backends that serve an operator here, the CPU's once for each instruction set."""
    kernels = KERNELS.get(operator, {})
    levels = [f"cpu-{level}" for level in LEVELS if dtype in kernels.get("cpu", ())]
    gpus = [
        name
        for name in ("cuda", "triton")
        if dtype in kernels.get(name, ()) and not unavailable_reason(name)
    ]
    return ["reference", *gpus, *levels]


def device(backend: str) -> str:
    """Where a backend's tensors are; Triton's interpreter takes those of the CPU."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not interprets()) else "cpu"


@contextmanager
def instruction_set(backend: str) -> Iterator[str]:
    """Yield a backend's name, of "cpu-avx2" and its like with that instruction set in use."""
    name, _, level = backend.partition("-")
    if not level:
        yield name
        return
    before = LIBRARY.instruction_set()  # type: ignore[union-attr]
    LIBRARY.set_instruction_set(level)  # type: ignore[union-attr]
    try:
        yield name
    finally:
        LIBRARY.set_instruction_set(before)  # type: ignore[union-attr]


def _copies(arguments: Any, dtypes: Callable[[torch.dtype], torch.dtype]) -> Any:
    def copy(tensor: Tensor) -> Tensor:
        dtype = dtypes(tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(dtype, copy=True)

    return _pytree.tree_map_only(Tensor, copy, arguments)


def cast(arguments: Any, dtype: torch.dtype) -> Any:
    """Copies in a floating dtype; integer tensors keep theirs."""
    return _copies(arguments, lambda _: dtype)


def same_precision(arguments: Any) -> Any:
    """Copies in the dtypes in which the reference is compared with itself in float64."""
    return _copies(arguments, lambda d: torch.float32 if d == torch.float64 else d)


def require_grad(names: Sequence[str], tensors: Tensors) -> Tensors:
    """Leaves that share the tensors' memory, those named with gradients."""
    return {
        name: tensor.detach().requires_grad_() if name in names else tensor
        for name, tensor in tensors.items()
    }


def gradients(
    results: Sequence[Tensor], leaves: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Gradients to leaves; None for those that the results with an upstream don't reach."""
    used = [
        (r, u.to(r.dtype))
        for r, u in zip(results, upstream, strict=True)
        if u is not None and r.requires_grad
    ]
    if not used:
        return [None] * len(leaves)
    outputs, grads = zip(*used, strict=True)
    return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def named_results(
    case: Case, arguments: Mapping[str, Any], backend: str | None = None
) -> dict[str, Tensor]:
    """Results of a backend, or of the reference for None, and the state after the call."""
    results = case.call(arguments, backend)
    state = {f"state {name}": arguments[name].cpu() for name in case.written}
    return {f"result {k}": result.detach().cpu() for k, result in enumerate(results)} | state


def named_gradients(
    case: Case,
    tensors: Tensors,
    upstream: Sequence[Tensor | None],
    backend: str | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor | None]:
    """Gradients through a backend, or through the reference for None, to all leaves or `names`."""
    names = case.gradient_names() if names is None else names
    leaves = require_grad(names, tensors)
    results = case.call(case.arguments(leaves), backend)
    found = gradients(results, [leaves[name] for name in names], upstream)
    return {
        name: None if gradient is None else gradient.cpu()
        for name, gradient in zip(names, found, strict=True)
    }


def expect_results(case: Case, arguments: Mapping[str, Any]) -> Expected:
    """What `named_results` must give for arguments, which stay as they are."""
    exact = named_results(case, cast(arguments, torch.float64))
    return exact, named_results(case, same_precision(arguments))


def expect_gradients(
    case: Case,
    tensors: Tensors,
    upstream: Sequence[Tensor | None],
    names: Sequence[str] | None = None,
) -> Expected:
    """What `named_gradients` must give for tensors."""
    exact = named_gradients(case, cast(tensors, torch.float64), upstream, names=names)
    return exact, named_gradients(case, same_precision(tensors), upstream, names=names)
