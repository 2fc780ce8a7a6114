"""Gates of an LSTM cell, forward and backward; the formulas are on docs/ops/lstm_gates.md.

A program owns a tile of the state and reads its four pre-activations, one C channels after the
other. Backward saves nothing: it reads the operands again. What has to move, in elements of the
state: 5 read and 2 written forward, 7 read and 5 written backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geco_fast.kernels._common import (
    as_rows,
    empty_results,
    on_device,
    place,
    sigmoid,
    tanh,
    tile_of,
)


@triton.jit
def _lstm_gates_forward_kernel(
    gates,  # [B, 4C, *S], the pre-activations i
    c,  # [B, C, *S]
    h_next,  # [B, C, *S]
    c_next,  # [B, C, *S]
    forget_bias: tl.float64,
    step,  # from one gate to the next
    batch,
    width,
    tiles,
    sizes,
    gate_strides,
    c_strides,
    h_next_strides,
    c_next_strides,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, column, exists = tile_of(batch, width, tiles, INDEX, ROWS, COLS)
    forget_bias = tl.full([], forget_bias, COMPUTE)
    at = gates + place(row, column, sizes, gate_strides, INDEX)
    step = tl.full([], step, INDEX)
    i = tl.load(at, exists).to(COMPUTE)
    f = tl.load(at + step, exists).to(COMPUTE)
    g = tl.load(at + 2 * step, exists).to(COMPUTE)
    o = tl.load(at + 3 * step, exists).to(COMPUTE)
    state = tl.load(c + place(row, column, sizes, c_strides, INDEX), exists).to(COMPUTE)
    new = sigmoid(f + forget_bias) * state + sigmoid(i) * tanh(g)
    h = sigmoid(o) * tanh(new)
    tl.store(c_next + place(row, column, sizes, c_next_strides, INDEX), new, exists)
    tl.store(h_next + place(row, column, sizes, h_next_strides, INDEX), h, exists)


@triton.jit
def _lstm_gates_backward_kernel(
    gates,  # [B, 4C, *S], the pre-activations i
    c,  # [B, C, *S]
    grad_h,  # [B, C, *S] or None
    grad_c_next,  # [B, C, *S] or None
    d_gates,  # [B, 4C, *S], the gradients to i
    d_c,  # [B, C, *S]
    forget_bias: tl.float64,
    step,
    d_step,
    batch,
    width,
    tiles,
    sizes,
    gate_strides,
    c_strides,
    grad_h_strides,
    grad_c_next_strides,
    d_gate_strides,
    d_c_strides,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, column, exists = tile_of(batch, width, tiles, INDEX, ROWS, COLS)
    forget_bias = tl.full([], forget_bias, COMPUTE)
    at = gates + place(row, column, sizes, gate_strides, INDEX)
    step = tl.full([], step, INDEX)
    i = sigmoid(tl.load(at, exists).to(COMPUTE))
    f = sigmoid(tl.load(at + step, exists).to(COMPUTE) + forget_bias)
    g = tanh(tl.load(at + 2 * step, exists).to(COMPUTE))
    state = tl.load(c + place(row, column, sizes, c_strides, INDEX), exists).to(COMPUTE)
    d_to = d_gates + place(row, column, sizes, d_gate_strides, INDEX)
    d_step = tl.full([], d_step, INDEX)
    d_new = tl.zeros([ROWS, COLS], COMPUTE)
    if grad_c_next is not None:
        at_grad = place(row, column, sizes, grad_c_next_strides, INDEX)
        d_new += tl.load(grad_c_next + at_grad, exists).to(COMPUTE)
    if grad_h is not None:
        o = sigmoid(tl.load(at + 3 * step, exists).to(COMPUTE))
        t = tanh(f * state + i * g)
        at_grad = place(row, column, sizes, grad_h_strides, INDEX)
        d_h = tl.load(grad_h + at_grad, exists).to(COMPUTE)
        d_new += d_h * o * (1.0 - t * t)
        tl.store(d_to + 3 * d_step, d_h * t * o * (1.0 - o), exists)
    else:
        tl.store(d_to + 3 * d_step, tl.zeros([ROWS, COLS], COMPUTE), exists)
    tl.store(d_to, d_new * g * i * (1.0 - i), exists)
    tl.store(d_to + d_step, d_new * state * f * (1.0 - f), exists)
    tl.store(d_to + 2 * d_step, d_new * i * (1.0 - g * g), exists)
    tl.store(d_c + place(row, column, sizes, d_c_strides, INDEX), d_new * f, exists)


def _first_gate(gates: Tensor) -> tuple[Tensor, int]:
    """The pre-activations i, and the step from one gate to the next."""
    channels = gates.shape[1] // 4
    return gates.narrow(1, 0, channels), channels * gates.stride(1)


def lstm_gates(gates: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::lstm_gates.triton``."""
    h_next, c_next = empty_results(torch.ops.geco_fast.lstm_gates.default, gates, c, forget_bias)
    if c.numel() > 0:
        i, step = _first_gate(gates)
        rows = as_rows(i, c, h_next, c_next, like=c)
        with on_device(c):
            _lstm_gates_forward_kernel[rows.grid](
                *(i, c, h_next, c_next, forget_bias, step),
                *rows.geometry,
                *rows.strides,
                **rows.options(c.dtype),
            )
    return h_next, c_next


def lstm_gates_backward(
    gates: Tensor,
    c: Tensor,
    forget_bias: float,
    grad_h: Tensor | None,
    grad_c_next: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::lstm_gates_backward.triton``."""
    d_gates, d_c = torch.empty_like(gates), torch.empty_like(c)
    if c.numel() > 0:
        (i, step), (d_i, d_step) = _first_gate(gates), _first_gate(d_gates)
        rows = as_rows(i, c, grad_h, grad_c_next, d_i, d_c, like=c)
        with on_device(c):
            _lstm_gates_backward_kernel[rows.grid](
                *(i, c, grad_h, grad_c_next, d_i, d_c, forget_bias, step, d_step),
                *rows.geometry,
                *rows.strides,
                **rows.options(c.dtype),
            )
    return d_gates, d_c
