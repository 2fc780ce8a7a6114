"""What holds on a GPU: streams, graphs, devices and sizes; and that tracing needs none."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import geco_fast as gf
from geco_fast._backend import interprets, unavailable_reason
from geco_fast._registry import KERNELS
from geco_fast.testing.calls import gradients, require_grad
from geco_fast.testing.cases import Case, cases
from geco_fast.testing.guards import moved

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WITH_KERNELS = [operator for operator, found in KERNELS.items() if "triton" in found]
FIRST = [cases(operator)[0] for operator in WITH_KERNELS if cases(operator)]


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_fake_gpu_tensors_trace_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo sees one graph of Triton's operators, on a machine that has no GPU."""
    torch._dynamo.reset()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    with FakeTensorMode():
        fake = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            for name, t in case.tensors(torch.float32).items()
        }
        compiled = torch.compile(case.call, fullgraph=True, backend=backend)
        results = compiled(case.arguments(fake), "triton")
    assert all(result.is_cuda for result in results)
    assert any(name.startswith("geco_fast.") and name.endswith(".triton") for name in seen), seen


def on_gpu(case: Case, seed: int = 0) -> dict[str, Tensor]:
    return {name: moved(t, "cuda") for name, t in case.tensors(torch.float32, seed).items()}


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each of a GPU's backends that is here."""
    reason = unavailable_reason(request.param)
    if reason:
        pytest.skip(reason)
    return request.param  # type: ignore[no-any-return]


def forward_and_backward(
    case: Case, tensors: dict[str, Tensor], backend: str = "triton"
) -> list[Tensor | None]:
    names = case.gradient_names()
    leaves = require_grad(names, tensors)
    results = case.call(case.arguments(leaves), backend)
    found = gradients(results, [leaves[name] for name in names], results)
    return [*(result.detach() for result in results), *found]


def assert_same(got: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert (g is None) == (w is None)
        assert g is None or torch.equal(g, w)


@needs_gpu
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_current_stream(case: Case, backend: str) -> None:
    """Operands that a slow kernel on a side stream still has to make are waited for there."""
    tensors = on_gpu(case)
    wanted = forward_and_backward(case, on_gpu(case), backend)
    aside = torch.cuda.Stream()
    late = {name: torch.empty_like(t) for name, t in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(100_000_000)
        for name, tensor in tensors.items():
            late[name] = moved(tensor.cpu(), "cuda") if not tensor.numel() else tensor.clone()
        got = forward_and_backward(case, late, backend)
    aside.synchronize()
    assert_same(got, wanted)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@needs_gpu
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_no_synchronisation(case: Case, backend: str, no_synchronisation: None) -> None:
    tensors = on_gpu(case)
    arguments = case.arguments(tensors)
    case.call(arguments, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    case.call(arguments, backend)


@needs_gpu
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_captured(case: Case, backend: str) -> None:
    """Replays of a CUDA graph compute on what the operands hold then."""
    names = case.gradient_names()
    held = on_gpu(case)
    for _ in range(3):
        forward_and_backward(case, held, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward_and_backward(case, held, backend)
    fresh = on_gpu(case, 1)
    for name, tensor in held.items():
        tensor.copy_(fresh[name])
    graph.replay()
    assert names
    assert_same(got, forward_and_backward(case, on_gpu(case, 1), backend))


@needs_gpu
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_inductor(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True)
    names = case.gradient_names()

    def through(call: Any) -> list[Tensor | None]:
        leaves = require_grad(names, on_gpu(case))
        results = call(case.arguments(leaves), backend)
        found = gradients(results, [leaves[name] for name in names], results)
        return [*(result.detach() for result in results), *found]

    for got, wanted in zip(through(compiled), through(case.call), strict=True):
        torch.testing.assert_close(got, wanted)


@needs_gpu
def test_other_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = FIRST[0]
    tensors = {name: t.to("cuda:1") for name, t in case.tensors(torch.float32).items()}
    got = forward_and_backward(case, tensors, backend)
    wanted = forward_and_backward(case, on_gpu(case), backend)
    assert all(tensor is None or tensor.device.index == 1 for tensor in got)
    assert_same([None if t is None else t.to("cuda:0") for t in got], wanted)


@needs_gpu
def test_beyond_31_bits(backend: str) -> None:
    """Elements past the first 2^31 of an operand give what they give alone."""
    rows, width = 2**15 + 8, 2**16
    x, y = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert x.numel() > 2**31
    got = gf.ops.squared_error(x, y, backend=backend)
    torch.testing.assert_close(got[-8:], gf.ops.squared_error(x[-8:], y[-8:], backend=backend))
    del y
    gates = x.view(rows, 4, width // 4)
    c = torch.randn(rows, 1, width // 4, device="cuda", dtype=torch.bfloat16)
    for got, alone in zip(
        gf.ops.lstm_gates(gates, c, backend=backend),
        gf.ops.lstm_gates(gates[-8:], c[-8:], backend=backend),
        strict=True,
    ):
        assert torch.equal(got[-8:], alone)


@pytest.fixture(scope="module")
def far() -> Tensor:
    """Memory beyond the reach of 32-bit offsets in float32; pages nobody writes take no room."""
    memory = mmap.mmap(-1, 4 * 2**31 + 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32)


def with_far_rows(tensors: dict[str, Tensor], memory: Tensor) -> dict[str, Tensor]:
    """Copies in `memory`, the last of their rows 2^31 elements from the first or more."""
    placed, start = {}, 0
    for name, tensor in tensors.items():
        placed[name] = tensor
        if tensor.dtype == memory.dtype and tensor.dim() > 0 and tensor.shape[0] > 1:
            step = -(-(2**31) // (tensor.shape[0] - 1))
            strides = (step, *tensor.stride()[1:])
            placed[name] = memory.as_strided(tensor.shape, strides, start).copy_(tensor)
            # A row's elements, and what `step` was rounded up by in all rows before the last.
            start += tensor[0].numel() + tensor.shape[0]
    return placed


FAR = [
    next(case for case in cases(operator, "small") if next(iter(case.shapes.values()))[0] > 1)
    for operator in WITH_KERNELS
    if cases(operator)
]


@pytest.mark.skipif(
    bool(unavailable_reason("triton")) or not interprets(), reason="needs Triton's interpreter"
)
@pytest.mark.parametrize("case", FAR, ids=str)
def test_offsets_beyond_31_bits(case: Case, far: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are 2^31 elements apart give what they give side by side."""
    from triton.runtime import interpreter

    # It would copy each operand's whole storage onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    near, distant = (case.tensors(torch.float32) for _ in range(2))
    distant = with_far_rows(distant, far)
    reached = max((t.shape[0] - 1) * t.stride(0) for t in distant.values() if t.dim())
    assert reached >= 2**31
    assert_same(forward_and_backward(case, distant), forward_and_backward(case, near))


class TrainingStep:
    """A step of a model under a constraint, on a GPU."""

    def __init__(self, model: nn.Module, image: tuple[int, int, int], batch: int) -> None:
        self.model = model.cuda()
        self.geco = gf.GECO({"error": gf.constraints.ReconstructionError(0.1)}).cuda()
        self.x = torch.rand(batch, *image, device="cuda")
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        output = self.model(self.x)
        error = gf.constraints.ReconstructionError(0.1)(output.reconstruction, self.x)
        loss: Tensor = self.geco(output.kl, {"error": error})
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def models() -> dict[str, Any]:
    draw = {"hidden_channels": 16, "latent_channels": 4, "steps": 3, "downsample": 2}
    return {
        "ConvDraw": lambda: gf.nn.ConvDraw((1, 16, 16), **draw),
        "NVPVAE": lambda: gf.nn.NVPVAE((1, 16, 16), latent_features=16, hidden_features=(32, 32)),
    }


@needs_gpu
@pytest.mark.parametrize("name", models())
def test_training_step_is_captured(name: str) -> None:
    """Model, constraint, multipliers and optimiser in one CUDA graph: a plain loop's losses."""
    curves = []
    for captured in (False, True):
        torch.manual_seed(0)
        step = TrainingStep(models()[name](), (1, 16, 16), 8)
        losses = []
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            losses += [step().item() for _ in range(3)]
        torch.cuda.current_stream().wait_stream(aside)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
            for _ in range(20):
                graph.replay()
                losses.append(loss.item())
        else:
            losses += [step().item() for _ in range(20)]
        curves.append(losses)
    plain, replayed = curves
    assert replayed[:3] == pytest.approx(plain[:3], rel=1e-3)
    # The noise of a captured step comes from other numbers.
    assert sum(replayed[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.2)
    assert replayed[-1] != replayed[-2]
