"""Constructor and call arguments shared by the modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from geco_fast._checks import check_count, check_floating, check_rank, check_shape, describe


def odd_kernel(kernel_size: int | Sequence[int]) -> tuple[int, int]:
    """``(height, width)`` of an odd kernel given as one integer or as a pair."""
    pair = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    if not isinstance(pair, Sequence) or len(pair) != 2 or any(type(k) is not int for k in pair):
        raise TypeError(f"kernel_size must be an integer or a pair, got {describe(kernel_size)}")
    if any(k < 1 or k % 2 == 0 for k in pair):
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size!r}")
    return pair[0], pair[1]


def check_image_shape(name: str, shape: Sequence[int], *, least: int = 1) -> tuple[int, int, int]:
    """Return ``(C, H, W)``; raise unless its sides are at least ``least``."""
    shape = tuple(shape)
    if len(shape) != 3:
        raise ValueError(f"{name} must be (C, H, W), got {shape!r}")
    channels, height, width = shape
    check_count(f"{name}[0]", channels)
    check_count(f"{name}[1]", height, least=least)
    check_count(f"{name}[2]", width, least=least)
    return channels, height, width


def check_batch(
    name: str, value: Tensor, shape: Sequence[int], why: str, *, batch: int | None = None
) -> int:
    """Return ``B``; raise unless ``value`` is a floating tensor ``[B, *shape]``, ``B`` as given."""
    check_floating(name, value)
    check_rank(name, value, (len(shape) + 1,), f"[B, {', '.join(map(str, shape))}]")
    batch = value.shape[0] if batch is None else batch
    check_shape(name, value, (batch, *shape), why)
    return batch
