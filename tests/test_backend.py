"""Which backend serves a call."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from marks import needs_library
from torch import Tensor

import geco_fast as gf
from geco_fast import _backend
from geco_fast._backend import LIBRARY, ON_REQUEST, _resolve, _resolve_once, select
from geco_fast._registry import KERNELS


@pytest.fixture
def operands() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 12, 3), torch.randn(2, 3, 3)


@needs_library
def test_auto_takes_the_kernel(operands: tuple[Tensor, Tensor]) -> None:
    assert select("lstm_gates", operands[0], "auto") == "cpu"
    assert select("lstm_gates", operands[0].to("meta"), "auto") == "reference"
    assert select("no_such_operator", operands[0], "auto") == "reference"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_explicit_choice_never_falls_back(
    backend: str, operands: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _resolve_once.cache_clear()
    with pytest.raises(gf.BackendUnavailable, match=f"'{backend}' is unavailable: .*; "):
        gf.ops.lstm_gates(*operands, backend=backend)
    with gf.use_backend(backend), pytest.raises(gf.BackendUnavailable):
        gf.ops.lstm_gates(*operands)


def test_operator_without_a_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KERNELS, "conv2d")
    _resolve_once.cache_clear()
    with pytest.raises(gf.BackendUnavailable, match="conv2d has no cpu kernel"):
        gf.ops.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), backend="cpu")


@needs_library
def test_kernel_refuses_another_device(operands: tuple[Tensor, Tensor]) -> None:
    gates, c = (operand.to("meta") for operand in operands)
    with pytest.raises(gf.BackendUnavailable, match="got one on meta"):
        gf.ops.lstm_gates(gates, c, backend="cpu")


@needs_library
def test_kernel_refuses_transforms(operands: tuple[Tensor, Tensor]) -> None:
    mapped = torch.func.vmap(lambda g, c: gf.ops.lstm_gates(g, c, backend="cpu"))
    with pytest.raises(gf.BackendUnavailable, match=r"torch\.func"):
        mapped(*(operand[None] for operand in operands))


def test_export_uses_pytorchs_operators(operands: tuple[Tensor, Tensor]) -> None:
    class Cell(torch.nn.Module):
        def forward(self, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            return gf.ops.lstm_gates(gates, c)

    program = torch.export.export(Cell(), operands)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert not any("geco_fast" in target for target in targets)


def test_use_backend_nests_and_restores(operands: tuple[Tensor, Tensor]) -> None:
    outside = select("lstm_gates", operands[0], "auto")
    with contextlib.suppress(KeyError), gf.use_backend("reference"):
        assert select("lstm_gates", operands[0], "auto") == "reference"
        with gf.use_backend("auto"):
            assert select("lstm_gates", operands[0], "auto") == outside
        assert select("lstm_gates", operands[0], "auto") == "reference"
        raise KeyError
    assert select("lstm_gates", operands[0], "auto") == outside


def test_use_backend_keeps_to_its_thread(operands: tuple[Tensor, Tensor]) -> None:
    seen: list[str] = []
    outside = select("lstm_gates", operands[0], "auto")
    with gf.use_backend("reference"):
        thread = threading.Thread(
            target=lambda: seen.append(select("lstm_gates", operands[0], "auto"))
        )
        thread.start()
        thread.join()
    assert seen == [outside]


def test_unknown_name(operands: tuple[Tensor, Tensor]) -> None:
    message = r"backend must be one of 'auto', .*, got 'gpu'"
    with pytest.raises(ValueError, match=message):
        gf.ops.lstm_gates(*operands, backend="gpu")
    with pytest.raises(ValueError, match=message), gf.use_backend("gpu"):
        pass


@pytest.mark.parametrize(("value", "shown"), [("reference", "reference"), ("gpu", "ValueError")])
def test_environment_variable(value: str, shown: str) -> None:
    code = (
        "import torch; from geco_fast._backend import select; "
        "print(select('lstm_gates', torch.ones(1), 'auto'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GECO_FAST_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert shown in done.stdout + done.stderr


@needs_library
def test_compiled_code_follows_use_backend() -> None:
    """In a process of its own: no block has run in the thread before."""
    code = """
import torch, geco_fast as gf
compiled = torch.compile(gf.ops.lstm_gates, fullgraph=True, backend="aot_eager")
gates, c = torch.randn(2, 12, 3), torch.randn(2, 3, 3)
compiled(gates, c)
try:
    with gf.use_backend("cuda"):
        compiled(gates, c)
except Exception as error:
    print("refused", "BackendUnavailable" in repr(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused True\n", done.stderr


@needs_library
def test_tracing_uses_pytorchs_operators(operands: tuple[Tensor, Tensor]) -> None:
    gates, c = operands
    traced = torch.jit.trace(lambda g, c: gf.ops.lstm_gates(g, c), (gates, c), check_trace=False)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::tanh" in kinds
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds), kinds
    assert "prim::PythonOp" not in kinds


@needs_library
def test_instruction_set_can_be_forced_down() -> None:
    best = LIBRARY.instruction_set()
    assert LIBRARY.instruction_sets()[-1] == best
    try:
        LIBRARY.set_instruction_set("baseline")
        assert LIBRARY.instruction_set() == "baseline"
        with pytest.raises(ValueError, match=r"baseline.*got 'neon2'"):
            LIBRARY.set_instruction_set("neon2")
        assert LIBRARY.instruction_set() == "baseline"
    finally:
        LIBRARY.set_instruction_set(best)


def test_onnx_export_uses_pytorchs_operators(
    operands: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its tracer is torch.jit.trace; with ``dynamo=True`` it is torch.export."""
    module = sys.modules["geco_fast.ops.lstm_gates"]
    chosen: list[str] = []

    def spy(*arguments: object) -> str:
        assert torch.onnx.is_in_onnx_export()
        chosen.append(select(*arguments))  # type: ignore[arg-type]
        return chosen[-1]

    class Cell(torch.nn.Module):
        def forward(self, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            return gf.ops.lstm_gates(gates, c)

    monkeypatch.setattr(module, "select", spy)
    # Writing the file takes the package onnx; by then the model has run.
    with contextlib.suppress(ImportError, torch.onnx.errors.OnnxExporterError):
        torch.onnx.export(Cell(), operands, tmp_path / "cell.onnx", dynamo=False)
    assert set(chosen) == {"reference"}


@needs_library
def test_forward_mode_uses_the_reference(operands: tuple[Tensor, Tensor]) -> None:
    with torch.autograd.forward_ad.dual_level():
        assert select("lstm_gates", operands[0], "auto") == "reference"
        with pytest.raises(gf.BackendUnavailable, match="forward-mode"):
            gf.ops.lstm_gates(*operands, backend="cpu")
    assert select("lstm_gates", operands[0], "auto") == "cpu"


@needs_library
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_graph_is_recorded_where_it_is_wanted(
    requires_grad: bool, grad_mode: bool, operands: tuple[Tensor, Tensor]
) -> None:
    gates, c = operands
    with torch.set_grad_enabled(grad_mode):
        results = gf.ops.lstm_gates(gates, c.requires_grad_(requires_grad))
    assert all(result.requires_grad == (requires_grad and grad_mode) for result in results)


@needs_library
@pytest.mark.parametrize(
    ("owner", "name", "backend"),
    [
        ("torch._C", "_AutoDispatchBelowAutograd", "cpu"),
        ("torch._C", "_is_tracing", "cpu"),
        ("torch._C", "_are_functorch_transforms_active", "reference"),
        ("torch.autograd.forward_ad", "_current_level", "reference"),
    ],
)
def test_a_torch_without_a_private_name_is_served(owner: str, name: str, backend: str) -> None:
    code = f"""
import torch, torch.autograd.forward_ad
value = {owner}.{name}
delattr({owner}, {name!r})
import geco_fast as gf
if {owner} is torch._C:  # torch's own code takes it from there
    {owner}.{name} = value
from geco_fast._backend import select
gates, c = torch.randn(2, 12, 3, requires_grad=True), torch.randn(2, 3, 3)
results = gf.ops.lstm_gates(gates, c)
grads = torch.autograd.grad(results[0].sum(), gates)
with torch.no_grad():
    plain = gf.ops.lstm_gates(gates, c)
wanted = gf.reference.lstm_gates(gates, c)
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results, wanted, strict=True))
assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))
print(select("lstm_gates", gates, "auto"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{backend}\n", done.stderr


@pytest.mark.parametrize(("operator", "backend"), sorted(ON_REQUEST))
def test_only_an_explicit_choice_takes_what_is_on_request(
    operator: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setitem(KERNELS, operator, {backend: (torch.float32,)})
    kind = ("cuda", torch.float32)
    assert _resolve(operator, "auto", *kind) == "reference"
    assert _resolve(operator, backend, *kind) == backend
    assert _resolve("lstm_gates", "auto", *kind) in ("cuda", "triton")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_use_backend_is_an_explicit_choice(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_backend, "_resolve_once", _resolve)
    x = torch.ones(2, 3, dtype=dtype)
    assert select("coupling_mlp", x, "auto") in ("cpu", "reference")
    with gf.use_backend("triton"):
        assert select("coupling_mlp", x, "auto") == "triton"
