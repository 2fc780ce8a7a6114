"""What the Triton kernels share: how operands are seen, results allocated, and arithmetic.

Operands ``[B, ...]`` are seen as B rows of N elements, whose index is taken apart into as few
dimensions as their strides allow: one for dense operands. A program handles a tile of ROWS x COLS;
`TILES` is the one table of them. Offsets are in 32 bits where they fit and else in 64.

Arithmetic is in float32, or in float64 for float64. Triton's own exp and division are
approximations in float32; those below are good to about a unit in the last place, and made of what
the interpreter knows, too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# (ROWS, COLS), of which the narrowest that holds a row is taken. 1024 elements to four warps are
# eight to a thread: two loads of 16 bytes in float32, one in the 16-bit dtypes.
TILES = ((64, 16), (16, 64), (4, 256), (1, 1024))
WARPS = 4
# Elements that divide the strides where accesses are as wide as they can be. Elsewhere, and in
# float64, twice as many warps share a tile: registers for addresses and numbers spill otherwise.
VECTOR = 16
# Tiles of a row that a program sums at most, and programs that keep a GPU busy: longer rows are
# shared out among programs, few of them among more.
LONGEST = 16
BUSY = 512


@dataclass(frozen=True)
class Rows:
    """Tensors of one shape, seen as rows.

    `strides` has one entry for each tensor: that of the batch, then those of `sizes`.
    """

    batch: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    index: tl.dtype

    @cached_property
    def width(self) -> int:
        """N, the elements of a row."""
        return math.prod(self.sizes)

    @cached_property
    def tile(self) -> tuple[int, int]:
        """ROWS and COLS of a tile."""
        return next((shape for shape in TILES if shape[1] >= self.width), TILES[-1])

    @cached_property
    def tiles(self) -> int:
        """Tiles in a row."""
        return -(-self.width // self.tile[1])

    @cached_property
    def grid(self) -> tuple[int]:
        """One program for every tile."""
        return (-(-self.batch // self.tile[0]) * self.tiles,)

    @cached_property
    def splits(self) -> int:
        """Programs that share the tiles of a row where it is summed."""
        if self.tiles <= LONGEST:
            return 1
        blocks = -(-self.batch // self.tile[0])
        return min(self.tiles, max(-(-self.tiles // LONGEST), -(-BUSY // blocks)))

    @cached_property
    def geometry(self) -> tuple[Any, ...]:
        """The kernels' arguments batch, width, tiles and sizes."""
        return self.batch, self.width, self.tiles, self.sizes

    @cached_property
    def _options(self) -> dict[str, Any]:
        rows, cols = self.tile
        # Strides of a gradient that is expanded are zeros.
        dense = len(self.sizes) == 1 and all(
            inner in (0, 1) and (self.batch == 1 or outer % VECTOR == 0)
            for outer, inner in self.strides
        )
        warps = WARPS if dense else 2 * WARPS
        return {"INDEX": self.index, "ROWS": rows, "COLS": cols, "num_warps": warps}

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """The kernels' constants, for operands of a dtype."""
        if dtype == torch.float64:
            return {**self._options, "COMPUTE": tl.float64, "num_warps": 2 * WARPS}
        return {**self._options, "COMPUTE": tl.float32}


# Shape and strides.
Geometry = tuple[tuple[int, ...], tuple[int, ...]]


def _index_type(tensors: Iterable[Geometry]) -> tl.dtype:
    reach = 0
    for shape, strides in tensors:
        elements = math.prod(shape)
        if elements:
            last = sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))
            reach = max(reach, elements, last)
    return tl.int64 if reach >= 2**31 - 2**16 else tl.int32


def index_type(*tensors: Tensor) -> tl.dtype:
    """Type that holds every offset into the tensors, and those of a tile that runs past them."""
    return _index_type((tuple(tensor.shape), tensor.stride()) for tensor in tensors)


def as_rows(*tensors: Tensor | None, like: Tensor) -> Rows:
    """See tensors of the shape of ``like``, ``[B, ...]``, as rows in the order of its memory.

    None, for an operand that is not there, gets strides as well.
    """
    own = like.stride()
    return _as_rows(like.shape, own, *(own if t is None else t.stride() for t in tensors))


@functools.lru_cache(maxsize=4096)
def _as_rows(shape: tuple[int, ...], own: tuple[int, ...], *given: tuple[int, ...]) -> Rows:
    inner = [d for d in range(1, len(shape)) if shape[d] != 1]
    inner.sort(key=lambda d: -own[d])
    sizes: list[int] = []
    strides: list[tuple[int, ...]] = []  # [dimension][tensor]
    for d in inner:
        size, steps = shape[d], tuple(tensor[d] for tensor in given)
        if sizes and strides[-1] == tuple(size * step for step in steps):
            sizes[-1] *= size
            strides[-1] = steps
        else:
            sizes.append(size)
            strides.append(steps)
    if not sizes:
        sizes, strides = [1], [(1,) * len(given)]
    by_tensor = zip((tensor[0] for tensor in given), *strides, strict=True)
    index = _index_type((shape, tensor) for tensor in given)
    return Rows(shape[0], tuple(sizes), tuple(by_tensor), index)


class Form(NamedTuple):
    """Shape, strides and dtype of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device | str) -> Tensor:
        """A tensor of this form, of any values."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


@functools.lru_cache(maxsize=1024)
def _forms(operator: Any, *arguments: Any) -> tuple[Form, ...]:
    """Forms of the results, by the operator's shape function."""

    def restore(argument: Any) -> Any:
        if isinstance(argument, Form):
            return argument.empty("meta")
        return list(map(restore, argument)) if isinstance(argument, tuple) else argument

    found = operator(*map(restore, arguments))
    results = (found,) if isinstance(found, Tensor) else found
    return tuple(Form(tuple(r.shape), r.stride(), r.dtype) for r in results)


def empty_results(operator: Any, *arguments: Any) -> list[Tensor]:
    """Results of a call of an operator, allocated as its shape function says, of any values."""
    device: torch.device | None = None

    def form(argument: Any) -> Any:
        nonlocal device
        if isinstance(argument, Tensor):
            device = device or argument.device
            return Form(argument.shape, argument.stride(), argument.dtype)
        return tuple(map(form, argument)) if isinstance(argument, (list, tuple)) else argument

    given = tuple(map(form, arguments))
    assert device is not None
    return [each.empty(device) for each in _forms(operator, *given)]


def at_most(registers: int | None, free: tuple[int, ...] = ()) -> dict[str, int]:
    """Launch option that caps a thread's registers, if a number is given, where ptxas takes it.

    Left alone it spills a few values where that lets one more program share a processor. GPUs whose
    compute capability, as one number, is among the `free` ones have no cap.
    """
    if registers is None or torch.version.hip or triton.knobs.runtime.interpret:
        return {}
    target = triton.runtime.driver.active.get_current_target().arch
    return {"maxnreg": registers} if isinstance(target, int) and target not in free else {}


@contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Launch on the device of a tensor; Triton takes that device's current stream."""
    if tensor.is_cuda:
        with torch.cuda.device_of(tensor):
            yield
    else:
        yield


@triton.jit
def place(row, column, sizes, strides, INDEX: tl.constexpr):
    """Offset of elements of rows, whose column index is taken apart by sizes."""
    offset = row.to(INDEX) * strides[0]
    for k in tl.static_range(len(sizes) - 1, 0, -1):
        offset += (column % sizes[k]).to(INDEX) * strides[k + 1]
        column = column // sizes[k]
    return offset + column.to(INDEX) * strides[1]


@triton.jit
def tile_of(batch, width, tiles, INDEX: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, COLS] of this program's tile, and which of them exist."""
    program = tl.program_id(0).to(INDEX)
    row = program // tiles * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % tiles * COLS + tl.arange(0, COLS)[None, :]
    return row, column, (row < batch) & (column < width)


@triton.jit
def tiles_of(splits, steps, tiles, INDEX: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS, 1] of this program, and from where to where it goes through their tiles."""
    program = tl.program_id(0).to(INDEX)
    row = program // splits * ROWS + tl.arange(0, ROWS)[:, None]
    first = program % splits * steps
    return row, first, tl.minimum(first + steps, tiles)


@triton.jit
def _sum_rows_kernel(
    parts,  # [B, splits]
    sums,  # [B]
    batch,
    splits,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, COLS], parts.dtype.element_ty)
    for first in range(0, splits, COLS):
        column = first + tl.arange(0, COLS)[None, :]
        total += tl.load(parts + row * splits + column, (row < batch) & (column < splits), 0.0)
    tl.store(sums + row, tl.sum(total, 1, keep_dims=True), row < batch)


def sum_rows(rows: Rows, sums: Tensor, launch: Callable[[tuple[int], Tensor, int], None]) -> None:
    """Sum rows into `sums` ``[B]``: in one launch, or in parts that a second one adds in order.

    ``launch(grid, parts, steps)`` is to write the sums ``[B, splits]`` of `steps` tiles each.
    """
    steps = -(-rows.tiles // rows.splits)
    grid = (-(-rows.batch // rows.tile[0]) * rows.splits,)
    if rows.splits == 1:
        launch(grid, sums, steps)
        return
    parts = sums.new_empty(rows.batch, rows.splits)
    launch(grid, parts, steps)
    few, many = TILES[1]
    _sum_rows_kernel[(-(-rows.batch // few),)](
        parts, sums, rows.batch, rows.splits, ROWS=few, COLS=many, num_warps=WARPS
    )


@triton.jit
def exp(x):
    """exp(x) = 2^k exp(r) with x = k ln 2 + r, and a Taylor polynomial in r, |r| < 0.35."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # In this form NaN passes.
        bounded = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))
        k = tl.floor(tl.where(x == x, bounded, 0.0) * 1.4426950408889634 + 0.5)
        # ln 2 in two parts, k times the first of which is exact.
        r = bounded - k * 0.693359375 + k * 2.1219444005469058e-4
        p = 1 / 5040.0
        p = p * r + 1 / 720.0
        p = p * r + 1 / 120.0
        p = p * r + 1 / 24.0
        p = p * r + 1 / 6.0
        p = p * r + 0.5
        p = p * r + 1.0
        p = p * r + 1.0
        half = k.to(tl.int32) >> 1
        rest = k.to(tl.int32) - half
        p = p * ((half + 127) << 23).to(tl.float32, bitcast=True)
        return p * ((rest + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _reduced(x):
    """2^k / 2, r and exp(r) - 1 - r, with the k and r of `exp`; and whether k is 0, and r x."""
    if x.dtype == tl.float64:
        bounded = tl.where(x > 710.0, 710.0, tl.where(x < -700.0, -700.0, x))
        k = tl.floor(tl.where(x == x, bounded, 0.0) * 1.4426950408889634 + 0.5)
        r = bounded - k * 0.6931471803691238 - k * 1.9082149292705877e-10
        p = r * (1.0 / 15)
        for n in tl.static_range(14, 1, -1):
            p = (p + 1.0) * r * (1.0 / n)
        excess = p * r
        half = ((k.to(tl.int64) + 1022) << 52).to(tl.float64, bitcast=True)
    else:
        bounded = tl.where(x > 89.0, 89.0, tl.where(x < -87.0, -87.0, x))
        k = tl.floor(tl.where(x == x, bounded, 0.0) * 1.4426950408889634 + 0.5)
        r = bounded - k * 0.693359375 + k * 2.1219444005469058e-4
        p = 1 / 40320.0
        p = p * r + 1 / 5040.0
        p = p * r + 1 / 720.0
        p = p * r + 1 / 120.0
        p = p * r + 1 / 24.0
        p = p * r + 1 / 6.0
        p = p * r + 0.5
        excess = p * r * r
        half = ((k.to(tl.int32) + 126) << 23).to(tl.float32, bitcast=True)
    return half, r, excess, k == 0.0


@triton.jit
def expm1(x):
    """exp(x) - 1 = 2^k (exp(r) - 1) + 2^k - 1; half of it, doubled, for 2^k may be infinite."""
    half, r, excess, _ = _reduced(x)
    return 2.0 * (half * (excess + r) + (half - 0.5))


@triton.jit
def exp_excess(x):
    """exp(x) - 1 - x, which keeps all digits where x is small."""
    half, r, excess, small = _reduced(x)
    return tl.where(small, excess, 2.0 * (half * (excess + r) + (half - 0.5)) - x)


@triton.jit
def log1p_below_one(e):
    """log(1 + e) of e in [0, 1]: twice the series of atanh(w), w = e / (2 + e) <= 1/3."""
    w = divide(e, e + 2.0)
    z = w * w
    terms: tl.constexpr = 18 if e.dtype == tl.float64 else 8
    p = tl.full([], 1.0 / (2 * terms + 1), e.dtype)
    for n in tl.static_range(terms - 1, -1, -1):
        p = p * z + 1.0 / (2 * n + 1)
    return 2.0 * w * p


@triton.jit
def atan(x):
    """atan(x): brought to w with |w| <= tan(pi/8), where the series takes few terms.

    atan(t) = pi/4 + atan((t - 1) / (t + 1)) = pi/2 + atan(-1 / t).
    """
    t = tl.abs(x)
    middle, far = t > 0.4142135623730951, t > 2.414213562373095
    top = tl.where(far, -1.0, tl.where(middle, t - 1.0, t))
    bottom = tl.where(far, t, tl.where(middle, t + 1.0, 1.0))
    w = divide(top, bottom)
    base = tl.where(far, 1.5707963267948966, tl.where(middle, 0.7853981633974483, tl.zeros_like(t)))
    z = w * w
    if x.dtype == tl.float64:
        p = tl.full([], -1.0 / 47, x.dtype)
        for n in tl.static_range(22, 0, -1):
            p = p * z + (1.0 - 2.0 * (n % 2)) / (2 * n + 1)
    else:
        # Fitted to (atan(w) / w - 1) / w^2.
        p = tl.full([], -0.06025315468182573, x.dtype)
        p = p * z + 0.10573241094765892
        p = p * z - 0.14240785529293626
        p = p * z + 0.19998326911904496
        p = p * z - 0.33333312797497633
    y = base + (w * z * p + w)
    return tl.where(x < 0, -y, y)


@triton.jit
def divide(a, b):
    """a / b, rounded as PyTorch does; Triton's own is an approximation in float32."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def tanh(x):
    """tanh(x): a Pade approximant where it is small, so that small values keep all digits."""
    z = x * x
    if x.dtype == tl.float64:
        top = (((z + 990.0) * z + 135135.0) * z + 4729725.0) * z + 34459425.0
        bottom = (((45.0 * z + 13860.0) * z + 945945.0) * z + 16216200.0) * z + 34459425.0
    else:
        top = (z + 105.0) * z + 945.0
        bottom = (15.0 * z + 420.0) * z + 945.0
    small = tl.abs(x) < 0.625
    near = x * divide(tl.where(small, top, 1.0), tl.where(small, bottom, 1.0))
    far = 1.0 - divide(tl.full([], 2.0, x.dtype), exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(small, near, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))"""
    return divide(tl.full([], 1.0, x.dtype), 1.0 + exp(-x))
