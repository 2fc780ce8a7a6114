"""Fixed-point map of the equilibrium encoder, forward and backward, streaming over the data.

The formulas are on docs/ops/equilibrium_map.md. A tile of pairs, some rows of data by some vectors,
has its squared distances in registers, summed over the dimensions in runs and groups; the weights
are computed again in every pass and never stored. Sums over the data are shared out among programs,
kept in float64 and joined in order; sums over vectors stay within a program.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from geco_fast.kernels._common import (
    at_most,
    divide,
    empty_results,
    exp,
    index_type,
    on_device,
)

# Rows of data and vectors of a tile, and dimensions of a product's tile at most. With eight warps a
# thread has eight pairs of a tile.
ROWS, VECTORS, DIMENSIONS, WARPS = 32, 64, 64, 8
# Dimensions up to which a program keeps its sums over the data in registers.
IN_REGISTERS = 32
# Rows of data for one program at least, programs that keep a GPU busy, and bytes of their sums.
FEWEST_ROWS, BUSY, SCRATCH = 256, 512, 2**26


@triton.jit
def _pairs(
    x,  # [n, d]
    psi,  # [m, d]
    grad,  # [m, d] or None
    mapped,  # [m, d]
    row,  # [ROWS, 1]
    vector,  # [1, VECTORS]
    n,
    m,
    d,
    x_strides,
    psi_strides,
    grad_strides,
    mapped_strides,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Squared distances |x - psi|^2 and, for a gradient, grad . (x - mapped), [ROWS, VECTORS].

    Summed in runs of 8 dimensions and groups of 160, which is as exact as pairwise sums.
    """
    none = tl.zeros([row.shape[0], vector.shape[1]], COMPUTE)
    distance = none
    product = none
    x_row = x + row.to(INDEX) * x_strides[0]
    psi_row = psi + vector.to(INDEX) * psi_strides[0]
    for group in range(0, d, 160):
        group_distance = none
        group_product = none
        for run in range(group, tl.minimum(group + 160, d), 8):
            run_distance = none
            run_product = none
            for k in tl.static_range(8):
                j = run + k
                row_exists = (row < n) & (row * 0 + j < d)
                vector_exists = (vector < m) & (vector * 0 + j < d)
                at = tl.full([1, 1], j, INDEX)
                u = tl.load(x_row + at * x_strides[1], row_exists, 0.0).to(COMPUTE)
                v = tl.load(psi_row + at * psi_strides[1], vector_exists, 0.0).to(COMPUTE)
                run_distance += (u - v) * (u - v)
                if grad is not None:
                    to = grad + vector.to(INDEX) * grad_strides[0] + at * grad_strides[1]
                    g = tl.load(to, vector_exists, 0.0).to(COMPUTE)
                    to = mapped + vector.to(INDEX) * mapped_strides[0] + at * mapped_strides[1]
                    f = tl.load(to, vector_exists, 0.0).to(COMPUTE)
                    run_product += g * (u - f)
            group_distance += run_distance
            group_product += run_product
        distance += group_distance
        product += group_product
    return distance, product


@triton.jit
def _log_priors(log_prior, vector, m, uniform, stride, COMPUTE: tl.constexpr, INDEX: tl.constexpr):
    """Logarithms of the priors [1, VECTORS]; -inf where there is no vector."""
    if log_prior is None:
        priors = tl.full([1, vector.shape[1]], uniform, COMPUTE)
        return tl.where(vector < m, priors, float("-inf"))
    else:
        at = log_prior + vector.to(INDEX) * stride
        return tl.load(at, vector < m, float("-inf")).to(COMPUTE)


@triton.jit
def _finite_or_zero(x):
    """x, or 0 for -inf: what is subtracted before an exponential."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _equilibrium_normaliser_kernel(
    x,  # [n, d]
    psi,  # [m, d]
    beta,  # []
    log_prior,  # [m] or None
    log_normaliser,  # [n]
    uniform: tl.float64,
    n,
    m,
    d,
    x_strides,
    psi_strides,
    log_prior_stride,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    temperature = tl.load(beta).to(COMPUTE)
    largest = tl.full([ROWS, 1], float("-inf"), COMPUTE)
    total = tl.zeros([ROWS, 1], COMPUTE)
    for first in range(0, m, VECTORS):
        vector = first + tl.arange(0, VECTORS)[None, :]
        distance, _ = _pairs(
            *(x, psi, None, psi, row, vector, n, m, d),
            *(x_strides, psi_strides, psi_strides, psi_strides),
            COMPUTE,
            INDEX,
        )
        prior = _log_priors(log_prior, vector, m, uniform, log_prior_stride, COMPUTE, INDEX)
        z = prior - divide(distance, temperature)
        larger = tl.maximum(largest, tl.max(z, 1, keep_dims=True))
        bound = _finite_or_zero(larger)
        terms = tl.where(vector < m, exp(z - bound), 0.0)
        total = total * exp(largest - bound) + tl.sum(terms, 1, keep_dims=True)
        largest = larger
    result = _finite_or_zero(largest).to(tl.float64) + tl.log(total.to(tl.float64))
    # The total has inf - inf in it.
    result = tl.where(largest == float("inf"), float("inf"), result)
    tl.store(log_normaliser + row, result, row < n)


@triton.jit
def _equilibrium_sums_kernel(
    x,  # [n, d]
    psi,  # [m, d]
    beta,  # []
    log_normaliser,  # [n]
    bounds,  # [splits, m], float64: what is subtracted from log m_ia
    masses,  # [splits, m], float64: sums of exp(log m_ia - bound)
    means,  # [splits, m, d], float64: the same, times x_i
    per_split,
    n,
    m,
    d,
    x_strides,
    psi_strides,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    FITS: tl.constexpr,
):
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)[None, :]
    split = tl.program_id(1).to(INDEX)
    temperature = tl.load(beta).to(COMPUTE)
    largest = tl.full([1, VECTORS], float("-inf"), COMPUTE)
    mass = tl.zeros([1, VECTORS], tl.float64)
    kept = tl.zeros([VECTORS, DIMENSIONS], tl.float64)
    begin = tl.program_id(1) * per_split
    for first in range(begin, tl.minimum(begin + per_split, n), ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        distance, _ = _pairs(
            *(x, psi, None, psi, row, vector, n, m, d),
            *(x_strides, psi_strides, psi_strides, psi_strides),
            COMPUTE,
            INDEX,
        )
        z = tl.load(log_normaliser + row, row < n, 0.0).to(COMPUTE)
        log_weight = tl.where(row < n, -divide(distance, temperature) - z, float("-inf"))
        larger = tl.maximum(largest, tl.max(log_weight, 0, keep_dims=True))
        bound = _finite_or_zero(larger)
        weight = tl.where(row < n, exp(log_weight - bound), 0.0)
        scale = exp(largest - bound).to(tl.float64)
        mass = mass * scale + tl.sum(weight, 0, keep_dims=True).to(tl.float64)
        largest = larger
        scale_of = tl.trans(scale)
        data_row = first + tl.arange(0, ROWS)[:, None]
        if FITS:
            column = tl.arange(0, DIMENSIONS)[None, :]
            at = data_row.to(INDEX) * x_strides[0] + column.to(INDEX) * x_strides[1]
            u = tl.load(x + at, (data_row < n) & (column < d), 0.0).to(COMPUTE)
            product = tl.dot(tl.trans(weight), u, input_precision="ieee", out_dtype=COMPUTE)
            kept = kept * scale_of + product.to(tl.float64)
        else:
            for from_column in range(0, d, DIMENSIONS):
                column = from_column + tl.arange(0, DIMENSIONS)[None, :]
                at = data_row.to(INDEX) * x_strides[0] + column.to(INDEX) * x_strides[1]
                u = tl.load(x + at, (data_row < n) & (column < d), 0.0).to(COMPUTE)
                product = tl.dot(tl.trans(weight), u, input_precision="ieee", out_dtype=COMPUTE)
                vector_row = tl.trans(vector)
                to = means + (split * m + vector_row) * d + column
                exists = (vector_row < m) & (column < d)
                sums = product.to(tl.float64)
                if first > begin:
                    sums += tl.load(to, exists, 0.0) * scale_of
                tl.store(to, sums, exists)
            # What a thread stores here another may load in the next round.
            tl.debug_barrier()
    tl.store(bounds + split * m + vector, largest, vector < m)
    tl.store(masses + split * m + vector, mass, vector < m)
    if FITS:
        vector_row = tl.trans(vector)
        column = tl.arange(0, DIMENSIONS)[None, :]
        to = means + (split * m + vector_row) * d + column
        tl.store(to, kept, (vector_row < m) & (column < d))


@triton.jit
def _equilibrium_join_kernel(
    bounds,  # [splits, m], float64
    masses,  # [splits, m], float64
    means,  # [splits, m, d], float64
    mapped,  # [m, d]
    log_mass,  # [m]
    splits,
    m,
    d,
    mapped_strides,
    INDEX: tl.constexpr,
    VECTORS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
):
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)[:, None]
    column = tl.program_id(1) * DIMENSIONS + tl.arange(0, DIMENSIONS)[None, :]
    at_vector = vector.to(INDEX)
    largest = tl.full([VECTORS, 1], float("-inf"), tl.float64)
    for split in range(splits):
        bound = tl.load(bounds + at_vector + split * m, vector < m, float("-inf"))
        largest = tl.maximum(largest, bound)
    shift = _finite_or_zero(largest)
    mass = tl.zeros([VECTORS, 1], tl.float64)
    mean = tl.zeros([VECTORS, DIMENSIONS], tl.float64)
    exists = (vector < m) & (column < d)
    for split in range(splits):
        at = at_vector + split * m
        scale = tl.exp(tl.load(bounds + at, vector < m, float("-inf")) - shift)
        mass += tl.load(masses + at, vector < m, 0.0) * scale
        mean += tl.load(means + at * d + column, exists, 0.0) * scale
    to = mapped + at_vector * mapped_strides[0] + column.to(INDEX) * mapped_strides[1]
    tl.store(to, mean / mass, exists)
    if tl.program_id(1) == 0:
        tl.store(log_mass + vector, shift + tl.log(mass), vector < m)


@triton.jit
def _weights(
    distance,
    product,
    grad,  # None where no gradient comes through the map
    normaliser,  # [ROWS, 1]
    mass,  # [1, VECTORS], its logarithm
    prior,  # [1, VECTORS], its logarithm
    temperature,
    exists,
):
    """w, p and E of a tile of pairs (see the page)."""
    log_weight = -divide(distance, temperature) - normaliser
    w = tl.where(exists, exp(log_weight - mass), 0.0)
    p = tl.where(exists, exp(log_weight + prior), 0.0)
    e = tl.zeros_like(w)
    # Without a gradient E is zero, even where w is NaN.
    if grad is not None:
        e = tl.where(exists, w * product, 0.0)
    return w, p, e


@triton.jit
def _equilibrium_rows_backward_kernel(
    x,  # [n, d]
    psi,  # [m, d]
    beta,  # []
    log_prior,  # [m] or None
    mapped,  # [m, d]
    log_normaliser,  # [n]
    log_mass,  # [m]
    grad_mapped,  # [m, d] or None
    grad_log_normaliser,  # [n] or None
    rest,  # [n], t_i
    d_x,  # [n, d] or None
    sums,  # [d, n] or None: d_x of the vectors so far, where one tile does not hold them all
    uniform: tl.float64,
    grad_log_normaliser_stride,
    n,
    m,
    d,
    x_strides,
    psi_strides,
    mapped_strides,
    grad_mapped_strides,
    d_x_strides,
    log_prior_stride,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at_row = row.to(INDEX)
    temperature = tl.load(beta).to(COMPUTE)
    normaliser = tl.load(log_normaliser + row, row < n, 0.0).to(COMPUTE)
    through_map = tl.zeros([ROWS, 1], COMPUTE)
    whole = tl.zeros([ROWS, 1], COMPUTE)
    for first in range(0, m, VECTORS):
        vector = first + tl.arange(0, VECTORS)[None, :]
        exists = (row < n) & (vector < m)
        distance, product = _pairs(
            *(x, psi, grad_mapped, mapped, row, vector, n, m, d),
            *(x_strides, psi_strides, grad_mapped_strides, mapped_strides),
            COMPUTE,
            INDEX,
        )
        mass = tl.load(log_mass + vector, vector < m, 0.0).to(COMPUTE)
        prior = _log_priors(log_prior, vector, m, uniform, log_prior_stride, COMPUTE, INDEX)
        _, p, e = _weights(
            distance, product, grad_mapped, normaliser, mass, prior, temperature, exists
        )
        through_map += tl.sum(e, 1, keep_dims=True)
        whole += tl.sum(p, 1, keep_dims=True)
    t = -through_map
    if grad_log_normaliser is not None:
        from_row = grad_log_normaliser + at_row * grad_log_normaliser_stride
        t += tl.load(from_row, row < n, 0.0).to(COMPUTE)
    # The normaliser is rounded: the p of a row add up to one only nearly.
    t = tl.where(whole > 0, divide(t, whole), t)
    tl.store(rest + row, t, row < n)
    if d_x is not None:
        for first in range(0, m, VECTORS):
            vector = first + tl.arange(0, VECTORS)[None, :]
            at_vector = vector.to(INDEX)
            exists = (row < n) & (vector < m)
            distance, product = _pairs(
                *(x, psi, grad_mapped, mapped, row, vector, n, m, d),
                *(x_strides, psi_strides, grad_mapped_strides, mapped_strides),
                COMPUTE,
                INDEX,
            )
            mass = tl.load(log_mass + vector, vector < m, 0.0).to(COMPUTE)
            prior = _log_priors(log_prior, vector, m, uniform, log_prior_stride, COMPUTE, INDEX)
            w, p, e = _weights(
                distance, product, grad_mapped, normaliser, mass, prior, temperature, exists
            )
            q = divide(2.0 * (e + t * p), temperature)
            for k in range(0, d):
                at = tl.full([1, 1], k, INDEX)
                u = tl.load(x + at_row * x_strides[0] + at * x_strides[1], row < n, 0.0)
                v = tl.load(psi + at_vector * psi_strides[0] + at * psi_strides[1], vector < m, 0.0)
                terms = -q * (u.to(COMPUTE) - v.to(COMPUTE))
                if grad_mapped is not None:
                    at_g = at_vector * grad_mapped_strides[0] + at * grad_mapped_strides[1]
                    terms += w * tl.load(grad_mapped + at_g, vector < m, 0.0).to(COMPUTE)
                terms = tl.where(exists, terms, 0.0)
                total = tl.sum(terms, 1, keep_dims=True)
                if sums is not None:
                    kept = sums + at * n + at_row
                    if first > 0:
                        total += tl.load(kept, row < n, 0.0)
                    tl.store(kept, total, row < n)
                if first + VECTORS >= m:
                    at_d = at_row * d_x_strides[0] + at * d_x_strides[1]
                    tl.store(d_x + at_d, total, row < n)
            tl.debug_barrier()


@triton.jit
def _equilibrium_vectors_backward_kernel(
    x,  # [n, d]
    psi,  # [m, d]
    beta,  # []
    log_prior,  # [m] or None
    mapped,  # [m, d]
    log_normaliser,  # [n]
    log_mass,  # [m]
    grad_mapped,  # [m, d] or None
    rest,  # [n], t_i
    psi_sums,  # [splits, d, m], float64, or None
    prior_sums,  # [splits, m], float64, or None
    beta_sums,  # [splits, blocks of vectors], float64, or None
    uniform: tl.float64,
    per_split,
    n,
    m,
    d,
    x_strides,
    psi_strides,
    mapped_strides,
    grad_mapped_strides,
    log_prior_stride,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)[None, :]
    at_vector = vector.to(INDEX)
    split = tl.program_id(1).to(INDEX)
    temperature = tl.load(beta).to(COMPUTE)
    mass = tl.load(log_mass + vector, vector < m, 0.0).to(COMPUTE)
    prior = _log_priors(log_prior, vector, m, uniform, log_prior_stride, COMPUTE, INDEX)
    to_prior = tl.zeros([1, VECTORS], tl.float64)
    to_beta = tl.zeros([1, VECTORS], tl.float64)
    begin = tl.program_id(1) * per_split
    for first in range(begin, tl.minimum(begin + per_split, n), ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at_row = row.to(INDEX)
        exists = (row < n) & (vector < m)
        distance, product = _pairs(
            *(x, psi, grad_mapped, mapped, row, vector, n, m, d),
            *(x_strides, psi_strides, grad_mapped_strides, mapped_strides),
            COMPUTE,
            INDEX,
        )
        normaliser = tl.load(log_normaliser + row, row < n, 0.0).to(COMPUTE)
        _, p, e = _weights(
            distance, product, grad_mapped, normaliser, mass, prior, temperature, exists
        )
        tp = tl.where(exists, tl.load(rest + row, row < n, 0.0).to(COMPUTE) * p, 0.0)
        to_prior += tl.sum(tp, 0, keep_dims=True).to(tl.float64)
        q = e + tp
        to_beta += tl.sum(tl.where(exists, q * distance, 0.0), 0, keep_dims=True).to(tl.float64)
        if psi_sums is not None:
            for k in range(0, d):
                at = tl.full([1, 1], k, INDEX)
                u = tl.load(x + at_row * x_strides[0] + at * x_strides[1], row < n, 0.0)
                v = tl.load(psi + at_vector * psi_strides[0] + at * psi_strides[1], vector < m, 0.0)
                terms = tl.where(exists, q * (u.to(COMPUTE) - v.to(COMPUTE)), 0.0)
                total = tl.sum(terms, 0, keep_dims=True).to(tl.float64)
                kept = psi_sums + (split * d + at) * m + at_vector
                if first > begin:
                    total += tl.load(kept, vector < m, 0.0)
                tl.store(kept, total, vector < m)
            tl.debug_barrier()
    if prior_sums is not None:
        tl.store(prior_sums + split * m + at_vector, to_prior, vector < m)
    if beta_sums is not None:
        to = beta_sums + split * tl.num_programs(0) + tl.program_id(0)
        tl.store(to, tl.sum(tl.sum(to_beta, 1), 0))


@triton.jit
def _narrow(x, pointer):
    """x of float64 for a store; Triton's interpreter does not take it to 16 bits at once."""
    if pointer.dtype.element_ty == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _equilibrium_join_backward_kernel(
    beta,  # []
    psi_sums,  # [splits, d, m], float64, or None
    prior_sums,  # [splits, m], float64, or None
    beta_sums,  # [beta_parts], float64, or None
    d_psi,  # [m, d] or None
    d_log_prior,  # [m] or None
    d_beta,  # [] or None
    splits,
    beta_parts,
    m,
    d,
    d_psi_strides,
    d_log_prior_stride,
    INDEX: tl.constexpr,
    VECTORS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
):
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)[:, None]
    at_vector = vector.to(INDEX)
    column = tl.program_id(1) * DIMENSIONS + tl.arange(0, DIMENSIONS)[None, :]
    at_column = column.to(INDEX)
    temperature = tl.load(beta).to(tl.float64)
    if psi_sums is not None:
        exists = (vector < m) & (column < d)
        total = tl.zeros([VECTORS, DIMENSIONS], tl.float64)
        for split in range(splits):
            at = (tl.full([1, 1], split, INDEX) * d + at_column) * m + at_vector
            total += tl.load(psi_sums + at, exists, 0.0)
        to = d_psi + at_vector * d_psi_strides[0] + at_column * d_psi_strides[1]
        tl.store(to, _narrow(total * 2.0 / temperature, d_psi), exists)
    # What is known when it is compiled stands apart from what is not.
    if prior_sums is not None:  # noqa: SIM102
        if tl.program_id(1) == 0:
            to_prior = tl.zeros([VECTORS, 1], tl.float64)
            for split in range(splits):
                to_prior += tl.load(prior_sums + split * m + at_vector, vector < m, 0.0)
            at_prior = d_log_prior + at_vector * d_log_prior_stride
            tl.store(at_prior, _narrow(to_prior, d_log_prior), vector < m)
    if beta_sums is not None:  # noqa: SIM102
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            to_beta = tl.zeros([VECTORS, 1], tl.float64)
            for first in range(0, beta_parts, VECTORS):
                part = first + tl.arange(0, VECTORS)[:, None]
                to_beta += tl.load(beta_sums + part, part < beta_parts, 0.0)
            whole = tl.sum(tl.sum(to_beta, 1), 0) / (temperature * temperature)
            tl.store(d_beta, _narrow(whole, d_beta))


def _tile(m: int, dtype: torch.dtype) -> tuple[int, int]:
    """ROWS and VECTORS of a tile."""
    most = VECTORS // 2 if dtype == torch.float64 else VECTORS
    return ROWS, max(16, min(most, triton.next_power_of_2(m)))


def _splits(n: int, m: int, d: int, vectors: int) -> tuple[int, int]:
    """Programs that share the data of a tile of vectors, and the rows of each."""
    blocks = triton.cdiv(m, vectors)
    splits = min(triton.cdiv(BUSY, blocks), triton.cdiv(n, FEWEST_ROWS))
    splits = max(1, min(splits, SCRATCH // (8 * m * max(d, 1))))
    per_split = triton.cdiv(triton.cdiv(n, splits), ROWS) * ROWS
    return triton.cdiv(n, per_split), per_split


def _options(index: tl.dtype, dtype: torch.dtype, m: int) -> dict[str, object]:
    rows, vectors = _tile(m, dtype)
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    return {
        "COMPUTE": compute,
        "INDEX": index,
        "ROWS": rows,
        "VECTORS": vectors,
        "num_warps": WARPS,
        # Elsewhere some of the kernels spill a few values.
        **at_most(248, free=(90, 100)),
    }


def _columns(d: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(max(d, 1))))


def equilibrium_map(
    x: Tensor, psi: Tensor, beta: Tensor, log_prior: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ``geco_fast::equilibrium_map.triton``."""
    operator = torch.ops.geco_fast.equilibrium_map.default
    mapped, log_normaliser, log_mass = empty_results(operator, x, psi, beta, log_prior)
    (n, d), m = x.shape, psi.shape[0]
    if n == 0 or m == 0:
        return mapped.zero_(), log_normaliser.fill_(-math.inf), log_mass.fill_(-math.inf)
    options = _options(index_type(x, psi), x.dtype, m)
    rows, vectors = _tile(m, x.dtype)
    splits, per_split = _splits(n, m, d, vectors)
    columns = _columns(d, DIMENSIONS // 2 if x.dtype == torch.float64 else DIMENSIONS)
    bounds, masses = x.new_empty(2, splits, m, dtype=torch.float64)
    means = x.new_empty(splits, m, d, dtype=torch.float64)
    blocks = triton.cdiv(m, vectors)
    index = index_type(x, psi, means)
    with on_device(x):
        _equilibrium_normaliser_kernel[(triton.cdiv(n, rows),)](
            *(x, psi, beta, log_prior, log_normaliser, -math.log(m), n, m, d),
            *(x.stride(), psi.stride(), 0 if log_prior is None else log_prior.stride(0)),
            **options,
        )
        _equilibrium_sums_kernel[(blocks, splits)](
            *(x, psi, beta, log_normaliser, bounds, masses, means, per_split, n, m, d),
            *(x.stride(), psi.stride()),
            DIMENSIONS=columns,
            FITS=d <= columns <= IN_REGISTERS,
            **{**options, "INDEX": index},
        )
        _equilibrium_join_kernel[(blocks, max(1, triton.cdiv(d, columns)))](
            *(bounds, masses, means, mapped, log_mass, splits, m, d, mapped.stride()),
            INDEX=index,
            VECTORS=vectors,
            DIMENSIONS=columns,
            num_warps=WARPS,
        )
    return mapped, log_normaliser, log_mass


def equilibrium_map_backward(
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
    """Launch ``geco_fast::equilibrium_map_backward.triton``."""
    inputs = (x, psi, beta, log_prior, mapped, log_normaliser, log_mass)
    results = empty_results(
        torch.ops.geco_fast.equilibrium_map_backward.default,
        *(*inputs, grad_mapped, grad_log_normaliser, wanted),
    )
    needed = [bool(wanted >> k & 1) and t is not None for k, t in enumerate(inputs[:4])]
    d_x, d_psi, d_beta, d_log_prior = (
        result if need else None for result, need in zip(results, needed, strict=True)
    )
    (n, d), m = x.shape, psi.shape[0]
    if n == 0 or m == 0:
        for result in results:
            result.zero_()
        return results[0], results[1], results[2], results[3]
    rows, vectors = _tile(m, x.dtype)
    splits, per_split = _splits(n, m, d, vectors)
    columns = _columns(d, DIMENSIONS // 2)
    blocks = triton.cdiv(m, vectors)
    wide = log_normaliser.dtype
    rest = x.new_empty(n, dtype=wide)
    sums = x.new_empty(d, n, dtype=wide) if d_x is not None and m > vectors else None

    def scratch(of: Tensor | None, *shape: int) -> Tensor | None:
        return None if of is None else x.new_empty(splits, *shape, dtype=torch.float64)

    psi_sums, prior_sums = scratch(d_psi, d, m), scratch(d_log_prior, m)
    beta_sums = scratch(d_beta, blocks)
    held = [t for t in (x, psi, mapped, grad_mapped, d_x, sums, psi_sums, d_psi) if t is not None]
    options = _options(index_type(*held), x.dtype, m)
    g = mapped if grad_mapped is None else grad_mapped
    prior_stride = 0 if log_prior is None else log_prior.stride(0)
    with on_device(x):
        _equilibrium_rows_backward_kernel[(triton.cdiv(n, rows),)](
            *(*inputs, grad_mapped, grad_log_normaliser, rest, d_x, sums, -math.log(m)),
            0 if grad_log_normaliser is None else grad_log_normaliser.stride(0),
            *(n, m, d, x.stride(), psi.stride(), mapped.stride(), g.stride()),
            *((x if d_x is None else d_x).stride(), prior_stride),
            **{**options, **at_most(255)},
        )
        if d_psi is not None or d_beta is not None or d_log_prior is not None:
            _equilibrium_vectors_backward_kernel[(blocks, splits)](
                *(*inputs, grad_mapped, rest, psi_sums, prior_sums, beta_sums, -math.log(m)),
                *(per_split, n, m, d, x.stride(), psi.stride(), mapped.stride(), g.stride()),
                prior_stride,
                **options,
            )
            _equilibrium_join_backward_kernel[(blocks, max(1, triton.cdiv(d, columns)))](
                *(beta, psi_sums, prior_sums, beta_sums, d_psi, d_log_prior, d_beta),
                *(splits, splits * blocks, m, d),
                (psi if d_psi is None else d_psi).stride(),
                0 if d_log_prior is None else d_log_prior.stride(0),
                INDEX=options["INDEX"],
                VECTORS=vectors,
                DIMENSIONS=columns,
                num_warps=WARPS,
            )
    return results[0], results[1], results[2], results[3]
