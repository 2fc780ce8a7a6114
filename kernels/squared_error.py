"""Squared error per batch element, forward and backward; the formulas are on
docs/ops/squared_error.md.

What has to move: both operands forward; both and each wanted gradient backward.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from geco_fast.kernels._common import (
    as_rows,
    divide,
    empty_results,
    on_device,
    place,
    sum_rows,
    tile_of,
    tiles_of,
)


@triton.jit
def _squared_error_forward_kernel(
    x,  # [B, ...]
    y,  # [B, ...]
    parts,  # [B, splits]
    divisor: tl.float64,
    steps,
    splits,
    batch,
    width,
    tiles,
    sizes,
    x_strides,
    y_strides,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, first, last = tiles_of(splits, steps, tiles, INDEX, ROWS)
    total = tl.zeros([ROWS, COLS], COMPUTE)
    for tile in range(first, last):
        column = tile * COLS + tl.arange(0, COLS)[None, :]
        exists = (row < batch) & (column < width)
        at_x = place(row, column, sizes, x_strides, INDEX)
        at_y = place(row, column, sizes, y_strides, INDEX)
        a = tl.load(x + at_x, exists, 0.0).to(COMPUTE)
        b = tl.load(y + at_y, exists, 0.0).to(COMPUTE)
        total += (a - b) * (a - b)
    sums = divide(tl.sum(total, 1, keep_dims=True), tl.full([1, 1], divisor, COMPUTE))
    split = tl.program_id(0) % splits
    tl.store(parts + row * splits + split, sums, row < batch)


@triton.jit
def _squared_error_backward_kernel(
    x,  # [B, ...]
    y,  # [B, ...]
    grad,  # [B]
    d_x,  # [B, ...] or None
    d_y,  # [B, ...] or None
    divisor: tl.float64,
    grad_stride,
    batch,
    width,
    tiles,
    sizes,
    x_strides,
    y_strides,
    d_x_strides,
    d_y_strides,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, column, exists = tile_of(batch, width, tiles, INDEX, ROWS, COLS)
    a = tl.load(x + place(row, column, sizes, x_strides, INDEX), exists).to(COMPUTE)
    b = tl.load(y + place(row, column, sizes, y_strides, INDEX), exists).to(COMPUTE)
    scale = tl.load(grad + row.to(tl.int64) * grad_stride, row < batch).to(COMPUTE)
    scale = divide(2.0 * scale, tl.full([1, 1], divisor, COMPUTE))
    d = (a - b) * scale
    if d_x is not None:
        tl.store(d_x + place(row, column, sizes, d_x_strides, INDEX), d, exists)
    if d_y is not None:
        tl.store(d_y + place(row, column, sizes, d_y_strides, INDEX), -d, exists)


def _divisor(x: Tensor, reduction: str) -> float:
    return float(math.prod(x.shape[1:])) if reduction == "mean" else 1.0


def squared_error(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    """Launch ``geco_fast::squared_error.triton``."""
    (error,) = empty_results(torch.ops.geco_fast.squared_error.default, x, y, reduction)
    if x.numel() == 0:
        return error.fill_(0.0 if reduction == "sum" else math.nan)
    rows = as_rows(x, y, like=x)
    divisor = _divisor(x, reduction)

    def launch(grid: tuple[int], parts: Tensor, steps: int) -> None:
        _squared_error_forward_kernel[grid](
            *(x, y, parts, divisor, steps, rows.splits),
            *rows.geometry,
            *rows.strides,
            **rows.options(x.dtype),
        )

    with on_device(x):
        sum_rows(rows, error, launch)
    return error


def squared_error_backward(
    x: Tensor, y: Tensor, reduction: str, grad: Tensor, needs_x: bool, needs_y: bool
) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::squared_error_backward.triton``."""
    operator = torch.ops.geco_fast.squared_error_backward.default
    grad_x, grad_y = empty_results(operator, x, y, reduction, grad, needs_x, needs_y)
    if x.numel():
        d_x, d_y = grad_x if needs_x else None, grad_y if needs_y else None
        rows = as_rows(x, y, d_x, d_y, like=x)
        with on_device(x):
            _squared_error_backward_kernel[rows.grid](
                *(x, y, grad, d_x, d_y, _divisor(x, reduction), grad.stride(0)),
                *rows.geometry,
                *rows.strides,
                **rows.options(x.dtype),
            )
    return grad_x, grad_y
