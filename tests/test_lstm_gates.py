"""What is special to lstm_gates; the rules common to all operators are in test_operators.py."""

from __future__ import annotations

import math

import pytest
import torch
from marks import every_level, needs_library
from torch import Tensor

import geco_fast as gf
from geco_fast import reference
from geco_fast._checks import FLOATING
from geco_fast.testing.budget import assert_within_budget


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    batch, channels, *spatial = shape
    gates = torch.randn(batch, 4 * channels, *spatial, dtype=dtype)
    return gates, torch.randn(batch, channels, *spatial, dtype=dtype)


def test_is_pytorchs_lstm_cell() -> None:
    torch.manual_seed(0)
    cell = torch.nn.LSTMCell(5, 7, dtype=torch.float64)
    x, h, c = (torch.randn(3, n, dtype=torch.float64) for n in (5, 7, 7))
    gates = x @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh
    for got, wanted in zip(gf.ops.lstm_gates(gates, c), cell(x, (h, c)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_forget_bias_is_added_to_the_forget_gate() -> None:
    gates, c = operands(2, 3, 4, dtype=torch.float64)
    shifted = gates.clone()
    shifted[:, 3:6] += 1.5
    for got, wanted in zip(
        gf.ops.lstm_gates(gates, c, forget_bias=1.5), gf.ops.lstm_gates(shifted, c), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_over_their_whole_range(backend: str, dtype: torch.dtype) -> None:
    """Through the operator, sigmoid and tanh alone, down to the least normal number."""
    x = torch.cat([torch.linspace(-86, 86, 20001), torch.logspace(-30, 0, 500)]).to(dtype)
    n = x.numel()
    zero, open_gate = torch.zeros(n, dtype=dtype), torch.full((n,), 60.0, dtype=dtype)

    def state(i: Tensor, f: Tensor, g: Tensor, c: Tensor) -> Tensor:
        gates = torch.cat([i, f, g, zero]).view(1, 4 * n)
        return gf.ops.lstm_gates(gates, c.view(1, n), backend=backend)[1].view(n)

    sigmoid = state(zero, x, zero, torch.ones(n, dtype=dtype))
    tanh = state(open_gate, zero, x, zero)
    exact = [1 / (1 + math.exp(-v)) for v in x.tolist()], [math.tanh(v) for v in x.tolist()]
    for got, wanted in zip((sigmoid, tanh), exact, strict=True):
        wanted_tensor = torch.tensor(wanted, dtype=torch.float64)
        error = (got.double() - wanted_tensor).abs()
        assert (error <= 3 * torch.finfo(dtype).eps * wanted_tensor.abs()).all()


@every_level
@pytest.mark.parametrize("dtype", FLOATING)
def test_non_finite_values_stay_where_they_are(backend: str, dtype: torch.dtype) -> None:
    gates, c = operands(1, 1, 512, dtype=dtype)
    for k, value in enumerate((math.nan, math.inf, -math.inf)):
        for block in range(4):
            gates[0, block, 10 * k + block] = value
        c[0, 0, 10 * k + 4] = value
    results = gf.ops.lstm_gates(gates, c, backend=backend)
    same = torch.float32 if dtype == torch.float64 else dtype
    for got, s, exact in zip(
        results,
        reference.lstm_gates(gates.to(same), c.to(same)),
        reference.lstm_gates(gates.double(), c.double()),
        strict=True,
    ):
        assert not exact.isfinite().all()
        assert_within_budget(got, s, exact)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shut_gate_lets_nothing_through(backend: str, dtype: torch.dtype) -> None:
    shut, huge = -math.inf, 1e30

    def run(i: float, f: float, g: float, o: float, c: float) -> tuple[float, float]:
        gates = torch.tensor([[i, f, g, o]], dtype=dtype)
        h, c_next = gf.ops.lstm_gates(gates, torch.tensor([[c]], dtype=dtype), backend=backend)
        return h.item(), c_next.item()

    assert run(0, shut, 0, 0, huge) == (0, 0)
    assert run(0, -200, 0, 0, 1) == (0, 0) or dtype == torch.float64
    assert run(shut, shut, 5, 0, huge) == (0, 0)
    assert run(0, 0, 5, shut, 1)[0] == 0
    assert all(math.isnan(value) for value in run(0, shut, 0, 0, math.inf))


@every_level
def test_without_a_gradient_to_h_nothing_comes_from_h(backend: str) -> None:
    """Its absence is no zero to multiply a NaN with."""
    gates, c = operands(2, 3, 5)
    c[0, 0, 0] = gates[1, 9, 1] = math.nan
    gates.requires_grad_()
    got, wanted = (
        torch.autograd.grad(gf.ops.lstm_gates(gates, c, backend=each)[1].sum(), gates)[0]
        for each in (backend, "reference")
    )
    assert torch.equal(got.isnan(), wanted.isnan())
    assert got.isnan().sum() == 1


@needs_library
def test_threads_do_not_change_a_bit() -> None:
    gates, c = operands(8, 32, 16, 16)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gf.ops.lstm_gates(gates, c, backend="cpu"))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_keeps_the_dtype_of_gates() -> None:
    gates, c = operands(2, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, c_next = gf.ops.lstm_gates(gates.bfloat16(), c)
    assert h.dtype == c_next.dtype == torch.bfloat16


@pytest.mark.parametrize("dynamic", [False, True])
def test_recurrence_compiles_whole(dynamic: bool) -> None:
    """One call's state is the next one's input."""
    torch._dynamo.reset()

    def roll(gates: Tensor, c: Tensor) -> Tensor:
        h = c
        for _ in range(3):
            h, c = gf.ops.lstm_gates(gates + h.repeat(1, 4, 1), c)
        return h

    compiled = torch.compile(roll, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    gates, c = operands(2, 3, 4, dtype=torch.float64)
    gates.requires_grad_()
    (got,) = torch.autograd.grad(compiled(gates, c).sum(), gates)
    (wanted,) = torch.autograd.grad(roll(gates, c).sum(), gates)
    torch.testing.assert_close(got, wanted)


def test_new_batch_size_does_not_recompile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(gf.ops.lstm_gates, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*operands(4, 3, 5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 7, 33):
            assert compiled(*operands(batch, 3, 5))[0].shape == (batch, 3, 5)


@pytest.mark.slow
def test_inductor() -> None:
    torch._dynamo.reset()
    gates, c = operands(2, 8, 5, 5)
    gates.requires_grad_()
    compiled = torch.compile(gf.ops.lstm_gates, fullgraph=True)
    results = []
    for function in (gf.ops.lstm_gates, compiled):
        h, c_next = function(gates, c)
        results.append([h, c_next, *torch.autograd.grad(h.sum() + c_next.sum(), gates)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


GATES, C = torch.zeros(2, 12, 5), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("gates", "c", "error", "message"),
    [
        ([1.0], C, TypeError, r"gates must be a tensor, got list \[1.0\]"),
        (GATES, None, TypeError, "c must be a tensor, got NoneType None"),
        (GATES.int(), C, TypeError, "gates must have one of the dtypes float32.*got int32"),
        (GATES, C.double(), TypeError, r"c must have the dtype of gates, torch.float32, got"),
        (GATES, C.to("meta"), ValueError, "c must be on the device of gates, cpu, got meta"),
        (GATES[0, 0], C, ValueError, r"gates must be \[B, 4C, \*S\].*shape \[5\]"),
        (GATES[:, :10], C, ValueError, "gates must have a channel count divisible by 4.*got 10"),
        (GATES, C[:, :2], ValueError, r"c must have shape \[2, 3, 5\].*got a tensor of shape"),
        (GATES, C[..., None], ValueError, r"c must have shape \[2, 3, 5\]"),
    ],
)
def test_bad_input(gates: object, c: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gf.ops.lstm_gates(gates, c)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [torch.tensor(1.0), "1", None, True])
def test_forget_bias_is_a_number(bias: object) -> None:
    with pytest.raises(TypeError, match="forget_bias must be a number, got"):
        gf.ops.lstm_gates(GATES, C, forget_bias=bias)  # type: ignore[arg-type]


def test_sparse_input_is_refused() -> None:
    with pytest.raises(TypeError, match="gates must be a dense tensor, got layout"):
        gf.ops.lstm_gates(GATES.to_sparse(), C)


@needs_library
def test_operator_itself_checks_what_memory_needs() -> None:
    forward, backward = torch.ops.geco_fast.lstm_gates, torch.ops.geco_fast.lstm_gates_backward
    with pytest.raises(RuntimeError, match="lstm_gates: gates must be"):
        forward(GATES, C[:, :2], 0.0)
    with pytest.raises(RuntimeError, match="lstm_gates: dtypes differ"):
        forward(GATES, C.double(), 0.0)
    with pytest.raises(RuntimeError, match="a gradient must have the shape"):
        backward(GATES, C, 0.0, C[:1], None)
