"""How an operator meets autograd: eagerly, under torch.compile, and for gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from geco_fast._registry import LIBRARY, launcher

# Without it a call of an operator takes the longer way through its autograd formula.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
_PLAIN = (Tensor, torch.nn.Parameter)


def operators(name: str) -> dict[str, Any]:
    """An operator's overload for each backend that has kernels of it."""
    packet = getattr(torch.ops.geco_fast, name)
    found = {"cpu": packet.default, "cuda": packet.default}
    if "triton" in packet.overloads():
        found["triton"] = packet.triton
    return found


def direct(overload: Any) -> Callable[..., Any]:
    """Return what calls an overload: of Triton's, its launcher, where nobody watches dispatch.

    The way through the dispatcher and back to Python takes longer than some kernels.
    """
    operator, _, kind = overload._name.removeprefix("geco_fast::").partition(".")
    modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    if kind != "triton" or modes is None:
        return overload  # type: ignore[no-any-return]
    launch = launcher(operator)

    def call(*arguments: Any) -> Any:
        plain = not modes() and all(
            type(argument) in _PLAIN or not isinstance(argument, Tensor) for argument in arguments
        )
        return launch(*arguments) if plain else overload(*arguments)

    return call


def differentiable(
    operator: str, make: Callable[..., type[torch.autograd.Function]], *others: str
) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Return, for each backend, what calls its operator with gradients.

    ``make`` is given a backend's overloads of `operator` and of the `others`, and returns the
    `torch.autograd.Function` over them. Eagerly a call is that Function itself, at half the cost
    per call of an autograd formula registered with the operator, and where no input requires grad
    the operator alone, at half the cost of the Function. Dynamo gets the operator with such a
    formula, made of the Function's `remember` and `backward`: it can't trace a Function whose
    inputs have symbolic shapes and come from another one.
    """
    calls: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}
    families = [operators(name) for name in (operator, *others)]
    for overload, *rest in zip(*(family.values() for family in families), strict=True):
        if overload not in calls:
            function = make(*map(direct, (overload, *rest)))
            calls[overload] = _differentiable(overload, function)
    return {backend: calls[overload] for backend, overload in families[0].items()}


def _differentiable(
    overload: Any, function: type[torch.autograd.Function]
) -> Callable[..., tuple[Tensor, ...]]:
    torch.library.register_autograd(
        overload._name,
        function.backward,
        setup_context=function.remember,  # type: ignore[attr-defined]
        lib=LIBRARY,
    )
    apply, run = direct_apply(function), direct(overload)
    kinds = [str(argument.type) for argument in overload._schema.arguments]
    positions = [k for k, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return overload(*arguments)
        if torch.is_grad_enabled():
            for position in positions:
                tensor = arguments[position]
                if tensor is not None and tensor.requires_grad:
                    return apply(*arguments)
        with below_autograd():
            return run(*arguments)

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
