"""CUDA kernels on the CPU, and that the emulation finds the faults it is there to find."""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
from cpp_build import ROOT, SETUP, build_emulated_library, build_emulated_program
from filelock import FileLock
from test_sanitizers import python, sanitizers_reason

from geco_fast._registry import KERNELS
from geco_fast.bench import gpu_kernels
from geco_fast.testing.calls import COMPOSED

pytestmark = pytest.mark.skipif(bool(sanitizers_reason()), reason=sanitizers_reason())

NVCC = shutil.which("nvcc")
ORDERS = [*product("012", "012")]
# Fault -> what the process that runs into it says.
FOUND_AT_ONCE = {
    "global-bounds": "heap-buffer-overflow",
    "shared-bounds": "heap-buffer-overflow",
    "barrier-diverged": "a barrier that 32 threads of the block never reach",
    "mask-diverged": "waits for lane 16, which will not come",
    "mask-foreign": "reads from lane 16, which is not in the mask",
    "misaligned": "no multiple of the access's 16 bytes",
}


@pytest.fixture(scope="module")
def program(pytestconfig: pytest.Config) -> Path:
    folder = Path(pytestconfig.cache.mkdir("emulation"))
    return build_emulated_program(folder, ROOT / "tests" / "emulation" / "faults.cpp")


def run(program: Path, fault: str, threads: str = "0", blocks: str = "0") -> tuple[int, str]:
    done = subprocess.run([program, fault, threads, blocks], capture_output=True, text=True)
    return done.returncode, done.stderr if done.returncode else done.stdout


def test_clean_kernel_gives_the_same_bits_in_every_order(program: Path) -> None:
    found = {run(program, "none", *orders) for orders in ORDERS}
    assert len(found) == 1
    ((status, text),) = found
    assert status == 0
    # 4 blocks load 64 numbers each and store one; that is 32 sectors and 4.
    assert text.split()[4:] == ["1024", "16", "36", "36"]


@pytest.mark.parametrize("fault", FOUND_AT_ONCE)
def test_fault_ends_the_process(program: Path, fault: str) -> None:
    status, text = run(program, fault)
    assert status != 0
    assert FOUND_AT_ONCE[fault] in text


@pytest.mark.parametrize("fault", ["shared-uninitialised", "barrier-missing"])
def test_shared_memory_is_nan_until_it_is_written(program: Path, fault: str) -> None:
    status, text = run(program, fault)
    assert status == 0
    assert all(int(word, 16) & 0x7FFFFFFF > 0x7F800000 for word in text.split()[:4])


def test_races_change_bits_with_the_order(program: Path) -> None:
    assert len({run(program, "block-order", *orders)[1] for orders in ORDERS}) > 1


EMULATED = [name for name, found in KERNELS.items() if "cuda" in found and name not in COMPOSED]


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> Path:
    folder = Path(pytestconfig.cache.mkdir("emulated"))
    # Several processes may want it at once.
    with FileLock(folder / "lock"):
        return build_emulated_library(folder)


def run_with(library: Path, folder: Path, *arguments: object) -> str:
    """What a process says in which CUDA's kernels take the place of the CPU's."""
    process = python(*arguments, cwd=folder, GECO_EMULATED=str(library))
    log, _ = process.communicate()
    assert process.returncode == 0, log[-6000:]
    return log


@pytest.mark.slow
@pytest.mark.parametrize("operator", EMULATED)
def test_table_of_cases(library: Path, tmp_path: Path, operator: str) -> None:
    """Every case in every dtype, forward and backward, with both sanitizers."""
    chosen = f"{operator}- and (forward or gradients) and cpu-baseline"
    log = run_with(
        *(library, tmp_path, "-m", "pytest", ROOT / "tests" / "test_operators.py", "-k", chosen),
        *("-q", "-x", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider"),
    )
    assert " passed" in log


CALL = """
import ctypes, sys, torch
import geco_fast._C
from geco_fast.testing.calls import EMULATED, gradients, require_grad
from geco_fast.testing.cases import cases

torch.ops.load_library(EMULATED)
emulation = ctypes.CDLL(EMULATED)

def call(case):
    names = case.gradient_names()
    leaves = require_grad(names, case.tensors(torch.float32))
    results = case.call(case.arguments(leaves), "cpu")
    upstream = [torch.ones_like(result) for result in results]
    found = gradients(results, [leaves[name] for name in names], upstream)
    return [t.detach() for t in (*results, *found) if t is not None]
"""

IN_EVERY_ORDER = """
for operator in sys.argv[1:]:
    for case in cases(operator):
        if sum(t.numel() for t in case.tensors(torch.float32).values()) > 5_000:
            continue
        emulation.geco_emulation_set_order(0, 0)
        first = call(case)
        for threads, blocks in ((0, 1), (0, 2), (1, 0), (2, 0), (1, 1), (2, 2)):
            emulation.geco_emulation_set_order(threads, blocks)
            for a, b in zip(first, call(case), strict=True):
                assert torch.equal(a.view(torch.int32), b.view(torch.int32)), str(case)
"""


@pytest.mark.slow
@pytest.mark.parametrize("operator", EMULATED)
def test_bits_are_the_same_in_every_order(library: Path, tmp_path: Path, operator: str) -> None:
    run_with(library, tmp_path, "-c", CALL + IN_EVERY_ORDER, operator)


TILES_OF_MANY_IMAGES = """
torch.manual_seed(0)
functions = {
    "lncc": lambda x, y: geco_fast.ops.lncc(x, y, kernel_size=3, reduction="none"),
    "pncc": lambda x, y: geco_fast.ops.pncc(x, y, patch_size=2, reduction="none"),
}
for function in functions.values():
    for count, shape in ((128, (10, 2)), (64, (18, 3)), (128, (3, 2, 3))):
        found = []
        one = torch.randn(2, 1, 1, *shape)
        for copies in (1, count):
            images = one.expand(2, copies, 1, *shape).contiguous().requires_grad_()
            scores = function(*images)
            (gradient,) = torch.autograd.grad(scores.sum(), images)
            found.append((scores.detach(), gradient.transpose(0, 1)))
        for alone, many in zip(*found):
            assert len(alone) == 1 and len(many) == count
            torch.testing.assert_close(many, alone.expand_as(many), rtol=1e-6, atol=1e-7)
"""


@pytest.mark.slow
def test_images_are_the_same_in_larger_tiles(library: Path, tmp_path: Path) -> None:
    """Where there are many images a thread has several windows; cases of few never come there."""
    run_with(library, tmp_path, "-c", CALL + "import geco_fast\n" + TILES_OF_MANY_IMAGES)


TRAFFIC = """
import json
from geco_fast.bench.gpu_kernels import main_case
from geco_fast.bench.limits import operator_work

for operator in sys.argv[1:]:
    case = main_case(operator)
    emulation.geco_emulation_reset_traffic()
    call(case)
    counts = (ctypes.c_int64 * 4)()
    emulation.geco_emulation_traffic(counts)
    loaded, stored, *sectors = counts
    least = int(operator_work(case, True).bytes)
    print(json.dumps([operator, str(case), loaded, stored, least, *sectors]))
"""
# What tiles share is read once for each of them, and a step counter once for each warp; see the
# operators' pages.
MORE_THAN_THE_LEAST = ("equilibrium_map", "geco_update", "lncc", "pncc")


def on_the_page(*row: object) -> bool:
    return f"| {' | '.join(map(str, row))} |\n" in gpu_kernels.PAGE.read_text()


@pytest.mark.slow
def test_traffic_is_the_least(library: Path, tmp_path: Path) -> None:
    """Bytes within a twentieth of the operands' own, and warps' sectors a tenth of the fewest."""
    log = run_with(library, tmp_path, "-c", CALL + TRAFFIC, *EMULATED)
    rows = [json.loads(line) for line in log.splitlines() if line.startswith('["')]
    assert [row[0] for row in rows] == EMULATED
    for operator, call, loaded, stored, least, sectors, fewest in rows:
        if operator not in MORE_THAN_THE_LEAST:
            assert least <= loaded + stored <= 1.05 * least, operator
        assert sectors <= 1.1 * fewest, operator
        row = (f"`{call}`", loaded, stored, least, sectors, fewest)
        assert on_the_page(*row), row


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_library_builds_without_spills(tmp_path: Path) -> None:
    """For one architecture, with warnings as errors; nobody's memory but registers is used."""
    target = tmp_path / "_cuda.so"
    units = [(p, f"{p.parent.name}_{p.stem}.o", []) for p in SETUP.cuda_sources()]
    strict = ["-Werror=all-warnings", "-Xptxas=--warn-on-spills"]
    flags = [*SETUP.cuda_flags(), *strict, "-gencode=arch=compute_90,code=sm_90"]
    SETUP.compile_and_link(
        *(tmp_path, target, units, [*flags, *SETUP.include_flags()]),
        *(SETUP.cuda_link_flags(), NVCC),
    )
    ((name, kernels, registers, local),) = gpu_kernels.library_resources(target)
    assert local == 0
    if SETUP.cuda_release(NVCC) == (13, 0):  # the page's
        assert on_the_page(name, kernels, registers, local)
