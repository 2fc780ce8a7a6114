"""Every operator that has kernels: its schema, its shape function, and the dtypes they take.

Schemas and shape functions are registered with torch here, in Python that needs nothing but torch;
the C++ library adds its kernels for the CPU and CUDA keys (`csrc/register.cpp`). Shape functions
run the reference on shape-only tensors, so an output's layout is PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geco_fast import reference
from geco_fast._checks import FLOATING

LIBRARY = torch.library.Library("geco_fast", "DEF")

# Operator -> backend -> dtypes its kernels take.
KERNELS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "geco_update": {"cpu": FLOATING},
    "lncc": {"cpu": FLOATING},
    "lstm_gates": {"cpu": FLOATING},
    "pncc": {"cpu": FLOATING},
}

LIBRARY.define(
    "geco_update(Tensor c_hat, Tensor(a!) ema, Tensor(b!) log_lambda, Tensor(c!) step, "
    "float alpha, float step_size, float lambda_min, float lambda_max, float[2]? max_log_step, "
    "int warmup_steps, int update_every, float? speedup, str parametrization, bool update) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define("lstm_gates(Tensor gates, Tensor c, float forget_bias) -> (Tensor, Tensor)")
LIBRARY.define(
    "lstm_gates_backward(Tensor gates, Tensor c, float forget_bias, Tensor? grad_h, "
    "Tensor? grad_c_next) -> (Tensor, Tensor)"
)


@torch.library.register_fake("geco_fast::geco_update", lib=LIBRARY)
def _(
    c_hat: Tensor, ema: Tensor, log_lambda: Tensor, step: Tensor, *options: object
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (c_hat.dtype, ema.dtype, log_lambda.dtype)
    dtype = torch.float64 if wide else torch.float32
    strides = (1, 0)[: c_hat.dim()]
    slope = torch.empty_strided(c_hat.shape, strides, dtype=dtype, device=c_hat.device)
    return c_hat.new_empty((), dtype=dtype), slope


@torch.library.register_fake("geco_fast::lstm_gates", lib=LIBRARY)
def _(gates: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
    return reference.lstm_gates(gates, c, forget_bias=forget_bias)


@torch.library.register_fake("geco_fast::lstm_gates_backward", lib=LIBRARY)
def _(
    gates: Tensor,
    c: Tensor,
    forget_bias: float,
    grad_h: Tensor | None,
    grad_c_next: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gates), torch.empty_like(c)


# A gradient that isn't wanted comes back as an empty tensor.
LIBRARY.define(
    "pncc(Tensor x, Tensor y, int[1] patch_size, int[1] stride, str channels, float eps, "
    "str reduction) -> Tensor"
)
LIBRARY.define(
    "pncc_backward(Tensor x, Tensor y, int[1] patch_size, int[1] stride, str channels, float eps, "
    "str reduction, Tensor grad, bool wants_x, bool wants_y) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "lncc(Tensor x, Tensor y, int kernel_size, float smooth_nr, float smooth_dr, str reduction) "
    "-> Tensor"
)
LIBRARY.define(
    "lncc_backward(Tensor x, Tensor y, int kernel_size, float smooth_nr, float smooth_dr, "
    "str reduction, Tensor grad, bool wants_x, bool wants_y) -> (Tensor, Tensor)"
)


@torch.library.register_fake("geco_fast::pncc", lib=LIBRARY)
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


@torch.library.register_fake("geco_fast::lncc", lib=LIBRARY)
def _(
    x: Tensor, y: Tensor, kernel_size: int, smooth_nr: float, smooth_dr: float, reduction: str
) -> Tensor:
    return reference.lncc(
        x, y, kernel_size, smooth_nr=smooth_nr, smooth_dr=smooth_dr, reduction=reduction
    )


def _wanted_gradients(x: Tensor, y: Tensor, wants_x: bool, wants_y: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if wants_x else x.new_empty(0),
        torch.empty_like(y) if wants_y else y.new_empty(0),
    )


@torch.library.register_fake("geco_fast::pncc_backward", lib=LIBRARY)
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
    return _wanted_gradients(x, y, wants_x, wants_y)


@torch.library.register_fake("geco_fast::lncc_backward", lib=LIBRARY)
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
    return _wanted_gradients(x, y, wants_x, wants_y)
