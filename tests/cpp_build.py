"""Build of the C++ tests, with the compiler and the flags of setup.py."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
# Tests of what every level has a copy of.
OF_EACH_LEVEL = ("gemm", "simd")
SANITIZE = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "-g1",
]


def load_setup() -> ModuleType:
    """setup.py as a module; it builds nothing by being imported."""
    spec = importlib.util.spec_from_file_location("geco_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()


def build_tests(folder: Path, flags: Sequence[str] = (), kernels: Path | None = None) -> Path:
    """Compile tests/cpp with the torch-free kernels, or with their objects in a folder.

    Returns the program.
    """
    levels = [name for name in SETUP.LEVEL_FLAGS if SETUP.X86 or name == "baseline"]
    sources = [source for source in SETUP.sources() if source.startswith("csrc/cpu/")]
    units, objects = [], []
    for source in sources:
        name = str(Path(source).with_suffix(".o"))
        if kernels is None:
            units.append((ROOT / source, name, SETUP.level_flags(source)))
        else:
            objects.append(str(kernels / Path(name).name))
    for path in sorted((ROOT / "tests" / "cpp").glob("*.cpp")):
        if path.stem not in OF_EACH_LEVEL:
            units.append((path, f"{path.stem}.o", []))
            continue
        for level in levels:
            own = [*SETUP.LEVEL_FLAGS[level], f"-DGECO_LEVEL={level}"]
            units.append((path, f"{path.stem}_{level}.o", own))
    program = folder / "kernel_tests"
    # Accuracy rests on fused multiplications, which -O1 alone leaves out; more takes too long.
    optimise = ["-O1", "-fexpensive-optimizations"]
    link_flags = [*objects, *flags, *SETUP.MORE_LINK_FLAGS]
    SETUP.compile_and_link(folder, program, units, [*SETUP.FLAGS, *optimise, *flags], link_flags)
    return program


def run_program(program: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a program and keep what it says."""
    return subprocess.run([program], capture_output=True, text=True, env=environment or None)


def _emulated(sources: Sequence[Path]) -> tuple[list, list[str]]:
    """Units and flags of CUDA sources that are compiled for the CPU, in the emulation."""
    emulation = ROOT / "tests" / "emulation"
    flags = [*SETUP.FLAGS, "-O1", "-Wno-unknown-pragmas", "-DGECO_EMULATION", f"-I{emulation}"]
    units = []
    for path in (emulation / "emulation.cpp", *sources):
        # The compiler doesn't know CUDA's files by their names.
        units.append((path, f"{path.parent.name}_{path.stem}.o", ["-x", "c++"]))
    return units, [*flags, *SANITIZE]


def build_emulated_program(folder: Path, source: Path) -> Path:
    """Compile a program with kernels in it; returns the program."""
    units, flags = _emulated([source])
    SETUP.compile_and_link(folder, folder / source.stem, units, flags, SANITIZE)
    return folder / source.stem


def build_emulated_library(folder: Path) -> Path:
    """Compile the CUDA operators into a library that serves tensors on the CPU."""
    units, flags = _emulated(SETUP.cuda_sources())
    flags = [*flags, "-DGECO_CUDA", *SETUP.include_flags()]
    library = folder / "emulated.so"
    SETUP.compile_and_link(folder, library, units, flags, [*SETUP.torch_link_flags(), *SANITIZE])
    return library
