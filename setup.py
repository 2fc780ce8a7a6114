"""Build of the C++ library; everything else about the package stands in pyproject.toml.

Neither torch nor a GPU is touched here: only torch's headers are read, and only its stable ABI is
compiled against. Without a C++ compiler the package installs as pure Python.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "2.10"
MAJOR, MINOR = map(int, TORCH_TARGET.split("."))
TORCH_TARGET_VERSION = f"0x{MAJOR:02x}{MINOR:02x}{0:012x}"

X86 = platform.machine().lower() in ("x86_64", "amd64")
# Kernels are long chains of dependent arithmetic. Scheduled before registers are assigned they
# interleave, worth a tenth with AVX-512 and a fifth with SSE2; AVX2's registers are too few for it.
SCHEDULE = ["-fschedule-insns", "-fsched-pressure"]
LEVEL_FLAGS = {
    "baseline": SCHEDULE,
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [*SCHEDULE, *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")), "-mfma", "-mf16c"],
}
FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-g0"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-missing-field-initializers"),
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    f'-DGECO_TORCH_TARGET=\\"{TORCH_TARGET}\\"',
]
# A build with sanitizers, say, needs no change here.
MORE_FLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
MORE_LINK_FLAGS = shlex.split(os.environ.get("LDFLAGS", ""))


def sources() -> list[str]:
    """Every C++ file, less the instruction sets of other processors."""
    found = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
    return [path for path in found if X86 or level_of(path) in (None, "baseline")]


def level_of(source: str) -> str | None:
    """Name of the instruction-set level a file is compiled for, if it is one's table."""
    stem = Path(source).stem
    return stem.removeprefix("level_") if stem.startswith("level_") else None


def level_flags(source: str) -> list[str]:
    """Flags of a file's instruction-set level."""
    return LEVEL_FLAGS.get(level_of(source) or "", [])


def package_dir(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the build needs the package {name}: pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def jobs() -> int:
    """Compiler processes: as many as cores, or one for every 2 GiB of memory if that is fewer."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**31
    return max(1, min(os.cpu_count() or 1, memory))


def find_compiler() -> str | None:
    """A C++ compiler that takes C++20, or None after saying what that means."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is not None:
        probe = [*compiler.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        try:
            subprocess.run(probe, input=b"#include <version>\n", check=True, capture_output=True)
            return compiler
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
            print(f"geco-fast: {compiler} is not usable: {detail}", file=sys.stderr)
    print(
        "geco-fast: no usable C++20 compiler; installing pure Python. Every operator then runs as "
        "plain PyTorch; for the fast kernels install a compiler and reinstall.",
        file=sys.stderr,
    )
    return None


COMPILER = find_compiler()


def compile_and_link(
    folder: Path,
    target: Path,
    units: Sequence[tuple[Path, str, Sequence[str]]],
    flags: Sequence[str],
    link_flags: Sequence[str],
) -> None:
    """Bring a library or program up to date with ninja.

    `units` are source, name of the object file in `folder`, and flags of its own.
    """
    from ninja import BIN_DIR
    from ninja.ninja_syntax import Writer

    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.ninja", "w") as file:
        ninja = Writer(file)
        ninja.variable("cxx", COMPILER)
        ninja.variable("flags", [*flags, f"-I{ROOT / 'csrc'}"])
        ninja.rule("compile", "$cxx -MMD -MF $out.d $flags $own -c $in -o $out", depfile="$out.d")
        ninja.rule("link", "$cxx $in -o $out $flags")
        objects = [str(folder / name) for _, name, _ in units]
        for (source, _, own), output in zip(units, objects, strict=True):
            ninja.build(output, "compile", str(source), variables={"own": [*own, *MORE_FLAGS]})
        ninja.build(str(target), "link", objects, variables={"flags": [*link_flags]})
    subprocess.run(
        [Path(BIN_DIR) / "ninja", f"-j{jobs()}", "-f", "build.ninja"], cwd=folder, check=True
    )


class NinjaBuild(build_ext):
    """Compiles each source with its level's flags, in parallel, and links one library."""

    def build_extensions(self) -> None:
        """Build the one extension."""
        (extension,) = self.extensions
        torch = package_dir("torch")
        # torch's include folder has a pybind11 of its own, which up to 2.11 refuses the stable ABI.
        includes = [
            package_dir("pybind11") / "include",
            torch / "include",
            torch / "include" / "torch" / "csrc" / "api" / "include",
            sysconfig.get_path("include"),
        ]
        compile_and_link(
            Path(self.build_temp).resolve(),
            Path(self.get_ext_fullpath(extension.name)).resolve(),
            [
                (ROOT / source, str(Path(source).with_suffix(".o")), level_flags(source))
                for source in extension.sources
            ],
            [*FLAGS, *(f"-isystem{path}" for path in includes)],
            ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu", *MORE_LINK_FLAGS],
        )


# The C++ tests take the compiler and its flags from here.
if __name__ == "__main__":
    setup(
        ext_modules=[Extension("geco_fast._C", sources())] if COMPILER else [],
        cmdclass={"build_ext": NinjaBuild},
    )
