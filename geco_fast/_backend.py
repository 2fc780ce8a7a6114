"""Which backend serves a call."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from geco_fast._checks import check_choice, exporting
from geco_fast._registry import KERNELS

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

# Operators with a backend that only an explicit choice takes: whether its kernel is the better one
# has not been measured.
ON_REQUEST = frozenset({("conv_lstm_step", "triton"), ("coupling_mlp", "triton")})


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend can't serve the call; the message says why and the mend."""


def _load_library() -> tuple[ModuleType | None, str]:
    """The C++ library, or None and the reason it is missing."""
    try:
        return importlib.import_module("geco_fast._C"), ""
    except ImportError as error:
        return None, (
            f"the C++ library is not loaded ({error}); reinstall geco-fast where a C++20 compiler "
            "is on the PATH"
        )


def _load_cuda_library() -> str:
    """Load CUDA's library; why it can't serve, or nothing if it can."""
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA; install a PyTorch build for your GPU"
    found = sorted(Path(__file__).parent.glob("_cuda*.so"))
    if not found:
        return (
            "this installation has no CUDA library; reinstall geco-fast from source with "
            "GECO_FAST_CUDA=1 where CUDA's nvcc is on the PATH"
        )
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the CUDA library is not loaded ({error}); reinstall geco-fast from source"
    return ""


LIBRARY, _LIBRARY_REASON = _load_library()
_CUDA_REASON = _load_cuda_library()
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def default_backend() -> str:
    """What "auto" means where nothing was chosen: the environment variable GECO_FAST_BACKEND."""
    if _ENVIRONMENT not in BACKENDS:
        check_choice("the environment variable GECO_FAST_BACKEND", _ENVIRONMENT, BACKENDS)
    return _ENVIRONMENT


class _Choice(threading.local):
    """What "auto" means in this thread; None until something was chosen."""

    def __init__(self) -> None:
        # An attribute of the instance, so that Dynamo guards compiled code on it.
        self.backend: str | None = None


_ENVIRONMENT = os.environ.get("GECO_FAST_BACKEND", "auto")
_choice = _Choice()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Set what ``backend="auto"`` means within a block, in this thread.

    Parameters
    ----------
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        The choice. Anything but "auto" is as strict as giving it to every call.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    check_choice("backend", backend, BACKENDS)
    previous = _choice.backend
    _choice.backend = backend
    try:
        yield
    finally:
        _choice.backend = previous


def _missing(backend: str) -> str:
    """Why a backend is not installed, with the mend; empty if it is."""
    if backend == "cpu":
        return _LIBRARY_REASON
    if backend == "cuda":
        return _CUDA_REASON
    if backend == "triton" and not _HAS_TRITON:
        return "Triton is not installed; pip install triton where it has a wheel"
    return ""


def interprets() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable_reason(backend: str) -> str:
    """Why a backend can't run on this machine, with the mend; empty if it can."""
    reason = _missing(backend)
    if reason or backend not in ("cuda", "triton") or torch.cuda.is_available():
        return reason
    if backend == "cuda":
        return "PyTorch sees no GPU; install a PyTorch build for yours, and its driver"
    if interprets():
        return ""
    return (
        "PyTorch sees no GPU; install a PyTorch build for yours, or set TRITON_INTERPRET=1 to "
        "run the kernels, slowly, on the CPU"
    )


def _always() -> bool:
    return True


# torch has no public way to ask for transforms. Should these names go, the reference serves every
# call: slower, and right.
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", _always)
_is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)


def _transformed() -> bool:
    """Whether `_transform_reason` has one, in less time."""
    return (
        _functorch_active()
        or getattr(forward_ad, "_current_level", 0) >= 0
        or exporting()
        # The ONNX exporters run a model under torch.jit.trace or torch.export.
        or _is_tracing()
    )


def _transform_reason() -> str:
    """Why only the reference can serve the call at present; empty if a kernel can, too."""
    if _functorch_active():
        return "torch.func transforms go through the reference; use backend='auto'"
    if getattr(forward_ad, "_current_level", 0) >= 0:
        return "forward-mode differentiation goes through the reference; use backend='auto'"
    if exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "an exported program needs PyTorch's own operators; use backend='auto'"
    return ""


def _refusal(operator: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """Why a backend can't serve such a call; empty if it can."""
    reason = _missing(backend)
    if reason:
        return reason
    kernels = KERNELS.get(operator, {})
    if backend not in kernels:
        return f"{operator} has no {backend} kernel in this release; use backend='auto'"
    wanted = "cpu" if backend == "cpu" or (backend == "triton" and interprets()) else "cuda"
    if device != wanted:
        return f"it serves {wanted} tensors, got one on {device}; move it or use backend='auto'"
    if dtype not in kernels[backend]:
        return f"its {operator} kernel does not take {dtype}; use backend='auto'"
    return ""


def _resolve(operator: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """Name the backend for a kind of call, transforms left aside."""
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        candidates = ("cpu",) if device == "cpu" else ("cuda", "triton")
        for candidate in candidates:
            on_request = (operator, candidate) in ON_REQUEST
            if not on_request and not _refusal(operator, candidate, device, dtype):
                return candidate
    elif backend != "reference":
        reason = _refusal(operator, backend, device, dtype)
        if reason:
            raise BackendUnavailable(f"{operator}: backend {backend!r} is unavailable: {reason}")
        return backend
    return "reference"


_resolve_once = functools.cache(_resolve)


def select(operator: str, tensor: Tensor, backend: str) -> str:
    """Name the backend that serves a call.

    Parameters
    ----------
    operator : str
        The public function's name.
    tensor : Tensor
        An operand; its device and dtype decide.
    backend : str
        What the caller asked for.

    Raises
    ------
    ValueError
        If the name is unknown.
    BackendUnavailable
        If an explicit choice can't serve the call.
    """
    if backend == "auto":
        backend = _choice.backend or default_backend()
    elif not isinstance(backend, str):
        check_choice("backend", backend, BACKENDS)
    device = "cpu" if tensor.is_cpu else tensor.device.type
    if not torch.compiler.is_compiling():
        chosen = _resolve_once(operator, backend, device, tensor.dtype)
        if chosen == "reference" or not _transformed():
            return chosen
    else:
        # Dynamo traces through the function and keeps its answer; it would warn of the cache.
        chosen = _resolve(operator, backend, device, tensor.dtype)
    reason = "" if chosen == "reference" else _transform_reason()
    if not reason:
        return chosen
    if backend == "auto":
        return "reference"
    raise BackendUnavailable(f"{operator}: backend {backend!r} is unavailable: {reason}")
