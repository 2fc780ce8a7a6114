"""Gaussian sample and divergence, forward and backward; the formulas are on
docs/ops/gaussian_latent.md.

What has to move, in elements of an operand: 5 read and 1 written forward; 6 read backward, and 1
written for each wanted gradient. Backward saves nothing: it reads the operands again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geco_fast.kernels._common import (
    as_rows,
    empty_results,
    exp,
    exp_excess,
    expm1,
    on_device,
    place,
    sum_rows,
    tile_of,
    tiles_of,
)


@triton.jit
def _gaussian_latent_forward_kernel(
    q_mean,  # [B, ...], as are all but parts
    q_log_std,
    p_mean,
    p_log_std,
    noise,
    z,
    parts,  # [B, splits]
    steps,
    splits,
    batch,
    width,
    tiles,
    sizes,
    q_mean_strides,
    q_log_std_strides,
    p_mean_strides,
    p_log_std_strides,
    noise_strides,
    z_strides,
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
        at = place(row, column, sizes, q_mean_strides, INDEX)
        m_q = tl.load(q_mean + at, exists, 0.0).to(COMPUTE)
        at = place(row, column, sizes, q_log_std_strides, INDEX)
        a_q = tl.load(q_log_std + at, exists, 0.0).to(COMPUTE)
        at = place(row, column, sizes, p_mean_strides, INDEX)
        m_p = tl.load(p_mean + at, exists, 0.0).to(COMPUTE)
        at = place(row, column, sizes, p_log_std_strides, INDEX)
        a_p = tl.load(p_log_std + at, exists, 0.0).to(COMPUTE)
        at = place(row, column, sizes, noise_strides, INDEX)
        e = tl.load(noise + at, exists, 0.0).to(COMPUTE)
        sample = m_q + exp(a_q) * e
        tl.store(z + place(row, column, sizes, z_strides, INDEX), sample, exists)
        d = (m_q - m_p) * exp(-a_p)
        # Where nothing is, all operands are zero, and so is this.
        total += 0.5 * (exp_excess(2.0 * (a_q - a_p)) + d * d)
    split = tl.program_id(0) % splits
    sums = tl.sum(total, 1, keep_dims=True)
    tl.store(parts + row * splits + split, sums, row < batch)


@triton.jit
def _gaussian_latent_backward_kernel(
    q_mean,  # [B, ...], as are all but grad_kl
    q_log_std,
    p_mean,
    p_log_std,
    noise,
    grad_z,  # or None
    grad_kl,  # [B] or None
    d_q_mean,  # or None, as are the other four
    d_q_log_std,
    d_p_mean,
    d_p_log_std,
    d_noise,
    grad_kl_stride,
    batch,
    width,
    tiles,
    sizes,
    q_mean_strides,
    q_log_std_strides,
    p_mean_strides,
    p_log_std_strides,
    noise_strides,
    grad_z_strides,
    d_q_mean_strides,
    d_q_log_std_strides,
    d_p_mean_strides,
    d_p_log_std_strides,
    d_noise_strides,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, column, exists = tile_of(batch, width, tiles, INDEX, ROWS, COLS)
    # A gradient that is absent is left out rather than taken as zero: zero times infinity is NaN.
    to_mean = tl.zeros([ROWS, COLS], COMPUTE)
    to_log_std = tl.zeros([ROWS, COLS], COMPUTE)
    at = place(row, column, sizes, q_log_std_strides, INDEX)
    a_q = tl.load(q_log_std + at, exists, 0.0).to(COMPUTE)
    if grad_z is not None:
        at = place(row, column, sizes, grad_z_strides, INDEX)
        g = tl.load(grad_z + at, exists, 0.0).to(COMPUTE)
        to_noise = g * exp(a_q)
        to_mean += g
        if d_q_log_std is not None:
            at = place(row, column, sizes, noise_strides, INDEX)
            to_log_std += to_noise * tl.load(noise + at, exists, 0.0).to(COMPUTE)
        if d_noise is not None:
            tl.store(d_noise + place(row, column, sizes, d_noise_strides, INDEX), to_noise, exists)
    if grad_kl is not None:
        k = tl.load(grad_kl + row.to(tl.int64) * grad_kl_stride, row < batch, 0.0).to(COMPUTE)
        at = place(row, column, sizes, q_mean_strides, INDEX)
        m_q = tl.load(q_mean + at, exists, 0.0).to(COMPUTE)
        at = place(row, column, sizes, p_mean_strides, INDEX)
        m_p = tl.load(p_mean + at, exists, 0.0).to(COMPUTE)
        at = place(row, column, sizes, p_log_std_strides, INDEX)
        a_p = tl.load(p_log_std + at, exists, 0.0).to(COMPUTE)
        inverse_std = exp(-a_p)
        d = (m_q - m_p) * inverse_std
        excess = expm1(2.0 * (a_q - a_p))
        to_mean += k * d * inverse_std
        to_log_std += k * excess
        if d_p_mean is not None:
            at = place(row, column, sizes, d_p_mean_strides, INDEX)
            tl.store(d_p_mean + at, -k * d * inverse_std, exists)
        if d_p_log_std is not None:
            at = place(row, column, sizes, d_p_log_std_strides, INDEX)
            tl.store(d_p_log_std + at, -k * (excess + d * d), exists)
    if d_q_mean is not None:
        tl.store(d_q_mean + place(row, column, sizes, d_q_mean_strides, INDEX), to_mean, exists)
    if d_q_log_std is not None:
        at = place(row, column, sizes, d_q_log_std_strides, INDEX)
        tl.store(d_q_log_std + at, to_log_std, exists)


def gaussian_latent(
    q_mean: Tensor, q_log_std: Tensor, p_mean: Tensor, p_log_std: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::gaussian_latent.triton``."""
    operands = (q_mean, q_log_std, p_mean, p_log_std, noise)
    z, kl = empty_results(torch.ops.geco_fast.gaussian_latent.default, *operands)
    if q_mean.numel() == 0:
        return z, kl.zero_()
    rows = as_rows(*operands, z, like=z)

    def launch(grid: tuple[int], parts: Tensor, steps: int) -> None:
        _gaussian_latent_forward_kernel[grid](
            *(*operands, z, parts, steps, rows.splits),
            *rows.geometry,
            *rows.strides,
            **rows.options(z.dtype),
        )

    with on_device(q_mean):
        sum_rows(rows, kl, launch)
    return z, kl


def gaussian_latent_backward(
    q_mean: Tensor,
    q_log_std: Tensor,
    p_mean: Tensor,
    p_log_std: Tensor,
    noise: Tensor,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    """Launch ``geco_fast::gaussian_latent_backward.triton``."""
    operands = (q_mean, q_log_std, p_mean, p_log_std, noise)
    operator = torch.ops.geco_fast.gaussian_latent_backward.default
    grads = tuple(empty_results(operator, *operands, grad_z, grad_kl, needs))
    if q_mean.numel():
        wanted = tuple(grad if needs >> k & 1 else None for k, grad in enumerate(grads))
        rows = as_rows(*operands, grad_z, *wanted, like=q_mean)
        with on_device(q_mean):
            _gaussian_latent_backward_kernel[rows.grid](
                *(*operands, grad_z, grad_kl, *wanted),
                0 if grad_kl is None else grad_kl.stride(0),
                *rows.geometry,
                *rows.strides,
                **rows.options(q_mean.dtype),
            )
    return grads
