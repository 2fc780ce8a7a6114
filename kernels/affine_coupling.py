"""Affine map of a coupling layer with its log-determinant, forward and backward.

The formulas are on docs/ops/affine_coupling.md.

What has to move, in elements of an operand: 3 read and 1 written forward; backward x, log_scale and
the gradient, the shift for the inverse, and 1 written for each wanted gradient.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from geco_fast.kernels._common import (
    as_rows,
    atan,
    divide,
    empty_results,
    exp,
    log1p_below_one,
    on_device,
    place,
    sum_rows,
    tanh,
    tile_of,
    tiles_of,
)


@triton.jit
def _scale_map(a, clamp, MAP: tl.constexpr, INVERSE: tl.constexpr):
    """s, its derivative, and exp(s), or exp(-s) for the inverse."""
    one = tl.full([], 1.0, a.dtype)
    if MAP == "sigmoid":
        x = a + 2.0
        e = exp(-tl.abs(x))
        near = divide(one, e + 1.0)
        far = e * near
        # log sigmoid(x) = min(x, 0) - log(1 + exp(-|x|))
        s = tl.where(x < 0, x, 0.0) - log1p_below_one(e)
        slope = tl.where(x < 0, near, far)
        factor = 1.0 + exp(-x) if INVERSE else tl.where(x < 0, far, near)
    else:
        if MAP == "exp":
            s = a
            slope = one
        elif MAP == "tanh":
            t = tanh(a)
            s = clamp * t
            slope = clamp * (1.0 - t * t)
        else:
            s = clamp * atan(a)
            slope = divide(clamp, a * a + 1.0)
        factor = exp(-s) if INVERSE else exp(s)
    return s, slope, factor


@triton.jit
def _affine_coupling_forward_kernel(
    x,  # [B, ...], as are all but parts
    log_scale,
    shift,
    y,
    parts,  # [B, splits]
    clamp: tl.float64,
    steps,
    splits,
    batch,
    width,
    tiles,
    sizes,
    x_strides,
    log_scale_strides,
    shift_strides,
    y_strides,
    MAP: tl.constexpr,
    INVERSE: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, first, last = tiles_of(splits, steps, tiles, INDEX, ROWS)
    clamp = tl.full([], clamp, COMPUTE)
    total = tl.zeros([ROWS, COLS], COMPUTE)
    for tile in range(first, last):
        column = tile * COLS + tl.arange(0, COLS)[None, :]
        exists = (row < batch) & (column < width)
        at = place(row, column, sizes, log_scale_strides, INDEX)
        a = tl.load(log_scale + at, exists, 0.0).to(COMPUTE)
        u = tl.load(x + place(row, column, sizes, x_strides, INDEX), exists, 0.0).to(COMPUTE)
        at = place(row, column, sizes, shift_strides, INDEX)
        b = tl.load(shift + at, exists, 0.0).to(COMPUTE)
        s, _, factor = _scale_map(a, clamp, MAP, INVERSE)
        v = (u - b) * factor if INVERSE else u * factor + b
        tl.store(y + place(row, column, sizes, y_strides, INDEX), v, exists)
        total += tl.where(exists, s, 0.0)
    sums = tl.sum(total, 1, keep_dims=True)
    split = tl.program_id(0) % splits
    tl.store(parts + row * splits + split, -sums if INVERSE else sums, row < batch)


@triton.jit
def _affine_coupling_backward_kernel(
    x,  # [B, ...], as are all but grad_log_det
    log_scale,
    shift,  # or None, where the map is not inverted
    grad_y,  # or None
    grad_log_det,  # [B] or None
    d_x,  # or None, as are the other two
    d_log_scale,
    d_shift,
    clamp: tl.float64,
    grad_log_det_stride,
    batch,
    width,
    tiles,
    sizes,
    x_strides,
    log_scale_strides,
    shift_strides,
    grad_y_strides,
    d_x_strides,
    d_log_scale_strides,
    d_shift_strides,
    MAP: tl.constexpr,
    INVERSE: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, column, exists = tile_of(batch, width, tiles, INDEX, ROWS, COLS)
    clamp = tl.full([], clamp, COMPUTE)
    at = place(row, column, sizes, log_scale_strides, INDEX)
    a = tl.load(log_scale + at, exists, 0.0).to(COMPUTE)
    _, slope, factor = _scale_map(a, clamp, MAP, INVERSE)
    d_s = tl.zeros([ROWS, COLS], COMPUTE)
    if grad_log_det is not None:
        at = row.to(tl.int64) * grad_log_det_stride
        d_s += tl.load(grad_log_det + at, row < batch, 0.0).to(COMPUTE)
    if grad_y is not None:
        at = place(row, column, sizes, grad_y_strides, INDEX)
        g = tl.load(grad_y + at, exists, 0.0).to(COMPUTE) * factor
        if d_log_scale is not None:
            u = tl.load(x + place(row, column, sizes, x_strides, INDEX), exists, 0.0).to(COMPUTE)
            if INVERSE:
                at = place(row, column, sizes, shift_strides, INDEX)
                u -= tl.load(shift + at, exists, 0.0).to(COMPUTE)
            d_s += g * u
        if d_x is not None:
            tl.store(d_x + place(row, column, sizes, d_x_strides, INDEX), g, exists)
        if d_shift is not None:
            tl.store(d_shift + place(row, column, sizes, d_shift_strides, INDEX), -g, exists)
    if d_log_scale is not None:
        at = place(row, column, sizes, d_log_scale_strides, INDEX)
        tl.store(d_log_scale + at, (-d_s if INVERSE else d_s) * slope, exists)


def _factor(scale_map: str, clamp: float) -> float:
    """What the map's bounded function is multiplied by."""
    return clamp * 2 / math.pi if scale_map == "atan" else clamp


def affine_coupling(
    x: Tensor, log_scale: Tensor, shift: Tensor, inverse: bool, scale_map: str, clamp: float
) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::affine_coupling.triton``."""
    operator = torch.ops.geco_fast.affine_coupling.default
    y, log_det = empty_results(operator, x, log_scale, shift, inverse, scale_map, clamp)
    if x.numel() == 0:
        return y, log_det.zero_()
    rows = as_rows(x, log_scale, shift, y, like=y)

    def launch(grid: tuple[int], parts: Tensor, steps: int) -> None:
        _affine_coupling_forward_kernel[grid](
            *(x, log_scale, shift, y, parts, _factor(scale_map, clamp), steps, rows.splits),
            *rows.geometry,
            *rows.strides,
            MAP=scale_map,
            INVERSE=inverse,
            **rows.options(x.dtype),
        )

    with on_device(x):
        sum_rows(rows, log_det, launch)
    return y, log_det


def affine_coupling_backward(
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
    """Launch ``geco_fast::affine_coupling_backward.triton``."""
    grad_x, grad_log_scale, grad_shift = grads = empty_results(
        torch.ops.geco_fast.affine_coupling_backward.default,
        *(x, log_scale, shift, inverse, scale_map, clamp, grad_y, grad_log_det),
        *(needs_x, needs_log_scale, needs_shift),
    )
    if x.numel():
        needed = (needs_x, needs_log_scale, needs_shift and inverse)
        wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        rows = as_rows(x, log_scale, shift, grad_y, *wanted, like=x)
        with on_device(x):
            _affine_coupling_backward_kernel[rows.grid](
                *(x, log_scale, shift, grad_y, grad_log_det, *wanted, _factor(scale_map, clamp)),
                0 if grad_log_det is None else grad_log_det.stride(0),
                *rows.geometry,
                *rows.strides,
                MAP=scale_map,
                INVERSE=inverse,
                **rows.options(x.dtype),
            )
    return grad_x, grad_log_scale, grad_shift
