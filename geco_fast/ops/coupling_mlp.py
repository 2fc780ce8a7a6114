"""Conditioner of a coupling layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from geco_fast import reference
from geco_fast._backend import select
from geco_fast._checks import check_alike, check_choice, check_floating, check_rank, check_shape
from geco_fast.ops._operands import autocast_to_lower
from geco_fast.reference.coupling_mlp import ACTIVATIONS


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
        Input ``[B, H0]``; float32, float64, bfloat16 or float16, any strides.
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
        Which implementation serves the call.

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
    select("coupling_mlp", cast["x"], backend)
    return reference.coupling_mlp(
        cast["x"],
        cast.get("context_projection"),
        [cast[f"weights[{layer}]"] for layer in range(len(weights))],
        [cast.get(f"biases[{layer}]") for layer in range(len(weights))],
        activation=activation,
    )
