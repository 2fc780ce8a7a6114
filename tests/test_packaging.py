"""The package builds, installs and imports where users need it to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from cpp_build import SETUP
from marks import needs_library

import geco_fast
from geco_fast._backend import LIBRARY

ROOT = Path(__file__).resolve().parent.parent
OTHER_TORCH = "2.14.1"
DEFAULTS = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "GECO_FAST_CUDA": "0"}
# Where it matters only that the build comes to its end.
QUICKLY = {"CXXFLAGS": "-O0"}


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **DEFAULTS, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source without anything built."""
    copy = tmp_path_factory.mktemp("source") / "geco_fast"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def make_wheel(source: Path, out: Path, *options: str, **environment: str) -> tuple[Path, str]:
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", out, *options, ".")
    log = run(*pip, cwd=source, **environment)
    (wheel,) = out.glob("geco_fast-*.whl")
    return wheel, log


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(source, tmp_path_factory.mktemp("wheel"), "--no-build-isolation")[0]


def make_environment(folder: Path, *requirements: str) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *requirements, cwd=folder)
    return python


def test_import_is_light() -> None:
    code = (
        "import sys, time, torch; start = time.process_time(); import geco_fast; "
        "print(time.process_time() - start, 'triton' in sys.modules, 'matplotlib' in sys.modules)"
    )
    lines = [run(sys.executable, "-c", code, cwd=ROOT).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in lines) < 0.3
    assert all(modules == ["False", "False"] for _, *modules in lines)


def test_info_names_every_backend() -> None:
    text = geco_fast.info()
    for backend in ("reference", "cpu", "cuda", "triton"):
        (line,) = re.findall(rf"^backend {backend}: (.*)$", text, re.MULTILINE)
        assert line == "active" or re.match(r"not active: .+; (use|install|reinstall)", line)


@needs_library
def test_only_stable_symbols() -> None:
    symbols = run("nm", "-D", "--undefined-only", LIBRARY.__file__, cwd=ROOT)
    names = {line.split()[-1].partition("@")[0] for line in symbols.splitlines()}
    from_torch = {n for n in names if "torch" in n.lower() or re.search(r"_ZNK?\d*(2at|3c10)", n)}
    unstable = {n for n in from_torch if not re.match(r"(aoti_torch_|torch_)[A-Za-z0-9_]+$", n)}
    assert from_torch, "nm shows nothing of torch"
    assert not unstable
    assert not {n for n in names if re.match(r"_ZNK?(2at|3c10)", n)}


@needs_library
@pytest.mark.slow
def test_levels_share_no_code(tmp_path: Path) -> None:
    """A weak symbol could be served from another level's file, with instructions the CPU lacks."""
    flags = ["-std=c++20", "-O0", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    levels = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
    levels["avx512"] = [*levels["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl"))]
    for name, level in levels.items():
        made = tmp_path / f"{name}.o"
        cpp = ROOT / "csrc" / "cpu" / f"level_{name}.cpp"
        run("c++", *flags, *level, "-c", cpp, "-o", made, cwd=tmp_path)
        defined = run("nm", "--defined-only", made, cwd=tmp_path).splitlines()
        weak = [line for line in defined if line.split()[-2] in "WVu"]
        assert not weak, name


def test_pure_python_without_a_compiler(source: Path, tmp_path: Path) -> None:
    wheel, log = make_wheel(source, tmp_path, "--no-build-isolation", CXX="/nowhere/c++")
    assert "installing pure Python" in log
    assert wheel.name.endswith("-py3-none-any.whl")
    run(sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "site", cwd=tmp_path)
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]; "
        "import geco_fast as gf; print(gf.__file__); print(gf.info())"
    )
    text = run(sys.executable, "-c", code, cwd=tmp_path / "site")
    assert str(tmp_path) in text
    assert re.search(r"backend cpu: not active: .*compiler", text)


def test_cuda_is_built_as_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(SETUP, "COMPILER", "c++")
    monkeypatch.setenv("GECO_FAST_CUDA", "auto")
    assert SETUP.find_nvcc() is None
    monkeypatch.setenv("GECO_FAST_CUDA", "1")
    with pytest.raises(FileNotFoundError, match="there is no nvcc: install"):
        SETUP.find_nvcc()
    monkeypatch.setenv("GECO_FAST_CUDA", "yes")
    with pytest.raises(ValueError, match="must be auto, 0 or 1, got 'yes'"):
        SETUP.find_nvcc()
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("GECO_FAST_CUDA", "auto")
    assert SETUP.find_nvcc() == str(nvcc)


def test_architectures_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def flags(wanted: str, release: tuple[int, int] = (13, 0)) -> list[str]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        monkeypatch.setattr(SETUP, "cuda_release", lambda _: release)
        return [flag.partition(",")[2] for flag in SETUP.cuda_architecture_flags("nvcc")]

    assert flags("8.0;9.0a+PTX") == ["code=sm_80", "code=sm_90a", "code=compute_90a"]
    assert flags("")[-2:] == ["code=sm_120", "code=compute_120"]
    assert len(flags("")) == 7
    # An older nvcc doesn't know the newest.
    assert flags("", (12, 4))[-2:] == ["code=sm_90", "code=compute_90"]
    with pytest.raises(ValueError, match="got 'Hopper'"):
        flags("8.0;Hopper")


@pytest.mark.slow
def test_broken_source_fails_the_build(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    with open(broken / "csrc" / "module.cpp", "a") as file:
        file.write("this is not C++\n")
    with pytest.raises(AssertionError, match="error"):
        make_wheel(broken, tmp_path, "--no-build-isolation")


@needs_library
@pytest.mark.slow
def test_wheel_holds_everything(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "py.typed",
        "_C.pyi",
        "kernels/__init__.py",
        "bench/paired.py",
        "nn/__init__.py",
    ):
        assert f"geco_fast/{wanted}" in names
    assert any(name.startswith("geco_fast/_C.") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "bench/"))]


@needs_library
@pytest.mark.slow
def test_source_distribution_builds(source: Path, tmp_path: Path) -> None:
    sdist = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path / "sdist")
    run(*sdist, cwd=source)
    (archive,) = (tmp_path / "sdist").glob("geco_fast-*.tar.gz")
    run("tar", "xf", archive, cwd=tmp_path)
    (unpacked,) = (path for path in tmp_path.glob("geco_fast-*") if path.is_dir())
    wheel, _ = make_wheel(unpacked, tmp_path / "out", "--no-build-isolation", **QUICKLY)
    assert "none-any" not in wheel.name
    for wanted in ("Makefile", "constraints.txt", "docs/architecture.md", "tests/conftest.py"):
        assert (unpacked / wanted).exists()


@needs_library
@pytest.mark.slow
def test_isolated_build(source: Path, tmp_path: Path) -> None:
    constraint = f"torch=={torch.__version__.partition('+')[0]}\n"
    (tmp_path / "constraints.txt").write_text(constraint)
    environment = {"PIP_CONSTRAINT": str(tmp_path / "constraints.txt"), **QUICKLY}
    wheel, _ = make_wheel(source, tmp_path / "out", **environment)
    assert "none-any" not in wheel.name


@needs_library
@pytest.mark.slow
def test_runs_on_another_torch(wheel: Path, tmp_path: Path) -> None:
    """Built here, run there: no rebuilding when torch is upgraded."""
    python = make_environment(tmp_path / "env", f"torch=={OTHER_TORCH}", "numpy", "pytest")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    run("cp", "-r", ROOT / "tests", ROOT / "pyproject.toml", tmp_path, cwd=tmp_path)
    options = ("--override-ini", "addopts=", "-k", "lstm_gates and not compiles")
    log = run(python, "-m", "pytest", "-q", *options, "tests/test_operators.py", cwd=tmp_path)
    assert re.search(r"\d+ passed", log)
    version = run(python, "-c", "import torch; print(torch.__version__)", cwd=tmp_path)
    assert version.startswith(OTHER_TORCH)
