"""How an operator meets autograd: eagerly, under torch.compile, and for gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from geco_fast._registry import LIBRARY

# Without it a call of an operator takes the longer way through its autograd formula.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def differentiable(
    operator: str, function: type[torch.autograd.Function]
) -> Callable[..., tuple[Tensor, ...]]:
    """Return what calls an operator with gradients.

    Eagerly that is the `torch.autograd.Function` itself, at half the cost per call of an autograd
    formula registered with the operator, and where no input requires grad the operator alone, at
    half the cost of the Function. Dynamo gets the operator with such a formula, made of the
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
    apply = direct_apply(function)
    kinds = [str(argument.type) for argument in overload._schema.arguments]
    positions = [k for k, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
    takes_lists = any(kind.startswith("List[") and "Tensor" in kind for kind in kinds)

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return overload(*arguments)
        if torch.is_grad_enabled():
            if takes_lists:
                return apply(*arguments)
            for position in positions:
                tensor = arguments[position]
                if tensor is not None and tensor.requires_grad:
                    return apply(*arguments)
        with below_autograd():
            return overload(*arguments)

    return call


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return a Function's `apply` without what prepares for torch.func's transforms.

    That is half the time of a call; under transforms no kernel is ever chosen.
    """
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


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
