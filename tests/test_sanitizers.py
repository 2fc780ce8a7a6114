"""The library and its tests under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cpp_build import ROOT, SANITIZE, SETUP, build_tests, run_program

from geco_fast._backend import LIBRARY

# New memory is NaN here, too. Python and torch keep what they never free.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_NUM_THREADS": "1",
}
PLANTED = {
    "heap-buffer-overflow": "volatile int n = 4; int* p = new int[n]; int x = p[n]; delete[] p;",
    "stack-buffer-overflow": "int a[4] = {}; int* volatile p = a; int x = p[4];",
    "heap-use-after-free": "int* volatile p = new int(1); delete p; int x = *p;",
    "shift exponent 40 is too large": "volatile int n = 40; int x = 1 << n;",
    "signed integer overflow": "volatile int n = 2147483647; int x = n + 1;",
    "load of misaligned address": (
        "alignas(8) char a[16] = {}; char* volatile p = a + 1; int x = *(int*)p;"
    ),
}


def sanitizers_reason() -> str:
    """Why the sanitizers can't be used here; empty if they can."""
    if LIBRARY is None or SETUP.COMPILER is None:
        return "no C++ library or no compiler"
    probe = [*SETUP.COMPILER.split(), *SANITIZE, "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(probe, input="int main() {}", text=True, capture_output=True)
    return f"the compiler has no sanitizers: {done.stderr[-200:]}" if done.returncode else ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(sanitizers_reason()), reason=sanitizers_reason()),
]


def runtime(name: str) -> str:
    command = [*SETUP.COMPILER.split(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("trace", PLANTED)
def test_planted_faults_are_found(trace: str, tmp_path: Path) -> None:
    """In a library that Python loads, with the flags of the build."""
    source, library = tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text(f'extern "C" int fault() {{ {PLANTED[trace]} return x; }}\n')
    flags = [*SETUP.FLAGS, "-w", "-O1", "-fvisibility=default", *SANITIZE]
    compiler = SETUP.COMPILER.split()
    subprocess.run([*compiler, *flags, "-shared", source, "-o", library], check=True)
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).fault()"
    done = python("-c", code, cwd=tmp_path)
    assert done.wait() != 0
    assert done.stdout is not None
    assert trace in done.stdout.read()


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen:
    """Start Python with the sanitizers' run time, which must come before all other libraries."""
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}"
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, "LD_PRELOAD": preload, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def sanitized(pytestconfig: pytest.Config) -> Path:
    """A folder with the package in `site`, its library built with the sanitizers in `objects`."""
    folder = Path(pytestconfig.cache.mkdir("sanitized"))
    options = shlex.join([*SANITIZE, "-O1", "-fexpensive-optimizations"])
    places = {"base": folder / "build", "temp": folder / "objects", "lib": folder / "site"}
    subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build",
            *(f"--build-{k}={v}" for k, v in places.items()),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            **{"CXXFLAGS": options, "LDFLAGS": shlex.join(SANITIZE), "GECO_FAST_CUDA": "0"},
        },
        check=True,
    )
    return folder


def test_suite_runs_clean(sanitized: Path, tmp_path: Path) -> None:
    """Two of the four dtypes in the table, half the random examples; all levels, no long case."""
    site = sanitized / "site"
    choices = {
        "test_operators.py": (
            "(forward or gradients) and (float64 or bfloat16 or winograd) and cpu "
            "and not (winograd-several or winograd-many)",
            "0",
        ),
        "test_random.py": ("random_calls and not triton", "150"),
        "test_guards.py": ("nan or alike", "0"),
    }
    start = (
        "import geco_fast._C as c, pytest, sys; assert sys.argv[1] in c.__file__, c.__file__; "
        "sys.exit(pytest.main(sys.argv[2:]))"
    )
    started = {}
    for file, (chosen, examples) in choices.items():
        started[file] = python(
            *("-c", start, site, ROOT / "tests" / file, "-k", chosen, "-q", "-x"),
            *("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider"),
            *("--random-examples", examples),
            cwd=tmp_path,
            PYTHONPATH=str(site),
        )
    for file, process in started.items():
        log, _ = process.communicate()
        assert process.returncode == 0, f"{file}: {log[-6000:]}"
        assert " passed" in log


def test_kernels_run_clean(sanitized: Path, pytestconfig: pytest.Config) -> None:
    folder = Path(pytestconfig.cache.mkdir("cpp-sanitized"))
    program = build_tests(folder, SANITIZE, kernels=sanitized / "objects" / "csrc" / "cpu")
    # Guard pages report themselves.
    options = {"ASAN_OPTIONS": f"{ENVIRONMENT['ASAN_OPTIONS']}:handle_segv=0:handle_sigbus=0"}
    done = run_program(program, **{**os.environ, **ENVIRONMENT, **options})
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
