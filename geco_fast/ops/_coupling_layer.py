"""A whole affine coupling layer: conditioner and map as one operator, where it has a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geco_fast import reference
from geco_fast._autograd import below_autograd, direct_apply, reference_gradients, wants_graph
from geco_fast._backend import select
from geco_fast._checks import alike
from geco_fast.ops._operands import autocast_enabled
from geco_fast.ops.affine_coupling import affine_coupling
from geco_fast.ops.coupling_mlp import coupling_mlp

_forward = torch.ops.geco_fast.coupling_layer.default
_backward = torch.ops.geco_fast.coupling_layer_backward.default


class Coupling(NamedTuple):
    """How a coupling layer is made; `keeps_second` says which part of the features is kept."""

    activation: str
    keeps_second: bool
    inverse: bool
    scale_map: str
    clamp: float


def split(x: Tensor, keeps_second: bool) -> tuple[Tensor, Tensor]:
    """The kept and the changed part of ``[B, features]``."""
    first = x.shape[1] // 2
    parts = x[:, :first], x[:, first:]
    return parts[::-1] if keeps_second else parts


def join(kept: Tensor, changed: Tensor, keeps_second: bool) -> Tensor:
    """The inverse of `split`."""
    return torch.cat((changed, kept) if keeps_second else (kept, changed), dim=1)


def project(context: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """The context's part of the first layer, ``[B, rows of weight]``, by the same kernel."""
    if context is None or weight is None:
        return None
    return coupling_mlp(context, None, [weight], [None])


def _reference(
    coupling: Coupling,
    x: Tensor,
    projection: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    kept, changed = split(x, coupling.keeps_second)
    raw = reference.coupling_mlp(
        kept, projection, weights, biases, activation=coupling.activation
    ).chunk(2, dim=1)
    log_scale, shift = raw
    changed, log_det = reference.affine_coupling(
        changed,
        log_scale,
        shift,
        inverse=coupling.inverse,
        scale_map=coupling.scale_map,
        clamp=coupling.clamp,
    )
    return join(kept, changed, coupling.keeps_second), log_det


class _CouplingLayer(torch.autograd.Function):
    """Saves what `coupling_mlp` does, and its result."""

    @staticmethod
    def forward(
        ctx: Any,
        coupling: Coupling,
        x: Tensor,
        context: Tensor | None,
        context_weight: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        half = len(parameters) // 2
        chain = list(parameters[:half]), list(parameters[half:])
        with below_autograd():
            y, log_det, hidden, raw = _forward(x, context, context_weight, *chain, *coupling, True)
        ctx.coupling = coupling
        ctx.save_for_backward(hidden, raw, x, context, context_weight, *parameters)
        ctx.set_materialize_grads(False)
        return y, log_det

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, raw, x, context, context_weight, *parameters = ctx.saved_tensors
        half = len(parameters) // 2
        if grads[0] is None and grads[1] is None:
            return (None,) * (4 + 2 * half)
        if wants_graph():
            both = [] if context is None else [context, context_weight]

            def define(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
                projection = rest[0] @ rest[1].T if both else None
                return _reference(
                    ctx.coupling, x, projection, rest[-2 * half : -half], rest[-half:]
                )

            found_x, *found = reference_gradients(define, [x, *both, *parameters], grads)
            return None, found_x, *(found if both else [None, None, *found])
        needed = ctx.needs_input_grad[1:]
        made = _backward(
            *(x, context, context_weight, parameters[:half], *ctx.coupling, hidden, raw, *grads),
            list(needed),
        )
        return None, *(each if need else None for each, need in zip(made, needed, strict=True))


_with_gradients = direct_apply(_CouplingLayer)


def coupling_layer(
    x: Tensor,
    context: Tensor | None,
    context_weight: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    coupling: Coupling,
) -> tuple[Tensor, Tensor]:
    """``(y, log_det)`` of a coupling layer over ``x [B, features]``.

    The arguments are those of `coupling_mlp` and `affine_coupling`, and a context ``[B, features]``
    with its weight ``[H1, features]``, whose product is the first layer's `context_projection`.
    These operators serve the call where no kernel does it as one: 16-bit operands, autocast,
    torch.compile, for which they have formulas, and what they refuse.
    """
    operands = [x, *weights, *biases]
    operands += [tensor for tensor in (context, context_weight) if tensor is not None]
    if (
        not torch.compiler.is_compiling()
        and alike(*operands)
        and not autocast_enabled(x.device.type)
        and select("coupling_mlp", x, "auto") == select("affine_coupling", x, "auto") == "cpu"
    ):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
            return _with_gradients(coupling, x, context, context_weight, *weights, *biases)  # type: ignore[no-any-return]
        chain = list(weights), list(biases)
        with below_autograd():
            return _forward(x, context, context_weight, *chain, *coupling, False)[:2]  # type: ignore[no-any-return]
    projection = project(context, context_weight)
    kept, changed = split(x, coupling.keeps_second)
    raw = coupling_mlp(kept, projection, weights, biases, activation=coupling.activation)
    changed, log_det = affine_coupling(
        changed,
        *raw.chunk(2, dim=1),
        inverse=coupling.inverse,
        scale_map=coupling.scale_map,
        clamp=coupling.clamp,
    )
    return join(kept, changed, coupling.keeps_second), log_det
