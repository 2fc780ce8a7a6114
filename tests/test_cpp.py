"""The torch-free kernels by themselves, on operands that end or begin at a guard page."""

from __future__ import annotations

from pathlib import Path

import pytest
from cpp_build import ROOT, SETUP, build_tests, run_program

from geco_fast._registry import KERNELS

needs_compiler = pytest.mark.skipif(SETUP.COMPILER is None, reason="no C++20 compiler")

# Stands in for the kernels: no level but one, whose test steps over an edge.
PLANTED = """
#include "harness.h"
namespace geco {
const cpu::Level* cpu::levels(int* count) {
  static const Level level = {"planted", [] { return true; }, nullptr};
  *count = 1;
  return &level;
}
namespace test {
const Register planted("planted", [](const cpu::Level&) {
  Guarded memory(100, Edge::EDGE);
  memory.data()[OFFSET] = 0;
});
}
}
"""


@needs_compiler
def test_kernels(pytestconfig: pytest.Config) -> None:
    """All kernels and primitives, at every level, against plain formulas."""
    done = run_program(build_tests(pytestconfig.cache.mkdir("cpp")))
    assert done.returncode == 0, done.stdout + done.stderr
    for operator in set(KERNELS) - {"prepare_weight"}:
        assert f"ran {operator}_" in done.stdout, f"tests/cpp has no test of {operator}"


@needs_compiler
@pytest.mark.parametrize(
    ("edge", "offset", "trace"),
    [
        ("kEnd", 100, "planted: touched a guard page"),
        ("kBegin", -1, "planted: touched a guard page"),
        ("kEnd", -1, "write outside an operand"),
        ("kBegin", 100, "write outside an operand"),
        ("kEnd", 99, ""),
    ],
)
def test_guard_pages_find_planted_faults(
    edge: str, offset: int, trace: str, pytestconfig: pytest.Config
) -> None:
    folder = Path(pytestconfig.cache.mkdir(f"cpp-{edge}{offset}"))
    planted = folder / "planted.cpp"
    text = PLANTED.replace("EDGE", edge).replace("OFFSET", str(offset))
    if not planted.exists() or planted.read_text() != text:
        planted.write_text(text)
    cpp = ROOT / "tests" / "cpp"
    units = [(planted, "planted.o", [f"-I{cpp}"]), (cpp / "main.cpp", "main.o", [])]
    SETUP.compile_and_link(folder, folder / "planted", units, [*SETUP.FLAGS, "-O0"], [])
    done = run_program(folder / "planted")
    assert (done.returncode == 0) == (not trace)
    assert trace in done.stderr
