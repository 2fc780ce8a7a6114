"""Memory that one call takes at its peak, and where it comes from."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next call, for good; elsewhere do nothing.

    By default it hands large blocks back to the system, and takes the next from there, page by
    page, in zeros: that may take longer than the work, and how often it happens is chance.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            trim_threshold, mmap_max = -1, -4
            mallopt(trim_threshold, 2**31 - 1)
            mallopt(mmap_max, 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler's own messages, which it writes past Python, off the terminal."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Largest number of bytes that a call holds at once, beyond what was there before it.

    Counted are the blocks of torch's allocator for the device: results, gradients, saved tensors
    and the scratch of our kernels, which are tensors, too. What a library takes from elsewhere
    (oneDNN, MKL, jax) is not seen.
    """
    step()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    del kept
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak
