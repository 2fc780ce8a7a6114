"""Options and fixtures of the whole suite."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter, on CPU tensors; asked for before the first
# is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from geco_fast._backend import BACKENDS, LIBRARY, unavailable_reason
from geco_fast.testing.calls import EMULATED, instruction_set

# Where it is asked for, CUDA's kernels take the place of the CPU's, in their emulation.
if EMULATED is not None:
    assert LIBRARY is not None
    torch.ops.load_library(EMULATED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-root", type=Path, help="folder with real data sets (mnist, cifar10)")
    parser.addoption(
        "--random-examples", type=int, default=300, help="random calls of each operator"
    )
    parser.addoption(
        "--random-seed", type=int, default=1, help="seed of the slow tests' random calls"
    )
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        choices=BACKENDS[1:],
        help="fail instead of skipping where this backend can't run",
    )


def pytest_configure(config: pytest.Config) -> None:
    for backend in config.getoption("--require-backend"):
        reason = unavailable_reason(backend)
        if reason:
            raise pytest.UsageError(f"--require-backend {backend}: {reason}")
    # glibc fills new memory with the low byte of this value's complement: 0xff, which is NaN in
    # every floating dtype, so that a result that was never written shows.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_perturb = -6
        mallopt(m_perturb, 0x100)
    if torch.cuda.is_available():
        # On a GPU it is PyTorch that fills it, in this mode.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # PyTorch's convolutions otherwise round float32 to 10 bits there.
        torch.backends.cudnn.allow_tf32 = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Share out files among processes, but the table of cases by test and operator."""
    for item in items:
        group = item.path.name
        if group == "test_operators.py" and hasattr(item, "callspec"):
            case = item.callspec.params.get("case")
            group = f"{item.originalname}-{case.operator}"  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def data_root(request: pytest.FixtureRequest) -> Path:
    root = request.config.getoption("--data-root")
    if root is None:
        pytest.skip("needs --data-root")
    return root


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Backend of a call; "cpu-avx2" and its like also choose that instruction set meanwhile."""
    with instruction_set(request.param) as name:
        yield name


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
