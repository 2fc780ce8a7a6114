"""Every operator that has kernels: its schema, its shape function, and the dtypes they take.

Schemas and shape functions are registered with torch here, in Python that needs nothing but torch;
the C++ library adds its kernels for the CPU and CUDA keys (`csrc/register.cpp`). Triton's are the
overload "triton" of the same operators, with launchers of the same names in `kernels`, imported by
their first call. Shape functions run the reference on shape-only tensors, so an output's layout is
PyTorch's own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from geco_fast import reference
from geco_fast._checks import FLOATING
from geco_fast.reference._precision import widen

LIBRARY = torch.library.Library("geco_fast", "DEF")

# Stem -> operators that its Triton module launches.
TRITON: dict[str, tuple[str, ...]] = {
    "coupling_mlp": ("coupling_mlp", "coupling_mlp_with_hidden", "coupling_mlp_backward"),
    "gaussian_latent": ("gaussian_latent", "gaussian_latent_backward"),
    "affine_coupling": ("affine_coupling", "affine_coupling_backward"),
    "conv_lstm": ("conv_lstm_step", "conv_lstm_step_with_gates", "conv_lstm_step_backward"),
    "equilibrium_map": ("equilibrium_map", "equilibrium_map_backward"),
    "geco_update": ("geco_update",),
    "lstm_gates": ("lstm_gates", "lstm_gates_backward"),
    "pncc": (
        *("pncc", "pncc_backward", "pncc_with_gradients"),
        *("lncc", "lncc_backward", "lncc_with_gradients"),
    ),
    "squared_error": ("squared_error", "squared_error_backward"),
}
_STEM_OF = {operator: stem for stem, operators in TRITON.items() for operator in operators}
# Operators that no other backend has.
_TRITONS_OWN = frozenset(TRITON["conv_lstm"])


@functools.cache
def launcher(operator: str) -> Callable[..., Any]:
    """What launches an operator's Triton kernels; its module is imported by the first call."""
    found: Callable[..., Any] | None = None

    def launch(*arguments: Any) -> Any:
        nonlocal found
        if found is None:
            module = importlib.import_module(f"geco_fast.kernels.{_STEM_OF[operator]}")
            found = getattr(module, operator)
        return found(*arguments)

    return launch


def _define(schema: str) -> None:
    operator, arguments = schema.split("(", 1)
    if operator not in _TRITONS_OWN:
        LIBRARY.define(schema)
    if operator in _STEM_OF:
        LIBRARY.define(f"{operator}.triton({arguments}")
        # Triton's interpreter takes tensors on the CPU.
        for key in ("CUDA", "CPU"):
            LIBRARY.impl(f"{operator}.triton", launcher(operator), key)


def _shapes(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the shape function of an operator, whatever its backend."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        overloads = () if operator in _TRITONS_OWN else ("",)
        for overload in (*overloads, ".triton") if operator in _STEM_OF else overloads:
            torch.library.register_fake(f"geco_fast::{operator}{overload}", function, lib=LIBRARY)
        return function

    return register


# Dimensions that a kernel's operands have at most (kMaxDims in csrc).
MAX_RANK = 8

# Operator -> backend -> dtypes its kernels take. Convolutions and products of CUDA are PyTorch's.
KERNELS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "affine_coupling": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
    "conv2d": {"cpu": FLOATING, "cuda": FLOATING},
    "conv_lstm_step": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
    "coupling_mlp": {
        "cpu": (torch.float32, torch.float64),
        "cuda": FLOATING,
        "triton": FLOATING,
    },
    "gaussian_latent": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
    "geco_update": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
    "lncc": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
    "equilibrium_map": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
    "lstm_gates": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
    "pncc": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
    "prepare_weight": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
    "squared_error": {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING},
}

_define(
    "affine_coupling(Tensor x, Tensor log_scale, Tensor shift, bool inverse, str scale_map, "
    "float clamp) -> (Tensor, Tensor)"
)
_define(
    "affine_coupling_backward(Tensor x, Tensor log_scale, Tensor? shift, bool inverse, "
    "str scale_map, float clamp, Tensor? grad_y, Tensor? grad_log_det, bool needs_x, "
    "bool needs_log_scale, bool needs_shift) -> (Tensor, Tensor, Tensor)"
)
# A list can't hold None: a bias without elements stands for none.
_define(
    "coupling_mlp(Tensor x, Tensor? context_projection, Tensor[] weights, Tensor[] biases, "
    "str activation) -> Tensor"
)
# The same, and what backward takes of the hidden layers.
_define(
    "coupling_mlp_with_hidden(Tensor x, Tensor? context_projection, Tensor[] weights, "
    "Tensor[] biases, str activation) -> (Tensor, Tensor)"
)
# Gradients to x, context_projection, all weights, all biases.
_define(
    "coupling_mlp_backward(Tensor x, Tensor[] weights, str activation, Tensor hidden, Tensor grad, "
    "bool[] wanted) -> Tensor[]"
)
# A coupling layer: y, log_det and, if they are to be kept, what backward takes of the hidden
# layers, and log_scale with shift.
_define(
    "coupling_layer(Tensor x, Tensor? context, Tensor? context_weight, Tensor[] weights, "
    "Tensor[] biases, str activation, bool keeps_second, bool inverse, str scale_map, float clamp, "
    "bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
# Gradients to x, context, its weight, all weights, all biases.
_define(
    "coupling_layer_backward(Tensor x, Tensor? context, Tensor? context_weight, Tensor[] weights, "
    "str activation, bool keeps_second, bool inverse, str scale_map, float clamp, Tensor hidden, "
    "Tensor raw, Tensor? grad_y, Tensor? grad_log_det, bool[] wanted) -> Tensor[]"
)
_define(
    "equilibrium_map(Tensor x, Tensor psi, Tensor beta, Tensor? log_prior) "
    "-> (Tensor, Tensor, Tensor)"
)
_define(
    "equilibrium_map_backward(Tensor x, Tensor psi, Tensor beta, Tensor? log_prior, Tensor mapped, "
    "Tensor log_normaliser, Tensor log_mass, Tensor? grad_mapped, Tensor? grad_log_normaliser, "
    "int wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
_define(
    "gaussian_latent(Tensor q_mean, Tensor q_log_std, Tensor p_mean, Tensor p_log_std, "
    "Tensor noise) -> (Tensor, Tensor)"
)
_define(
    "gaussian_latent_backward(Tensor q_mean, Tensor q_log_std, Tensor p_mean, Tensor p_log_std, "
    "Tensor noise, Tensor? grad_z, Tensor? grad_kl, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_define(
    "geco_update(Tensor c_hat, Tensor(a!) ema, Tensor(b!) log_lambda, Tensor(c!) step, "
    "float alpha, float step_size, float lambda_min, float lambda_max, float[2]? max_log_step, "
    "int warmup_steps, int update_every, float? speedup, str parametrization, bool update) "
    "-> (Tensor, Tensor)"
)
_define("lstm_gates(Tensor gates, Tensor c, float forget_bias) -> (Tensor, Tensor)")
_define(
    "lstm_gates_backward(Tensor gates, Tensor c, float forget_bias, Tensor? grad_h, "
    "Tensor? grad_c_next) -> (Tensor, Tensor)"
)
_define("squared_error(Tensor x, Tensor y, str reduction) -> Tensor")
_define(
    "squared_error_backward(Tensor x, Tensor y, str reduction, Tensor grad, bool needs_x, "
    "bool needs_y) -> (Tensor, Tensor)"
)


def _row_sums(like: Tensor) -> Tensor:
    """Sums ``[B]`` over all but the batch, in the dtype of the arithmetic."""
    return like.new_empty(like.shape[:1], dtype=torch.promote_types(like.dtype, torch.float32))


def _gradient(like: Tensor, needed: bool) -> Tensor:
    """Gradient to `like`; empty where none is wanted."""
    return torch.empty_like(like) if needed else like.new_empty(0, dtype=torch.float32)


@_shapes("affine_coupling")
def _(
    x: Tensor, log_scale: Tensor, shift: Tensor, inverse: bool, scale_map: str, clamp: float
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    x, log_scale, shift = widen(x, log_scale, shift)
    # PyTorch's logsigmoid is contiguous whatever its input.
    scale = torch.exp(log_scale.contiguous() if scale_map == "sigmoid" else log_scale)
    return ((x - shift) * scale if inverse else x * scale + shift).to(dtype), _row_sums(x)


@_shapes("affine_coupling_backward")
def _(
    x: Tensor,
    log_scale: Tensor,
    shift: Tensor | None,
    inverse: bool,
    scale_map: str,
    clamp: float,
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    needs_x: bool,
    needs_log_scale: bool,
    needs_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _gradient(x, needs_x),
        _gradient(log_scale, needs_log_scale),
        _gradient(x if shift is None else shift, needs_shift and inverse),
    )


@_shapes("coupling_mlp")
def _coupling_mlp(
    x: Tensor,
    context_projection: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
) -> Tensor:
    none = [None] * len(weights)
    return reference.coupling_mlp(x, context_projection, weights, none, activation=activation)


@_shapes("coupling_mlp_with_hidden")
def _(
    x: Tensor,
    context_projection: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor]:
    result = _coupling_mlp(x, context_projection, weights, biases, activation)
    return result, _hidden(x, weights)


def _hidden(x: Tensor, weights: list[Tensor]) -> Tensor:
    # Panels of 32 columns.
    width = sum((weight.shape[0] + 31) // 32 * 32 for weight in weights[:-1])
    return x.new_empty(x.shape[0] * width)


@_shapes("coupling_layer")
def _(
    x: Tensor,
    context: Tensor | None,
    context_weight: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    keeps_second: bool,
    inverse: bool,
    scale_map: str,
    clamp: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, log_det = x.new_empty(x.shape), x.new_empty(x.shape[0])
    if not keep:
        return y, log_det, x.new_empty(0), x.new_empty(0)
    return y, log_det, _hidden(x, weights), x.new_empty(x.shape[0], weights[-1].shape[0])


@_shapes("coupling_layer_backward")
def _(
    x: Tensor,
    context: Tensor | None,
    context_weight: Tensor | None,
    weights: list[Tensor],
    *options: Any,
) -> list[Tensor]:
    biases = [weight.new_empty(weight.shape[0]) for weight in weights]
    inputs = (x.new_empty(x.shape), context, context_weight, *weights, *biases)
    return [
        x.new_empty(0) if like is None else _gradient(like, needed)
        for like, needed in zip(inputs, options[-1], strict=True)
    ]


@_shapes("coupling_mlp_backward")
def _(
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    hidden: Tensor,
    grad: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    projection = x.new_empty(x.shape[0], weights[0].shape[0])
    biases = [weight.new_empty(weight.shape[0]) for weight in weights]
    inputs = (x, projection, *weights, *biases)
    return [_gradient(like, needed) for like, needed in zip(inputs, wanted, strict=True)]


@_shapes("gaussian_latent")
def _(
    q_mean: Tensor, q_log_std: Tensor, p_mean: Tensor, p_log_std: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    return reference.gaussian_latent(q_mean, q_log_std, p_mean, p_log_std, noise)


@_shapes("gaussian_latent_backward")
def _(
    q_mean: Tensor,
    q_log_std: Tensor,
    p_mean: Tensor,
    p_log_std: Tensor,
    noise: Tensor,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    inputs = (q_mean, q_log_std, p_mean, p_log_std, noise)
    return tuple(_gradient(like, bool(needs >> k & 1)) for k, like in enumerate(inputs))


@_shapes("geco_update")
def _(
    c_hat: Tensor, ema: Tensor, log_lambda: Tensor, step: Tensor, *options: object
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (c_hat.dtype, ema.dtype, log_lambda.dtype)
    dtype = torch.float64 if wide else torch.float32
    strides = (1, 0)[: c_hat.dim()]
    slope = torch.empty_strided(c_hat.shape, strides, dtype=dtype, device=c_hat.device)
    return c_hat.new_empty((), dtype=dtype), slope


@_shapes("equilibrium_map")
def _(
    x: Tensor, psi: Tensor, beta: Tensor, log_prior: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # Not the reference: its loop over chunks would be as long as the data.
    dtype = torch.promote_types(x.dtype, torch.float32)
    mapped = torch.empty_like(psi, dtype=dtype)
    return mapped, x.new_empty(x.shape[0], dtype=dtype), psi.new_empty(psi.shape[0], dtype=dtype)


@_shapes("equilibrium_map_backward")
def _(
    x: Tensor,
    psi: Tensor,
    beta: Tensor,
    log_prior: Tensor | None,
    mapped: Tensor,
    log_normaliser: Tensor,
    log_mass: Tensor,
    grad_mapped: Tensor | None,
    grad_log_normaliser: Tensor | None,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [
        x.new_empty(0) if tensor is None or not wanted >> k & 1 else torch.empty_like(tensor)
        for k, tensor in enumerate((x, psi, beta, log_prior))
    ]
    return grads[0], grads[1], grads[2], grads[3]


@_shapes("lstm_gates")
def _(gates: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
    return reference.lstm_gates(gates, c, forget_bias=forget_bias)


@_shapes("lstm_gates_backward")
def _(
    gates: Tensor,
    c: Tensor,
    forget_bias: float,
    grad_h: Tensor | None,
    grad_c_next: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gates), torch.empty_like(c)


# A gradient that isn't wanted comes back as an empty tensor.
_define(
    "pncc(Tensor x, Tensor y, int[1] patch_size, int[1] stride, str channels, float eps, "
    "str reduction) -> Tensor"
)
_define(
    "pncc_backward(Tensor x, Tensor y, int[1] patch_size, int[1] stride, str channels, float eps, "
    "str reduction, Tensor grad, bool wants_x, bool wants_y) -> (Tensor, Tensor)"
)
# A sum or mean, and its gradients in the dtype of the arithmetic.
_define(
    "pncc_with_gradients(Tensor x, Tensor y, int[1] patch_size, int[1] stride, str channels, "
    "float eps, str reduction, bool wants_x, bool wants_y) -> (Tensor, Tensor, Tensor)"
)
_define(
    "lncc(Tensor x, Tensor y, int kernel_size, float smooth_nr, float smooth_dr, str reduction) "
    "-> Tensor"
)
_define(
    "lncc_backward(Tensor x, Tensor y, int kernel_size, float smooth_nr, float smooth_dr, "
    "str reduction, Tensor grad, bool wants_x, bool wants_y) -> (Tensor, Tensor)"
)
_define(
    "lncc_with_gradients(Tensor x, Tensor y, int kernel_size, float smooth_nr, float smooth_dr, "
    "str reduction, bool wants_x, bool wants_y) -> (Tensor, Tensor, Tensor)"
)


@_shapes("pncc")
def _(
    x: Tensor,
    y: Tensor,
    patch_size: list[int],
    stride: list[int],
    channels: str,
    eps: float,
    reduction: str,
) -> Tensor:
    size, step = (
        given * (x.dim() - 2) if len(given) == 1 else given for given in (patch_size, stride)
    )
    return reference.pncc(x, y, size, stride=step, channels=channels, eps=eps, reduction=reduction)


@_shapes("lncc")
def _(
    x: Tensor, y: Tensor, kernel_size: int, smooth_nr: float, smooth_dr: float, reduction: str
) -> Tensor:
    return reference.lncc(
        x, y, kernel_size, smooth_nr=smooth_nr, smooth_dr=smooth_dr, reduction=reduction
    )


@_shapes("pncc_backward")
def _(
    x: Tensor,
    y: Tensor,
    patch_size: list[int],
    stride: list[int],
    channels: str,
    eps: float,
    reduction: str,
    grad: Tensor,
    wants_x: bool,
    wants_y: bool,
) -> tuple[Tensor, Tensor]:
    return _gradient(x, wants_x), _gradient(y, wants_y)


@_shapes("lncc_backward")
def _(
    x: Tensor,
    y: Tensor,
    kernel_size: int,
    smooth_nr: float,
    smooth_dr: float,
    reduction: str,
    grad: Tensor,
    wants_x: bool,
    wants_y: bool,
) -> tuple[Tensor, Tensor]:
    return _gradient(x, wants_x), _gradient(y, wants_y)


@_shapes("pncc_with_gradients")
@_shapes("lncc_with_gradients")
def _(x: Tensor, y: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    *_, wants_x, wants_y = options
    wide_x, wide_y = widen(x, y)
    return _row_sums(x), _gradient(wide_x, bool(wants_x)), _gradient(wide_y, bool(wants_y))


@_shapes("squared_error")
def _(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    return _row_sums(x)


@_shapes("squared_error_backward")
def _(
    x: Tensor, y: Tensor, reduction: str, grad: Tensor, needs_x: bool, needs_y: bool
) -> tuple[Tensor, Tensor]:
    return _gradient(x, needs_x), _gradient(y, needs_y)


# Convolutions in Winograd's domain. The weight's transform, or its form for the gradients to the
# inputs.
_define(
    "winograd_weight(Tensor weight, int split, int blocks, int height, int width, bool transposed) "
    "-> Tensor"
)
_define(
    "winograd_weight_backward(Tensor grad, int out_channels, int in_channels, int kernel, "
    "int split, int blocks, int height, int width) -> Tensor"
)
_define("winograd_conv2d(Tensor x, Tensor weight, Tensor transformed, Tensor? bias) -> Tensor")
# The next state, and the pre-activations, if they are to be kept.
_define(
    "winograd_step(Tensor? x, Tensor h, Tensor c, Tensor weight, Tensor transformed, Tensor? bias, "
    "Tensor? x_projection, float forget_bias, bool keep) -> (Tensor, Tensor, Tensor)"
)
# Gradients to both sources, the transformed weight and the bias. That to the transformed weight is
# added to `total`, if it is given, and an empty tensor returned in its place.
_define(
    "winograd_backward(Tensor grad, Tensor? x, Tensor? h, Tensor weight, Tensor transposed, "
    "int blocks, int wanted, Tensor(a!)? total=None) -> (Tensor, Tensor, Tensor, Tensor)"
)


def winograd_form(kernel: int, height: int, width: int) -> tuple[int, int]:
    """Tiles of an image, and points of a tile: the form that takes the fewest products."""

    def form(outputs: int) -> tuple[int, int]:
        return -(-height // outputs) * -(-width // outputs), (outputs + kernel - 1) ** 2

    if kernel != 3:
        return form(4 if kernel == 5 else 2)
    small, large = form(4), form(6)
    return small if small[0] * small[1] <= large[0] * large[1] else large


def _winograd_values(
    inputs: int, split: int, outputs: int, blocks: int, kernel: int, height: int, width: int
) -> tuple[int, int]:
    """Elements of both forms of a weight, as csrc/include/conv_lstm.h lays them out."""

    def groups(channels: int) -> int:
        return -(-channels // 16)

    def slots(channels: int, blocks: int) -> int:
        return (blocks * groups(channels) - 1) * 16 + (channels - 1) % 16 + 1

    _, points = winograd_form(kernel, height, width)
    second = inputs - split
    last = slots(second, 1) if second else 0
    in_slots = 16 * groups(split) + last if second else slots(split, 1)
    in_groups = groups(split) + groups(second)
    out_groups, out_slots = blocks * groups(outputs // blocks), slots(outputs // blocks, blocks)
    rows = (-(-out_groups // 2) * in_slots, -(-in_groups // 2) * out_slots)
    return points * (rows[0] + 1) * 32, points * (rows[1] + 1) * 32


# The step as one kernel; the same and the pre-activations; from their gradient, those to x, h,
# weight and bias.
_define(
    "conv_lstm_step(Tensor? x, Tensor h, Tensor c, Tensor weight, Tensor? bias, "
    "Tensor? x_projection, float forget_bias) -> (Tensor, Tensor)"
)
_define(
    "conv_lstm_step_with_gates(Tensor? x, Tensor h, Tensor c, Tensor weight, Tensor? bias, "
    "Tensor? x_projection, float forget_bias) -> (Tensor, Tensor, Tensor)"
)
_define(
    "conv_lstm_step_backward(Tensor grad, Tensor? x, Tensor h, Tensor weight, int wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@_shapes("conv_lstm_step")
def _conv_lstm_step(
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_projection: Tensor | None,
    forget_bias: float,
) -> tuple[Tensor, Tensor]:
    return reference.conv_lstm_step(x, h, c, weight, bias, x_projection=x_projection)


def _pre_activations(h: Tensor) -> Tensor:
    """Memory for them, channels innermost."""
    batch, channels, height, width = h.shape
    return h.new_empty(batch, height, width, 4 * channels).permute(0, 3, 1, 2)


@_shapes("conv_lstm_step_with_gates")
def _(
    x: Tensor | None, h: Tensor, c: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return *_conv_lstm_step(x, h, c, weight, *others), _pre_activations(h)


@_shapes("conv_lstm_step_backward")
def _(grad: Tensor, x: Tensor | None, h: Tensor, weight: Tensor, wanted: int) -> tuple[Tensor, ...]:
    bias = weight.new_empty(weight.shape[0])
    return tuple(
        grad.new_empty(0, dtype=torch.float32)
        if like is None
        else _gradient(like, bool(wanted >> k & 1))
        for k, like in enumerate((x, h, weight, bias))
    )


@_shapes("winograd_weight")
def _(weight: Tensor, split: int, blocks: int, height: int, width: int, transposed: bool) -> Tensor:
    outputs, inputs, kernel, _ = weight.shape
    values = _winograd_values(inputs, split, outputs, blocks, kernel, height, width)
    return weight.new_empty(values[transposed])


@_shapes("winograd_weight_backward")
def _(grad: Tensor, out_channels: int, in_channels: int, kernel: int, *form: int) -> Tensor:
    return grad.new_empty(out_channels, in_channels, kernel, kernel)


@_shapes("winograd_conv2d")
def _(x: Tensor, weight: Tensor, transformed: Tensor, bias: Tensor | None) -> Tensor:
    return reference.conv2d(x, weight, bias)


@_shapes("winograd_step")
def _(
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    transformed: Tensor,
    bias: Tensor | None,
    x_projection: Tensor | None,
    forget_bias: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h_next, c_next = _conv_lstm_step(x, h, c, weight, bias, x_projection, forget_bias)
    return h_next, c_next, _pre_activations(h) if keep else h.new_empty(0)


@_shapes("winograd_backward")
def _(
    grad: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    transposed: Tensor,
    blocks: int,
    wanted: int,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, outputs, height, width = grad.shape
    kernel = weight.shape[2]

    def image(source: Tensor | None, bit: int) -> Tensor:
        if source is None or not wanted & bit:
            return grad.new_empty(0)
        shape = (batch, source.shape[1], height, width)
        return grad.new_empty(shape).contiguous(memory_format=suggest_memory_format(source))

    split, second = (0 if source is None else source.shape[1] for source in (x, h))
    values, _ = _winograd_values(split + second, split, outputs, blocks, kernel, height, width)
    return (
        image(x, 1),
        image(h, 2),
        grad.new_empty(values if wanted & 4 and total is None else 0),
        grad.new_empty(outputs if wanted & 8 else 0),
    )
