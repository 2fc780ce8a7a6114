"""One step of GECO: the batch's means, their average, the multipliers and the penalty.

The formulas are on docs/ops/geco_update.md. One program does it all, for what is left after the
sums is a few scalars for each constraint; many values are summed by others first. As on the CPU all
arithmetic is in float64 and results are rounded once. The step counter stays on its device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from geco_fast.kernels._common import (
    LONGEST,
    TILES,
    WARPS,
    Rows,
    as_rows,
    at_most,
    empty_results,
    expm1,
    index_type,
    log1p_below_one,
    on_device,
    tiles_of,
)


@triton.jit
def _batch_sums_kernel(
    c_hat,  # [L, B]
    parts,  # [L, splits]
    steps,
    splits,
    tiles,
    constraints,
    batch,
    constraint_stride,
    batch_stride,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, first, last = tiles_of(splits, steps, tiles, INDEX, ROWS)
    total = tl.zeros([ROWS, COLS], tl.float64)
    for tile in range(first, last):
        column = tile * COLS + tl.arange(0, COLS)[None, :]
        exists = (row < constraints) & (column < batch)
        at = row * constraint_stride + column.to(INDEX) * batch_stride
        total += tl.load(c_hat + at, exists, 0.0).to(tl.float64)
    split = tl.program_id(0) % splits
    tl.store(parts + row * splits + split, tl.sum(total, 1, keep_dims=True), row < constraints)


@triton.jit
def _within(x, low, high):
    """x within bounds; NaN passes."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _geco_update_kernel(
    c_hat,  # [L, N]: the batch, or its sums in parts
    ema,  # [L]
    log_lambda,  # [L]
    step,  # []
    penalty,  # []
    slope,  # [L], lambda / B
    alpha: tl.float64,
    step_size: tl.float64,
    low: tl.float64,
    high: tl.float64,
    down: tl.float64,
    up: tl.float64,
    speedup: tl.float64,
    batch: tl.float64,
    warmup_steps: tl.int64,
    update_every: tl.int64,
    constraints,
    count,
    constraint_stride,
    batch_stride,
    ema_stride,
    log_lambda_stride,
    SOFTPLUS2: tl.constexpr,
    UPDATE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    wide: tl.constexpr = tl.float64
    down = tl.full([], down, wide)
    up = tl.full([], up, wide)
    low = tl.full([], low, wide)
    high = tl.full([], high, wide)
    alpha = tl.full([], alpha, wide)
    batch = tl.full([], batch, wide)
    now = tl.load(step)
    due = (now >= warmup_steps) & (now % update_every == 0)
    total = tl.zeros([ROWS, 1], wide)
    for first in range(0, constraints, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        exists = row < constraints
        at_row = row.to(INDEX)
        # Every thread has the state that is written below, before any writes.
        m = tl.load(ema + at_row * ema_stride, exists, 0.0).to(wide)
        before = tl.load(log_lambda + at_row * log_lambda_stride, exists, 0.0).to(wide)
        tl.debug_barrier()
        sums = tl.zeros([ROWS, COLS], wide)
        for from_column in range(0, count, COLS):
            column = from_column + tl.arange(0, COLS)[None, :]
            at = at_row * constraint_stride + column.to(INDEX) * batch_stride
            sums += tl.load(c_hat + at, exists & (column < count), 0.0).to(wide)
        c = tl.sum(sums, 1, keep_dims=True) / batch
        factor = tl.exp(before)
        if count > 0:
            tl.store(slope + row, factor / batch, exists)
        if UPDATE:
            m = tl.where(now == 0, c, alpha * m + (1.0 - alpha) * c)
            tl.store(ema + at_row * ema_stride, m, exists)
            ascent = step_size * m
            ascent = tl.where(m <= 0, ascent * speedup, ascent)
            if SOFTPLUS2:
                root = tl.exp(0.5 * before)  # softplus(w)
                sigmoid = -expm1(-root)  # of w
                w = root + tl.log(sigmoid) + ascent * 2.0 * root * sigmoid
                softplus = tl.where(w > 0, w, 0.0 * w) + log1p_below_one(tl.exp(-tl.abs(w)))
                # An infinite w times zero is NaN.
                softplus = tl.where(w == float("inf"), w, softplus)
                ascent = 2.0 * tl.log(softplus) - before
            after = _within(before + _within(ascent, down, up), low, high)
            if due:
                tl.store(log_lambda + at_row * log_lambda_stride, after, exists)
            total += tl.where(exists, factor * m, 0.0)
        else:
            total += tl.where(exists, factor * c, 0.0)
    tl.debug_barrier()
    tl.store(penalty, tl.sum(tl.sum(total, 1), 0))
    if UPDATE:
        tl.store(step, now + 1)


def _addresses(tensor: Tensor) -> set[int]:
    """Where the elements of a tensor are, by their first bytes' addresses."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    steps = [[stride * k for k in range(n)] for n, stride in sides]
    first, width = tensor.data_ptr(), tensor.element_size()
    return {first + width * sum(offsets) for offsets in itertools.product(*steps)}


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common."""

    def bounds(tensor: Tensor) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        return start, start + (last + 1) * tensor.element_size()

    if not (a.numel() and b.numel()):
        return False
    (a_start, a_end), (b_start, b_end) = bounds(a), bounds(b)
    if a_end <= b_start or b_end <= a_start:
        return False

    def covered(tensor: Tensor) -> set[int]:
        width = range(tensor.element_size())
        return {address + k for address in _addresses(tensor) for k in width}

    return not covered(a).isdisjoint(covered(b))


def _check_apart(c_hat: Tensor, ema: Tensor, log_lambda: Tensor, step: Tensor) -> None:
    named = (("ema", ema), ("log_lambda", log_lambda), ("step", step), ("c_hat", c_hat))
    for name, tensor in named[:2]:
        if tensor.shape[0] > 1 and tensor.stride(0) == 0:
            raise RuntimeError(
                f"geco_update: {name} is written in place, and its elements share memory; clone it"
            )
    for k, (name, tensor) in enumerate(named):
        for other_name, other in named[k + 1 :]:
            if _share(tensor, other):
                raise RuntimeError(
                    f"geco_update: {name} is written in place and shares memory with {other_name}; "
                    "clone one of them"
                )


def geco_update(
    c_hat: Tensor,
    ema: Tensor,
    log_lambda: Tensor,
    step: Tensor,
    alpha: float,
    step_size: float,
    lambda_min: float,
    lambda_max: float,
    max_log_step: Sequence[float] | None,
    warmup_steps: int,
    update_every: int,
    speedup: float | None,
    parametrization: str,
    update: bool,
) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::geco_update.triton``."""
    if update:
        _check_apart(c_hat, ema, log_lambda, step)
    options = (alpha, step_size, lambda_min, lambda_max, max_log_step)
    options += (warmup_steps, update_every, speedup, parametrization, update)
    operator = torch.ops.geco_fast.geco_update.default
    penalty, slope = empty_results(operator, c_hat, ema, log_lambda, step, *options)
    values = c_hat if c_hat.dim() == 2 else c_hat[:, None]
    rows = as_rows(values, like=values)
    down, up = max_log_step or (-math.inf, math.inf)
    with on_device(c_hat):
        batch = values.shape[1]
        # Sums of a batch that is no wider than the narrowest tile would leave as many tiles.
        if rows.grid[0] > LONGEST and batch > TILES[0][1]:
            values = _sum_parts(values, rows)
        few, many = as_rows(values, like=values).tile
        _geco_update_kernel[(1,)](
            *(values, ema, log_lambda, step, penalty, slope, alpha, step_size),
            # One number for both bounds came as a pair of it.
            *(math.log(lambda_min), math.log(lambda_max), -abs(down), up),
            *(1.0 if speedup is None else speedup, float(batch), warmup_steps, update_every),
            *(*values.shape, *values.stride(), ema.stride(0), log_lambda.stride(0)),
            SOFTPLUS2=parametrization == "softplus2",
            UPDATE=update,
            INDEX=index_type(values, ema, log_lambda),
            ROWS=few,
            COLS=many,
            num_warps=WARPS,
            **at_most(255),
        )
    return penalty, slope


def _sum_parts(c_hat: Tensor, rows: Rows) -> Tensor:
    """Sums ``[L, splits]`` of more values than one program should add."""
    few, many = rows.tile
    parts = c_hat.new_empty(c_hat.shape[0], rows.splits, dtype=torch.float64)
    _batch_sums_kernel[(-(-c_hat.shape[0] // few) * rows.splits,)](
        *(c_hat, parts, -(-rows.tiles // rows.splits), rows.splits, rows.tiles),
        *(*c_hat.shape, *c_hat.stride()),
        INDEX=rows.index,
        ROWS=few,
        COLS=many,
        num_warps=WARPS,
    )
    return parts
