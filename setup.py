"""Build of the C++ libraries; everything else about the package stands in pyproject.toml.

Neither torch nor a GPU is touched here: only torch's headers are read, and only its stable ABI is
compiled against, so that a PyTorch for CPUs will do for CUDA's library, too. Without a C++ compiler
the package installs as pure Python, and without nvcc with no CUDA kernels but Triton's.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
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


def find_nvcc() -> str | None:
    """nvcc, as GECO_FAST_CUDA wants it: "auto" where there is one, "1" for certain, "0" never."""
    wanted = os.environ.get("GECO_FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"GECO_FAST_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0" or COMPILER is None:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if nvcc is None and wanted == "1":
        raise FileNotFoundError(
            "GECO_FAST_CUDA=1 wants CUDA kernels and there is no nvcc: install the CUDA toolkit, "
            "12.4 or newer, and put nvcc on the PATH or its folder into CUDA_HOME"
        )
    return nvcc


NVCC = find_nvcc()
CUDA_LIBRARY = "geco_fast._cuda"
# Architectures that PyTorch's own builds serve, and the CUDA release whose nvcc knows them.
CUDA_ARCHITECTURES = {
    **{"8.0": (11, 0), "8.6": (11, 1), "8.9": (11, 8), "9.0": (11, 8)},
    **{"10.0": (12, 8), "12.0": (12, 8)},
}


def cuda_release(nvcc: str) -> tuple[int, int]:
    """Version of nvcc."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise RuntimeError(f"{nvcc} --version names no release: {text.strip()!r}")
    return int(found[1]), int(found[2])


def cuda_flags() -> list[str]:
    """Flags of CUDA's library, for nvcc and for the compiler behind it."""
    host = [flag for flag in FLAGS if flag.startswith(("-f", "-W"))]
    return [
        *(flag for flag in FLAGS if flag not in host and flag != "-g0"),
        *("-DGECO_CUDA", f"-ccbin={COMPILER}"),
        # What nvcc itself writes into the host's code would be warned of.
        *(f"-Xcompiler={flag}" for flag in host if flag not in ("-Wall", "-Wextra")),
    ]


def cuda_architecture_flags(nvcc: str) -> list[str]:
    """What nvcc makes code for: TORCH_CUDA_ARCH_LIST, as PyTorch reads it, or all it can."""
    release = cuda_release(nvcc)
    known = [name for name, since in CUDA_ARCHITECTURES.items() if release >= since]
    default = ";".join([*known[:-1], f"{known[-1]}+PTX"])
    flags = []
    for entry in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or default):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST must be capabilities such as '8.0;9.0+PTX', got {entry!r}"
            )
        number = found[1] + found[2] + found[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_sources() -> list[Path]:
    """Sources of CUDA's library: its kernels, and the operators that have any, compiled for it."""
    # The largest first, or one of those that take minutes would end alone.
    found = (ROOT / "csrc" / "cuda").glob("*.cu")
    kernels = sorted(found, key=lambda path: (-path.stat().st_size, path.name))
    stems = {"torch_compat", *(path.stem for path in kernels)}
    operators = [p for p in sorted((ROOT / "csrc" / "ops").glob("*.cpp")) if p.stem in stems]
    return [*kernels, *operators, ROOT / "csrc" / "register.cpp"]


def compile_and_link(
    folder: Path,
    target: Path,
    units: Sequence[tuple[Path, str, Sequence[str]]],
    flags: Sequence[str],
    link_flags: Sequence[str],
    compiler: str | None = COMPILER,
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
        through = "" if compiler == COMPILER else "-Xcompiler="
        ninja.variable("cxx", compiler)
        ninja.variable("flags", [*flags, f"-I{ROOT / 'csrc'}"])
        ninja.rule("compile", "$cxx -MMD -MF $out.d $flags $own -c $in -o $out", depfile="$out.d")
        ninja.rule("link", "$cxx $in -o $out $flags")
        objects = [str(folder / name) for _, name, _ in units]
        more = [through + flag for flag in MORE_FLAGS]
        for (source, _, own), output in zip(units, objects, strict=True):
            ninja.build(output, "compile", str(source), variables={"own": [*own, *more]})
        ninja.build(str(target), "link", objects, variables={"flags": [*link_flags]})
    subprocess.run(
        [Path(BIN_DIR) / "ninja", f"-j{jobs()}", "-f", "build.ninja"], cwd=folder, check=True
    )


def include_flags() -> list[str]:
    """Where the headers of torch, pybind11 and Python are."""
    torch = package_dir("torch")
    # torch's include folder has a pybind11 of its own, which up to 2.11 refuses the stable ABI.
    folders = [
        package_dir("pybind11") / "include",
        torch / "include",
        torch / "include" / "torch" / "csrc" / "api" / "include",
        sysconfig.get_path("include"),
    ]
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


def torch_link_flags() -> list[str]:
    """What links a library to torch's own."""
    return ["-shared", f"-L{package_dir('torch') / 'lib'}", "-ltorch_cpu"]


def cuda_link_flags() -> list[str]:
    """What links CUDA's library; nvcc adds CUDA's runtime, the static one."""
    # A PyTorch for CPUs has no libtorch_cuda to link with; where there is one libtorch brings it.
    return [*torch_link_flags(), "-Xlinker=--no-as-needed", "-ltorch"]


class NinjaBuild(build_ext):
    """Compiles sources in parallel and links each library, the CPU's and CUDA's."""

    def build_extensions(self) -> None:
        """Build the extensions."""
        for extension in self.extensions:
            build = self._build_cuda if extension.name == CUDA_LIBRARY else self._build_cpu
            build(Path(self.get_ext_fullpath(extension.name)).resolve(), extension.sources)

    def _build_cpu(self, target: Path, sources: Sequence[str]) -> None:
        folder = Path(self.build_temp).resolve()
        units = [
            (ROOT / source, str(Path(source).with_suffix(".o")), level_flags(source))
            for source in sources
        ]
        flags = [*FLAGS, *include_flags()]
        compile_and_link(folder, target, units, flags, [*torch_link_flags(), *MORE_LINK_FLAGS])

    def _build_cuda(self, target: Path, sources: Sequence[str]) -> None:
        folder = Path(self.build_temp).resolve() / "cuda"
        units = [
            (ROOT / source, f"{Path(source).parent.name}_{Path(source).stem}.o", [])
            for source in sources
        ]
        flags = [*cuda_flags(), *cuda_architecture_flags(NVCC), *include_flags()]
        compile_and_link(folder, target, units, flags, cuda_link_flags(), NVCC)


def extensions() -> list[Extension]:
    """Return the libraries that can be built here."""
    if not COMPILER:
        return []
    found = [Extension("geco_fast._C", sources())]
    if NVCC:
        found.append(Extension(CUDA_LIBRARY, [str(p.relative_to(ROOT)) for p in cuda_sources()]))
    return found


# The C++ tests take the compiler and its flags from here.
if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": NinjaBuild},
    )
