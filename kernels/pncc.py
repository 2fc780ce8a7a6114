"""Normalised cross-correlation of patches, forward and backward; formulas: docs/ops/pncc.md.

Forward, a program owns a tile of a batch element's patches and takes them row of pixels by row: a
row's mean and the centred sums of its values are merged into those of the rows before it. For
gradients the same kernel leaves five coefficients of every patch, A, the means, Bx and By, and in
a second one a program owns a tile of pixels and adds up those of the patches that hold them. Sums
over patches are made a tile at a time and then in the order of tiles.

What has to move, in images: 2 read forward, and 2 more and 2 written backward; a pixel is read as
often as there are patches with it, from the caches.

What isn't obvious: every value is taken relative to the pixel at its patch's centre. Near values
differ exactly, so that means, which are kept in that form, have the digits of a patch's variation
and not of its brightness.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from geco_fast.kernels._common import at_most, divide, empty_results, index_type, on_device

# Elements of a tile, of a row of each patch times patches or of patches that hold each pixel times
# pixels, to four warps.
TILE = 1024
WARPS = 4
# Patches or pixels of a tile: neighbours in memory are read by neighbouring threads.
MOST = 128
FEWEST = 32
# Partial sums that are added at a time.
PARTIAL = 256


@triton.jit
def _place(part, strides, INDEX: tl.constexpr):
    """Offset of a place in space, given by its three coordinates."""
    offset = part[0].to(INDEX) * strides[2] + part[1].to(INDEX) * strides[3]
    return offset + part[2].to(INDEX) * strides[4]


@triton.jit
def _apart(index, sizes):
    """Take an index apart by the sizes of three dimensions: what is left, and three coordinates."""
    last = index % sizes[2]
    index = index // sizes[2]
    middle = index % sizes[1]
    index = index // sizes[1]
    return index // sizes[0], (index % sizes[0], middle, last)


@triton.jit
def _inverse_root(x):
    root = tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)
    return divide(tl.full(x.shape, 1.0, x.dtype), root)


@triton.jit
def _sum_of(partial, parts, divisor, COMPUTE: tl.constexpr, PARTIAL: tl.constexpr):
    """Partial sums, added and divided."""
    total = tl.zeros([PARTIAL], COMPUTE)
    for first in range(0, parts, PARTIAL):
        k = first + tl.arange(0, PARTIAL)
        total += tl.load(partial + k, k < parts, other=0.0)
    return divide(tl.sum(total), tl.full([], divisor, COMPUTE))


@triton.jit
def _patches_kernel(
    x,  # [B, C, *S]
    y,  # [B, C, *S]
    scores,  # [B, *S'] or [B, C, *S'], or None
    partial,  # [B, tiles], sums of a tile's scores, or None
    coefficients,  # [fields, B, patches], or None
    grad,  # as the scores or [B], or None for ones
    eps: tl.float64,
    smooth: tl.float64,
    divisor: tl.float64,  # of grad
    batch,
    channels,  # of a patch
    sizes,
    patch,
    steps,
    pads,
    counts,
    patches,
    tiles,
    x_strides,
    y_strides,
    score_strides,
    grad_strides,
    SQUARED: tl.constexpr,
    PADDED: tl.constexpr,
    EXACT: tl.constexpr,  # rows of a patch are whole tiles
    WANTS_X: tl.constexpr,
    WANTS_Y: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    PATCHES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    program = tl.program_id(0).to(INDEX)
    b = program // tiles
    index = program % tiles * PATCHES + tl.arange(0, PATCHES)[None, :]
    exists = index < patches
    group, at = _apart(index, counts)
    z = at[0] * steps[0] - pads[0]
    r = at[1] * steps[1] - pads[1]
    w = at[2] * steps[2] - pads[2]
    x_at = x + b * x_strides[0] + group * channels * x_strides[1]
    y_at = y + b * y_strides[0] + group * channels * y_strides[1]
    centre = (z + patch[0] // 2, r + patch[1] // 2, w + patch[2] // 2)
    x_pivot = tl.load(x_at + _place(centre, x_strides, INDEX), exists, other=0.0).to(COMPUTE)
    y_pivot = tl.load(y_at + _place(centre, y_strides, INDEX), exists, other=0.0).to(COMPUTE)
    x_at += _place((z, r, w), x_strides, INDEX)
    y_at += _place((z, r, w), y_strides, INDEX)

    x_mean = tl.zeros([1, PATCHES], COMPUTE)
    y_mean = tl.zeros([1, PATCHES], COMPUTE)
    xx = tl.zeros([1, PATCHES], COMPUTE)
    yy = tl.zeros([1, PATCHES], COMPUTE)
    xy = tl.zeros([1, PATCHES], COMPUTE)
    lost_xx = tl.zeros([1, PATCHES], COMPUTE)
    lost_yy = tl.zeros([1, PATCHES], COMPUTE)
    lost_xy = tl.zeros([1, PATCHES], COMPUTE)
    before = tl.full([], 0.0, COMPUTE)
    # For all the compiler shall know these are no neighbours: threads are to share patches out.
    element = tl.max_contiguous(tl.arange(0, ELEMENTS)[:, None], [1, 1]).to(INDEX)
    for c in range(channels):
        for dz in range(patch[0]):
            c_at, z_at = tl.full([], c, INDEX), tl.full([], dz, INDEX)
            x_row = x_at + (c_at * x_strides[1] + z_at * x_strides[2])
            y_row = y_at + (c_at * y_strides[1] + z_at * y_strides[2])
            for dr in range(patch[1]):
                in_row = exists
                if PADDED:
                    in_row &= (
                        (z + dz >= 0) & (z + dz < sizes[0]) & (r + dr >= 0) & (r + dr < sizes[1])
                    )
                for first in range(0, patch[2], ELEMENTS):
                    dw = first + element
                    here = in_row
                    if not EXACT:
                        valid = dw < patch[2]
                        here &= valid
                    if PADDED:
                        here &= (w + dw >= 0) & (w + dw < sizes[2])
                    x_values = tl.load(x_row + dw * x_strides[4], here, other=0.0)
                    y_values = tl.load(y_row + dw * y_strides[4], here, other=0.0)
                    x_values = x_values.to(COMPUTE) - x_pivot
                    y_values = y_values.to(COMPUTE) - y_pivot
                    if not EXACT:
                        x_values = tl.where(valid, x_values, 0.0)
                        y_values = tl.where(valid, y_values, 0.0)
                    # The row's means, less the pivots, and its centred sums.
                    count = tl.minimum(patch[2] - first, ELEMENTS).to(COMPUTE)
                    x_here = tl.sum(x_values, 0, keep_dims=True) / count
                    y_here = tl.sum(y_values, 0, keep_dims=True) / count
                    x_values -= x_here
                    y_values -= y_here
                    if not EXACT:
                        x_values = tl.where(valid, x_values, 0.0)
                        y_values = tl.where(valid, y_values, 0.0)
                    # What the distance of its means from those before adds.
                    x_here -= x_mean
                    y_here -= y_mean
                    share = count / (before + count)
                    weight = before * share
                    x_mean += x_here * share
                    y_mean += y_here * share
                    more_xx = tl.sum(x_values * x_values, 0, keep_dims=True)
                    more_yy = tl.sum(y_values * y_values, 0, keep_dims=True)
                    more_xy = tl.sum(x_values * y_values, 0, keep_dims=True)
                    more_xx += x_here * (x_here * weight)
                    more_yy += y_here * (y_here * weight)
                    more_xy += x_here * (y_here * weight)
                    # What an addition rounds away is added up, too.
                    lost_xx += more_xx - ((xx + more_xx) - xx)
                    lost_yy += more_yy - ((yy + more_yy) - yy)
                    lost_xy += more_xy - ((xy + more_xy) - xy)
                    xx += more_xx
                    yy += more_yy
                    xy += more_xy
                    before += count
                x_row += x_strides[3]
                y_row += y_strides[3]

    # An overflow is not one of NaN, and NaN is in the sums themselves.
    xx += tl.where(lost_xx == lost_xx, lost_xx, 0.0)
    yy += tl.where(lost_yy == lost_yy, lost_yy, 0.0)
    xy += tl.where(lost_xy == lost_xy, lost_xy, 0.0)

    eps = tl.full([], eps, COMPUTE)
    if SQUARED:
        # In this form NaN passes.
        x_norm = tl.where(xx < eps, eps, xx)
        y_norm = tl.where(yy < eps, eps, yy)
        score = divide(xy * xy + tl.full([], smooth, COMPUTE), x_norm * y_norm)
    else:
        x_norm = _inverse_root(xx + eps)
        y_norm = _inverse_root(yy + eps)
        score = xy * x_norm * y_norm
    if coefficients is not None:
        if grad is not None:
            g_at = grad + b * grad_strides[0] + group * grad_strides[1]
            g = tl.load(g_at + _place(at, grad_strides, INDEX), exists, other=0.0).to(COMPUTE)
        else:
            g = tl.full([1, PATCHES], 1.0, COMPUTE)
        g = divide(g, tl.full(g.shape, divisor, COMPUTE))
        to = coefficients + b * patches + index
        plane = tl.full([], patches, INDEX) * batch
        if SQUARED:
            a = 2.0 * g * divide(xy, x_norm * y_norm)
            b_x = tl.where(xx < eps, 0.0, 2.0 * g * divide(score, x_norm))
            b_y = tl.where(yy < eps, 0.0, 2.0 * g * divide(score, y_norm))
        else:
            a = g * x_norm * y_norm
            b_x = g * score * x_norm * x_norm
            b_y = g * score * y_norm * y_norm
        tl.store(to, a, exists)
        tl.store(to + plane, x_mean, exists)
        tl.store(to + 2 * plane, y_mean, exists)
        if WANTS_X:
            tl.store(to + 3 * plane, b_x, exists)
        if WANTS_Y:
            tl.store(to + (3 + WANTS_X) * plane, b_y, exists)
    if not SQUARED:
        score = tl.where(score > 1.0, 1.0, tl.where(score < -1.0, -1.0, score))
    if scores is not None:
        to = scores + b * score_strides[0] + group * score_strides[1]
        tl.store(to + _place(at, score_strides, INDEX), score, exists)
    if partial is not None:
        tl.store(partial + program, tl.sum(tl.where(exists, score, 0.0)))


@triton.jit
def _sum_kernel(
    partial,  # [B, parts]
    sums,  # [B]
    parts,
    divisor: tl.float64,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    row = tl.program_id(0).to(INDEX)
    total = _sum_of(partial + row * parts, parts, divisor, COMPUTE, PARTIAL)
    tl.store(sums + row, total)


@triton.jit
def _pixels_kernel(
    x,  # [B, C, *S]
    y,  # [B, C, *S]
    coefficients,  # [fields, B, patches]
    d_x,  # [B, C, *S] or None
    d_y,  # [B, C, *S] or None
    partial,  # [B, parts], or None
    sums,  # [B], or None
    divisor: tl.float64,  # of the sums
    batch,
    channels,
    groups,
    sizes,
    patch,
    steps,
    pads,
    counts,
    cover,  # patches that hold a pixel, at most
    patches,
    tiles,
    parts,
    x_strides,
    y_strides,
    d_x_strides,
    d_y_strides,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    PIXELS: tl.constexpr,
    COVER: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    program = tl.program_id(0).to(INDEX)
    b = program // tiles
    index = program % tiles * PIXELS + tl.arange(0, PIXELS)[None, :]
    group, at = _apart(index, sizes)
    exists = group < groups
    x_at = x + b * x_strides[0] + group * channels * x_strides[1]
    y_at = y + b * y_strides[0] + group * channels * y_strides[1]
    x_first = tl.load(x_at + _place(at, x_strides, INDEX), exists, other=0.0).to(COMPUTE)
    y_first = tl.load(y_at + _place(at, y_strides, INDEX), exists, other=0.0).to(COMPUTE)

    # The pixel in coordinates of the padded image, and the last patch that begins at or before it.
    z, r, w = at[0] + pads[0], at[1] + pads[1], at[2] + pads[2]
    last_z = tl.minimum(z // steps[0], counts[0] - 1)
    last_r = tl.minimum(r // steps[1], counts[1] - 1)
    last_w = tl.minimum(w // steps[2], counts[2] - 1)
    plane = tl.full([], patches, INDEX) * batch
    of_group = coefficients + b * patches + group * counts[0] * counts[1] * counts[2]

    total_a = tl.zeros([1, PIXELS], COMPUTE)
    if d_x is not None:
        total_b_x = tl.zeros([1, PIXELS], COMPUTE)
        total_x = tl.zeros([1, PIXELS], COMPUTE)
    if d_y is not None:
        total_b_y = tl.zeros([1, PIXELS], COMPUTE)
        total_y = tl.zeros([1, PIXELS], COMPUTE)
    element = tl.arange(0, COVER)[:, None].to(INDEX)
    for back_z in range(cover[0]):
        i = last_z - back_z
        in_z = exists & (i >= 0) & (i * steps[0] + patch[0] > z)
        centre_z = i * steps[0] - pads[0] + patch[0] // 2
        for back_r in range(cover[1]):
            j = last_r - back_r
            in_r = in_z & (j >= 0) & (j * steps[1] + patch[1] > r)
            centre_r = j * steps[1] - pads[1] + patch[1] // 2
            x_row = x_at + (centre_z * x_strides[2] + centre_r * x_strides[3])
            y_row = y_at + (centre_z * y_strides[2] + centre_r * y_strides[3])
            of_row = of_group + (i * counts[1] + j) * counts[2]
            for first in range(0, cover[2], COVER):
                k = last_w - (first + element)
                valid = in_r & (k >= 0) & (k * steps[2] + patch[2] > w)
                centre_w = k * steps[2] - pads[2] + patch[2] // 2
                x_pivot = tl.load(x_row + centre_w * x_strides[4], valid, other=0.0)
                y_pivot = tl.load(y_row + centre_w * y_strides[4], valid, other=0.0)
                of_patch = of_row + k
                a = tl.load(of_patch, valid, other=0.0)
                x_mean = tl.load(of_patch + plane, valid, other=0.0)
                y_mean = tl.load(of_patch + 2 * plane, valid, other=0.0)
                x_here = tl.where(valid, x_first - x_pivot.to(COMPUTE) - x_mean, 0.0)
                y_here = tl.where(valid, y_first - y_pivot.to(COMPUTE) - y_mean, 0.0)
                total_a += tl.sum(a, 0, keep_dims=True)
                if d_x is not None:
                    b_x = tl.load(of_patch + 3 * plane, valid, other=0.0)
                    total_b_x += tl.sum(b_x, 0, keep_dims=True)
                    total_x += tl.sum(a * y_here - b_x * x_here, 0, keep_dims=True)
                if d_y is not None:
                    b_y = tl.load(of_patch + (3 + (d_x is not None)) * plane, valid, other=0.0)
                    total_b_y += tl.sum(b_y, 0, keep_dims=True)
                    total_y += tl.sum(a * x_here - b_y * y_here, 0, keep_dims=True)

    # A pixel in no patch has no gradient, whatever its value.
    held = (last_z * steps[0] + patch[0] > z) & (last_r * steps[1] + patch[1] > r)
    held &= last_w * steps[2] + patch[2] > w
    x_at += _place(at, x_strides, INDEX)
    y_at += _place(at, y_strides, INDEX)
    if d_x is not None:
        to_x = d_x + b * d_x_strides[0] + group * channels * d_x_strides[1]
        to_x += _place(at, d_x_strides, INDEX)
    if d_y is not None:
        to_y = d_y + b * d_y_strides[0] + group * channels * d_y_strides[1]
        to_y += _place(at, d_y_strides, INDEX)
    for c in range(channels):
        channel = tl.full([], c, INDEX)
        x_here = tl.load(x_at + channel * x_strides[1], exists, other=0.0).to(COMPUTE) - x_first
        y_here = tl.load(y_at + channel * y_strides[1], exists, other=0.0).to(COMPUTE) - y_first
        if d_x is not None:
            value = tl.where(held, total_x + total_a * y_here - total_b_x * x_here, 0.0)
            tl.store(to_x + channel * d_x_strides[1], value, exists)
        if d_y is not None:
            value = tl.where(held, total_y + total_a * x_here - total_b_y * y_here, 0.0)
            tl.store(to_y + channel * d_y_strides[1], value, exists)

    if partial is not None:
        first_tile = program % tiles == 0
        own = tl.where(first_tile, parts, 0)
        total = _sum_of(partial + b * parts, own, divisor, COMPUTE, PARTIAL)
        tl.store(sums + b, total, first_tile)


def _three(values: tuple[int, ...], missing: int) -> tuple[int, int, int]:
    """One value for each of three dimensions."""
    a, b, c = (*(missing,) * (3 - len(values)), *values)
    return a, b, c


def _tile(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a tile, where each of `columns` has so many rows."""
    # A row past the last is work for nothing, and a tile costs as much as two rows besides.
    height = min((1, 2, 4, 8, 16, 32), key=lambda n: -(-rows // n) * (n + 2))
    return height, max(FEWEST, min(MOST, TILE // height, triton.next_power_of_2(columns)))


@dataclass(frozen=True)
class _Patches:
    """The patches of an image of three dimensions."""

    batch: int
    groups: int
    channels: int
    sizes: tuple[int, int, int]
    patch: tuple[int, int, int]
    steps: tuple[int, int, int]
    pads: tuple[int, int, int]

    @cached_property
    def counts(self) -> tuple[int, int, int]:
        given = zip(self.sizes, self.patch, self.steps, self.pads, strict=True)
        a, b, c = ((size + 2 * pad - patch) // step + 1 for size, patch, step, pad in given)
        return a, b, c

    @cached_property
    def total(self) -> int:
        """Patches of a batch element."""
        return self.groups * math.prod(self.counts)

    @cached_property
    def cover(self) -> tuple[int, int, int]:
        """Patches that hold a pixel, at most."""
        given = zip(self.patch, self.steps, self.counts, strict=True)
        a, b, c = (min(-(-patch // step), count) for patch, step, count in given)
        return a, b, c

    @cached_property
    def patch_tile(self) -> tuple[int, int]:
        """ELEMENTS and PATCHES."""
        return _tile(self.patch[2], self.total)

    @cached_property
    def pixel_tile(self) -> tuple[int, int]:
        """COVER and PIXELS."""
        return _tile(self.cover[2], self.groups * math.prod(self.sizes))

    @cached_property
    def patch_tiles(self) -> int:
        return -(-self.total // self.patch_tile[1])

    @cached_property
    def pixel_tiles(self) -> int:
        return -(-self.groups * math.prod(self.sizes) // self.pixel_tile[1])

    @cached_property
    def geometry(self) -> tuple[Any, ...]:
        """The kernels' arguments sizes, patch, steps, pads and counts."""
        return self.sizes, self.patch, self.steps, self.pads, self.counts


@functools.lru_cache(maxsize=1024)
def _patches_of(
    shape: tuple[int, ...],
    patch: tuple[int, ...],
    steps: tuple[int, ...],
    pads: tuple[int, ...],
    joint: bool,
) -> _Patches:
    """See images as such of three dimensions; what is given once holds for all of theirs."""
    batch, channels, *spatial = shape
    given = (per * (len(spatial) if len(per) == 1 else 1) for per in (patch, steps, pads))
    patch, steps, pads = map(_three, given, (1, 1, 0))
    sizes = _three(tuple(spatial), 1)
    # One patch has no other beside it: a step past the image stays within its index type.
    reach = zip(steps, sizes, pads, strict=True)
    steps = tuple(max(1, min(step, size + pad)) for step, size, pad in reach)
    groups, channels = (1, channels) if joint else (channels, 1)
    return _Patches(batch, groups, channels, sizes, patch, _three(steps, 1), pads)


def _image_strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Strides of an image: batch, channel and three dimensions."""
    if tensor is None:
        return None
    batch, channel, *spatial = tensor.stride()
    return batch, channel, *_three(tuple(spatial), 0)


def _score_strides(tensor: Tensor | None, joint: bool) -> tuple[int, ...] | None:
    """The same for scores, whose channels may be joint, or for their sums."""
    if tensor is None:
        return None
    batch, *rest = tensor.stride()
    group, *spatial = rest if rest and not joint else (0, *rest)
    return batch, group, *_three(tuple(spatial), 0)


@dataclass(frozen=True)
class _Call:
    """Images with an operator's options, and its launches."""

    x: Tensor
    y: Tensor
    patches: _Patches
    squared: bool
    joint: bool
    eps: float
    smooth: float
    reduction: str

    @property
    def compute(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def divisor(self) -> int:
        """Of the sum of scores."""
        return self.patches.total if self.reduction == "mean" else 1

    def _common(self, *tensors: Tensor | None) -> dict[str, Any]:
        present = [t for t in (self.x, self.y, *tensors) if t is not None]
        return {
            "COMPUTE": tl.float64 if self.x.dtype == torch.float64 else tl.float32,
            "INDEX": index_type(*present),
            "num_warps": WARPS,
        }

    def _partial(self) -> Tensor:
        shape = (self.patches.batch, self.patches.patch_tiles)
        return self.x.new_empty(shape, dtype=self.compute)

    def _score(
        self,
        scores: Tensor | None = None,
        partial: Tensor | None = None,
        coefficients: Tensor | None = None,
        grad: Tensor | None = None,
        wants: tuple[bool, bool] = (False, False),
    ) -> None:
        p = self.patches
        elements, columns = p.patch_tile
        _patches_kernel[(p.batch * p.patch_tiles,)](
            *(self.x, self.y, scores, partial, coefficients, grad),
            *(self.eps, self.smooth, self.divisor, p.batch, p.channels),
            *p.geometry,
            *(p.total, p.patch_tiles, _image_strides(self.x), _image_strides(self.y)),
            *(_score_strides(scores, self.joint), _score_strides(grad, self.joint)),
            SQUARED=self.squared,
            PADDED=any(p.pads),
            EXACT=p.patch[2] % elements == 0,
            WANTS_X=wants[0],
            WANTS_Y=wants[1],
            PATCHES=columns,
            ELEMENTS=elements,
            **self._common(scores, coefficients, grad),
            **at_most(128),
        )

    def forward(self, result: Tensor) -> Tensor:
        """Write the scores, or their sums."""
        if self.x.numel() == 0:
            return result.fill_(self.score_of_nothing)
        with on_device(self.x):
            if self.reduction == "none":
                self._score(scores=result)
            else:
                partial = self._partial()
                self._score(partial=partial)
                common = self._common(partial)
                _sum_kernel[(self.patches.batch,)](
                    *(partial, result, self.patches.patch_tiles, self.divisor),
                    PARTIAL=PARTIAL,
                    **common,
                )
        return result

    @property
    def score_of_nothing(self) -> float:
        """No values correlate to zero; the mean over no patches is not a number."""
        return math.nan if self.reduction == "mean" and self.patches.total == 0 else 0.0

    def gradients(
        self,
        grad: Tensor | None,
        d_x: Tensor | None,
        d_y: Tensor | None,
        sums: Tensor | None = None,
    ) -> None:
        """Write the gradients that have a place, and the sums: without `grad`, theirs."""
        p = self.patches
        wants = (d_x is not None, d_y is not None)
        with on_device(self.x):
            shape = (3 + sum(wants), p.batch, p.total)
            coefficients = self.x.new_empty(shape, dtype=self.compute)
            partial = None if sums is None else self._partial()
            self._score(None, partial, coefficients, grad, wants)
            cover, columns = p.pixel_tile
            _pixels_kernel[(p.batch * p.pixel_tiles,)](
                *(self.x, self.y, coefficients, d_x, d_y, partial, sums, self.divisor),
                *(p.batch, p.channels, p.groups),
                *p.geometry,
                *(p.cover, p.total, p.pixel_tiles, p.patch_tiles),
                *map(_image_strides, (self.x, self.y, d_x, d_y)),
                PIXELS=columns,
                COVER=cover,
                PARTIAL=PARTIAL,
                **self._common(coefficients, d_x, d_y),
                **at_most(248, free=(90, 100)),
            )


def _pncc_call(
    x: Tensor,
    y: Tensor,
    patch_size: list[int],
    stride: list[int],
    channels: str,
    eps: float,
    reduction: str,
) -> _Call:
    joint = channels == "joint"
    patches = _patches_of(x.shape, tuple(patch_size), tuple(stride), (0,), joint)
    return _Call(x, y, patches, False, joint, eps, 0.0, reduction)


def _lncc_call(
    x: Tensor, y: Tensor, kernel_size: int, smooth_nr: float, smooth_dr: float, reduction: str
) -> _Call:
    patches = _patches_of(x.shape, (kernel_size,), (1,), (kernel_size // 2,), False)
    return _Call(x, y, patches, True, False, smooth_dr, smooth_nr, reduction)


def _backward(
    call: _Call, grad: Tensor, wants_x: bool, wants_y: bool, results: list[Tensor]
) -> tuple[Tensor, Tensor]:
    d_x, d_y = results
    if call.x.numel() > 0 and (wants_x or wants_y):
        call.gradients(grad, d_x if wants_x else None, d_y if wants_y else None)
    return d_x, d_y


def _with_gradients(
    call: _Call, wants_x: bool, wants_y: bool, results: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    sums, d_x, d_y = results
    if call.x.numel() == 0:
        sums.fill_(call.score_of_nothing)
    else:
        call.gradients(None, d_x if wants_x else None, d_y if wants_y else None, sums)
    return sums, d_x, d_y


def pncc(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    """Launch ``geco_fast::pncc.triton``."""
    (result,) = empty_results(torch.ops.geco_fast.pncc.default, x, y, *options)
    return _pncc_call(x, y, *options).forward(result)


def pncc_backward(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::pncc_backward.triton``."""
    *given, grad, wants_x, wants_y = options
    results = empty_results(torch.ops.geco_fast.pncc_backward.default, x, y, *options)
    return _backward(_pncc_call(x, y, *given), grad, wants_x, wants_y, results)


def pncc_with_gradients(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ``geco_fast::pncc_with_gradients.triton``."""
    *given, wants_x, wants_y = options
    results = empty_results(torch.ops.geco_fast.pncc_with_gradients.default, x, y, *options)
    return _with_gradients(_pncc_call(x, y, *given), wants_x, wants_y, results)


def lncc(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    """Launch ``geco_fast::lncc.triton``."""
    (result,) = empty_results(torch.ops.geco_fast.lncc.default, x, y, *options)
    return _lncc_call(x, y, *options).forward(result)


def lncc_backward(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Launch ``geco_fast::lncc_backward.triton``."""
    *given, grad, wants_x, wants_y = options
    results = empty_results(torch.ops.geco_fast.lncc_backward.default, x, y, *options)
    return _backward(_lncc_call(x, y, *given), grad, wants_x, wants_y, results)


def lncc_with_gradients(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ``geco_fast::lncc_with_gradients.triton``."""
    *given, wants_x, wants_y = options
    results = empty_results(torch.ops.geco_fast.lncc_with_gradients.default, x, y, *options)
    return _with_gradients(_lncc_call(x, y, *given), wants_x, wants_y, results)
