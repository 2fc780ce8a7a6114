"""Guard regions: operands whose surroundings are watched."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

MARGIN = 256
_ALIGNMENT = 64
# In a process with AddressSanitizer's run time, surroundings are out of bounds for reading, too.
_poison = getattr(ctypes.CDLL(None), "__asan_poison_memory_region", None)
_unpoison = getattr(ctypes.CDLL(None), "__asan_unpoison_memory_region", None)


def distinct(tensor: Tensor) -> Tensor:
    """One element for each place in memory: dimensions at stride 0 are cut to their first."""
    for d, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[d] > 1:
            tensor = tensor.narrow(d, 0, 1)
    return tensor


def _reach(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last in memory, both included."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def moved(tensor: Tensor, device: str) -> Tensor:
    """A tensor on a device, with its strides; itself if it is there."""
    if tensor.device.type == device:
        return tensor
    length = _reach(tensor) * tensor.element_size()
    memory = torch.full((length,), 0xFF, dtype=torch.uint8, device=device).view(tensor.dtype)
    placed = memory.as_strided(tensor.shape, tensor.stride())
    distinct(placed).copy_(distinct(tensor.detach()))
    return placed


class Guards:
    """Copies of operands, each amid bytes 0xff, which are NaN in every floating dtype.

    They are made on `device`, or where the operands are. `check` finds whatever was written since:
    around an operand, between its elements, or, unless the operator is meant to, in it.
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self._watched: list[tuple[Tensor, Tensor, Tensor]] = []

    def place(self, tensor: Tensor) -> Tensor:
        """Return a copy amid a guard region, of the same strides and alignment."""
        length = _reach(tensor) * tensor.element_size()
        size = 2 * MARGIN + _ALIGNMENT + length
        device = self._device or tensor.device
        buffer = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
        # An empty tensor has no address, and its strides need not fit the alignment.
        address = tensor.data_ptr() if length else buffer.data_ptr()
        start = MARGIN + (address - buffer.data_ptr() - MARGIN) % _ALIGNMENT
        placed = self._view(buffer, start, length, tensor)
        distinct(placed).copy_(distinct(tensor.detach()))
        self._watched.append((placed, buffer, buffer.clone()))
        if _poison is not None and buffer.is_cpu:
            first, last = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
            _poison(ctypes.c_void_p(first), ctypes.c_size_t(start))
            end = first + start + length
            _poison(ctypes.c_void_p(end), ctypes.c_size_t(last - end))
        return placed

    @staticmethod
    def _view(buffer: Tensor, start: int, length: int, like: Tensor) -> Tensor:
        window = buffer[start : start + length].view(like.dtype)
        return window.as_strided(like.shape, like.stride(), window.storage_offset())

    def place_all(self, arguments: Any) -> Any:
        """`place` every tensor of a nested structure."""
        return _pytree.tree_map_only(Tensor, self.place, arguments)

    def check(self, written: Iterable[Tensor] = ()) -> None:
        """Raise AssertionError if a byte changed that is not an element of one of `written`."""
        allowed = {id(tensor) for tensor in written}
        for k, (placed, buffer, before) in enumerate(self._watched):
            if _unpoison is not None and buffer.is_cpu:
                _unpoison(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(buffer.numel()))
            if torch.equal(buffer, before):
                continue
            if id(placed) in allowed:
                start = int(placed.storage_offset()) * placed.element_size()
                length = buffer.numel() - start
                length -= length % placed.element_size()
                self._view(before, start, length, placed).copy_(placed)
                if torch.equal(buffer, before):
                    continue
            changed = (buffer != before).nonzero().flatten().tolist()
            raise AssertionError(
                f"operand {k} of shape {list(placed.shape)} and strides {list(placed.stride())}: "
                f"bytes {changed[:8]} of its guard region were written to (the operand itself "
                f"starts at {placed.storage_offset() * placed.element_size()})"
            )
