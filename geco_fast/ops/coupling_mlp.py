"""Conditioner of a coupling layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geco_fast import reference
from geco_fast._autograd import below_autograd, direct_apply, reference_gradients, wants_graph
from geco_fast._backend import select
from geco_fast._checks import check_alike, check_choice, check_floating, check_rank, check_shape
from geco_fast._registry import LIBRARY
from geco_fast.ops._operands import autocast_to_lower
from geco_fast.reference.coupling_mlp import ACTIVATIONS


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, projection, weights, biases, ctx.activation = inputs
    ctx.save_for_backward(output[1], x, projection, *weights, *biases)


def _over(run: Any, run_with_hidden: Any, differentiate: Any) -> Callable[..., Tensor]:
    """Return what calls a backend's operators, with gradients."""

    def gradients(ctx: Any, needed: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
        """Gradients to x, context_projection, all weights and all biases, as far as needed."""
        hidden, x, projection, *parameters = ctx.saved_tensors
        count = len(parameters) // 2
        if wants_graph():
            given = [tensor for tensor in (x, projection, *parameters) if tensor is not None]

            def define(x: Tensor, *rest: Tensor) -> tuple[Tensor]:
                weights, biases = rest[-2 * count : -count], rest[-count:]
                present = [bias if bias.numel() else None for bias in biases]
                first = rest[0] if projection is not None else None
                activation = ctx.activation
                return (reference.coupling_mlp(x, first, weights, present, activation=activation),)

            found = list(reference_gradients(define, given, (grad,)))
            return found if projection is not None else [found[0], None, *found[1:]]
        made = differentiate(x, parameters[:count], ctx.activation, hidden, grad, list(needed))
        return [each if need else None for each, need in zip(made, needed, strict=True)]

    class _CouplingMLP(torch.autograd.Function):
        """Saves the operands and one value for each hidden unit and row.

        A Function sees no tensor in a list: it takes the activation, x, context_projection, then
        weights and biases one by one.
        """

        @staticmethod
        def forward(
            ctx: Any, activation: str, x: Tensor, projection: Tensor | None, *parameters: Tensor
        ) -> Tensor:
            count = len(parameters) // 2
            inputs = (x, projection, list(parameters[:count]), list(parameters[count:]), activation)
            with below_autograd():
                output = run_with_hidden(*inputs)
            _remember(ctx, inputs, output)
            return output[0]  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return None, *gradients(ctx, ctx.needs_input_grad[1:], grad)

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _remember(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def through_lists(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
        x, projection, weights, biases, _ = ctx.needs_input_grad
        found = gradients(ctx, (x, projection, *weights, *biases), grad)
        count = len(weights)
        return *found[:2], found[2 : 2 + count], found[2 + count :], None

    # Dynamo gets the operator with a formula of the same parts, as in `differentiable`.
    torch.library.register_autograd(
        run_with_hidden._name, through_lists, setup_context=set_up, lib=LIBRARY
    )
    with_gradients = direct_apply(_CouplingMLP)

    def call(
        x: Tensor,
        projection: Tensor | None,
        weights: list[Tensor],
        biases: list[Tensor],
        activation: str,
    ) -> Tensor:
        """Call the operator, and keep the hidden layers where a gradient will need them."""
        inputs = (x, projection, weights, biases, activation)
        operands = (x, projection, *weights, *biases)
        needs = (t is not None and t.requires_grad for t in operands)
        wanted = torch.is_grad_enabled() and any(needs)
        if torch.compiler.is_compiling():
            return run_with_hidden(*inputs)[0] if wanted else run(*inputs)  # type: ignore[no-any-return]
        if wanted:
            return with_gradients(activation, *operands)  # type: ignore[no-any-return]
        with below_autograd():
            return run(*inputs)  # type: ignore[no-any-return]

    return call


_operators = (
    torch.ops.geco_fast.coupling_mlp,
    torch.ops.geco_fast.coupling_mlp_with_hidden,
    torch.ops.geco_fast.coupling_mlp_backward,
)
_library = _over(*(operator.default for operator in _operators))
_coupling_mlp = {
    "cpu": _library,
    "cuda": _library,
    "triton": _over(*(operator.triton for operator in _operators)),
}


def coupling_mlp(
    x: Tensor,
    context_projection: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """Apply a chain of linear layers with activations between them.

    Parameters
    ----------
    x : Tensor
        Input ``[B, H0]``; float32, float64, bfloat16 or float16, any strides. The CPU's kernel
        takes float32 and float64.
    context_projection : Tensor or None
        ``[B, H1]``, added to the first layer's output before its activation: the context's part
        of that layer, computed once for all layers and samples that share the context.
    weights : sequence of Tensor
        One or more, ``[H1, H0]``, ``[H2, H1]``, ... as `torch.nn.Linear` keeps them.
    biases : sequence of Tensor or None
        As many, ``[H1]``, ``[H2]``, ...; None for a layer without.
    activation : {"relu", "leaky_relu", "tanh", "elu", "silu"}
        Applied between layers, never after the last; `leaky_relu` has PyTorch's slope 0.01.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call; "auto" never takes "triton".

    Returns
    -------
    Tensor
        ``[B, out]`` in the dtype of the operands (under autocast, autocast's, as in
        `torch.nn.functional.linear`).

    Raises
    ------
    ValueError
        If a rank, a shape, a device, the number of biases or `activation` is wrong.
    TypeError
        If a dtype is not supported or the dtypes differ.
    BackendUnavailable
        If an explicitly chosen backend can't serve the call.

    Notes
    -----
    The fully connected conditional network of Rezende and Viola, "Taming VAEs" (2018), in a
    coupling layer of Dinh et al., "Density estimation using Real NVP" (2017).

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> weights, biases = [torch.randn(8, 4), torch.randn(6, 8)], [torch.zeros(8), None]
    >>> gf.ops.coupling_mlp(torch.randn(2, 4), None, weights, biases).shape
    torch.Size([2, 6])
    """
    check_choice("activation", activation, ACTIVATIONS)
    if not weights or len(biases) != len(weights):
        raise ValueError(
            "weights and biases must be as many, one or more, "
            f"got {len(weights)} weights and {len(biases)} biases"
        )
    check_floating("x", x)
    check_rank("x", x, (2,), "[B, H0]")
    operands: dict[str, Tensor] = {"x": x}
    width = x.shape[1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = f"weights[{layer}]"
        check_floating(name, weight)
        check_rank(name, weight, (2,), f"[H{layer + 1}, H{layer}]")
        check_shape(name, weight, (weight.shape[0], width), "the width of the layer before")
        width = weight.shape[0]
        operands[name] = weight
        if bias is not None:
            check_floating(f"biases[{layer}]", bias)
            check_shape(f"biases[{layer}]", bias, (width,), f"the rows of {name}")
            operands[f"biases[{layer}]"] = bias
    if context_projection is not None:
        check_floating("context_projection", context_projection)
        shape = (x.shape[0], weights[0].shape[0])
        check_shape("context_projection", context_projection, shape, "[B, H1]")
        operands["context_projection"] = context_projection
    cast = dict(zip(operands, autocast_to_lower(*operands.values()), strict=True))
    for name, tensor in cast.items():
        check_alike(name, tensor, "x", cast["x"])
    x, context_projection = cast["x"], cast.get("context_projection")
    weights = [cast[f"weights[{layer}]"] for layer in range(len(weights))]
    biases = [cast.get(f"biases[{layer}]") for layer in range(len(weights))]
    chosen = select("coupling_mlp", x, backend)
    if chosen in ("reference", "cuda"):
        # Products of cuBLAS.
        return reference.coupling_mlp(x, context_projection, weights, biases, activation=activation)
    # An empty tensor stands for no bias.
    given = [x.new_empty(0) if bias is None else bias for bias in biases]
    return _coupling_mlp[chosen](x, context_projection, weights, given, activation)
