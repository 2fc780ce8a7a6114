"""What a machine can do at most, and the least that an operator has to do."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from geco_fast._backend import LIBRARY
from geco_fast.testing.cases import Case

COPIED_BYTES = 2**28
COPIES = 5
FMA_SECONDS = 0.02
FMA_TRIES = 5


class Work(NamedTuple):
    """The least that a call moves and computes, in bytes and in arithmetic operations."""

    bytes: float
    operations: float


class Limits(NamedTuple):
    """Bandwidth of a copy far beyond the cache, and peak of float32 multiply-adds, per second."""

    bytes_per_s: float
    operations_per_s: float | None

    def seconds(self, work: Work) -> float:
        """Least time of some work: to move its bytes or to compute, whichever is longer."""
        arithmetic = work.operations / self.operations_per_s if self.operations_per_s else 0.0
        return max(work.bytes / self.bytes_per_s, arithmetic)

    def bound(self, work: Work) -> str:
        """Which of the two it is."""
        moving = work.bytes / self.bytes_per_s
        return "memory" if self.seconds(work) == moving else "arithmetic"


def measure_limits(threads: int, device: str = "cpu") -> Limits:
    """Measure both: with as many threads on the instruction set in use, or those of a GPU."""
    if device != "cpu":
        return _gpu_limits(device)
    source = torch.rand(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(COPIES):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return Limits(2 * COPIED_BYTES / min(times), _multiply_adds_per_s(threads))


@functools.cache
def _gpu_limits(device: str) -> Limits:
    """Bandwidth of a copy, and the rate of PyTorch's float32 matrix product, without TF32."""
    source = torch.rand(4 * COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.rand(8192, 8192, device=device) for _ in range(2))
    copied = min(_device_seconds(lambda: target.copy_(source)) for _ in range(COPIES))
    multiplied = min(_device_seconds(lambda: torch.mm(left, right)) for _ in range(COPIES))
    return Limits(2 * 4 * COPIED_BYTES / copied, 2 * 8192**3 / multiplied)


def _device_seconds(action: Callable[[], object]) -> float:
    """Time of an action on the current GPU, by its events."""
    action()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _multiply_adds_per_s(threads: int) -> float | None:
    if LIBRARY is None:
        return None
    with ThreadPoolExecutor(threads) as pool:
        return max(
            sum(pool.map(LIBRARY.fma_peak, [FMA_SECONDS] * threads)) for _ in range(FMA_TRIES)
        )


def _operations(exponentials: float, reciprocals: float, others: float) -> float:
    """Operations of a value, in units of the peak: an instruction stands where two could.

    An exponential is 12 instructions on the arithmetic ports, a reciprocal or a root 3.
    """
    return 2 * (12 * exponentials + 3 * reciprocals + others)


def _numel(case: Case, name: str) -> int:
    return math.prod(case.shapes[name])


def _lstm_gates(case: Case) -> tuple[Work, Work]:
    n = _numel(case, "c")
    return (
        Work(4 * 7 * n, n * _operations(5, 3, 12)),
        Work(4 * 12 * n, n * _operations(5, 3, 20)),
    )


def _gaussian_latent(case: Case) -> tuple[Work, Work]:
    n = _numel(case, "q_mean")
    written = len(case.gradient_names())
    return (
        Work(4 * 6 * n, n * _operations(3, 0, 11)),
        Work(4 * (6 + written) * n, n * _operations(3, 0, 15)),
    )


def _affine_coupling(case: Case) -> tuple[Work, Work]:
    n = _numel(case, "x")
    # Exponentials, reciprocals and other instructions of the map that bounds the scale.
    scale_map = {"exp": (0, 0, 0), "tanh": (1, 1, 3), "atan": (0, 1, 12), "sigmoid": (1, 1, 8)}
    exponentials, reciprocals, others = scale_map[case.options.get("scale_map", "tanh")]
    # Forward, the gradient to the shift is that of the result and need not be written.
    written = 3 if case.options.get("inverse") else 2
    return (
        Work(4 * 4 * n, n * _operations(exponentials + 1, reciprocals, others + 3)),
        Work(4 * (3 + written) * n, n * _operations(exponentials + 1, reciprocals, others + 5)),
    )


def _squared_error(case: Case) -> tuple[Work, Work]:
    n = _numel(case, "x")
    written = len(case.gradient_names())
    return Work(4 * 2 * n, 3 * n), Work(4 * (2 + written) * n, (1 + written) * n)


def _windowed(case: Case) -> tuple[Work, Work]:
    """Five sliding sums of two additions a value and dimension, and about ten for each value."""
    n = _numel(case, "x")
    operations = n * (5 * 2 * (len(case.shapes["x"]) - 2) + 10)
    return Work(4 * 2 * n, operations), Work(4 * 4 * n, operations)


def _geco_update(case: Case) -> tuple[Work, Work]:
    n, constraints = _numel(case, "c_hat"), _numel(case, "ema")
    return (
        Work(4 * (n + 4 * constraints), n + constraints * _operations(1, 1, 10)),
        Work(4 * n, n),
    )


def _coupling_mlp(case: Case) -> tuple[Work, Work]:
    """What backward needs of the hidden layers is written once and read once."""
    shapes = case.shapes
    batch = shapes["x"][0]
    weights = [shape for name, shape in shapes.items() if name.startswith("weight")]
    values = sum(map(math.prod, weights))
    operands = sum(map(math.prod, shapes.values()))
    result, hidden = batch * weights[-1][0], batch * sum(shape[0] for shape in weights[:-1])
    moved = operands + _numel(case, "x") + values + result + 2 * hidden
    return (
        Work(4 * (operands + result), 2 * batch * values),
        Work(4 * moved, 4 * batch * values),
    )


def _equilibrium_map(case: Case) -> tuple[Work, Work]:
    (n, d), (m, _) = case.shapes["x"], case.shapes["psi"]
    exponential = _operations(1, 0, 0)
    return (
        Work(4 * (2 * n * d + 2 * m * d + n), n * m * (8 * d + exponential)),
        Work(4 * (3 * n * d + 4 * m * d + 3 * n + m), n * m * (11 * d + 2 * exponential)),
    )


def _conv2d(case: Case) -> tuple[Work, Work]:
    """As a direct convolution; one of fewer products passes this limit."""
    batch, inputs, height, width = case.shapes["x"]
    outputs = case.shapes["weight"][0]
    pixels, weight = batch * height * width, _numel(case, "weight")
    moved = pixels * (inputs + outputs) + weight + outputs
    return (
        Work(4 * moved, 2 * pixels * weight),
        Work(4 * (moved + pixels * inputs + weight), 4 * pixels * weight),
    )


# Forward and backward, in float32, as the operators' pages count them.
LEAST: dict[str, Callable[[Case], tuple[Work, Work]]] = {
    "affine_coupling": _affine_coupling,
    "conv2d": _conv2d,
    "coupling_mlp": _coupling_mlp,
    "equilibrium_map": _equilibrium_map,
    "gaussian_latent": _gaussian_latent,
    "geco_update": _geco_update,
    "lncc": _windowed,
    "lstm_gates": _lstm_gates,
    "pncc": _windowed,
    "squared_error": _squared_error,
}


def operator_work(case: Case, backward: bool) -> Work | None:
    """Least work of a case, forward or forward and backward; None where nobody counted it."""
    if case.operator not in LEAST:
        return None
    forward, back = LEAST[case.operator](case)
    return Work(*(a + b for a, b in zip(forward, back, strict=True))) if backward else forward
