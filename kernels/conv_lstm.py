"""A step of a convolutional LSTM, forward and backward; the formulas are on docs/ops/conv_lstm.md.

The convolution is a product [pixels, taps and channels] [taps and channels, gates] whose first
factor is gathered from the images as it is used. A program owns the four gates of some channels at
some pixels. It goes through the taps of x, then of h, so that nothing is concatenated, and makes
the new state of its own sums: pre-activations reach memory only where backward will want them.

Backward is given the gradients of the pre-activations. Those to x and h are the same product with
taps mirrored. For that to the weight a program owns some gates and channels of a tap and goes
through the pixels; where such tiles are few, pixels are shared out in parts, whose sums another
launch adds in order.

The weight is copied first, to have its columns innermost: a tile of it is whole lines of memory.
Tiles of images are read along channels where those are innermost in memory, else along pixels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from geco_fast.kernels._common import Form, at_most, index_type, on_device, sigmoid, tanh


class Tiles(NamedTuple):
    """ROWS and COLS of a tile of a product, DEPTH, the summands at a time, and who computes it."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most


# By the bytes of an element: for pixels of images where tiles are few; where they are many, for
# pre-activations and for gradients to images; for the gradient to the weight.
TILES = {
    2: (
        *(Tiles(32, 64, 32, 4, 3, 248), Tiles(128, 128, 32, 8, 3)),
        *(Tiles(128, 64, 32, 8, 3), Tiles(64, 64, 32, 8, 3, 255)),
    ),
    4: (
        *(Tiles(32, 64, 16, 4, 3, 248), Tiles(64, 64, 16, 8, 3)),
        *(Tiles(64, 64, 16, 8, 3), Tiles(64, 64, 16, 8, 3, 255)),
    ),
    8: (*(Tiles(32, 32, 16, 8, 3, 248),) * 3, Tiles(32, 64, 16, 8, 3, 255)),
}
# Programs that keep a GPU busy, the fewest pixels of a part, the most parts of a sum, and pixels
# that a sum takes before it starts anew, so that rounding does not grow with their number.
BUSY = 256
FEWEST_PIXELS = 256
MOST_PARTS = 64
SUMMANDS = {2: 8192, 4: 512, 8: 512}
JOINED = 1024
X, H, WEIGHT, BIAS = 1, 2, 4, 8


@triton.jit
def _load(pointer, row, column, row_exists, column_exists, ALONG_ROWS: tl.constexpr):
    """Tile [rows, columns] of elements at offsets, zero where there are none."""
    if ALONG_ROWS:
        exists = column_exists[:, None] & row_exists[None, :]
        return tl.trans(tl.load(pointer + (column[:, None] + row[None, :]), exists, other=0.0))
    else:
        exists = row_exists[:, None] & column_exists[None, :]
        return tl.load(pointer + (row[:, None] + column[None, :]), exists, other=0.0)


@triton.jit
def _store(pointer, tile, row, column, row_exists, column_exists, ALONG_ROWS: tl.constexpr):
    if ALONG_ROWS:
        exists = column_exists[:, None] & row_exists[None, :]
        tl.store(pointer + (column[:, None] + row[None, :]), tl.trans(tile), exists)
    else:
        exists = row_exists[:, None] & column_exists[None, :]
        tl.store(pointer + (row[:, None] + column[None, :]), tile, exists)


@triton.jit
def _place(image, y, x, strides, INDEX: tl.constexpr):
    """Offset of pixels' first channel."""
    return image.to(INDEX) * strides[0] + y.to(INDEX) * strides[2] + x.to(INDEX) * strides[3]


@triton.jit
def _add_taps(
    total,
    source,  # [B, channels, H, W]
    strides,
    channels,
    factor,  # [kh * kw, rows, columns], at the source's first row
    rows,
    columns,
    column,
    column_exists,
    image,
    y,
    x,
    exists,
    height,
    width,
    kernel,
    MIRRORED: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add to total the product of a source's neighbourhoods and the rows of its channels."""
    at = _place(image, y, x, strides, INDEX)
    from_tap = tl.full([], rows, INDEX) * columns
    above, left = kernel[0] // 2, kernel[1] // 2
    for first in range(0, channels, DEPTH):
        k = first + tl.arange(0, DEPTH)
        k_exists = k < channels
        k = k.to(INDEX)
        k_at = k * strides[1]
        factor_at = factor + (k[:, None] * columns + column[None, :])
        factor_exists = k_exists[:, None] & column_exists[None, :]
        for tap in range(0, kernel[0] * kernel[1]):
            down, right = tap // kernel[1] - above, tap % kernel[1] - left
            if MIRRORED:
                down, right = -down, -right
            to_y, to_x = y + down, x + right
            inside = exists & (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
            shift = down.to(INDEX) * strides[2] + right.to(INDEX) * strides[3]
            a = _load(source, at + shift, k_at, inside, k_exists, ALONG_ROWS)
            b = tl.load(factor_at + tap * from_tap, factor_exists, other=0.0)
            total = tl.dot(
                a.to(FACTOR), b.to(FACTOR), total, input_precision="ieee", out_dtype=total.dtype
            )
    return total


@triton.jit
def _conv_lstm_step_forward_kernel(
    x,  # [B, Cx, H, W] or None
    h,  # [B, C, H, W]
    c,  # [B, C, H, W]
    weight,  # [kh * kw, Cx + C, C, 4]
    bias,  # [4C] or None
    projection,  # [B, 4C, H, W] or None
    h_next,  # [B, C, H, W]
    c_next,  # [B, C, H, W]
    gates,  # [B, 4C, H, W], the pre-activations, or None
    forget_bias: tl.float64,
    pixels,
    height,
    width,
    inputs,
    channels,
    kernel,
    x_strides,
    h_strides,
    c_strides,
    bias_stride,
    projection_strides,
    h_next_strides,
    c_next_strides,
    gate_strides,
    X_ALONG_ROWS: tl.constexpr,
    H_ALONG_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FACTOR: tl.constexpr,
    PIXEL: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    pixel = (program // blocks).to(PIXEL) * ROWS + tl.arange(0, ROWS)
    first = program % blocks * CHANNELS
    exists = pixel < pixels
    line = pixel // width
    image, row, col = line // height, line % height, pixel % width
    column = first * 4 + tl.arange(0, CHANNELS * 4)
    column_exists = column < channels * 4
    total = tl.zeros([ROWS, CHANNELS * 4], COMPUTE)
    depth = inputs + channels
    if x is not None:
        total = _add_taps(
            *(total, x, x_strides, inputs, weight, depth, channels * 4, column, column_exists),
            *(image, row, col, exists, height, width, kernel),
            *(False, X_ALONG_ROWS, FACTOR, INDEX, DEPTH),
        )
    total = _add_taps(
        *(total, h, h_strides, channels, weight + tl.full([], inputs, INDEX) * channels * 4),
        *(depth, channels * 4, column, column_exists),
        *(image, row, col, exists, height, width, kernel),
        *(False, H_ALONG_ROWS, FACTOR, INDEX, DEPTH),
    )
    # A channel's gates stand side by side: i, f and g, o.
    even, odd = tl.split(tl.reshape(total, [ROWS, CHANNELS, 2, 2]))
    i, g = tl.split(even)
    f, o = tl.split(odd)
    channel = first + tl.arange(0, CHANNELS)
    known = channel < channels
    channel = channel.to(INDEX)
    step = tl.full([], channels, INDEX)
    if bias is not None:
        at = bias + channel * bias_stride
        i += tl.load(at, known, other=0.0).to(COMPUTE)[None, :]
        f += tl.load(at + step * bias_stride, known, other=0.0).to(COMPUTE)[None, :]
        g += tl.load(at + 2 * step * bias_stride, known, other=0.0).to(COMPUTE)[None, :]
        o += tl.load(at + 3 * step * bias_stride, known, other=0.0).to(COMPUTE)[None, :]
    if projection is not None:
        at = _place(image, row, col, projection_strides, INDEX)
        stride = projection_strides[1]
        i += _load(projection, at, channel * stride, exists, known, H_ALONG_ROWS).to(COMPUTE)
        at += step * stride
        f += _load(projection, at, channel * stride, exists, known, H_ALONG_ROWS).to(COMPUTE)
        at += step * stride
        g += _load(projection, at, channel * stride, exists, known, H_ALONG_ROWS).to(COMPUTE)
        at += step * stride
        o += _load(projection, at, channel * stride, exists, known, H_ALONG_ROWS).to(COMPUTE)
    if gates is not None:
        # Channels are innermost in these.
        at = _place(image, row, col, gate_strides, INDEX)
        stride = gate_strides[1]
        _store(gates, i, at, channel * stride, exists, known, False)
        _store(gates, f, at + step * stride, channel * stride, exists, known, False)
        _store(gates, g, at + 2 * step * stride, channel * stride, exists, known, False)
        _store(gates, o, at + 3 * step * stride, channel * stride, exists, known, False)
    at = _place(image, row, col, c_strides, INDEX)
    state = _load(c, at, channel * c_strides[1], exists, known, H_ALONG_ROWS).to(COMPUTE)
    forget_bias = tl.full([], forget_bias, COMPUTE)
    new = sigmoid(f + forget_bias) * state + sigmoid(i) * tanh(g)
    at = _place(image, row, col, c_next_strides, INDEX)
    _store(c_next, new, at, channel * c_next_strides[1], exists, known, H_ALONG_ROWS)
    at = _place(image, row, col, h_next_strides, INDEX)
    out = sigmoid(o) * tanh(new)
    _store(h_next, out, at, channel * h_next_strides[1], exists, known, H_ALONG_ROWS)


@triton.jit
def _conv_lstm_step_inputs_kernel(
    grad,  # [B, 4C, H, W], of the pre-activations
    weight,  # [kh * kw, 4C, Cx + C]
    d_x,  # [B, Cx, H, W] or None
    d_h,  # [B, C, H, W] or None
    pixels,
    height,
    width,
    inputs,
    channels,
    kernel,
    first,  # of x's channels and h's in a row
    last,
    grad_strides,
    d_x_strides,
    d_h_strides,
    X_ALONG_ROWS: tl.constexpr,
    H_ALONG_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FACTOR: tl.constexpr,
    PIXEL: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    blocks = tl.cdiv(last - first, COLS)
    program = tl.program_id(0)
    pixel = (program // blocks).to(PIXEL) * ROWS + tl.arange(0, ROWS)
    exists = pixel < pixels
    line = pixel // width
    image, row, col = line // height, line % height, pixel % width
    column = first + program % blocks * COLS + tl.arange(0, COLS)
    total = _add_taps(
        *(tl.zeros([ROWS, COLS], COMPUTE), grad, grad_strides, channels * 4, weight),
        *(channels * 4, inputs + channels, column, column < last),
        *(image, row, col, exists, height, width, kernel),
        *(True, False, FACTOR, INDEX, DEPTH),
    )
    if d_x is not None:
        at = _place(image, row, col, d_x_strides, INDEX)
        own = column.to(INDEX) * d_x_strides[1]
        _store(d_x, total, at, own, exists, column < inputs, X_ALONG_ROWS)
    if d_h is not None:
        at = _place(image, row, col, d_h_strides, INDEX)
        own = (column - inputs).to(INDEX) * d_h_strides[1]
        known = (column >= inputs) & (column < last)
        _store(d_h, total, at, own, exists, known, H_ALONG_ROWS)


@triton.jit
def _sum_over_pixels(
    grad,  # [B, 4C, H, W]
    grad_strides,
    gate,
    gates,
    source,  # [B, channels, H, W]
    strides,
    column,
    channels,
    down,
    right,
    first,
    last,
    height,
    width,
    ALONG_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    """Sums [gates, channels] over pixels of the gradient times the source's shifted pixels."""
    known, there = gate < gates, column < channels
    gate_at, column_at = gate.to(INDEX) * grad_strides[1], column.to(INDEX) * strides[1]
    source += down.to(INDEX) * strides[2] + right.to(INDEX) * strides[3]
    top, left = -down, -right
    bottom, end_of_line = height - down, width - right
    total = tl.zeros([gate.shape[0], column.shape[0]], COMPUTE)
    for start in range(first, last, SUMMANDS):
        end = tl.minimum(start + SUMMANDS, last)
        part = tl.zeros_like(total)
        for k in range(start, end, DEPTH):
            pixel = k + tl.arange(0, DEPTH)
            line = pixel // width
            image, y, x = line // height, line % height, pixel % width
            exists = pixel < end
            inside = exists & (y >= top) & (y < bottom) & (x >= left) & (x < end_of_line)
            at = _place(image, y, x, grad_strides, INDEX)
            d = _load(grad, at, gate_at, exists, known, False)
            at = _place(image, y, x, strides, INDEX)
            tile = _load(source, at, column_at, inside, there, ALONG_ROWS)
            d, tile = tl.trans(d).to(FACTOR), tile.to(FACTOR)
            part = tl.dot(d, tile, part, input_precision="ieee", out_dtype=part.dtype)
        total += part
    return total


@triton.jit
def _conv_lstm_step_weight_kernel(
    grad,  # [B, 4C, H, W], of the pre-activations
    x,  # [B, Cx, H, W] or None
    h,  # [B, C, H, W]
    sums,  # [parts, 4C, Cx + C, kh, kw]
    pixels,
    pixels_of_part,
    height,
    width,
    inputs,
    channels,
    kernel,
    x_blocks,
    blocks,  # of x and h together
    grad_strides,
    x_strides,
    h_strides,
    sum_strides,
    X_ALONG_ROWS: tl.constexpr,
    H_ALONG_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FACTOR: tl.constexpr,
    PIXEL: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    program = tl.program_id(0)
    block = program % blocks
    program = program // blocks
    gate_blocks = tl.cdiv(channels * 4, ROWS)
    gate = program % gate_blocks * ROWS + tl.arange(0, ROWS)
    program = program // gate_blocks
    taps = kernel[0] * kernel[1]
    tap = program % taps
    part = program // taps
    row, col = tap // kernel[1], tap % kernel[1]
    down, right = row - kernel[0] // 2, col - kernel[1] // 2
    first = part.to(PIXEL) * pixels_of_part
    last = tl.minimum(first + pixels_of_part, pixels)
    at = (
        part.to(INDEX) * sum_strides[0]
        + row.to(INDEX) * sum_strides[3]
        + col.to(INDEX) * sum_strides[4]
    )
    at += gate.to(INDEX) * sum_strides[1]
    known = gate < channels * 4
    if block >= x_blocks:
        own = (block - x_blocks) * COLS + tl.arange(0, COLS)
        total = _sum_over_pixels(
            *(grad, grad_strides, gate, channels * 4, h, h_strides, own, channels),
            *(down, right, first, last, height, width),
            *(H_ALONG_ROWS, COMPUTE, FACTOR, INDEX, DEPTH, SUMMANDS),
        )
        columns = (inputs + own).to(INDEX) * sum_strides[2]
        _store(sums, total, at, columns, known, own < channels, False)
    elif x is not None:
        own = block * COLS + tl.arange(0, COLS)
        total = _sum_over_pixels(
            *(grad, grad_strides, gate, channels * 4, x, x_strides, own, inputs),
            *(down, right, first, last, height, width),
            *(X_ALONG_ROWS, COMPUTE, FACTOR, INDEX, DEPTH, SUMMANDS),
        )
        columns = own.to(INDEX) * sum_strides[2]
        _store(sums, total, at, columns, known, own < inputs, False)


@triton.jit
def _conv_lstm_step_join_kernel(
    sums,  # [parts, elements]
    joined,  # [4C, Cx + C, kh, kw]
    parts,
    elements,
    inputs,  # Cx + C
    kernel,
    strides,
    INDEX: tl.constexpr,
    COLS: tl.constexpr,
):
    element = tl.program_id(0).to(INDEX) * COLS + tl.arange(0, COLS)
    exists = element < elements
    total = tl.zeros([COLS], sums.dtype.element_ty)
    for part in range(parts):
        total += tl.load(sums + element + part * tl.full([], elements, INDEX), exists, other=0.0)
    at = element % kernel[1] * strides[3]
    element = element // kernel[1]
    at += element % kernel[0] * strides[2]
    element = element // kernel[0]
    at += element % inputs * strides[1] + element // inputs * strides[0]
    tl.store(joined + at, total, exists)


def _along_rows(tensor: Tensor | None) -> bool:
    """Whether pixels are closer in memory than channels."""
    return tensor is not None and tensor.stride(3) < tensor.stride(1)


def _tiles_of_pixels(pixels: int, columns: int, few: Tiles, many: Tiles) -> Tiles:
    programs = triton.cdiv(pixels, many.rows) * triton.cdiv(columns, many.cols)
    return many if programs >= BUSY else few


@functools.lru_cache(maxsize=1024)
def _forms(operator: Any, device: torch.device, *operands: Form | None) -> tuple[Form, ...]:
    """Forms of the results: the layout that PyTorch's convolution has on a device."""
    with FakeTensorMode():
        fake = (None if operand is None else operand.empty(device) for operand in operands)
        found = operator(*fake, 0.0)
    return tuple(Form(tuple(r.shape), r.stride(), r.dtype) for r in found)


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def _options(tiles: Tiles, pixels: int, *tensors: Tensor | None) -> dict[str, Any]:
    """The kernels' constants."""
    present = [tensor for tensor in tensors if tensor is not None]
    dtype = getattr(tl, str(present[0].dtype).removeprefix("torch."))
    # The interpreter has no products of bfloat16.
    widened = dtype == tl.bfloat16 and triton.knobs.runtime.interpret
    return {
        "COMPUTE": tl.float64 if dtype == tl.float64 else tl.float32,
        "FACTOR": tl.float32 if widened else dtype,
        "PIXEL": tl.int64 if pixels >= 2**31 - 2**16 else tl.int32,
        "INDEX": index_type(*present),
        "ROWS": tiles.rows,
        "DEPTH": tiles.depth,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **at_most(tiles.registers),
    }


def _step(
    operator: Any,
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_projection: Tensor | None,
    forget_bias: float,
) -> list[Tensor]:
    operands = (x, h, c, weight, bias, x_projection)
    known = (None if t is None else Form(tuple(t.shape), t.stride(), t.dtype) for t in operands)
    results = [form.empty(h.device) for form in _forms(operator, h.device, *known)]
    h_next, c_next, gates = (*results, None)[:3]
    batch, channels, height, width = h.shape
    pixels, inputs = batch * height * width, weight.shape[1] - channels
    if c.numel() == 0:
        return results
    x = x if inputs else None
    factor = weight.unflatten(0, (4, channels)).permute(3, 4, 2, 1, 0).contiguous()
    tiles = _tiles_of_pixels(pixels, 4 * channels, *TILES[h.element_size()][:2])
    blocks = triton.cdiv(4 * channels, tiles.cols)
    state = (x_projection, h_next, c_next, gates)
    with on_device(h):
        _conv_lstm_step_forward_kernel[(triton.cdiv(pixels, tiles.rows) * blocks,)](
            *(x, h, c, factor, bias, *state, forget_bias),
            *(pixels, height, width, inputs, channels, tuple(weight.shape[2:])),
            *(_strides(x), h.stride(), c.stride(), None if bias is None else bias.stride(0)),
            *map(_strides, state),
            X_ALONG_ROWS=_along_rows(x),
            H_ALONG_ROWS=_along_rows(h),
            CHANNELS=tiles.cols // 4,
            **_options(tiles, pixels, h, x, c, factor, *state),
        )
    return results


def conv_lstm_step(
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_projection: Tensor | None,
    forget_bias: float,
) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::conv_lstm_step.triton``."""
    operator = torch.ops.geco_fast.conv_lstm_step.triton
    h_next, c_next = _step(operator, x, h, c, weight, bias, x_projection, forget_bias)
    return h_next, c_next


def conv_lstm_step_with_gates(
    x: Tensor | None,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_projection: Tensor | None,
    forget_bias: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ``geco_fast::conv_lstm_step_with_gates.triton``."""
    operator = torch.ops.geco_fast.conv_lstm_step_with_gates.triton
    h_next, c_next, gates = _step(operator, x, h, c, weight, bias, x_projection, forget_bias)
    return h_next, c_next, gates


def _inputs_gradients(
    grad: Tensor, weight: Tensor, d_x: Tensor | None, d_h: Tensor | None, inputs: int
) -> None:
    batch, gates, height, width = grad.shape
    pixels, channels = batch * height * width, gates // 4
    factor = weight.permute(2, 3, 0, 1).contiguous()
    first = inputs if d_x is None else 0
    last = inputs if d_h is None else inputs + channels
    few, _, many, _ = TILES[grad.element_size()]
    tiles = _tiles_of_pixels(pixels, last - first, few, many)
    blocks = triton.cdiv(last - first, tiles.cols)
    _conv_lstm_step_inputs_kernel[(triton.cdiv(pixels, tiles.rows) * blocks,)](
        *(grad, factor, d_x, d_h, pixels, height, width, inputs, channels),
        *(tuple(weight.shape[2:]), first, last),
        *map(_strides, (grad, d_x, d_h)),
        X_ALONG_ROWS=_along_rows(d_x),
        H_ALONG_ROWS=_along_rows(d_h),
        COLS=tiles.cols,
        **_options(tiles, pixels, grad, factor, d_x, d_h),
    )


def _weight_gradient(grad: Tensor, x: Tensor | None, h: Tensor, d_weight: Tensor) -> None:
    batch, gates, height, width = grad.shape
    pixels, channels = batch * height * width, gates // 4
    depth, *kernel = d_weight.shape[1:]
    inputs = depth - channels
    tiles = TILES[grad.element_size()][3]
    x_blocks = triton.cdiv(inputs, tiles.cols)
    blocks = x_blocks + triton.cdiv(channels, tiles.cols)
    programs = blocks * triton.cdiv(gates, tiles.rows) * kernel[0] * kernel[1]
    parts = min(triton.cdiv(BUSY, programs), triton.cdiv(pixels, FEWEST_PIXELS), MOST_PARTS)
    pixels_of_part = triton.cdiv(triton.cdiv(pixels, parts), tiles.depth) * tiles.depth
    parts = triton.cdiv(pixels, pixels_of_part)
    sums = d_weight[None]
    if parts > 1:
        compute = torch.promote_types(grad.dtype, torch.float32)
        sums = grad.new_empty((parts, *d_weight.shape), dtype=compute)
    _conv_lstm_step_weight_kernel[(programs * parts,)](
        *(grad, x if inputs else None, h, sums, pixels, pixels_of_part, height, width),
        *(inputs, channels, tuple(kernel), x_blocks, blocks),
        *map(_strides, (grad, x, h, sums)),
        X_ALONG_ROWS=_along_rows(x),
        H_ALONG_ROWS=_along_rows(h),
        COLS=tiles.cols,
        SUMMANDS=SUMMANDS[grad.element_size()],
        **_options(tiles, pixels, grad, x, h, sums),
    )
    if parts > 1:
        elements = d_weight.numel()
        _conv_lstm_step_join_kernel[(triton.cdiv(elements, JOINED),)](
            *(sums, d_weight, parts, elements, depth, tuple(kernel), d_weight.stride()),
            INDEX=index_type(sums, d_weight),
            COLS=JOINED,
        )


def conv_lstm_step_backward(
    grad: Tensor, x: Tensor | None, h: Tensor, weight: Tensor, wanted: int
) -> tuple[Tensor, ...]:
    """Launch ``geco_fast::conv_lstm_step_backward.triton``."""
    found = [
        torch.empty_like(like) if like is not None and wanted & bit else None
        for like, bit in ((x, X), (h, H), (weight, WEIGHT))
    ]
    d_x, d_h, d_weight = found
    if grad.numel() == 0:
        for each in found:
            if each is not None:
                each.zero_()
    else:
        with on_device(grad):
            if d_h is not None or (d_x is not None and d_x.numel()):
                _inputs_gradients(grad, weight, d_x, d_h, weight.shape[1] - h.shape[1])
            if d_weight is not None:
                _weight_gradient(grad, x, h, d_weight)
    d_bias = grad.sum((0, 2, 3)) if wanted & BIAS else None
    return tuple(
        grad.new_empty(0, dtype=torch.float32) if each is None else each
        for each in (*found, d_bias)
    )
