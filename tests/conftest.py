"""Options and fixtures of the whole suite."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from geco_fast._backend import BACKENDS, LIBRARY, unavailable_reason


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-root", type=Path, help="folder with real data sets (mnist, cifar10)")
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
    # New memory is filled with huge values, so that a result that was never written shows.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_perturb = -6
        mallopt(m_perturb, 0x80)


@pytest.fixture
def data_root(request: pytest.FixtureRequest) -> Path:
    root = request.config.getoption("--data-root")
    if root is None:
        pytest.skip("needs --data-root")
    return root


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Backend of a call; "cpu-avx2" and its like also choose that instruction set meanwhile."""
    name, _, level = request.param.partition("-")
    if not level:
        yield name
        return
    before = LIBRARY.instruction_set()
    LIBRARY.set_instruction_set(level)
    yield name
    LIBRARY.set_instruction_set(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
