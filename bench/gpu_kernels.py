"""What Triton's compiler makes of the kernels, and what they move: docs/gpu-kernels.md, made anew.

`python -m geco_fast.bench.gpu_kernels` needs no GPU. Launches aren't listed by hand: operators are
called, and each launch is compiled for an architecture instead of run; then they are called in
Triton's interpreter, where the bytes that unmasked lanes load and store are counted.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from geco_fast import _backend
from geco_fast._registry import KERNELS, TRITON
from geco_fast.bench.limits import operator_work
from geco_fast.testing.calls import gradients, require_grad
from geco_fast.testing.cases import Case, cases

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu-kernels.md"
# Compute capabilities of NVIDIA, and one architecture of AMD.
TARGETS = ("80", "86", "89", "90", "100", "120", "gfx942")
SHOWN = "90"
SHARED_LIMIT = 48 * 1024
# Bytes and float32 operations per second, as the makers name them.
DEVICES = {
    "H100": (3.35e12, 67e12),
    "A100": (2.04e12, 19.5e12),
    "RTX 4090": (1.01e12, 82.6e12),
}
Row = dict[str, Any]
Call = tuple[Case, torch.dtype]


def _size(case: Case) -> int:
    return sum(map(math.prod, case.shapes.values()))


def served() -> list[str]:
    """Operators that have Triton kernels and cases."""
    return [name for name, found in KERNELS.items() if "triton" in found and cases(name)]


def main_case(operator: str) -> Case:
    """The case that stands for an operator: its smallest one of the benchmark, if it has any."""
    candidates = cases(operator, "bench") or cases(operator, "small")
    return min(candidates, key=_size)


# Cases, beside the main one, in which a kernel has other code: tiles, layouts, forms.
_ROWS = ("row-7", "row-33", "row-130", "several-blocks", "strided")
FORMS: dict[str, tuple[str, ...]] = {
    "affine_coupling": (*_ROWS, *(f"{m}-forward" for m in ("exp", "tanh", "atan", "sigmoid"))),
    "conv_lstm_step": ("hoisted", "kernel-5", "channels_last", "sliced"),
    "coupling_mlp": (*(f"{a}-65-33" for a in ("tanh", "elu", "silu")), "context", "strided"),
    "equilibrium_map": ("small", "uniform", "image", "several-threads", "strided"),
    "gaussian_latent": _ROWS,
    "geco_update": ("first-step", "one", "many", "softplus2"),
    "lncc": ("line", "deep", "nine", "strided"),
    "lstm_gates": ("vector", "tail", "channels_last", "strided"),
    "pncc": ("line", "volume", "separate-mean", "strides", "strided"),
    "squared_error": _ROWS,
}
# Shapes for which products have larger tiles.
_LARGE = {
    "conv_lstm_step": {
        **{"x": (32, 128, 16, 16), "h": (32, 128, 16, 16), "c": (32, 128, 16, 16)},
        "weight": (512, 256, 3, 3),
    },
    "coupling_mlp": {
        **{"x": (8192, 32), "weight0": (128, 32), "bias0": (128,)},
        **{"weight1": (64, 128), "bias1": (64,)},
    },
}


def calls() -> list[Call]:
    """Calls that make the page's main table: every operator's main case."""
    return [(main_case(operator), torch.float32) for operator in served()]


def configurations() -> list[Call]:
    """Calls in which kernels have code of their own; the main ones first."""
    rows = calls()
    for operator in served():
        main, by_name = main_case(operator), {case.name: case for case in cases(operator)}
        forms = [by_name[name] for name in FORMS[operator]]
        if operator in _LARGE:
            forms.append(replace(main, name="large", shapes=_LARGE[operator]))
        rows += [(main, dtype) for dtype in main.dtypes if dtype != torch.float32]
        rows += [(case, dtype) for case in forms for dtype in case.dtypes]
    return rows


def fingerprint() -> str:
    """Digest of the kernels' code, comments and docstrings left aside."""
    digest = hashlib.sha256()
    for path in sorted((PAGE.parent.parent / "kernels").glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and body:
                first = body[0]
                if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                    del body[0]
        digest.update(f"{path.name}\n{ast.unparse(tree)}\n".encode())
    return digest.hexdigest()[:16]


def call(case: Case, dtype: torch.dtype) -> None:
    """Call an operator's Triton kernels, forward and backward, on CPU tensors."""
    tensors = case.tensors(dtype)
    names = case.gradient_names()
    leaves = require_grad(names, tensors)
    results = case.call(case.arguments(leaves), "triton")
    upstream = [torch.ones(r.shape, dtype=r.dtype) for r in results]
    gradients(results, [leaves[name] for name in names], upstream)


class _NoDriver:
    """Stands for a GPU where there is none: code is made for it and never loaded."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(binary: bytes, folder: Path, reads_code: bool) -> Row:
    path = folder / "kernel.cubin"
    path.write_bytes(binary)

    def dump(option: str) -> str:
        done = subprocess.run([_tool("cuobjdump"), option, path], capture_output=True, text=True)
        return done.stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
    assert usage is not None, "cuobjdump says nothing of the kernel's registers"
    widths: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    if reads_code:
        for word, rest in re.findall(r"\b(LDG|STG|LDGSTS)\b(\.\S+)?", dump("-sass")):
            bits = re.search(r"\.(8|16|64|128)\b|\.[US](8|16)\b", rest)
            width = int(next(filter(None, bits.groups()))) // 8 if bits else 4
            widths[word[:3]][width] += 1
    return {
        "registers": int(usage[1]),
        "spilled": int(usage[2]) + int(usage[3]),
        "loads": max(widths["LDG"], default=0),
        "stores": max(widths["STG"], default=0),
    }


def _read_amd(assembly: str) -> Row:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    widths = {"": 4, "x2": 8, "x3": 12, "x4": 16}

    def widest(kind: str) -> int:
        found = re.findall(rf"\b(?:global|buffer)_{kind}_dword(x[234])?\b", assembly)
        return max((widths[width] for width in found), default=0)

    return {
        "registers": number("vgpr_count"),
        # Scalar registers spill into the lanes of a vector register, not to memory.
        "spilled": number("private_segment_fixed_size"),
        "loads": widest("load"),
        "stores": widest("store"),
    }


def compile_for(target: str, of: Sequence[Call]) -> list[Row]:
    """Compile every launch of calls; in a process of its own, without the interpreter."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    for stem in TRITON:
        importlib.import_module(f"geco_fast.kernels.{stem}")
    # Operators are to serve CPU tensors, with the kernels and options that a GPU gets.
    _backend.interprets = lambda: True
    nvidia = target.isdigit()
    made = GPUTarget("cuda", int(target), 32) if nvidia else GPUTarget("hip", target, 64)
    driver.set_active(_NoDriver(made))  # type: ignore[arg-type]
    rows: dict[str, Row] = {}
    run = JITFunction.run
    about = ""

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in rows:
            read = (
                _read_nvidia(kernel.asm["cubin"], folder, target == SHOWN)
                if nvidia
                else _read_amd(kernel.asm["amdgcn"])
            )
            name = self.fn.__name__
            rows[kernel.hash] = {
                "kernel": name,
                "call": about,
                "target": target,
                "shared": kernel.metadata.shared,
                **read,
            }
        return kernel

    JITFunction.run = record  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for case, dtype in of:
            about = f"{case} {str(dtype).removeprefix('torch.')}"
            call(case, dtype)
    return [*rows.values()]


def library_resources(library: Path) -> list[list[object]]:
    """Rows about the CUDA library: architecture, kernels, registers, kernels with local memory."""
    command = [_tool("cuobjdump"), "-res-usage", library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows: dict[str, list[tuple[int, ...]]] = {}
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part)
        rows.setdefault(part.split()[0], []).extend(tuple(map(int, row)) for row in usage)
    return [
        [name, len(of), max(row[0] for row in of), sum(row[1] + row[2] > 0 for row in of)]
        for name, of in rows.items()
        if of
    ]


def count_bytes(of: Sequence[Call]) -> list[Row]:
    """Bytes that unmasked lanes load and store in calls; in a process with the interpreter."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    moved = 0

    def counting(name: str, mask_at: int) -> None:
        function = getattr(builder, name)

        def counted(pointers: Any, *rest: Any, **more: Any) -> Any:
            nonlocal moved
            lanes = int(rest[mask_at].data.sum())
            moved += lanes * pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
            return function(pointers, *rest, **more)

        setattr(builder, name, counted)

    counting("create_masked_load", 0)
    counting("create_masked_store", 1)
    rows = []
    for case, dtype in of:
        moved = 0
        call(case, dtype)
        least = operator_work(case, True)
        rows.append({"call": str(case), "moved": moved, "least": least and least.bytes})
    return rows


def _worker(*kind: str) -> list[Row]:
    """Rows from a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if kind == ("bytes",):
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "geco_fast.bench.gpu_kernels", *kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(kind)}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compiled(targets: Sequence[str], which: str = "main") -> list[Row]:
    """What the compiler makes of calls, the "main" or "all" of them, on some targets."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda target: _worker(target, which), targets)
        return [row for rows in found for row in rows]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def resource_line(row: Row) -> list[object]:
    """A kernel's row in the first table."""
    names = ("kernel", "call", "registers", "spilled", "shared", "loads", "stores")
    return [row[name] for name in names]


def _bounds() -> str:
    rows: list[list[object]] = []
    for operator in served():
        for case in [*cases(operator, "bench-gpu"), *cases(operator, "bench")][:2]:
            work = operator_work(case, True)
            if work is None or not work.bytes:
                continue
            times = [
                f"{1e6 * max(work.bytes / copied, work.operations / peak):.3g}"
                for copied, peak in DEVICES.values()
            ]
            intensity = f"{work.operations / work.bytes:.2g}"
            rows.append([f"`{case}`", f"{work.bytes / 1e6:.3g}", intensity, *times])
    return _table(["call", "least MB", "operations a byte", *DEVICES], rows)


CUDA = "\n## CUDA C++\n"
HEAD = """\
# GPU kernels

Made by `python -m geco_fast.bench.gpu_kernels`, without a GPU: what Triton {triton} makes of the
kernels, and what they move. Times that were measured are on the operators' pages; those here are
bounds. The kernels' code is the one whose digest is `{fingerprint}`.

## Resources

Forward and backward of every operator's smallest case of the benchmark, compiled for sm_{shown}:
registers of a thread, bytes of local memory, to which registers spill, and of shared memory, and
the widest access to global memory in bytes.

"""


def page(rows: Sequence[Row], bytes_moved: Sequence[Row], triton: str) -> str:
    """The whole page."""
    mains = {f"{case} float32" for case, _ in calls()}
    shown = [r for r in rows if r["target"] == SHOWN and r["call"] in mains]
    header = ["kernel", "call", "registers", "spilled", "shared", "loads", "stores"]
    text = HEAD.format(triton=triton, shown=SHOWN, fingerprint=fingerprint()) + _table(
        header, [*map(resource_line, shown)]
    )
    summary = []
    for target in TARGETS:
        of = [row for row in rows if row["target"] == target]
        name = f"sm_{target}" if target.isdigit() else target
        most = [max(row[what] for row in of) for what in ("registers", "shared")]
        summary.append([name, len(of), *most, sum(row["spilled"] > 0 for row in of)])
    header = ["target", "kernels", "registers", "shared memory", "kernels that spill"]
    text += f"""
## All architectures

Every operator's main case and its other tiles, layouts and forms, in all dtypes. Of registers and
of shared memory, which is to be at most {SHARED_LIMIT} bytes, the most that a kernel has. AMD's
compiler spills scalar registers into lanes of vector registers, which is not counted: no memory is
touched.

{_table(header, summary)}"""
    spilling = [row for row in rows if row["spilled"]]
    if spilling:
        header = ["target", "kernel", "call", "registers", "spilled"]
        text += f"""
Those that spill:

{_table(header, [[row[name] for name in header] for row in spilling])}"""
    text += """
## Bytes moved

What unmasked lanes load and store in one call, forward and backward, counted in the interpreter,
over the least: each operand read and each result written once. What comes again from the cache
counts again.

"""
    lines = [
        [f"`{r['call']}`", r["moved"], int(r["least"]), f"{r['moved'] / r['least']:.2f}"]
        for r in bytes_moved
        if r["least"]
    ]
    text += _table(["call", "moved", "least", "ratio"], lines)
    named = ", ".join(
        f"{name} {copied / 1e12:.3g} TB/s and {peak / 1e12:.3g} TFLOP/s"
        for name, (copied, peak) in DEVICES.items()
    )
    text += f"""
## Bounds

Microseconds that forward and backward in float32 would take at best, where the least bytes move at
the bandwidth that the maker names and the operations run at its peak outside of tensor cores
({named}).
These are bounds, not measurements.

"""
    # What follows is the CUDA library's, which tests/test_emulation.py holds to its code.
    kept = PAGE.read_text()
    return text + _bounds() + kept[kept.index(CUDA) :]


def main(arguments: Sequence[str]) -> None:
    """Write the page; with arguments, print one worker's rows."""
    from importlib.metadata import version

    if arguments:
        target, *which = arguments
        if target == "bytes":
            # The interpreter would take half an hour for coupling_mlp's products.
            rows = count_bytes([of for of in calls() if of[0].operator != "coupling_mlp"])
        else:
            rows = compile_for(target, configurations() if which == ["all"] else calls())
        print(json.dumps(rows))
        return
    rows = compiled(TARGETS, "all")
    PAGE.write_text(page(rows, _worker("bytes"), version("triton")))


if __name__ == "__main__":
    main(sys.argv[1:])
