"""A chain of linear layers, forward and backward; the formulas are on docs/ops/coupling_mlp.md.

Forward, and for the gradients D of the pre-activations u, a program owns some rows of the batch and
takes them through all layers. What a layer gives it writes to global memory and reads back in the
next, after a barrier: nobody else needs it. A second kernel makes the gradients of all weights and
biases, a program a tile of one of them; where tiles are few the batch is cut into parts, whose sums
are added in a third launch, in order.

Kept for backward is one value for each hidden unit and row: y where it tells the derivative, u for
elu and silu, from which backward makes y again. A layer's values are [B, H], rows 32 elements
apart or a multiple of that.

Sums are of at most SUMMANDS products at a time, so that rounding does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from geco_fast.kernels._common import at_most, divide, exp, expm1, index_type, on_device, tanh

# Activations of which backward is given u: its derivative is no function of y, or would cancel.
KEEPS_INPUT = ("elu", "silu")


class Tiles(NamedTuple):
    """ROWS and COLS of a tile of a product, DEPTH, the summands at a time, and who computes it."""

    rows: int
    cols: int
    depth: int
    warps: int
    registers: int | None = None  # of a thread, at most


# By the bytes of an element: for rows of a small batch, for those of a large one, and for the
# gradient of a weight.
TILES = {
    2: (Tiles(16, 64, 64, 4), Tiles(64, 64, 32, 8, 128), Tiles(64, 64, 32, 4)),
    4: (Tiles(16, 64, 16, 4, 248), Tiles(64, 32, 16, 8, 248), Tiles(64, 32, 16, 4, 248)),
    8: (*(Tiles(16, 32, 16, 4, 248),) * 2, Tiles(32, 32, 16, 8, 248)),
}
LARGE_BATCH = 8192
SUMMANDS = 512
STAGES = 3
# Programs that shall share the parameters' gradients at least, and what parts of the batch are for
# that: not too short, and few enough to be added by one program.
PROGRAMS = 512
FEWEST_ROWS = 512
MOST_PARTS = 64


@triton.jit
def _activate(u, ACTIVATION: tl.constexpr):
    # A NaN passes all of them.
    if ACTIVATION == "relu":
        return tl.where(u < 0.0, 0.0, u)
    elif ACTIVATION == "leaky_relu":
        return tl.where(u > 0.0, u, u * 0.01)
    elif ACTIVATION == "tanh":
        return tanh(u)
    elif ACTIVATION == "elu":
        return tl.where(u > 0.0, u, expm1(u))
    else:
        return divide(u, 1.0 + exp(-u))


@triton.jit
def _through_activation(kept, d, ACTIVATION: tl.constexpr):
    """d times the derivative, where y or u is kept."""
    if ACTIVATION == "relu":
        return tl.where(kept <= 0.0, 0.0, d)
    elif ACTIVATION == "leaky_relu":
        return tl.where(kept > 0.0, d, d * 0.01)
    elif ACTIVATION == "tanh":
        return d * (1.0 - kept * kept)
    elif ACTIVATION == "elu":
        return tl.where(kept > 0.0, d, d * exp(kept))
    else:
        # Sigmoid q and 1 - q, neither of which cancels.
        e = exp(-tl.abs(kept))
        larger = divide(tl.full([], 1.0, e.dtype), 1.0 + e)
        smaller = e * larger
        q = tl.where(kept > 0.0, larger, smaller)
        rest = tl.where(kept > 0.0, smaller, larger)
        return d * (q * (1.0 + kept * rest))


@triton.jit
def _place(row, column, strides, INDEX: tl.constexpr):
    return row.to(INDEX) * strides[0] + column.to(INDEX) * strides[1]


@triton.jit
def _add_product(
    total,
    a,
    a_strides,
    b,
    b_strides,
    row,
    rows,
    column,
    columns,
    first,
    last,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add to total some rows of a [rows, K] times some columns of b [K, columns]."""
    for start in range(first, last, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a_tile = tl.load(
            a + _place(row[:, None], k[None, :], a_strides, INDEX),
            (row < rows)[:, None] & (k < last)[None, :],
            other=0.0,
        )
        b_tile = tl.load(
            b + _place(k[:, None], column[None, :], b_strides, INDEX),
            (k < last)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        total = tl.dot(
            a_tile.to(FACTOR),
            b_tile.to(FACTOR),
            total,
            input_precision="ieee",
            out_dtype=total.dtype,
        )
    return total


@triton.jit
def _product(
    a,
    a_strides,
    b,
    b_strides,
    row,
    rows,
    column,
    columns,
    first,
    last,
    COMPUTE: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    """Some rows of a [rows, K] times some columns of b [K, columns], K from first to last."""
    total = tl.zeros([row.shape[0], column.shape[0]], COMPUTE)
    if a.dtype.element_ty.primitive_bitwidth == 16:
        # float32's rounding is nothing beside that of the operands.
        return _add_product(
            *(total, a, a_strides, b, b_strides, row, rows, column, columns),
            *(first, last, FACTOR, INDEX, DEPTH),
        )
    else:
        for start in range(first, last, SUMMANDS):
            total += _add_product(
                *(tl.zeros_like(total), a, a_strides, b, b_strides, row, rows, column, columns),
                *(start, tl.minimum(start + SUMMANDS, last), FACTOR, INDEX, DEPTH),
            )
        return total


@triton.jit
def _coupling_mlp_forward_kernel(
    values,  # x and then what each layer gives, [B, H] each, the last of them the result
    kept,  # u of each hidden layer, [B, H], or None
    projection,  # [B, H1] or None
    weights,  # [H of the layer, H before]
    biases,  # [H] or None
    value_strides,
    kept_strides,
    projection_strides,
    weight_strides,
    bias_strides,
    batch,
    widths,  # the columns of `values`
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    for layer in tl.static_range(len(widths) - 1):
        if layer > 0:
            tl.debug_barrier()
        for start in range(0, widths[layer + 1], COLS):
            column = start + tl.arange(0, COLS)
            exists = (row < batch)[:, None] & (column < widths[layer + 1])[None, :]
            u = _product(
                values[layer],
                value_strides[layer],
                weights[layer],
                (weight_strides[layer][1], weight_strides[layer][0]),
                row,
                batch,
                column,
                widths[layer + 1],
                0,
                widths[layer],
                COMPUTE,
                FACTOR,
                INDEX,
                DEPTH,
                SUMMANDS,
            )
            if biases[layer] is not None:
                at = biases[layer] + column.to(INDEX) * bias_strides[layer]
                u += tl.load(at, column < widths[layer + 1], other=0.0).to(COMPUTE)[None, :]
            if layer == 0 and projection is not None:
                at = _place(row[:, None], column[None, :], projection_strides, INDEX)
                u += tl.load(projection + at, exists, other=0.0).to(COMPUTE)
            if layer + 2 < len(widths):
                if kept[layer] is not None:
                    at = _place(row[:, None], column[None, :], kept_strides[layer], INDEX)
                    tl.store(kept[layer] + at, u, exists)
                u = _activate(u, ACTIVATION)
            at = _place(row[:, None], column[None, :], value_strides[layer + 1], INDEX)
            tl.store(values[layer + 1] + at, u, exists)


@triton.jit
def _coupling_mlp_backward_kernel(
    kept,  # of each hidden layer, [B, H]
    values,  # y of each hidden layer where it is to be made again, [B, H], or None
    grads,  # D of each layer, [B, H]; None below LOWEST
    d_x,  # [B, H0] or None
    weights,
    kept_strides,
    value_strides,
    grad_strides,
    d_x_strides,
    weight_strides,
    batch,
    widths,  # of x and of what each layer gives
    LOWEST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    for layer in tl.static_range(len(widths) - 2, LOWEST - 1, -1):
        for start in range(0, widths[layer], COLS):
            column = start + tl.arange(0, COLS)
            exists = (row < batch)[:, None] & (column < widths[layer])[None, :]
            if layer > LOWEST or (layer == 0 and d_x is not None):
                d = _product(
                    grads[layer],
                    grad_strides[layer],
                    weights[layer],
                    weight_strides[layer],
                    row,
                    batch,
                    column,
                    widths[layer],
                    0,
                    widths[layer + 1],
                    COMPUTE,
                    FACTOR,
                    INDEX,
                    DEPTH,
                    SUMMANDS,
                )
            if layer > 0:
                at = _place(row[:, None], column[None, :], kept_strides[layer - 1], INDEX)
                u = tl.load(kept[layer - 1] + at, exists, other=0.0).to(COMPUTE)
                if values[layer - 1] is not None:
                    at = _place(row[:, None], column[None, :], value_strides[layer - 1], INDEX)
                    tl.store(values[layer - 1] + at, _activate(u, ACTIVATION), exists)
                if layer > LOWEST:
                    at = _place(row[:, None], column[None, :], grad_strides[layer - 1], INDEX)
                    tl.store(grads[layer - 1] + at, _through_activation(u, d, ACTIVATION), exists)
            elif d_x is not None:
                at = _place(row[:, None], column[None, :], d_x_strides, INDEX)
                tl.store(d_x + at, d, exists)
        tl.debug_barrier()


@triton.jit
def _column_sums(
    a,
    strides,
    column,
    columns,
    first,
    last,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    """Sums of some columns of a [rows, columns] over the rows from first to last."""
    total = tl.zeros([DEPTH, column.shape[0]], COMPUTE)
    for start in range(first, last, SUMMANDS):
        part = tl.zeros_like(total)
        for k in range(start, tl.minimum(start + SUMMANDS, last), DEPTH):
            row = k + tl.arange(0, DEPTH)
            part += tl.load(
                a + _place(row[:, None], column[None, :], strides, INDEX),
                (row < last)[:, None] & (column < columns)[None, :],
                other=0.0,
            ).to(COMPUTE)
        total += part
    return tl.sum(total, 0)


@triton.jit
def _coupling_mlp_parameters_kernel(
    values,  # what comes into each layer, [B, H before]
    grads,  # D of each layer, [B, H]
    d_weights,  # [H, H before] or None
    d_biases,  # [H] or None
    partial,  # [parts, tiles, ROWS, COLS], sums over parts of the batch, or None
    value_strides,
    grad_strides,
    d_weight_strides,
    batch,
    rows_of_part,
    parts,
    tiles,  # of all gradients
    widths,
    JOINS: tl.constexpr,  # what `partial` holds
    COMPUTE: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    program = tl.program_id(0)
    first = (program // tiles).to(INDEX) * rows_of_part
    last = tl.minimum(first + rows_of_part, batch)
    slot = tl.arange(0, ROWS)
    slots = slot[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tile = program % tiles
    for layer in tl.static_range(len(widths) - 1):
        if d_weights[layer] is not None:
            across = tl.cdiv(widths[layer], COLS)
            count = tl.cdiv(widths[layer + 1], ROWS) * across
            if (tile >= 0) & (tile < count):
                row = tile // across * ROWS + slot
                column = tile % across * COLS + tl.arange(0, COLS)
                if JOINS:
                    total = tl.zeros([ROWS, COLS], COMPUTE)
                    for part in range(parts):
                        at = (part * tiles + program).to(INDEX) * (ROWS * COLS)
                        total += tl.load(partial + at + slots)
                else:
                    total = _product(
                        grads[layer],
                        (grad_strides[layer][1], grad_strides[layer][0]),
                        values[layer],
                        value_strides[layer],
                        row,
                        widths[layer + 1],
                        column,
                        widths[layer],
                        first,
                        last,
                        COMPUTE,
                        FACTOR,
                        INDEX,
                        DEPTH,
                        SUMMANDS,
                    )
                if partial is None or JOINS:
                    at = _place(row[:, None], column[None, :], d_weight_strides[layer], INDEX)
                    exists = (row < widths[layer + 1])[:, None] & (column < widths[layer])[None, :]
                    tl.store(d_weights[layer] + at, total, exists)
                else:
                    at = program.to(INDEX) * (ROWS * COLS)
                    tl.store(partial + at + slots, total)
            tile -= count
        if d_biases[layer] is not None:
            count = tl.cdiv(widths[layer + 1], ROWS)
            if (tile >= 0) & (tile < count):
                row = tile * ROWS + slot
                if JOINS:
                    sums = tl.zeros([ROWS], COMPUTE)
                    for part in range(parts):
                        at = (part * tiles + program).to(INDEX) * (ROWS * COLS)
                        sums += tl.load(partial + at + slot)
                else:
                    sums = _column_sums(
                        grads[layer],
                        grad_strides[layer],
                        row,
                        widths[layer + 1],
                        first,
                        last,
                        COMPUTE,
                        INDEX,
                        DEPTH,
                        SUMMANDS,
                    )
                if partial is None or JOINS:
                    tl.store(d_biases[layer] + row, sums, row < widths[layer + 1])
                else:
                    at = program.to(INDEX) * (ROWS * COLS)
                    tl.store(partial + at + slot, sums)
            tile -= count


def _options(
    tiles: Tiles, dtype: torch.dtype, *operands: Sequence[Tensor | None]
) -> dict[str, Any]:
    """The kernels' constants."""
    rows, cols, depth, warps, registers = tiles
    factor = getattr(tl, str(dtype).removeprefix("torch."))
    if factor == tl.bfloat16 and triton.knobs.runtime.interpret:
        factor = tl.float32  # The interpreter has no products of bfloat16.
    tensors = [tensor for each in operands for tensor in each if tensor is not None]
    return {
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "FACTOR": factor,
        "INDEX": index_type(*tensors),
        "ROWS": rows,
        "COLS": cols,
        "DEPTH": depth,
        "SUMMANDS": SUMMANDS,
        "num_warps": warps,
        "num_stages": STAGES,
        **at_most(registers),
    }


def _tiles_of_rows(x: Tensor) -> Tiles:
    return TILES[x.element_size()][x.shape[0] >= LARGE_BATCH]


def _strides(tensors: Sequence[Tensor | None]) -> tuple[tuple[int, ...], ...]:
    return tuple((0, 0) if tensor is None else tensor.stride() for tensor in tensors)


def _widths(x: Tensor, weights: Sequence[Tensor]) -> tuple[int, ...]:
    """Columns of x, and of what each layer gives."""
    return x.shape[1], *(weight.shape[0] for weight in weights)


def _padded(width: int) -> int:
    return -(-width // 32) * 32


def _layers(memory: Tensor, batch: int, widths: Sequence[int]) -> list[Tensor]:
    """Layers ``[B, H]``, one after another in memory."""
    sizes = [batch * _padded(width) for width in widths]
    parts = memory[: sum(sizes)].split(sizes) if sizes else ()
    return [
        part.view(batch, _padded(width))[:, :width]
        for part, width in zip(parts, widths, strict=True)
    ]


def _new_layers(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    size = sum(x.shape[0] * _padded(width) for width in widths)
    return _layers(x.new_empty(size), x.shape[0], widths)


def _layers_in_turn(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """New layers, each in the memory of the last but one."""
    both = _new_layers(x, [max(widths)] * min(len(widths), 2)) if widths else []
    return [both[k % 2][:, :width] for k, width in enumerate(widths)]


def _forward(
    x: Tensor,
    projection: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    hidden: Tensor | None,
) -> Tensor:
    batch, widths = x.shape[0], _widths(x, weights)
    result = x.new_empty(batch, widths[-1])
    if batch == 0:
        return result
    layers = None if hidden is None else _layers(hidden, batch, widths[1:-1])
    kept: Sequence[Tensor | None] = [None] * (len(weights) - 1)
    if layers is not None and activation in KEEPS_INPUT:
        kept, layers = layers, None
    if layers is None:
        layers = _layers_in_turn(x, widths[1:-1])
    values = (x, *layers, result)
    present = [bias if bias.numel() else None for bias in biases]
    tiles = _tiles_of_rows(x)
    with on_device(x):
        _coupling_mlp_forward_kernel[(triton.cdiv(batch, tiles.rows),)](
            *(values, tuple(kept), projection, tuple(weights), tuple(present)),
            *(_strides(values), _strides(kept)),
            None if projection is None else projection.stride(),
            *(_strides(weights), tuple(bias.stride(0) for bias in biases)),
            *(batch, widths),
            ACTIVATION=activation,
            **_options(tiles, x.dtype, values, kept, [projection], weights, biases),
        )
    return result


def coupling_mlp(
    x: Tensor,
    context_projection: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
) -> Tensor:
    """Launch ``geco_fast::coupling_mlp.triton``."""
    return _forward(x, context_projection, weights, biases, activation, None)


def coupling_mlp_with_hidden(
    x: Tensor,
    context_projection: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::coupling_mlp_with_hidden.triton``."""
    hidden = x.new_empty(x.shape[0] * sum(map(_padded, _widths(x, weights)[1:-1])))
    return _forward(x, context_projection, weights, biases, activation, hidden), hidden


def _parameters(
    values: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    d_weights: Sequence[Tensor | None],
    d_biases: Sequence[Tensor | None],
    batch: int,
    widths: tuple[int, ...],
) -> None:
    """Gradients of weights and biases."""
    like = next(tensor for tensor in (*d_weights, *d_biases) if tensor is not None)
    shape = TILES[like.element_size()][2]
    tiles = 0
    for layer, width in enumerate(widths[1:]):
        down, across = triton.cdiv(width, shape.rows), triton.cdiv(widths[layer], shape.cols)
        tiles += down * across if d_weights[layer] is not None else 0
        tiles += down if d_biases[layer] is not None else 0
    if tiles == 0:
        return
    parts = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(batch, FEWEST_ROWS), MOST_PARTS)
    rows_of_part = triton.cdiv(triton.cdiv(batch, max(parts, 1)), shape.depth) * shape.depth
    parts = triton.cdiv(batch, rows_of_part) if batch else 1
    partial = None
    if parts > 1:
        compute = torch.promote_types(like.dtype, torch.float32)
        partial = like.new_empty(parts * tiles * shape.rows * shape.cols, dtype=compute)
    options = _options(shape, like.dtype, values, grads, d_weights, [partial])
    with on_device(like):
        for joins in (False, True)[: 1 + (parts > 1)]:
            _coupling_mlp_parameters_kernel[(tiles if joins else tiles * parts,)](
                *(tuple(values), tuple(grads), tuple(d_weights), tuple(d_biases), partial),
                *(_strides(values), _strides(grads), _strides(d_weights)),
                *(batch, rows_of_part, parts, tiles, widths),
                JOINS=joins,
                **options,
            )


def coupling_mlp_backward(
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    hidden: Tensor,
    grad: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Launch ``geco_fast::coupling_mlp_backward.triton``."""
    batch, count, widths = x.shape[0], len(weights), _widths(x, weights)
    wants_x, wants_projection = wanted[:2]
    wants_weight, wants_bias = wanted[2 : 2 + count], wanted[2 + count :]
    d_x = torch.empty_like(x) if wants_x else None
    d_projection = x.new_empty(batch, widths[1]) if wants_projection else None
    d_weights = [
        torch.empty_like(weight) if need else None
        for weight, need in zip(weights, wants_weight, strict=True)
    ]
    d_biases = [
        x.new_empty(width) if need else None
        for width, need in zip(widths[1:], wants_bias, strict=True)
    ]
    # Nothing is wanted of the layers below.
    lowest = 0
    if not (wants_x or wants_projection):
        needed = (w or b for w, b in zip(wants_weight, wants_bias, strict=True))
        lowest = next((layer for layer, need in enumerate(needed) if need), count - 1)

    kept = _layers(hidden, batch, widths[1:-1])
    values: list[Tensor | None] = list(kept)
    made: list[Tensor | None] = [None] * (count - 1)
    if activation in KEEPS_INPUT:
        again = [layer for layer in range(count - 1) if wants_weight[layer + 1]]
        new = _new_layers(x, [widths[layer + 1] for layer in again])
        for layer, each in zip(again, new, strict=True):
            made[layer] = each
        values = made
    grads: list[Tensor | None] = [None] * count
    if d_projection is not None:
        grads[0] = d_projection if count > 1 else d_projection.copy_(grad)
    grads[-1] = grad
    below = range(lowest + wants_projection, count - 1)
    for layer, each in zip(below, _new_layers(x, [widths[k + 1] for k in below]), strict=True):
        grads[layer] = each

    if batch > 0 and (wants_x or lowest + 1 < count or any(each is not None for each in made)):
        tiles = _tiles_of_rows(x)
        with on_device(x):
            _coupling_mlp_backward_kernel[(triton.cdiv(batch, tiles.rows),)](
                *(tuple(kept), tuple(made), tuple(grads), d_x, tuple(weights)),
                *(_strides(kept), _strides(made), _strides(grads)),
                None if d_x is None else d_x.stride(),
                *(_strides(weights), batch, widths),
                LOWEST=lowest,
                ACTIVATION=activation,
                **_options(tiles, x.dtype, kept, made, grads, [d_x], weights),
            )
    if any(wants_weight) or any(wants_bias):
        _parameters((x, *values), grads, d_weights, d_biases, batch, widths)
    none = x.new_empty(0, dtype=torch.float32)
    return [
        none.clone() if each is None else each
        for each in (d_x, d_projection, *d_weights, *d_biases)
    ]
