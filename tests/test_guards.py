"""The tests' own traps: new memory is NaN, and stray writes around operands are found."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from geco_fast._checks import FLOATING
from geco_fast.testing.cases import lay_out
from geco_fast.testing.guards import MARGIN, Guards

SIZES = (1, 3, 64, 1000, 5000, 300_000, 5_000_000)
needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt")
    or "tcache_count=0" not in os.environ.get("GLIBC_TUNABLES", ""),
    reason="new memory is always NaN only with glibc and GLIBC_TUNABLES as the Makefile sets it",
)


@needs_glibc
@pytest.mark.parametrize("dtype", FLOATING)
def test_new_tensors_are_nan(dtype: torch.dtype) -> None:
    for size in SIZES:
        torch.zeros(size, dtype=dtype)
        assert torch.empty(size, dtype=dtype).isnan().all()


@needs_glibc
@pytest.mark.parametrize("size", SIZES)
def test_tensors_that_kernels_allocate_are_nan(size: int) -> None:
    """Through the function that the C++ library calls."""
    torch.zeros(size)
    (path,) = Path(torch.__file__).parent.glob("lib/libtorch_cpu.so")
    library = ctypes.CDLL(str(path))
    int64, int32 = ctypes.c_int64, ctypes.c_int32
    handle, data = ctypes.c_void_p(), ctypes.c_void_p()
    made = library.aoti_torch_empty_strided(
        int64(1),
        (int64 * 1)(size),
        (int64 * 1)(1),
        int32(library.aoti_torch_dtype_float32()),
        int32(library.aoti_torch_device_type_cpu()),
        int32(0),
        ctypes.byref(handle),
    )
    assert made == 0
    assert library.aoti_torch_get_data_ptr(handle, ctypes.byref(data)) == 0
    held = ctypes.string_at(data.value, 4 * size)
    assert library.aoti_torch_delete_tensor_object(handle) == 0
    assert set(held) == {0xFF}


@pytest.mark.parametrize("dtype", [*FLOATING, torch.int64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
def test_guarded_copies_are_alike(dtype: torch.dtype, layout: str) -> None:
    tensor = torch.arange(3 * 4 * 5.0).view(3, 4, 5)
    tensor = lay_out(tensor.to(dtype) if dtype.is_floating_point else tensor, layout).to(dtype)
    for original in (tensor, tensor[:0], tensor[1:, 1:, 2:], tensor[0, 0, 0]):
        guards = Guards()
        placed = guards.place(original)
        assert torch.equal(placed, original)
        assert placed.stride() == original.stride()
        if original.numel():
            assert placed.data_ptr() % 64 == original.data_ptr() % 64
        guards.check()


@pytest.mark.parametrize("where", ["before", "after", "between", "in"])
@pytest.mark.parametrize("written", [False, True])
def test_stray_writes_are_found(where: str, written: bool) -> None:
    guards = Guards()
    guards.place(torch.randn(4))
    placed = guards.place(torch.randn(10)[::2])
    element = {"before": -1, "after": 9, "between": 1, "in": 2}[where]
    ctypes.memset(placed.data_ptr() + 4 * element, 0, 1)
    if written and where == "in":
        guards.check(written=[placed])
        return
    with pytest.raises(AssertionError, match="operand 1 of shape"):
        guards.check(written=[placed] if written else [])


def test_guards_reach_as_far_as_a_vector() -> None:
    assert MARGIN >= 4 * 64
