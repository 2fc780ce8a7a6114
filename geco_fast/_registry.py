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
    "lstm_gates": {"cpu": FLOATING},
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
