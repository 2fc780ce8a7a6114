"""One step of a convolutional LSTM, and the convolution in it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geco_fast import reference
from geco_fast._autograd import (
    below_autograd,
    differentiable,
    direct_apply,
    reference_gradients,
    wants_graph,
)
from geco_fast._backend import BackendUnavailable, select
from geco_fast._checks import (
    alike,
    check_alike,
    check_choice,
    check_floating,
    check_number,
    check_rank,
    check_shape,
)
from geco_fast._registry import LIBRARY, winograd_form
from geco_fast.ops._operands import autocast_enabled, autocast_to_lower, per_dimension
from geco_fast.ops.lstm_gates import lstm_gates
from geco_fast.reference.conv_lstm import conv_lstm_gates

ALGORITHMS = ("auto", "direct", "winograd")
# Relative error, in the Frobenius norm, that results and gradients in Winograd's domain may have.
WINOGRAD_BOUND = 2e-5

_X, _H, _WEIGHT, _BIAS = 1, 2, 4, 8
_weight = torch.ops.geco_fast.winograd_weight.default
_weight_backward = torch.ops.geco_fast.winograd_weight_backward.default
_step = torch.ops.geco_fast.winograd_step.default
_backward = torch.ops.geco_fast.winograd_backward.default
_gates_backward = torch.ops.geco_fast.lstm_gates_backward.default
_whole_step = torch.ops.geco_fast.conv_lstm_step.triton
_whole_step_with_gates = torch.ops.geco_fast.conv_lstm_step_with_gates.triton
_whole_step_backward = torch.ops.geco_fast.conv_lstm_step_backward.triton
_whole_gates_backward = torch.ops.geco_fast.lstm_gates_backward.triton


class _Shared:
    """What the uses of one transformed weight share in a backward pass.

    The weight's other form, for the gradients to the inputs, is made by the first that needs it.
    The first to have a gradient to the transformed weight gives it to autograd, and the others add
    to it where it is: autograd reads it when all are done.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        # One attribute: another thread's backward pass may come between.
        self._state: tuple[int, Tensor | None, Tensor | None] = (-1, None, None)

    def get(self) -> tuple[Tensor | None, Tensor | None]:
        """The other form and the gradient so far, unless they are of another backward pass."""
        task, transposed, total = self._state
        return (transposed, total) if task == torch._C._current_graph_task_id() else (None, None)

    def put(self, transposed: Tensor | None, total: Tensor | None) -> None:
        self._state = (torch._C._current_graph_task_id(), transposed, total)


class PreparedWeight(NamedTuple):
    """A convolution weight made ready for many steps at one image size; see `prepare_weight`.

    Attributes
    ----------
    weight : Tensor
        ``[4C, Cx + C, kh, kw]``.
    spatial : tuple of int
        ``(H, W)`` of the images it is meant for.
    transformed : Tensor or None
        The weight in Winograd's domain; None where the direct convolution will be used.
    shared : object
        What the steps share in their backward pass.
    """

    weight: Tensor
    spatial: tuple[int, int]
    transformed: Tensor | None = None
    shared: _Shared | None = None


class _Transform(torch.autograd.Function):
    """The weight in Winograd's domain, where the gradients of all its uses are gathered."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, *inputs: Any) -> Tensor:
        ctx.shared = shared
        _Transform.remember(ctx, inputs)
        with below_autograd():
            return _weight(*inputs)  # type: ignore[no-any-return]

    @staticmethod
    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
        weight, *ctx.form, _ = inputs
        # Saved so that autograd sees if the weight was changed meanwhile.
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.shared.forget()
        return None, *_Transform.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        found = None if grad is None else _weight_backward(grad, *weight.shape[:3], *ctx.form)
        return found, *(None,) * 5


def _weight_and_input_gradients(
    blocks: int,
    grad: Tensor,
    sources: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    needed: dict[str, bool],
    shared: _Shared | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients to both sources, the weight, its transform and the bias.

    Those to the weight flow through its transform, where it has a graph.
    """
    x, h = sources
    form = (0 if x is None else x.shape[1], blocks, *grad.shape[2:])
    alone = needed["weight"] and not needed["transformed"]
    wanted = (
        needed["x"] * _X
        | needed["h"] * _H
        | (needed["transformed"] or alone) * _WEIGHT
        | needed["bias"] * _BIAS
    )
    transposed, total = (None, None) if shared is None else shared.get()
    if transposed is None:
        wants_input = needed["x"] or needed["h"]
        transposed = _weight(weight, *form, True) if wants_input else weight.new_empty(0)
    grad_x, grad_h, grad_transformed, grad_bias = _backward(
        grad, x, h, weight, transposed, blocks, wanted, total
    )
    if shared is not None:
        gathers = needed["transformed"] and total is None
        shared.put(
            transposed if transposed.numel() else None, grad_transformed if gathers else total
        )
    return (
        grad_x if needed["x"] else None,
        grad_h if needed["h"] else None,
        _weight_backward(grad_transformed, *weight.shape[:3], *form) if alone else None,
        grad_transformed if needed["transformed"] and total is None else None,
        grad_bias if needed["bias"] else None,
    )


class _Conv2d(torch.autograd.Function):
    """Saves its input and the weight, and makes their transforms again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _Conv2d.remember(ctx, inputs)
        with below_autograd():
            return torch.ops.geco_fast.winograd_conv2d.default(*inputs)

    @staticmethod
    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
        x, weight, _, bias = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if wants_graph():
            given = [tensor for tensor in (x, weight, bias) if tensor is not None]
            found = reference_gradients(lambda *of: (reference.conv2d(*of),), given, (grad,))
            return *found[:2], None, found[2] if bias is not None else None
        names = ("x", "weight", "transformed", "bias")
        needed = dict(zip(names, ctx.needs_input_grad, strict=True)) | {"h": False}
        grad_x, _, *rest = _weight_and_input_gradients(1, grad, (x, None), weight, needed)
        return grad_x, *rest


def _gradients_with_a_graph(
    given: dict[str, Tensor | None], forget_bias: float, grads: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """Gradients of a step to the tensors given, for gradients of gradients."""
    present = {name: tensor for name, tensor in given.items() if tensor is not None}

    def define(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named: dict[str, Any] = {"x": None, **dict(zip(present, tensors, strict=True))}
        return reference.conv_lstm_step(**named, forget_bias=forget_bias)

    gradients = reference_gradients(define, list(present.values()), grads)
    return dict(zip(present, gradients, strict=True))


class _Step(torch.autograd.Function):
    """Saves its inputs and the pre-activations; the inputs' transforms are made again."""

    names = (
        *("x", "h", "c", "weight", "transformed", "bias", "x_projection"),
        *("forget_bias", "keep"),
    )

    @staticmethod
    def forward(ctx: Any, shared: _Shared, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.shared = shared
        with below_autograd():
            output = _step(*inputs)
        _Step.remember(ctx, inputs, output)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, h, c, weight, _, bias, x_projection, ctx.forget_bias, _ = inputs
        ctx.save_for_backward(x, h, c, weight, bias, x_projection, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_Step.gradients(ctx, ctx.needs_input_grad[1:], ctx.shared, grads)

    @staticmethod
    def through_operator(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Step.gradients(ctx, ctx.needs_input_grad, None, grads)

    @staticmethod
    def gradients(
        ctx: Any,
        needed: Sequence[bool],
        shared: _Shared | None,
        grads: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        x, h, c, weight, bias, x_projection, gates = ctx.saved_tensors
        grad_h, grad_c, _ = grads
        found: dict[str, Tensor | None] = dict.fromkeys(_Step.names)
        if grad_h is None and grad_c is None:
            return tuple(found.values())
        if wants_graph():
            given = {
                "x": x,
                "h": h,
                "c": c,
                "weight": weight,
                "bias": bias,
                "x_projection": x_projection,
            }
            found |= _gradients_with_a_graph(given, ctx.forget_bias, (grad_h, grad_c))
            return tuple(found.values())
        wanted = dict(zip(_Step.names, needed, strict=True))
        grad_gates, found["c"] = _gates_backward(gates, c, ctx.forget_bias, grad_h, grad_c)
        if x_projection is not None:
            found["x_projection"] = grad_gates
        names = ("x", "h", "weight", "transformed", "bias")
        if any(wanted[name] for name in names):
            gradients = _weight_and_input_gradients(4, grad_gates, (x, h), weight, wanted, shared)
            found |= zip(names, gradients, strict=True)
        return tuple(found.values())


class _WholeStep(torch.autograd.Function):
    """A step as one kernel; saves its inputs and the pre-activations."""

    names = ("x", "h", "c", "weight", "bias", "x_projection", "forget_bias")

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            output = _whole_step_with_gates(*inputs)
        _WholeStep.remember(ctx, inputs, output)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.forget_bias = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, gates = ctx.saved_tensors
        found: dict[str, Tensor | None] = dict.fromkeys(_WholeStep.names)
        grad_h, grad_c, _ = grads
        if grad_h is None and grad_c is None:
            return tuple(found.values())
        given = dict(zip(_WholeStep.names, tensors, strict=False))
        if wants_graph():
            found |= _gradients_with_a_graph(given, ctx.forget_bias, (grad_h, grad_c))
            return tuple(found.values())
        x, h, c, weight, *_ = tensors
        needed = dict(zip(_WholeStep.names, ctx.needs_input_grad, strict=True))
        grad_gates, found["c"] = _whole_gates_backward(gates, c, ctx.forget_bias, grad_h, grad_c)
        if needed["x_projection"]:
            found["x_projection"] = grad_gates
        bits = {"x": _X, "h": _H, "weight": _WEIGHT, "bias": _BIAS}
        wanted = sum(bit for name, bit in bits.items() if needed[name])
        if wanted:
            gradients = _whole_step_backward(grad_gates, x, h, weight, wanted)
            found |= (
                (name, gradient)
                for name, gradient in zip(bits, gradients, strict=True)
                if needed[name]
            )
        return tuple(found.values())


_conv2d = differentiable("winograd_conv2d", lambda _: _Conv2d)["cpu"]
_transform_with_gradients = direct_apply(_Transform)
_step_with_gradients = direct_apply(_Step)
_whole_step_with_gradients = direct_apply(_WholeStep)
# Dynamo gets the operators with formulas of the same parts, as in `differentiable`.
torch.library.register_autograd(
    "geco_fast::winograd_weight",
    _Transform.gradients,
    setup_context=_Transform.remember,
    lib=LIBRARY,
)
torch.library.register_autograd(
    "geco_fast::winograd_step",
    _Step.through_operator,
    setup_context=_Step.remember,
    lib=LIBRARY,
)
torch.library.register_autograd(
    _whole_step_with_gates._name,
    _WholeStep.backward,
    setup_context=_WholeStep.remember,
    lib=LIBRARY,
)


def _why_not(dtype: torch.dtype, shape: tuple[int, ...], spatial: tuple[int, ...]) -> str:
    """Why Winograd's domain can't serve a convolution; empty if it can."""
    kernel = tuple(shape[2:])
    if dtype != torch.float32:
        return f"it serves float32, got {dtype}"
    if kernel not in ((3, 3), (5, 5), (7, 7)):
        return f"it serves kernels of 3x3, 5x5 and 7x7, got {kernel[0]}x{kernel[1]}"
    if 0 in shape or 0 in spatial:
        return "it serves images and weights that aren't empty"
    return ""


def _pays(
    chosen: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    spatial: tuple[int, int],
    batch: int,
    uses: int,
) -> bool:
    """Whether Winograd's domain is there and is faster, for so many uses of a weight of this shape.

    Both ways are estimated in products of the direct convolution; docs/ops/conv_lstm.md tells where
    the factors come from.
    """
    if chosen != "cpu" or _why_not(dtype, shape, spatial):
        return False
    outputs, inputs, kernel, _ = shape
    wide_inputs, wide_outputs = -(-inputs // 16) * 16, -(-outputs // 16) * 16
    pixels = batch * spatial[0] * spatial[1]
    if inputs < 8 or (inputs < 12 and pixels * wide_outputs > 100_000):
        return False
    # Few outputs leave transforms of 7x7, or of many inputs, without the products that repay them.
    if (kernel == 7 and (outputs <= 16 or inputs < 16)) or inputs > 16 * outputs:
        return False
    tiles, points = winograd_form(kernel, *spatial)
    tiles *= batch
    direct = pixels * (kernel**2 * inputs * wide_outputs + 40 * (inputs + outputs))
    products = 1.25 * tiles * points * wide_inputs * wide_outputs
    values = 6 * tiles * points * (wide_inputs + wide_outputs)
    weights = 20 * points * wide_inputs * max(32, wide_outputs) / uses
    return direct > 1.2 * (products + values + weights)


_pays_once = functools.lru_cache(_pays)


def _choose(
    operator: str,
    chosen: str,
    algorithm: str,
    weight: Tensor,
    spatial: tuple[int, int],
    batch: int | None = None,
) -> bool:
    """Whether a call that a backend serves goes through Winograd's domain."""
    if algorithm == "auto":
        # Without a batch, a weight is made ready for some eight steps of some eight images.
        uses = 8 if batch is None else 1
        if torch.compiler.is_compiling():
            # No compiled code is bound to a batch.
            return _pays(chosen, weight.dtype, weight.shape, spatial, 8, uses)
        batch = 8 if batch is None else batch
        return _pays_once(chosen, weight.dtype, weight.shape, spatial, batch, uses)
    if algorithm == "direct":
        return False
    reason = _why_not(weight.dtype, weight.shape, spatial)
    if chosen != "cpu":
        reason = f"it has a kernel for the CPU alone, and {chosen!r} serves the call"
    if reason:
        raise BackendUnavailable(
            f"{operator}: algorithm 'winograd' is unavailable: {reason}; use algorithm='auto'"
        )
    return True


@functools.cache
def _warn_of_memory() -> None:
    warnings.warn(
        "there is not enough memory for Winograd's domain; the direct convolution is used instead",
        RuntimeWarning,
        stacklevel=4,
    )


def _if_memory_allows(attempt: Callable[[], Any]) -> Any:
    """What `attempt` returns, or None after a warning where memory for it can't be had."""
    if torch.compiler.is_compiling():
        return attempt()
    try:
        return attempt()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        _warn_of_memory()
        return None


def _transformed(
    weight: Tensor, split: int, blocks: int, spatial: tuple[int, int], shared: _Shared | None = None
) -> Tensor | None:
    """A weight in Winograd's domain, or None where memory for it can't be had."""
    inputs = (weight, split, blocks, *spatial, False)
    if torch.compiler.is_compiling():
        return _weight(*inputs)  # type: ignore[no-any-return]
    if not (torch.is_grad_enabled() and weight.requires_grad):
        with below_autograd():
            return _if_memory_allows(lambda: _weight(*inputs))  # type: ignore[no-any-return]
    return _if_memory_allows(  # type: ignore[no-any-return]
        lambda: _transform_with_gradients(shared or _Shared(), *inputs)
    )


def _check_weight(weight: Tensor) -> None:
    check_floating("weight", weight)
    check_rank("weight", weight, (4,), "[out_channels, in_channels, kh, kw]")
    kernel = tuple(weight.shape[2:])
    if not (kernel[0] % 2 and kernel[1] % 2):
        raise ValueError(f"weight must have an odd kernel, got {kernel[0]}x{kernel[1]}")


def _in_order(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a convolution's operands need no more checks and no cast.

    The good case, told in a fraction of the time that it takes to name what is wrong.
    """
    if not (alike(x, weight) if bias is None else alike(x, weight, bias)):
        return False
    shape, given = weight.shape, x.shape
    return (
        len(shape) == len(given) == 4
        and given[1] == shape[1]
        and shape[2] % 2 == shape[3] % 2 == 1
        and (bias is None or bias.shape == shape[:1])
        and not autocast_enabled("cpu" if x.is_cpu else x.device.type)
    )


def _alike(operands: dict[str, Tensor | None], first: str) -> dict[str, Any]:
    """Apply autocast to the operands that are there; check that dtype and device agree."""
    present = {name: tensor for name, tensor in operands.items() if tensor is not None}
    cast = dict(zip(present, autocast_to_lower(*present.values()), strict=True))
    for name, tensor in cast.items():
        check_alike(name, tensor, first, cast[first])
    return {name: cast.get(name) for name in operands}


def prepare_weight(
    weight: Tensor,
    spatial: tuple[int, int],
    *,
    algorithm: str = "auto",
    backend: str = "auto",
) -> PreparedWeight:
    """Transform a weight once for all steps of a forward pass.

    What `conv_lstm_step` would do to its weight at every step is done here once; the gradient is
    accumulated over the steps and brought back to `weight` once. The weight must not be changed
    before the steps' backward pass: autograd raises its usual error if it was.

    Parameters
    ----------
    weight : Tensor
        ``[4C, Cx + C, kh, kw]``, odd kernels.
    spatial : tuple of int
        ``(H, W)`` of the images that the steps will see.
    algorithm : {"auto", "direct", "winograd"}
        As of `conv_lstm_step`.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    PreparedWeight
        Given to `conv_lstm_step` in place of the weight.

    Raises
    ------
    ValueError
        If the weight's rank, its channels, an even kernel, `spatial` or `algorithm` is wrong.
    TypeError
        If the dtype is not supported.
    BackendUnavailable
        If an explicitly chosen backend or algorithm can't serve the call.
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    _check_weight(weight)
    outputs, inputs = weight.shape[:2]
    if outputs % 4 or 4 * inputs < outputs:
        raise ValueError(
            f"weight must be [4C, Cx + C, kh, kw], got {outputs} output and {inputs} input channels"
        )
    height, width = per_dimension("spatial", spatial, 2)
    (weight,) = autocast_to_lower(weight)
    chosen = select("prepare_weight", weight, backend)
    if _choose("prepare_weight", chosen, algorithm, weight, (height, width)):
        shared = None if torch.compiler.is_compiling() else _Shared()
        split = inputs - outputs // 4
        transformed = _transformed(weight, split, 4, (height, width), shared)
        if transformed is not None:
            return PreparedWeight(weight, (height, width), transformed, shared)
    return PreparedWeight(weight, (height, width))


def conv_lstm_step(
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor | PreparedWeight,
    bias: Tensor | None = None,
    *,
    forget_bias: float = 0.0,
    x_projection: Tensor | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Advance a convolutional LSTM by one step.

    .. math:: i, f, g, o = W * [x, h] + b + p, \qquad
        c' = \sigma(f + b_f) \, c + \sigma(i) \tanh(g), \qquad h' = \sigma(o) \tanh(c')

    with a convolution of stride 1 and "same" zero padding, and p = `x_projection`.

    Parameters
    ----------
    x : Tensor or None
        Input ``[B, Cx, H, W]``; None stands for no input channels. float32, float64, bfloat16 or
        float16, any strides.
    h, c : Tensor
        Hidden and cell state ``[B, C, H, W]``.
    weight : Tensor or PreparedWeight
        ``[4C, Cx + C, kh, kw]``: gates in PyTorch's order i, f, g, o; input channels x, then h;
        odd kernels.
    bias : Tensor, optional
        ``[4C]``.
    forget_bias : float
        Added to the forget gate's pre-activation.
    x_projection : Tensor, optional
        ``[B, 4C, H, W]``, added to the pre-activations: the part of time-invariant inputs,
        computed once for all steps.
    algorithm : {"auto", "direct", "winograd"}
        How to convolve: by PyTorch's own convolution, or by fewer products in Winograd's domain,
        where results and gradients have a relative error of 2e-5 at most in the Frobenius norm.
        That serves float32 on the CPU with kernels of 3x3, 5x5 and 7x7, and "auto" takes it where
        it is faster.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call. "triton" is one kernel that convolves directly and
        applies the gates; it has to be asked for. With "auto" the gates may have a kernel where
        the step has none.

    Returns
    -------
    h, c_next : Tensor
        ``[B, C, H, W]`` in the dtype of the operands (under autocast, autocast's).

    Raises
    ------
    ValueError
        If a rank, shape or device is wrong, a kernel is even, a `PreparedWeight` is for another
        image size, or `algorithm` is unknown.
    TypeError
        If a dtype is not supported, the dtypes differ, or `forget_bias` is not a number.
    BackendUnavailable
        If an explicitly chosen backend or algorithm can't serve the call.

    Notes
    -----
    Shi et al., "Convolutional LSTM network" (2015), eq. 3 without peepholes; Lavin and Gray, "Fast
    algorithms for convolutional neural networks" (2016) for Winograd's minimal filtering. Where
    memory for the transforms can't be had, the direct convolution is used, with a warning.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> h = c = torch.zeros(2, 8, 6, 6)
    >>> h, c = gf.ops.conv_lstm_step(torch.randn(2, 3, 6, 6), h, c, torch.randn(32, 11, 5, 5))
    >>> h.shape
    torch.Size([2, 8, 6, 6])
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_number("forget_bias", forget_bias)
    check_floating("h", h)
    check_rank("h", h, (4,), "[B, C, H, W]")
    batch, hidden, *spatial = h.shape
    check_floating("c", c)
    check_shape("c", c, h.shape, "that of h")
    transformed = shared = None
    if isinstance(weight, PreparedWeight):
        if weight.spatial != tuple(spatial):
            raise ValueError(
                f"weight must be prepared for the spatial shape {spatial} of h, "
                f"got one for {list(weight.spatial)}"
            )
        transformed, shared = weight.transformed, weight.shared
        if transformed is None and algorithm == "auto":
            algorithm = "direct"
        weight = weight.weight
    _check_weight(weight)
    inputs = 0
    if x is not None:
        check_floating("x", x)
        check_rank("x", x, (4,), "[B, Cx, H, W]")
        inputs = x.shape[1]
        check_shape("x", x, (batch, inputs, *spatial), "batch and spatial shape of h")
    shape = (4 * hidden, inputs + hidden, *weight.shape[2:])
    check_shape("weight", weight, shape, "[4C, Cx + C, kh, kw] of x and h")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (4 * hidden,), "four times the channels of h")
    if x_projection is not None:
        check_floating("x_projection", x_projection)
        shape = (batch, 4 * hidden, *spatial)
        check_shape("x_projection", x_projection, shape, "four times the channels of h")
    operands = _alike(
        {"x": x, "h": h, "weight": weight, "bias": bias, "x_projection": x_projection, "c": c}, "h"
    )
    chosen = select("conv_lstm_step", operands["h"], backend)
    size = (spatial[0], spatial[1])
    if transformed is not None and algorithm == "auto":
        winograd = chosen == "cpu" and operands["weight"].dtype == torch.float32
    else:
        winograd = _choose("conv_lstm_step", chosen, algorithm, operands["weight"], size, batch)
    if winograd:
        if transformed is None:
            transformed = _transformed(operands["weight"], inputs, 4, size)
        if transformed is not None:
            result = _if_memory_allows(
                lambda: _winograd_step(transformed, shared, forget_bias, **operands)
            )
            if result is not None:
                return result
    if chosen == "triton":
        return _step_in_one(forget_bias, **operands)
    c = operands.pop("c")
    gates = conv_lstm_gates(**operands)
    return lstm_gates(gates, c, forget_bias=forget_bias, backend=backend)


def _winograd_step(
    transformed: Tensor,
    shared: _Shared | None,
    forget_bias: float,
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_projection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    given = (x, h, c, weight, transformed, bias, x_projection)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    inputs = (*given, float(forget_bias), keep)
    if torch.compiler.is_compiling():
        h, c_next, _ = _step(*inputs)
    elif keep:
        h, c_next, _ = _step_with_gradients(shared, *inputs)
    else:
        with below_autograd():
            h, c_next, _ = _step(*inputs)
    return h, c_next


def _step_in_one(
    forget_bias: float,
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_projection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    given = (x, h, c, weight, bias, x_projection)
    inputs = (*given, float(forget_bias))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        compiles = torch.compiler.is_compiling()
        call = _whole_step_with_gates if compiles else _whole_step_with_gradients
        h, c_next, _ = call(*inputs)
    elif torch.compiler.is_compiling():
        h, c_next = _whole_step(*inputs)
    else:
        with below_autograd():
            h, c_next = _whole_step(*inputs)
    return h, c_next


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    algorithm: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Convolve images with stride 1 and "same" zero padding.

    Parameters
    ----------
    x : Tensor
        Images ``[B, Cin, H, W]``; float32, float64, bfloat16 or float16, any strides.
    weight : Tensor
        ``[Cout, Cin, kh, kw]``, odd kernels.
    bias : Tensor, optional
        ``[Cout]``.
    algorithm : {"auto", "direct", "winograd"}
        How to convolve: by PyTorch's own convolution, or by fewer products in Winograd's domain,
        where results and gradients have a relative error of 2e-5 at most in the Frobenius norm.
        That serves float32 on the CPU with kernels of 3x3, 5x5 and 7x7, and "auto" takes it where
        it is faster.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Which implementation serves the call.

    Returns
    -------
    Tensor
        ``[B, Cout, H, W]`` in the dtype of the operands (under autocast, autocast's), laid out as
        `torch.nn.functional.conv2d` would.

    Raises
    ------
    ValueError
        If a rank, shape or device is wrong, a kernel is even, or `algorithm` is unknown.
    TypeError
        If a dtype is not supported or the dtypes differ.
    BackendUnavailable
        If an explicitly chosen backend or algorithm can't serve the call.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> gf.ops.conv2d(torch.randn(2, 3, 7, 9), torch.randn(4, 3, 5, 3)).shape
    torch.Size([2, 4, 7, 9])
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    if not _in_order(x, weight, bias):
        check_floating("x", x)
        check_rank("x", x, (4,), "[B, Cin, H, W]")
        _check_weight(weight)
        shape = (weight.shape[0], x.shape[1], *weight.shape[2:])
        check_shape("weight", weight, shape, "[Cout, Cin, kh, kw] of x")
        if bias is not None:
            check_floating("bias", bias)
            check_shape("bias", bias, weight.shape[:1], "the output channels of weight")
        x, weight, bias = _alike({"x": x, "weight": weight, "bias": bias}, "x").values()
    chosen = select("conv2d", x, backend)
    batch, _, *size = x.shape
    if _choose("conv2d", chosen, algorithm, weight, (size[0], size[1]), batch):
        transformed = _transformed(weight, weight.shape[1], 1, (size[0], size[1]))
        if transformed is not None:
            result = _if_memory_allows(lambda: _conv2d(x, weight, transformed, bias))
            if result is not None:
                return result
    return reference.conv2d(x, weight, bias)
