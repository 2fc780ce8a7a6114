"""How an operator meets autograd: eagerly, under torch.compile, and for gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geco_fast._registry import LIBRARY

below_autograd = torch._C._AutoDispatchBelowAutograd


def differentiable(
    operator: str, function: type[torch.autograd.Function]
) -> Callable[..., tuple[Tensor, ...]]:
    """Return what calls an operator with gradients.

    Eagerly that is the `torch.autograd.Function` itself, at half the cost per call of an autograd
    formula registered with the operator. Dynamo gets the operator with such a formula, made of the
    Function's `remember` and `backward`: it can't trace a Function whose inputs have symbolic
    shapes and come from another one.
    """
    torch.library.register_autograd(
        f"geco_fast::{operator}",
        function.backward,
        setup_context=function.remember,  # type: ignore[attr-defined]
        lib=LIBRARY,
    )
    overload = getattr(torch.ops.geco_fast, operator).default
    # `Function.apply` prepares for torch.func's transforms, under which no kernel is ever chosen;
    # the method below it goes straight to the graph, in half the time.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        return overload(*arguments) if torch.compiler.is_compiling() else apply(*arguments)

    return call


def wants_graph() -> bool:
    """Whether backward runs under ``create_graph=True``."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def reference_gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``function(*inputs)`` as a graph that can be differentiated again.

    Called from a `torch.autograd.Function`'s backward while grad mode is on, that is, under
    ``create_graph=True``. Inputs that need no gradient get None.
    """
    # Views are differentiated, so that the walk ends here and not at the callers' leaves.
    views = [tensor.view_as(tensor) for tensor in inputs]
    wanted = [view for view in views if view.requires_grad]
    used = [
        (output, grad)
        for output, grad in zip(function(*views), grad_outputs, strict=True)
        if grad is not None
    ]
    if not wanted or not used:
        return (None,) * len(views)
    grads = iter(
        torch.autograd.grad(
            [output for output, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(grads) if view.requires_grad else None for view in views)
